"""Pruning of real architectures: oracle error, what shrinks, and every backend on the result.

    python tests/benchmarks/prune_and_export.py                          # all models, all backends
    python tests/benchmarks/prune_and_export.py --models vgg16_bn gpt2 --targets onnx eager
    python tests/benchmarks/prune_and_export.py --int8 --targets onnx openvino --size 128

Each model (random weights, seeded) is captured, canonicalised, pruned by ``--ratio`` of the
channels of every coupled group and checked against the masked oracle in float64; the result is
lowered to every target, and each artifact is compared with it. With ``--int8`` the pruned program
is quantised for each target (on random inputs) before it is lowered: the line tells how many of
its layers truly run on integers, the size of the artifact and its signal-to-noise ratio. Exits 1
if anything failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pruna_ir.build import build
from pruna_ir.capture import capture
from pruna_ir.cost import cost
from pruna_ir.data import TensorData
from pruna_ir.errors import PrunaError
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.report import integers, quantity
from pruna_ir.stimuli import random_inputs
from pruna_ir.transform import Context

TARGETS = ("eager", "onnx", "openvino", "tvm", "tensorrt")


def vision(name: str, size: int) -> Program:
    """A torchvision classifier of images of this size; ViT takes 224 only."""
    import torchvision

    torch.manual_seed(0)
    module = torchvision.models.get_model(name, weights=None)
    if name.startswith("vit"):
        # It is initialised with zeros: no output would depend on anything.
        nn.init.normal_(module.heads.head.weight, std=0.02)
        size = 224
    return capture(with_statistics(module, size), (torch.randn(2, 3, size, size),))


def with_statistics(module: nn.Module, size: int) -> nn.Module:
    """The module with the batch norms' statistics of random images: untrained, those of
    mobilenet_v3 let the signal fade to 1e-10, which no integer grid holds."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.momentum = 1.0
    with torch.no_grad():
        module.train()(torch.randn(4, 3, size, size))
    return module.eval()


def bert(_size: int) -> Program:
    """BERT-base, random weights, 32 tokens."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return tokens(BertModel(BertConfig()), 30522)


def gpt2(_size: int) -> Program:
    """GPT-2 small, random weights, 32 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return tokens(GPT2LMHeadModel(GPT2Config(use_cache=False)), 50257)


def tokens(module: nn.Module, vocabulary: int) -> Program:
    """A transformer of token ids, with a dynamic batch (TVM takes no dynamic sequence)."""
    return capture(module, (), {"input_ids": torch.randint(0, vocabulary, (2, 32))})


MODELS: dict[str, Callable[[int], Program]] = {
    **{
        name: partial(vision, name)
        for name in (
            "resnet50", "vgg16_bn", "densenet121", "mobilenet_v3_large", "efficientnet_b0",
            "vit_b_16",
        )
    },
    "bert": bert,
    "gpt2": gpt2,
}  # fmt: skip


def prune(name: str, ratio: float, size: int) -> tuple[Program, str]:
    """The pruned program and a line that tells what happened."""
    program = MODELS[name](size)
    start = time.perf_counter()
    pipeline = Pipeline.parse(f"canonicalize,prune-channels{{ratio={ratio}}}")
    result = pipeline.run(program)
    seconds = time.perf_counter() - start
    report = result.steps[-1].check
    assert report is not None, "nothing was pruned"
    before, after = cost(program), cost(result.program)
    line = (
        f"{name:<20} oracle error {report.measured:.1e}  "
        f"parameters {before.parameters / 1e6:6.1f} M -> {after.parameters / 1e6:6.1f} M "
        f"({1 - after.parameters / before.parameters:4.0%} less)  "
        f"FLOPs {1 - after.flops / before.flops:4.0%} less  {seconds:5.1f} s with check"
    )
    return result.program, line


QUANTISE = (
    "fold-constants,fold-batch-norm,fuse-conv-bn-relu,insert-fake-quant,eliminate-dead-code"
)


def quantised(program: Program, target: str) -> Program:
    """The program on the target's integer grid, calibrated on random inputs."""
    drawn = [random_inputs(program, seed=seed) for seed in range(4)]
    data = TensorData(tuple(torch.cat(parts) for parts in zip(*drawn, strict=True)), batch_size=2)
    return Pipeline.parse(QUANTISE).run(program, Context(data=data, target=target)).program


def lower(program: Program, target: str, *, int8: bool) -> tuple[bool, str]:
    """Whether the artifact was built and not found wrong, and a line."""
    start = time.perf_counter()
    told = ""
    try:
        with tempfile.TemporaryDirectory() as folder:
            if int8:
                program = quantised(program, target)
            artifact = build(program, target, Path(folder) / target)
            certificate = artifact.certificate
            if int8:
                layers = integers(certificate.audit_summary()) or "layers not audited"
                told = f"{layers}, {quantity(artifact.size(), 'B')}  "
    except PrunaError as error:
        return False, f"  {target:<10} {type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    return True, f"  {target:<10} {told}{certificate.summary()}  {seconds:.0f} s"


def main() -> None:
    """Print a block a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=224, help="of images")
    parser.add_argument("--int8", action="store_true", help="quantise before lowering")
    arguments = parser.parse_args()
    fine = True
    for name in arguments.models:
        try:
            program, line = prune(name, arguments.ratio, arguments.size)
        except PrunaError as error:
            print(f"{name:<20} {type(error).__name__}: {error}", flush=True)
            fine = False
            continue
        print(line, flush=True)
        for target in arguments.targets:
            passed, line = lower(program, target, int8=arguments.int8)
            fine &= passed
            print(line, flush=True)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
