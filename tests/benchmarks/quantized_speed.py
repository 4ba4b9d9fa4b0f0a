"""Speed of int8 artifacts over float32 ones of the same network, beside NNCF's own.

    python tests/benchmarks/quantized_speed.py                       # four networks, one core
    python tests/benchmarks/quantized_speed.py --models gpt2 --targets onnx --rounds 60

Networks: resnet18 and mobilenet_v2 (torchvision), vit_tiny (timm), gpt2 (transformers, 12 layers,
64 tokens), random weights, biases and scales of norms, batch 1, which is fixed: runtimes do more
where all sizes are known. For OpenVINO: our float32 and our int8 artifact, and NNCF's int8 model
from the same module and calibration data (its defaults; model type transformer where the network
is one); for ONNX Runtime: our float32 and int8 artifacts, and NNCF's from our ONNX model. All run
in turns in one process, each twice untimed before it is timed, since the others have driven its
weights from the caches; a ratio is the median over rounds. Exits 1 where ours is below NNCF's own
ratio on OpenVINO, or below ``FLOORS`` on ONNX Runtime.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pruna_ir.backends.to_openvino import OpenvinoRunner
from pruna_ir.build import Artifact, build
from pruna_ir.capture import capture
from pruna_ir.data import TensorData
from pruna_ir.latency import measure
from pruna_ir.lowering import LoadOptions
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.transform import Context

TARGETS = ("openvino", "onnx")
MODELS = ("resnet18", "mobilenet_v2", "vit_tiny", "gpt2")
FLOORS = {"resnet18": 3.4, "mobilenet_v2": 1.9, "vit_tiny": 2.1, "gpt2": 3.0}
"""The least ratios of int8 to float32 on ONNX Runtime."""
FLOAT = "canonicalize,fold-constants,fold-batch-norm,fuse-conv-bn-relu"
INT8 = "insert-fake-quant,eliminate-dead-code"
TOKENS, VOCABULARY = 64, 50257


@dataclass(frozen=True)
class Network:
    """A network, captured, with inputs for timing and data to calibrate on."""

    module: torch.nn.Module
    program: Program
    inputs: list[np.ndarray[Any, Any]]
    data: TensorData
    transformer: bool
    text: bool


def network(name: str, samples: int) -> Network:
    """One of `MODELS`, seeded."""
    torch.manual_seed(0)
    if name == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        module = GPT2LMHeadModel(GPT2Config(use_cache=False)).eval()
        data = torch.randint(0, VOCABULARY, (samples, TOKENS))
        return _captured(module, "input_ids", data, transformer=True)
    if name == "vit_tiny":
        import timm

        module = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    else:
        import torchvision

        module = torchvision.models.get_model(name, weights=None).eval()
    data = torch.randn(samples, 3, 224, 224)
    _warm_norms(module, data)
    return _captured(module, "", data, transformer=name.startswith("vit"))


def _warm_norms(module: torch.nn.Module, data: torch.Tensor) -> None:
    """Batch norms with the statistics of the data: untrained ones let the signal fade."""
    norms = [m for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    if norms:
        with torch.no_grad():
            module(data[:8])
    module.eval()


def _untrivial(module: torch.nn.Module) -> None:
    """Give biases and the scales of norms values: compilers drop the zeros and ones of untrained
    networks, and with them operators that every trained one has."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            start = 1.0 if name.endswith("weight") else 0.0
            parameter.data = start + 0.1 * torch.randn_like(parameter)


def _captured(
    module: torch.nn.Module, name: str, data: torch.Tensor, *, transformer: bool
) -> Network:
    args, kwargs = ((), {name: data[:1]}) if name else ((data[:1],), {})
    _untrivial(module)
    program = capture(module, args, kwargs, dynamic_batch=False)
    program = Pipeline.parse(FLOAT).run(program, check_each=False).program
    return Network(
        module, program, [data[:1].numpy()], TensorData((data,), batch_size=4), transformer,
        bool(name),
    )  # fmt: skip


def quantised(net: Network, target: str, options: str) -> Program:
    """Our int8 program."""
    context = Context(data=net.data, target=target)
    text = INT8.replace("insert-fake-quant", f"insert-fake-quant{options}")
    return Pipeline.parse(text).run(net.program, context, check_each=False).program


