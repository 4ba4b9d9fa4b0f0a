"""ONNX: from a Program to ``model.onnx``, run by ONNX Runtime on the CPU.

The model comes from `pruna_ir.onnx_export`: checked, with the program's names and dynamic
dimensions, quantisers as QuantizeLinear/DequantizeLinear pairs, weights stored in one byte each.

ONNX Runtime turns the pairs into integer kernels when it loads the model. On x86 it wants unsigned
activations, and both inputs of a residual add quantised. Products are written as its own operator
for integers (see `onnx_products`), weight-only ones likewise (`pruna_ir.onnx_blocks`), and first
convolutions so that their kernel is fast (`onnx_strided_images`). A product of dequantised tensors
that none of this takes stays a MatMul; then the optimiser ``MatMulAddFusion``, which would make a
float Gemm of it, is off, and the manifest's fact ``disabled_optimizers`` says so, for whoever
loads ``model.onnx`` by other means.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from pruna_ir.backends.onnx_products import integer_products
from pruna_ir.backends.onnx_profile import module_names
from pruna_ir.backends.onnx_strided_images import fold_strides
from pruna_ir.errors import LoweringError, ToolchainError
from pruna_ir.lowering import (
    MANIFEST,
    Availability,
    KernelRow,
    LoadOptions,
    Lowered,
    Offender,
    Runner,
)
from pruna_ir.onnx_blocks import pack_products
from pruna_ir.onnx_coverage import onnx_unsupported
from pruna_ir.onnx_export import OPSET, export_onnx
from pruna_ir.program import Program, dtype_of
from pruna_ir.quantization import U8_ASYMMETRIC, QuantScheme
from pruna_ir.transform import API_VERSION, Context

MAIN = "model.onnx"
_BUILD = ("onnx", "onnxscript")
_EXECUTE = ("onnx", "onnxruntime")


@dataclass(frozen=True)
class ToOnnx:
    """Lowers programs to ONNX and runs them with ONNX Runtime."""

    name: ClassVar[str] = "onnx"
    api_version: ClassVar[int] = API_VERSION
    scheme: ClassVar[QuantScheme] = QuantScheme(
        U8_ASYMMETRIC, residual="both", fused_attention="plain"
    )
    zeros: ClassVar[Mapping[str, str]] = {"": "dense speed: zeros are multiplied like any number"}

    def availability(self) -> Availability:
        """Whether ``onnx`` and ``onnxscript`` (to build), ``onnxruntime`` (to run) are there."""
        return Availability(_missing(_BUILD), _missing(_EXECUTE))

    def unsupported(self, program: Program) -> list[Offender]:
        """Every node for which ``torch.onnx`` has no translation, or ONNX Runtime no kernel."""
        return [*onnx_unsupported(program), *_in_bfloat16(program)]

    def lower(self, program: Program, folder: Path, context: Context) -> Lowered:
        """Write ``model.onnx``.

        Raises:
            LoweringError: ``torch.onnx`` refuses the program, or it exceeds 2 GiB.
        """
        context.progress("onnx: exporting", 0, 1)
        model = export_onnx(program)
        pack_products(model)
        integer_products(model)
        fold_strides(model.graph)
        (folder / MAIN).write_bytes(model.SerializeToString())
        context.progress("onnx: exporting", 1, 1)
        return Lowered(
            MAIN,
            {package: version(package) for package in _BUILD},
            {"opset": OPSET, "disabled_optimizers": _disabled_optimizers(model)},
        )

    def load(self, folder: Path, options: LoadOptions) -> Runner:
        """The model in an ONNX Runtime session on the CPU, all optimisations on.

        Raises:
            ToolchainError: ONNX Runtime is not installed.
            LoweringError: ONNX Runtime refuses the model.
        """
        if missing := self.availability().execute:
            raise ToolchainError(missing)
        return OnnxRunner(folder / MAIN, options, _stated_optimizers(folder))


def _in_bfloat16(program: Program) -> list[Offender]:
    """The calls that compute in bfloat16: ONNX Runtime refuses such models on the CPU."""
    reason = "ONNX Runtime has no bfloat16 kernels on the CPU; cast to float16, or keep float32"
    return [
        Offender.of(node, reason)
        for node in program.calls()
        if dtype_of(node) is torch.bfloat16
    ]


def _missing(packages: Sequence[str]) -> str:
    absent = [package for package in packages if find_spec(package) is None]
    if not absent:
        return ""
    return f"the package {', '.join(absent)} is missing: pip install 'pruna-ir[onnx]'"


def _disabled_optimizers(model: Any) -> list[str]:
    nodes = model.graph.node
    made = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    products = (node for node in nodes if node.op_type == "MatMul")
    return ["MatMulAddFusion"] if any(made & set(node.input) for node in products) else []


def _stated_optimizers(folder: Path) -> list[str]:
    path = folder / MANIFEST
    if not path.is_file():
        return []
    stated: list[str] = json.loads(path.read_text(encoding="utf-8"))["facts"].get(
        "disabled_optimizers", []
    )
    return stated


# -- running -----------------------------------------------------------------------------------

_INT8 = frozenset(
    {
        "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulInteger",
        "MatMulIntegerToFloat", "QAttention", "QGemm", "QLinearAdd", "QLinearAveragePool",
        "QLinearConcat", "QLinearConv", "QLinearGlobalAveragePool", "QLinearLeakyRelu",
        "QLinearMatMul", "QLinearMul", "QLinearReduceMean", "QLinearSigmoid", "QLinearSoftmax",
        "QLinearWhere",
    }
)  # fmt: skip
_CONVOLUTIONS = frozenset(
    {"Conv", "ConvInteger", "ConvTranspose", "FusedConv", "NhwcFusedConv", "QLinearConv"}
)
_PRODUCTS = frozenset(
    {
        "DynamicQuantizeMatMul", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "MatMulInteger",
        "MatMulIntegerToFloat", "QGemm", "QLinearMatMul",
    }
)  # fmt: skip
_SCALED = frozenset({"QGemm", "QLinearMatMul"})
"""Products whose first operand's scale and zero point stand before the second operand."""
_WEIGHT_ONLY = "MatMulNBits"
_LAYERS = frozenset({"attention", "conv", "linear", "matmul"})
_ATTENTION = frozenset({"Attention", "MultiHeadAttention", "QAttention"})


