"""Import: from a Program to a Relax module whose weights are arguments.

The program is exported again and decomposed to core ATen operators, the form that TVM's importer
is written for: it reads the arguments of ``batch_norm`` and others by position and mistakes an
undecomposed one for training mode.

    fake_quant(x)  ->  dequantize(quantize(x, s, z), s, z)
    fake_quant(W)  ->  dequantize(W8, s, z)    with W8 = clip(rint(W / s) + z, qmin, qmax)

``relax.quantize`` saturates to its 8-bit type; a narrower range is clipped before it. Its rounding
is half to even on LLVM targets, as the operator's is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from pruna_ir.backends.tvm_bfloat16 import conversion, with_float32
from pruna_ir.backends.tvm_operators import OPERATORS
from pruna_ir.backends.tvm_plain_products import with_plain_products
from pruna_ir.call import bind_arguments, unbind_arguments
from pruna_ir.decompose import decompose
from pruna_ir.errors import LoweringError, UnsupportedError
from pruna_ir.lowering import Offender
from pruna_ir.program import Program
from pruna_ir.reexport import reexport
from pruna_ir.registry import kernels
from pruna_ir.transform import Context, Rewrite

aten = torch.ops.aten
Array = np.ndarray[Any, Any]

_WHOLE = (aten.linear.default, aten.matmul.default, aten.scaled_dot_product_attention.default)
"""Operators that are translated whole: in parts, they come with reshapes and masks to undo."""


@dataclass(frozen=True)
class Imported:
    """A Relax module with one function ``main(inputs..., parameters...)``.

    Attributes:
        module: the ``tvm.IRModule``.
        parameters: the stored parameters by name, in the order of the arguments.
    """

    module: Any
    parameters: Mapping[str, Array]


def import_program(program: Program) -> Imported:
    """The program as a Relax module.

    Raises:
        UnsupportedError: TVM has no translation of some nodes; all are named.
        LoweringError: the importer refuses the program.
    """
    from tvm.relax.frontend.torch import from_exported_program

    exported = core_form(program)
    if offenders := untranslatable(exported):
        raise UnsupportedError(
            "TVM cannot translate these nodes:\n  " + "\n  ".join(map(str, offenders))
        )
    try:
        module = from_exported_program(
            exported,
            custom_convert_map={
                **OPERATORS,
                "_to_copy.default": conversion(_constants(exported)),
                "fake_quant.default": _fake_quant_translation(exported),
            },
            run_ep_decomposition=False,
        )
    except LoweringError:
        raise
    except Exception as error:
        first = "\n  ".join(str(error).strip().splitlines()[:4])
        raise LoweringError(
            f"TVM's importer refuses the program: {type(error).__name__}: {first}"
        ) from error
    return _weights_as_arguments(module)


def core_form(program: Program) -> torch.export.ExportedProgram:
    """The program in core ATen operators and ``fake_quant``."""
    exported = reexport(with_float32(with_plain_products(_without_views(program))))
    table = torch.export.default_decompositions()
    for operator in _WHOLE:
        del table[operator]
    with torch.no_grad():
        decomposed: torch.export.ExportedProgram = exported.run_decompositions(table)
    _count_from_the_front(decomposed.graph)
    return decomposed


def _count_from_the_front(graph: fx.Graph) -> None:
    """Slices with non-negative dimensions: TVM refuses others where a size is dynamic."""
    for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        bound = bind_arguments(node)
        bound["dim"] = int(bound["dim"]) % node.meta["val"].dim()
        node.args, node.kwargs = unbind_arguments(aten.slice.Tensor, bound)


def _without_views(program: Program) -> Program:
    """The program with ``reshape`` for ``view``.

    Decomposing an operator may change the strides of its result (attention's does); a view of it
    would then be refused.
    """
    rw = Rewrite(program, "tvm-import", Context())
    for node in rw.calls(aten.view.default, aten._unsafe_view.default):
        bound = bind_arguments(node)
        reshaped = rw.insert(
            aten.reshape.default, before=node, like=node, self=bound["self"], shape=bound["size"]
        )
        rw.replace(node, reshaped)
    return rw.finish()


def unsupported(program: Program) -> list[Offender]:
    """Every node that TVM's importer cannot translate.

    A program of operators that the importer knows by name is not exported to find out.
    """
    flat = decompose(program)
    names = _translated()
    if all(_name(node) in names for node in flat.calls()):
        return []
    return untranslatable(core_form(program))


def untranslatable(exported: torch.export.ExportedProgram) -> list[Offender]:
    """Every call of an exported program that TVM's importer does not know."""
    names = _translated()
    return [
        Offender.of(node, "TVM's importer has no translation of it")
        for node in exported.graph.nodes
        if node.op == "call_function" and _name(node) not in names
    ]


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", ""))


def _translated() -> set[str]:
    """The operators with a translation, by overload, such as ``conv2d.default``."""
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    return {*ExportedProgramImporter().convert_map, *OPERATORS, "fake_quant.default"}


# -- quantisers ----------------------------------------------------------------------------------


def _fake_quant_translation(
    exported: torch.export.ExportedProgram,
) -> Callable[[fx.Node, Any], Any]:
    """A translator of ``fake_quant`` nodes for TVM's importer."""
    kernels()
    constants = _constants(exported)

    def translate(node: fx.Node, importer: Any) -> Any:
        from tvm import relax

        grid = _Grid.of(node, constants)
        x, emit = node.args[0], importer.block_builder.emit
        assert isinstance(x, fx.Node)
        scale, points = relax.const(grid.scale), relax.const(grid.zero_point.astype(grid.dtype))
        if x.name in constants:
            integers = relax.const(grid.quantize(constants[x.name]))
        else:
            source = importer.env[x]
            if grid.is_narrow:
                low, high = grid.bounds()
                source = emit(relax.op.maximum(source, relax.const(low)))
                source = emit(relax.op.minimum(source, relax.const(high)))
            integers = emit(
                relax.op.quantize(source, scale, points, grid.axis, grid.dtype.name)
            )
        return emit(relax.op.dequantize(integers, scale, points, grid.axis, "float32"))

    return translate


@dataclass(frozen=True)
class _Grid:
    """The constants of one ``fake_quant`` node.

    Attributes:
        scale: float32, [] or [channels].
        zero_point: int32, of the shape of ``scale``.
        axis: the channel's dimension; the last where there is one scale for all.
        rank: the number of dimensions of the quantised tensor.
        dtype: int8 or uint8.
    """

    scale: Array
    zero_point: Array
    axis: int
    rank: int
    qmin: int
    qmax: int
    dtype: np.dtype[Any]

    @staticmethod
    def of(node: fx.Node, constants: Mapping[str, Array]) -> _Grid:
        """The grid of a node.

        Raises:
            LoweringError: its scale or zero point is computed, or its range exceeds 8 bits.
        """
        bound = bind_arguments(node)
        qmin, qmax = int(bound["qmin"]), int(bound["qmax"])
        scale, zero_point = (_constant(constants, node, bound[k]) for k in ("scale", "zero_point"))
        dtype = np.dtype(np.int8 if qmin < 0 else np.uint8)
        if qmin < np.iinfo(dtype).min or qmax > np.iinfo(dtype).max:
            raise LoweringError(f"{node.name}: no 8-bit type holds the range [{qmin}, {qmax}]")
        rank = bound["x"].meta["val"].dim()
        axis = -1 if bound["axis"] is None else int(bound["axis"]) % rank
        scale, zero_point = scale.astype(np.float32), zero_point.astype(np.int32)
        return _Grid(scale, zero_point, axis, rank, qmin, qmax, dtype)

    @property
    def is_narrow(self) -> bool:
        """Whether the range is smaller than the integer type's."""
        info = np.iinfo(self.dtype)
        return (self.qmin, self.qmax) != (info.min, info.max)

    def _along(self, values: Array) -> Array:
        shape = [1] * self.rank
        if values.ndim:
            shape[self.axis] = -1
        return values.reshape(shape) if values.ndim else values

    def bounds(self) -> tuple[Array, Array]:
        """The smallest and the largest real value of the grid, shaped to broadcast."""
        scale, points = self._along(self.scale), self._along(self.zero_point)
        low, high = (((q - points) * scale).astype(np.float32) for q in (self.qmin, self.qmax))
        return np.asarray(low), np.asarray(high)

    def quantize(self, weight: Array) -> Array:
        """``clip(rint(weight / scale) + zero_point, qmin, qmax)`` in the integer type."""
        grid = np.rint(weight.astype(np.float32) / self._along(self.scale))
        grid = grid + self._along(self.zero_point)
        return np.asarray(np.clip(grid, self.qmin, self.qmax), dtype=self.dtype)


def _constants(exported: torch.export.ExportedProgram) -> dict[str, Array]:
    """The tensors behind an exported program's placeholders, by placeholder."""
    held: dict[str, torch.Tensor] = {**exported.constants, **exported.state_dict}
    return {
        spec.arg.name: held[spec.target].detach().cpu().numpy()
        for spec in exported.graph_signature.input_specs
        if spec.target is not None and isinstance(held.get(spec.target), torch.Tensor)
    }


def _constant(constants: Mapping[str, Array], reader: fx.Node, node: fx.Node) -> Array:
    if node.name not in constants:
        raise LoweringError(
            f"{reader.name}: fake_quant reads a computed scale or zero point ({node.name}); "
            "TVM artifacts need calibrated constants"
        )
    return constants[node.name]


# -- weights -------------------------------------------------------------------------------------


def _weights_as_arguments(module: Any) -> Imported:
    """Every constant tensor of ``main`` as an argument behind the inputs.

    What is computed from weights alone is then done once at load, and the library stays small.
    """
    from tvm import relax

    module = relax.transform.DeadCodeElimination(["main"])(module)
    main = module["main"]
    arguments: dict[Any, Any] = {}
    parameters: dict[str, Array] = {}

    def argument(constant: Any) -> Any:
        if constant.value not in arguments:
            name = f"p{len(parameters)}"
            parameters[name] = constant.value.numpy()
            arguments[constant.value] = relax.Var(name, constant.ty)
        return arguments[constant.value]

    body = _replace_constants(main.body, argument)
    attributes = dict(main.attrs or {}) | {"num_input": len(main.params)}
    function = relax.Function(
        [*main.params, *arguments.values()], body, main.ret_ty, main.is_pure
    ).with_attrs(attributes)
    module.update_func(module.get_global_var("main"), function)
    return Imported(relax.transform.Normalize()(module), parameters)


def _replace_constants(body: Any, argument: Callable[[Any], Any]) -> Any:
    from tvm import relax

    class Replace(relax.PyExprMutator):  # type: ignore[misc]  # TVM is untyped
        def visit_generic_const_(self, constant: Any) -> Any:
            is_tensor = isinstance(constant.ty, relax.TensorType) and constant.ty.ndim > 0
            return argument(constant) if is_tensor else constant

    return relax.expr_functor.mutator(Replace)().visit_expr(body)
