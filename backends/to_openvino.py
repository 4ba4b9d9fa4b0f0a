"""OpenVINO: from a Program to OpenVINO IR (``model.xml`` and ``model.bin``), run on the CPU.

The re-exported program goes through OpenVINO's own PyTorch frontend; one conversion rule is ours:

    fake_quant(x)  ->  FakeQuantize(x, low, high, low, high, levels)
                       low = (qmin - z) * s, high = (qmax - z) * s, levels = qmax - qmin + 1
    fake_quant(W)  ->  Multiply(Subtract(Convert(W8), z), s)     W8 = clip(rint(W / s) + z)

The second is the form in which OpenVINO's low-precision transformations expect stored integers
(``z`` left out where it is 0): weights take one byte each in the file, and the same int8 kernels
run. ``rint`` rounds half to even and divides in float32, as the operator itself does.

By default OpenVINO may compute float32 models in bfloat16 where the processor has it; artifacts
are verified with ``strict_precision``, which asks for float32. OpenVINO's telemetry stays off
unless the process has imported OpenVINO before.

Limits: scales and zero points must be constants; grids of more than 8 bits stay float32 weights.
"""

from __future__ import annotations

import logging
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import fx

from pruna_ir.backends.openvino_blocks import compress_products
from pruna_ir.backends.openvino_single_pixels import separate_single_pixels
from pruna_ir.call import bind_arguments
from pruna_ir.errors import LoweringError, ToolchainError
from pruna_ir.lowering import Availability, KernelRow, LoadOptions, Lowered, Offender, Runner
from pruna_ir.program import Program, TensorSpec, module_path
from pruna_ir.quantization import U8_ASYMMETRIC, QuantScheme
from pruna_ir.reexport import origins, reexport
from pruna_ir.transform import API_VERSION, Context

MAIN = "model.xml"
_FAKE_QUANT = "pruna.fake_quant.default"
_FRAMEWORK_NODE = "PtFrameworkNode"
_WEIGHTS = {
    "aten.linear.default": "weight",
    "aten.addmm.default": "mat2",
    "aten.mm.default": "mat2",
    "aten.matmul.default": "other",
}
"""Products that may have a constant matrix as their second operand."""