class OnnxRunner:
    """An ONNX Runtime session."""

    def __init__(self, path: Path, options: LoadOptions, disabled: Sequence[str]) -> None:
        self._path, self._options, self._disabled = path, options, tuple(disabled)
        self._session = self._open()
        self._names = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def _open(self, optimized: Path | None = None, profile: Path | None = None) -> Any:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = self._options.threads
        if optimized is not None:
            settings.optimized_model_filepath = str(optimized)
        if profile is not None:
            settings.enable_profiling = True
            settings.profile_file_prefix = str(profile)
        try:
            return onnxruntime.InferenceSession(
                self._path,
                settings,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(self._disabled),
            )
        except Exception as error:
            raise LoweringError(
                f"{self._path}: ONNX Runtime refuses the model: {str(error)[:600]}"
            ) from error

    def run(self, inputs: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """One array per output for one array per input."""
        feeds = dict(zip(self._names, inputs, strict=True))
        outputs: list[np.ndarray[Any, Any]] = self._session.run(self._outputs, feeds)
        return outputs

    def layer_times(self, inputs: Sequence[np.ndarray[Any, Any]], runs: int) -> dict[str, float]:
        """Milliseconds of every node of the optimised model, from ONNX Runtime's profiler.

        Named ``module.path/node`` after the layer that a node was fused to, where there is one.
        """
        with tempfile.TemporaryDirectory() as folder:
            session = self._open(profile=Path(folder) / "profile")
            feeds = dict(zip(self._names, inputs, strict=True))
            for _ in range(runs):
                session.run(self._outputs, feeds)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        times: dict[str, list[float]] = {}
        for event in events:
            name, kernel = str(event["name"]), "_kernel_time"
            if event.get("cat") == "Node" and name.endswith(kernel):
                times.setdefault(name.removesuffix(kernel), []).append(event["dur"] / 1e3)
        names, found = module_names(self._path, times), dict[str, float]()
        for name, taken in times.items():
            own = names.get(name, name)
            found[own] = found.get(own, 0.0) + statistics.median(taken)
        return found

    def audit(self) -> list[KernelRow]:
        """What stands in the model as ONNX Runtime optimised it for this machine.

        Convolutions and products are named as in `layer_times`.
        """
        import onnx

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            self._open(path)
            model = onnx.load(path)
        constants = {tensor.name for tensor in model.graph.initializer}
        dtypes = _element_types(model)
        rows = [_row(node, constants, dtypes) for node in model.graph.node]
        names = module_names(self._path, [row.layer for row in rows if row.kind in _LAYERS])
        return [replace(row, layer=names.get(row.layer, row.layer)) for row in rows]


def _element_types(model: Any) -> dict[str, str]:
    from onnx import TensorProto

    graph = model.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    found = {v.name: TensorProto.DataType.Name(v.type.tensor_type.elem_type) for v in values}
    return found | {t.name: TensorProto.DataType.Name(t.data_type) for t in graph.initializer}


_WORDS = {
    "FLOAT": "float32",
    "FLOAT16": "float16",
    "BFLOAT16": "bfloat16",
    "DOUBLE": "float64",
    "INT8": "int8",
    "UINT8": "int8",
}


def _row(node: Any, constants: set[str], dtypes: dict[str, str]) -> KernelRow:
    if node.op_type in _INT8:
        precision = "int8"
    elif node.op_type == _WEIGHT_ONLY:
        precision = _weight_only(node)
    else:
        word = next((dtypes[name] for name in node.input if name in dtypes), "")
        precision = _WORDS.get(word, word.lower() or "float32")
    return KernelRow(
        layer=node.name or node.output[0],
        kind=_kind(node, constants),
        precision=precision,
        detail=f"{node.domain}.{node.op_type}" if node.domain else node.op_type,
    )


def _weight_only(node: Any) -> str:
    """The precision of a product with packed weights: float unless its activations are rounded."""
    attributes = {a.name: a.i for a in node.attribute}
    return "int8" if attributes.get("accuracy_level") == 4 else f"int{attributes['bits']} weights"


def _kind(node: Any, constants: set[str]) -> str:
    if node.op_type in _CONVOLUTIONS:
        return "conv"
    if node.op_type in _ATTENTION:
        return "attention"
    if node.op_type == _WEIGHT_ONLY:
        return "linear"
    if node.op_type in _PRODUCTS:
        second = 3 if node.op_type in _SCALED else 1
        operands = {node.input[0], node.input[second]}
        return "linear" if constants & operands else "matmul"
    return str(node.op_type)
