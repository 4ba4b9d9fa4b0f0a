"""Engines: from an ONNX model to a TensorRT engine, and what the builder says is in it.

Two packages build: TensorRT-RTX (`tensorrt_rtx`), ahead of time and without a GPU, for a stated
compute capability; and full TensorRT (`tensorrt`), on and for the GPU at hand. Networks are
strongly typed: a layer runs in the types that the ONNX model states.

With detailed verbosity the builder logs each layer of the finished engine with the types of its
operands. Those lines are the audit:

    Name: node_conv2d_myl0_2, LayerType: correlation, Inputs: [ { ... Datatype: Int8, ...
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from pruna_ir.errors import LoweringError, ToolchainError, UsageError
from pruna_ir.lowering import KernelRow

RTX = "tensorrt_rtx"
FULL = "tensorrt"
DEFAULT_CAPABILITY = "8.9"

_KINDS = {"correlation": "conv", "convolution": "conv", "deconvolution": "conv", "gemm": "matmul"}
_FUSED = {"Fc": "linear", "Conv": "conv", "Bmm": "matmul", "Gemm": "matmul"}
_TYPES = {
    "Int8": "int8", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "FP8": "float8",
    "Int32": "int32", "Int64": "int64", "Bool": "bool", "UInt8": "uint8",
}  # fmt: skip
_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"(?:Constants: \[(?P<constants>.*?)\], )?Outputs: \[(?P<outputs>.*?)\], "
    r"TacticName: (?P<tactic>[^,]*),"
)
_DATATYPE = re.compile(r"Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")


@dataclass(frozen=True)
class Range:
    """The sizes of one dynamic dimension that an engine is built for."""

    least: int
    best: int
    most: int


def chosen_package() -> str:
    """``tensorrt`` where it is installed beside a CUDA device, else ``tensorrt_rtx``."""
    if find_spec(FULL) is not None and torch.cuda.is_available():
        return FULL
    return RTX


def vendor(package: str) -> Any:
    """The imported package.

    Raises:
        ToolchainError: it is not installed or cannot be loaded.
    """
    try:
        if package == FULL:
            import tensorrt

            return tensorrt
        import tensorrt_rtx

        return tensorrt_rtx
    except (ImportError, OSError) as error:
        raise ToolchainError(
            f"{package} cannot be loaded ({error}); pip install 'pruna-ir[tensorrt]'"
        ) from error


class BuildLog:
    """What a builder says: everything in order, errors apart."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []

    def logger(self, trt: Any) -> Any:
        """A vendor logger that writes here."""
        log = self

        class Logger(trt.ILogger):  # type: ignore[misc]  # the vendor is untyped
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                log.lines += message.splitlines()
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    log.errors.append(message)

        return Logger()

    def cause(self) -> str:
        """The last errors, or that there were none."""
        return "\n  ".join(self.errors[-3:]) or "the builder gave no reason"


@dataclass(frozen=True)
class Engine:
    """A built engine: its bytes and its layers."""

    plan: bytes
    layers: list[KernelRow]