@dataclass(frozen=True)
class ToOpenvino:
    """Lowers programs to OpenVINO IR and runs them on the CPU."""

    name: ClassVar[str] = "openvino"
    api_version: ClassVar[int] = API_VERSION
    scheme: ClassVar[QuantScheme] = QuantScheme(
        U8_ASYMMETRIC, residual="identity", fused_attention="any", signed_queries=True,
        nearly_symmetric=0.1,
        layer_outputs=False,
    )  # fmt: skip
    """Unsigned activations; of a residual add only the identity branch is quantised, since the
    other one is the convolution's own accumulator: OpenVINO leaves out a rounding between the
    convolution and the add that it fuses, and would no longer compute the program's function.
    Matrix products are faster on signed activations without a zero point, and fused attention
    runs its first product on integers only where query and key have none."""
    # CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE, which is off by default, packs the weights of int8
    # matrix products on CPUs with AMX, in multiples of 64 channels.
    zeros: ClassVar[Mapping[str, str]] = {
        "": "dense speed; packed weights exist for int8 products on AMX only and are not turned on"
    }

    def availability(self) -> Availability:
        """Whether the package ``openvino`` is installed."""
        if find_spec("openvino") is None:
            missing = "the package openvino is missing: pip install 'pruna-ir[openvino]'"
            return Availability(missing, missing)
        return Availability()

    def unsupported(self, program: Program) -> list[Offender]:
        """Every node that OpenVINO's frontend has no rule for, from a partial conversion."""
        _import_openvino()
        from openvino.frontend import FrontEndManager

        decoder = _decoder(program)
        behind = origins(program, decoder.pt_module.graph)
        frontend = FrontEndManager().load_by_framework("pytorch")
        frontend.add_extension(_extension())
        with _quiet():
            model = frontend.convert_partially(frontend.load(decoder))
        names = (
            op.get_friendly_name()
            for op in model.get_ordered_ops()
            if op.get_type_name() == _FRAMEWORK_NODE
        )
        found: dict[tuple[str, str], Offender] = {}
        for name in names:
            own, _, operator = name.partition("/")
            # A getitem that stays behind is a consequence: its producer is among the offenders.
            if operator and "getitem" not in operator:
                offender = _offender(behind.get(own), own, operator)
                found.setdefault((offender.node, offender.reason), offender)
        return list(found.values())

    def lower(self, program: Program, folder: Path, context: Context) -> Lowered:
        """Write ``model.xml`` and ``model.bin``.

        Raises:
            LoweringError: OpenVINO refuses the program.
        """
        context.progress("openvino: converting", 0, 1)
        ov = _import_openvino()
        model = convert(program)
        with _quiet():
            ov.save_model(model, folder / MAIN, compress_to_fp16=False)
        context.progress("openvino: converting", 1, 1)
        return Lowered(MAIN, {"openvino": version("openvino")})

    def load(self, folder: Path, options: LoadOptions) -> Runner:
        """The model, compiled for the CPU.

        Raises:
            ToolchainError: OpenVINO is not installed.
            LoweringError: OpenVINO refuses the file.
        """
        if missing := self.availability().execute:
            raise ToolchainError(missing)
        ov = _import_openvino()
        try:
            compiled = ov.Core().compile_model(folder / MAIN, "CPU", _settings(options))
        except RuntimeError as error:
            raise LoweringError(
                f"{folder / MAIN}: OpenVINO refuses the model: {_first_lines(error)}"
            ) from error
        return OpenvinoRunner(compiled)


def _settings(options: LoadOptions) -> dict[str, Any]:
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if options.threads:
        settings["INFERENCE_NUM_THREADS"] = options.threads
    if options.profile:
        settings["PERF_COUNT"] = "YES"
    if options.strict_precision:
        # The second: never quantise the activations of a weight-only model behind our back.
        settings["INFERENCE_PRECISION_HINT"] = "f32"
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    return settings


# -- running -----------------------------------------------------------------------------------

_KINDS = {
    "Convolution": "conv",
    "Deconvolution": "conv",
    "FullyConnected": "linear",
    "MatMul": "matmul",
    "ScaledDotProductAttention": "attention",
    "ScaledDotProductAttentionWithKVCache": "attention",
}
_PRECISIONS = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "u8": "int8",
    "i8": "int8",
}


class OpenvinoRunner:
    """A model compiled by OpenVINO."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()

    def run(self, inputs: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """One array per output for one array per input."""
        self._request.infer(dict(enumerate(inputs)), share_inputs=True)
        count = len(self._compiled.outputs)
        return [np.array(self._request.get_output_tensor(i).data) for i in range(count)]

    def layer_times(self, inputs: Sequence[np.ndarray[Any, Any]], runs: int) -> dict[str, float]:
        """Milliseconds of every layer by its name; it takes `LoadOptions.profile`.

        A layer that OpenVINO made anew bears the first name from the program that it stands for.
        """
        names = self._original_names()
        times: dict[str, list[float]] = {}
        for _ in range(runs):
            self.run(inputs)
            for info in self._request.profiling_info:
                spent = info.real_time.total_seconds() * 1e3
                name = names.get(info.node_name, info.node_name)
                times.setdefault(name, []).append(spent)
        return {name: statistics.median(taken) for name, taken in times.items()}

    def _original_names(self) -> dict[str, str]:
        found = {}
        for op in self._compiled.get_runtime_model().get_ordered_ops():
            facts = op.get_rt_info()
            if "originalLayersNames" in facts:
                behind = _text(facts["originalLayersNames"]).split(",")
                own = op.get_friendly_name()
                found[own] = next((name for name in behind if "/" in name), own)
        return found

    def audit(self) -> list[KernelRow]:
        """What OpenVINO's runtime model says of every layer that computes."""
        rows = []
        for op in self._compiled.get_runtime_model().get_ordered_ops():
            facts = {key: _text(value) for key, value in op.get_rt_info().items()}
            kind = facts.get("layerType", "")
            if kind in ("Const", "Input", "Output"):
                continue
            precision = facts.get("runtimePrecision", "")
            weights = _weight_only(op) if kind == "FullyConnected" else ""
            rows.append(
                KernelRow(
                    layer=facts.get("originalLayersNames", "").split(",")[0]
                    or op.get_friendly_name(),
                    kind=_KINDS.get(kind, kind),
                    precision=weights or _PRECISIONS.get(precision, precision),
                    detail=facts.get("primitiveType", ""),
                )
            )
        return rows