# -- NNCF -----------------------------------------------------------------------------------------


def nncf_openvino(_: Artifact, net: Network, threads: int) -> Callable[[], object]:
    """NNCF's int8 model from what OpenVINO makes of the module (ours has ports NNCF refuses)."""
    import nncf
    import openvino as ov

    core = ov.Core()
    name = net.program.inputs[0].name
    example = net.data.inputs[0][:1]
    args, kwargs = ((), {name: example}) if net.text else ((example,), {})
    model = ov.convert_model(torch.export.export(net.module, args, kwargs))
    calibration = nncf.Dataset([batch.inputs[0][:1].numpy() for batch in net.data])
    kind = nncf.ModelType.TRANSFORMER if net.transformer else None
    model = nncf.quantize(model, calibration, model_type=kind)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    runner = OpenvinoRunner(core.compile_model(model, "CPU", settings))
    return lambda: runner.run(net.inputs)


def nncf_onnx(artifact: Artifact, net: Network, threads: int) -> Callable[[], object]:
    """NNCF's int8 model from our float32 ONNX model."""
    import nncf
    import onnx
    import onnxruntime as ort

    model = onnx.load(artifact.folder / artifact.manifest.main)
    name = model.graph.input[0].name
    calibration = nncf.Dataset([{name: batch.inputs[0][:1].numpy()} for batch in net.data])
    kind = nncf.ModelType.TRANSFORMER if net.transformer else None
    model = nncf.quantize(model, calibration, model_type=kind)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {name: net.inputs[0]})


# -- measuring ------------------------------------------------------------------------------------


def compare(name: str, net: Network, target: str, arguments: argparse.Namespace) -> bool:
    """Print one network on one runtime; whether it is as fast as it must be."""
    with tempfile.TemporaryDirectory() as folder:
        plain = build(net.program, target, Path(folder) / "float", verify=False)
        small = build(
            quantised(net, target, arguments.options), target, Path(folder) / "int8", verify=False
        )
        calls = {"float32": _call(plain, net, arguments.threads),
                 "ours": _call(small, net, arguments.threads)}  # fmt: skip
        peer_fact = "not run"
        if not arguments.alone:
            theirs = nncf_openvino if target == "openvino" else nncf_onnx
            peer_fact = _added(calls, lambda: theirs(plain, net, arguments.threads))
        found = measure(calls, repeats=arguments.rounds, budget_s=arguments.budget, warmup=5,
                        settle=2)  # fmt: skip
    own = found["ours"].speedup
    peer = found["nncf"].speedup if "nncf" in found else 0.0
    if "nncf" in found:
        peer_fact = f"{peer:.2f}x"
    least = peer if target == "openvino" else FLOORS[name]
    fine = own >= least
    print(
        f"{name:<14} {target:<9} float32 {found['float32'].p50:7.2f} ms  "
        f"int8 {found['ours'].p50:7.2f} ms  ours {own:.2f}x  NNCF {peer_fact}"
        f"{'' if fine else f'  below {least:.2f}x'}",
        flush=True,
    )
    return fine


def _added(
    calls: dict[str, Callable[[], object]], make: Callable[[], Callable[[], object]]
) -> str:
    """Add the peer's model to what is timed; where it has none, the reason."""
    try:
        calls["nncf"] = make()
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0][:60]}"
    return ""


def _call(artifact: Artifact, net: Network, threads: int) -> Callable[[], object]:
    runner = artifact.load(LoadOptions(threads=threads))
    return lambda: runner.run(net.inputs)


def main() -> None:
    """Print a line a network and runtime."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds a comparison")
    parser.add_argument("--threads", type=int, default=1, help="0 leaves it to the runtimes")
    parser.add_argument("--samples", type=int, default=16, help="to calibrate on")
    parser.add_argument("--options", default="", help="of insert-fake-quant, such as {ranges=kl}")
    parser.add_argument("--alone", action="store_true", help="without NNCF")
    arguments = parser.parse_args()
    fine = True
    for name in arguments.models:
        net = network(name, arguments.samples)
        for target in arguments.targets:
            fine &= compare(name, net, target, arguments)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