def build_engine(
    model: bytes,
    package: str,
    profile: Mapping[str, Sequence[int | Range]],
    *,
    capability: str,
    tf32: bool,
) -> Engine:
    """Build an engine from a serialised ONNX model.

    Args:
        model: the ONNX model.
        package: ``tensorrt_rtx`` or ``tensorrt``.
        profile: the sizes of each input with a dynamic dimension.
        capability: the compute capability to build for (``tensorrt_rtx`` only).
        tf32: let float32 products round their operands to TF32.

    Raises:
        LoweringError: TensorRT refuses the model.
        UsageError: TensorRT-RTX does not know the compute capability.
    """
    trt, log = vendor(package), BuildLog()
    logger = log.logger(trt)
    builder = trt.Builder(logger)
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise LoweringError("TensorRT refuses the model: " + "\n  ".join(reasons or [log.cause()]))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    (config.set_flag if tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    # Lets the builder look for 2:4 zeros; without them, nothing changes.
    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if package == RTX:
        _set_capability(trt, config, capability)
    _set_profile(builder, config, profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise LoweringError(f"TensorRT cannot build the engine: {log.cause()}")
    return Engine(bytes(plan), list(layer_rows(log.lines)))


def _set_capability(trt: Any, config: Any, capability: str) -> None:
    members = trt.ComputeCapability.__members__
    member = members.get(f"SM{capability.replace('.', '')}")
    if member is None:
        numbers = [name[2:] for name in members if name.startswith("SM")]
        known = ", ".join(f"{number[:-1]}.{number[-1]}" for number in numbers)
        raise UsageError(
            f"TensorRT-RTX does not build for compute capability {capability}; it knows {known}"
        )
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(member, 0):
        raise LoweringError(f"TensorRT-RTX refuses compute capability {capability}")


def _set_profile(
    builder: Any, config: Any, profile: Mapping[str, Sequence[int | Range]]
) -> None:
    if not profile:
        return
    chosen = builder.create_optimization_profile()
    for name, sizes in profile.items():
        ranges = [Range(size, size, size) if isinstance(size, int) else size for size in sizes]
        chosen.set_shape(
            name,
            tuple(r.least for r in ranges),
            tuple(r.best for r in ranges),
            tuple(r.most for r in ranges),
        )
    if config.add_optimization_profile(chosen) < 0:
        raise LoweringError(f"TensorRT refuses the optimisation profile {dict(profile)}")


def refused_nodes(model: Any, package: str) -> list[tuple[Any, str]]:
    """The ONNX nodes that TensorRT's parser refuses, each with its reason.

    Args:
        model: an ``onnx.ModelProto``.
        package: ``tensorrt_rtx`` or ``tensorrt``.
    """
    trt, log = vendor(package), BuildLog()
    logger = log.logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if parser.supports_model_v2(model.SerializeToString()):
        return []
    nodes = model.graph.node
    found = {
        index: f"TensorRT has no {node.op_type}"
        for index, node in enumerate(nodes)
        if not parser.supports_operator(node.op_type)
    }
    for error in (parser.get_error(i) for i in range(parser.num_errors)):
        found.setdefault(error.node(), f"TensorRT refuses it: {error.desc()}")
    found = found or dict.fromkeys(_outside_subgraphs(parser), "TensorRT refuses it")
    return [(nodes[index], found[index]) for index in sorted(found)]


def _outside_subgraphs(parser: Any) -> list[int]:
    """The indices of the nodes that the parser leaves out of what it supports."""
    return [
        index
        for i in range(parser.num_subgraphs)
        if not parser.is_subgraph_supported(i)
        for index in parser.get_subgraph_nodes(i)
    ]


def _kind(layer_type: str, name: str) -> str:
    """Our word for a layer's type; a fusion that holds a product is named after the product."""
    if layer_type == "runtime_fusion":
        words = re.findall(r"[A-Z][a-z]*", name.removeprefix("__myl_"))
        return next((_FUSED[word] for word in words if word in _FUSED), layer_type)
    return _KINDS.get(layer_type, layer_type)


def layer_rows(lines: Iterable[str]) -> Iterable[KernelRow]:
    """The engine's layers from the lines of a build log, in order.

    Layers without operands (waits between streams) are left out.
    """
    for line in lines:
        found = _LAYER.match(line)
        if found is None or found["type"] == "shape_call":
            continue
        inputs = _DATATYPE.findall(found["inputs"] or "")
        constants = _DATATYPE.findall(found["constants"] or "")
        outputs = _DATATYPE.findall(found["outputs"] or "")
        kind = _kind(found["type"], found["name"])
        if kind == "matmul" and len(inputs) == 1 and any("," in sizes for sizes, _ in constants):
            kind = "linear"
        operands = inputs if kind in ("conv", "linear", "matmul") else outputs
        types = [_TYPES.get(name, name.lower()) for _, name in operands]
        if types:
            yield KernelRow(found["name"], kind, types[0], found["tactic"])