_COMPRESSED = {f"{sign}{bits}": f"int{bits} weights" for sign in "iu" for bits in (4, 8)}


def _weight_only(op: Any) -> str:
    """What a product of floats with compressed weights is called; empty for anything else.

    OpenVINO reports the type of the weights as the precision of such a product.
    """
    value, weight = (op.input(i).get_element_type().get_type_name() for i in (0, 1))
    return _COMPRESSED.get(weight, "") if value in ("f32", "f16", "bf16") else ""


def _text(value: Any) -> str:
    return str(value.astype(str)) if hasattr(value, "astype") else str(value)


# -- conversion --------------------------------------------------------------------------------


def convert(program: Program) -> Any:
    """The program as an ``openvino.Model`` with the program's names and dynamic dimensions.

    Raises:
        LoweringError: OpenVINO refuses the program.
    """
    ov = _import_openvino()
    decoder = _decoder(program)
    try:
        with _quiet():
            model = ov.convert_model(decoder, extension=[_extension()])
    except Exception as error:
        raise LoweringError(f"OpenVINO refuses the program: {_first_lines(error)}") from error
    _name_layers(model, program, decoder.pt_module.graph)
    _shape_inputs(model, program)
    compress_products(model, _matrices(program))
    separate_single_pixels(model)
    for output, spec in zip(model.outputs, program.outputs, strict=True):
        output.get_tensor().add_names({spec.name})
    return model


def _matrices(program: Program) -> dict[str, tuple[int, int]]:
    """The inputs and outputs of every product with a matrix, by the product's name."""
    found = {}
    for node in program.calls():
        weight = _WEIGHTS.get(str(node.target))
        shape = tuple(bind_arguments(node)[weight].meta["val"].shape) if weight else ()
        if len(shape) == 2 and all(isinstance(size, int) for size in shape):
            path = "/".join(part for part in (module_path(node), node.name, "MatMul") if part)
            found[path] = (shape[1], shape[0]) if weight == "weight" else (shape[0], shape[1])
    return found


def _decoder(program: Program) -> Any:
    _import_openvino()
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    exported = reexport(program)
    try:
        with _quiet():
            return TorchFXPythonDecoder.from_exported_program(exported)
    except Exception as error:
        raise LoweringError(f"OpenVINO cannot read the program: {_first_lines(error)}") from error


def _extension() -> Any:
    from openvino.frontend.pytorch import ConversionExtension

    return ConversionExtension(_FAKE_QUANT, _convert_fake_quant)


