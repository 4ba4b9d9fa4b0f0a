"""The tensorrt backend: an ONNX model shaped for TensorRT, and the engine built from it.

Files of an artifact: ``model.onnx`` (runs in ONNX Runtime too), ``model.engine``, ``engine.json``
(what built it, for which device, the sizes it takes, sha256) and ``layers.json`` (the engine's
layers as the builder logged them).

TensorRT-RTX builds ahead of time on any Linux machine, without a GPU, for one compute capability;
full TensorRT is used where it is installed beside a GPU. Without a CUDA device an engine cannot
run: then the ONNX model that it was built from is what can be verified.

Activations are signed with zero point 0, weights signed per channel: TensorRT refuses others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from pruna_ir.backends.tensorrt_engine import (
    DEFAULT_CAPABILITY,
    FULL,
    RTX,
    Range,
    build_engine,
    chosen_package,
    refused_nodes,
)
from pruna_ir.backends.tensorrt_runner import EngineRunner, OnnxRunner
from pruna_ir.errors import LoweringError, ToolchainError
from pruna_ir.lowering import Availability, KernelRow, LoadOptions, Lowered, Offender
from pruna_ir.onnx_coverage import onnx_unsupported
from pruna_ir.onnx_export import OPSET, export_onnx, module_scopes
from pruna_ir.program import Program, TensorSpec
from pruna_ir.quantization import S8_SYMMETRIC, QuantScheme
from pruna_ir.transform import API_VERSION, Context

MODEL = "model.onnx"
ENGINE = "model.engine"
DESCRIPTION = "engine.json"
LAYERS = "layers.json"
NO_DEVICE = "no CUDA device"
MOST = 32
"""The largest size of a dynamic dimension that has no bound of its own, unless the example's is
larger."""

_FOLD_AT_MOST = 1 << 20
"""Bytes of a folded constant: a transposed copy of a large weight is better computed."""
_BUILD = ("onnx", "onnxscript", "onnx_graphsurgeon")


@dataclass(frozen=True)
class ToTensorrt:
    """Lower to a TensorRT engine.

    Attributes:
        compute_capability: of the device to build for, such as ``8.9``; empty for the CUDA device
            at hand, and for 8.9 without one. Full TensorRT builds for the device at hand only.
        tf32: let float32 products round their operands to TF32, which is faster.
    """

    compute_capability: str = ""
    tf32: bool = False

    name: ClassVar[str] = "tensorrt"
    api_version: ClassVar[int] = API_VERSION
    scheme: ClassVar[QuantScheme] = QuantScheme(
        S8_SYMMETRIC, residual="identity", layer_outputs=False, repeat_behind_movers=False
    )
    zeros: ClassVar[Mapping[str, str]] = {
        "2:4": "allowed on the sparse tensor cores of Ampere and later, where full TensorRT finds "
        "them faster; TensorRT-RTX engines hold them dense",
        "": "dense speed: only 2:4 is a pattern for sparse tensor cores",
    }

    def availability(self) -> Availability:
        """What is missing to build an engine, and to execute one."""
        missing = [name for name in _BUILD if find_spec(name) is None]
        if find_spec(RTX) is None and chosen_package() != FULL:
            missing.append("tensorrt_rtx")
        lacking = f"{', '.join(missing)} not installed; pip install 'pruna-ir[tensorrt]'"
        build = lacking if missing else ""
        if not torch.cuda.is_available():
            device = f"{NO_DEVICE}; engines run on an NVIDIA GPU with its driver"
            return Availability(build, device)
        return Availability(build, "" if find_spec(chosen_package()) else lacking)

    def unsupported(self, program: Program) -> list[Offender]:
        """Every node that ``torch.onnx`` cannot translate, or else that TensorRT cannot parse.

        The second question needs the translated model, and TensorRT itself.
        """
        offenders = onnx_unsupported(program)
        if offenders or find_spec(chosen_package()) is None:
            return offenders
        nodes = {node.name: node for node in program.graph.nodes}
        return [
            _offender(node, reason, nodes)
            for node, reason in refused_nodes(export_onnx(program), chosen_package())
        ]

    def lower(self, program: Program, folder: Path, context: Context) -> Lowered:
        """Write the ONNX model, the engine and its description.

        Raises:
            ToolchainError: no TensorRT is installed.
            LoweringError: ``torch.onnx`` or TensorRT refuses the program.
            UsageError: TensorRT does not know the compute capability.
        """
        package = chosen_package()
        context.progress("tensorrt: export", 0, 2)
        exported = export_onnx(program)
        model = shape_for_tensorrt(exported)
        (folder / MODEL).write_bytes(model)
        context.progress("tensorrt: build engine", 1, 2)
        ranges = {name: _range(program, name) for name in program.dims}
        capability = self.compute_capability or _device_capability() or DEFAULT_CAPABILITY
        engine = build_engine(
            model, package, _profile(program.inputs, ranges), capability=capability, tf32=self.tf32
        )
        (folder / ENGINE).write_bytes(engine.plan)
        _write(folder / LAYERS, [asdict(row) for row in engine.layers])
        facts = {
            "package": package,
            "compute-capability": capability,
            "tf32": self.tf32,
            "opset": OPSET,
            "profile": {name: [r.least, r.best, r.most] for name, r in ranges.items()},
        }
        tensors = [value.name for value in exported.graph.output]
        _write(folder / DESCRIPTION, _description(program, tensors, folder, facts))
        context.progress("tensorrt: build engine", 2, 2)
        return Lowered(
            main=ENGINE,
            tool_versions=_versions(package),
            facts=facts,
            warnings=_limits(program, ranges),
        )

    def load(self, folder: Path, options: LoadOptions) -> EngineRunner:  # noqa: ARG002
        """The engine on the CUDA device.

        Raises:
            ToolchainError: there is no CUDA device, or not the one that it was built for.
            LoweringError: a file is missing or damaged, or TensorRT refuses the engine.
        """
        description, layers = _read(folder)
        if not torch.cuda.is_available():
            raise ToolchainError(NO_DEVICE)
        wanted, present = description["facts"]["compute-capability"], _device_capability()
        if present != wanted:
            raise ToolchainError(
                f"the engine was built for compute capability {wanted}, but the CUDA device has "
                f"{present}; build it again with compute_capability={present}"
            )
        return EngineRunner(folder / ENGINE, description, layers)

    def load_intermediate(self, folder: Path, options: LoadOptions) -> OnnxRunner | None:
        """The ONNX model that the engine was built from, in ONNX Runtime with nothing optimised.

        Its audit lists the engine's layers. None where ONNX Runtime is not installed.

        Raises:
            LoweringError: a file is missing or damaged, or ONNX Runtime refuses the model.
        """
        if find_spec("onnxruntime") is None:
            return None
        description, layers = _read(folder)
        return OnnxRunner(folder / MODEL, description, layers, options.threads)


def shape_for_tensorrt(model: Any) -> bytes:
    """The model as TensorRT likes it: shape arithmetic folded, no dead or identity nodes.

    Quantisers are left in place: folding one would turn int8 weights back into floats.

    Args:
        model: an ``onnx.ModelProto``.

    Returns:
        The serialised model.
    """
    import onnx_graphsurgeon as gs

    graph = gs.import_onnx(model)
    graph.fold_constants(
        size_threshold=_FOLD_AT_MOST,
        should_exclude_node=lambda node: node.op in ("QuantizeLinear", "DequantizeLinear")
    )
    for node in [n for n in graph.nodes if n.op == "Identity"]:
        _bypass(graph, node)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    shaped: bytes = gs.export_onnx(graph).SerializeToString()
    return shaped


def _bypass(graph: Any, node: Any) -> None:
    """Let the readers of an Identity read its input; one that makes a graph output stays."""
    source, result = node.inputs[0], node.outputs[0]
    if any(result is output for output in graph.outputs):
        return
    for reader in list(result.outputs):
        reader.inputs = [source if value is result else value for value in reader.inputs]
    node.outputs.clear()


def _offender(node: Any, reason: str, nodes: Mapping[str, fx.Node]) -> Offender:
    """The offender behind an ONNX node: the program's node, or at least the model's module."""
    path, name = ["", *(module_scopes(node) or [node.name])][-2:]
    origin = nodes.get(name)
    if origin is None:
        return Offender(name, f"onnx.{node.op_type}", reason, "", path)
    return Offender.of(origin, f"onnx.{node.op_type}: {reason}")


def _device_capability() -> str:
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def _range(program: Program, dim: str) -> Range:
    """The sizes of a dynamic dimension that the engine takes, best at the example's."""
    bounds = program.dims[dim]
    examples = [
        example.shape[axis]
        for spec, example in zip(program.inputs, program.examples, strict=True)
        for axis, size in enumerate(spec.shape)
        if size == dim
    ]
    best = max([bounds.lower, *examples])
    most = bounds.upper if bounds.upper is not None else max(MOST, best)
    return Range(bounds.lower, min(best, most), most)