def _convert_fake_quant(context: Any) -> Any:
    """The conversion rule of ``pruna::fake_quant``."""
    from openvino import opset13 as ops

    x = context.get_input(0)
    scale, zero = (_constant(context.get_input(i)) for i in (1, 2))
    axis, qmin, qmax = (context.get_values_from_const_input(i) for i in (3, 4, 5))
    if scale is None or zero is None:
        raise LoweringError(
            "fake_quant reads a computed scale or zero point; OpenVINO artifacts need calibrated "
            "constants"
        )
    scale = scale.astype(np.float32)
    if axis is not None:
        rank = x.get_partial_shape().rank.get_length()
        shape = [1] * rank
        shape[axis] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    weight = _constant(x)
    if weight is not None and qmax - qmin <= 255:
        return _stored_integers(weight, scale, zero, qmin, qmax)
    low, high = (((q - zero) * scale).astype(np.float32) for q in (qmin, qmax))
    bounds = [ops.constant(bound) for bound in (low, high, low, high)]
    return ops.fake_quantize(x, *bounds, levels=qmax - qmin + 1).outputs()


def _stored_integers(
    weight: np.ndarray[Any, Any],
    scale: np.ndarray[Any, Any],
    zero: np.ndarray[Any, Any],
    qmin: int,
    qmax: int,
) -> Any:
    from openvino import opset13 as ops

    grid = np.rint(weight / scale) + zero
    integers = np.clip(grid, qmin, qmax).astype(np.int8 if qmin < 0 else np.uint8)
    result = ops.convert(ops.constant(integers), "f32")
    if zero.any():
        result = ops.subtract(result, ops.constant(zero.astype(np.float32)))
    return ops.multiply(result, ops.constant(scale)).outputs()


def _constant(output: Any) -> np.ndarray[Any, Any] | None:
    node = output.get_node()
    if node.get_type_name() != "Constant":
        return None
    data: np.ndarray[Any, Any] = node.data
    return data


def _shape_inputs(model: Any, program: Program) -> None:
    """Give each input its program's shape: the frontend leaves every dimension open."""
    from openvino import Dimension, PartialShape

    def dimension(size: int | str) -> Any:
        if isinstance(size, int):
            return Dimension(size)
        bounds = program.dims.get(size)
        if bounds is None:
            return Dimension(-1)
        return Dimension(bounds.lower, -1 if bounds.upper is None else bounds.upper)

    def shape(spec: TensorSpec) -> Any:
        return PartialShape([dimension(size) for size in spec.shape])

    model.reshape({i: shape(spec) for i, spec in enumerate(program.inputs)})
    for parameter, spec in zip(model.inputs, program.inputs, strict=True):
        parameter.get_tensor().add_names({spec.name})


# -- provenance --------------------------------------------------------------------------------


def _offender(origin: fx.Node | None, name: str, operator: str) -> Offender:
    if origin is None:
        return Offender(name, operator, "OpenVINO has no rule for it", "", "")
    own = str(origin.target)
    through = "" if own == operator else f" ({own} decomposes into {operator})"
    return Offender.of(origin, f"OpenVINO has no rule for it{through}")


def _name_layers(model: Any, program: Program, graph: fx.Graph) -> None:
    """Name operations after the user's module and the program's node, for audits and profiles."""
    behind = origins(program, graph)
    calls = {node.name: node for node in graph.nodes if node.op == "call_function"}
    for op in model.get_ops():
        own, _, rest = op.get_friendly_name().partition("/")
        if own in calls and rest:
            origin = behind.get(own, calls[own])
            parts = (module_path(calls[own]), origin.name, op.get_type_name())
            op.set_friendly_name("/".join(part for part in parts if part))


# -- the vendor's package ----------------------------------------------------------------------


def _import_openvino() -> Any:
    """The package ``openvino``, its telemetry off.

    OpenVINO sends usage data from its import on unless the user has opted out; it falls back to a
    stub where its telemetry package cannot be imported.

    Raises:
        ToolchainError: it is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise ToolchainError(
            f"openvino cannot be imported ({error}): pip install 'pruna-ir[openvino]'"
        ) from error
    return openvino


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that OpenVINO's frontend logs about its own tables."""
    disabled, handlers = logging.root.manager.disable, list(logging.root.handlers)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        logging.root.handlers[:] = handlers


def _first_lines(error: BaseException, count: int = 8) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return "\n  ".join(lines[:count]) or type(error).__name__