def _profile(
    inputs: Sequence[TensorSpec], ranges: Mapping[str, Range]
) -> dict[str, list[int | Range]]:
    profile: dict[str, list[int | Range]] = {}
    for spec in inputs:
        if not any(isinstance(size, str) for size in spec.shape):
            continue
        if unknown := [s for s in spec.shape if isinstance(s, str) and s not in ranges]:
            raise LoweringError(
                f"input {spec.name} has the dimension {unknown[0]}, whose range is not known; "
                "capture the program with a static size there"
            )
        profile[spec.name] = [s if isinstance(s, int) else ranges[s] for s in spec.shape]
    return profile


def _limits(program: Program, ranges: Mapping[str, Range]) -> tuple[str, ...]:
    return tuple(
        f"the engine takes {name} from {r.least} to {r.most}; capture with an upper bound to "
        "change that"
        for name, r in ranges.items()
        if program.dims[name].upper is None
    )


def _versions(package: str) -> dict[str, str]:
    distribution = "tensorrt-rtx-cu13" if package == RTX else "tensorrt"
    names = [*(name.replace("_", "-") for name in _BUILD), distribution, "torch"]
    return {name: version(name) for name in names}


def _description(
    program: Program, outputs: Sequence[str], folder: Path, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``engine.json`` holds; ``tensor`` is a value's name inside the engine."""

    def described(spec: TensorSpec, tensor: str) -> dict[str, Any]:
        dtype = str(spec.dtype).removeprefix("torch.")
        return {"name": spec.name, "tensor": tensor, "dtype": dtype, "shape": list(spec.shape)}

    return {
        "inputs": [described(spec, spec.name) for spec in program.inputs],
        "outputs": [described(s, t) for s, t in zip(program.outputs, outputs, strict=True)],
        "facts": dict(facts),
        "sha256": {name: _digest(folder / name) for name in (MODEL, ENGINE, LAYERS)},
    }


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _read(folder: Path) -> tuple[dict[str, Any], list[KernelRow]]:
    """The engine's description and layers, every file checked against its sha256."""
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        expected = dict(description["sha256"])
        for name, digest in expected.items():
            if _digest(folder / name) != digest:
                raise LoweringError(f"{folder / name} is not the file that was written")
        layers = json.loads((folder / LAYERS).read_text(encoding="utf-8"))
        return description, [KernelRow(**row) for row in layers]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoweringError(f"{folder} holds no whole TensorRT artifact: {error}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


