"""Blocked tensors: a Relax function whose convolutions run on [n, C/16, H, W, 16].

Every convolution of constant height, width and channels takes and gives blocked tensors; what lies
between (element-wise operators, poolings, means over height and width, concatenations of whole
blocks) is computed on them too:

    relu(conv2d(x) + b)  ->  unblock(relu(conv2d_blocked(block(x), pack(W)) + block(b)))

so that ``block`` and ``unblock`` remain at the ends of a network alone. The lanes behind the last
channel hold anything: nothing that is kept reads them.

A ``conv1d`` is a convolution of height one.

Limits: a convolution on tensors of unknown height or width stays as it is; data of fewer than 16
channels is read where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pruna_ir.backends.tvm_convolutions import (
    ATTRIBUTES,
    Convolution,
    Place,
    Tile,
    accumulators,
    convolve,
    pack,
    rule,
)
from pruna_ir.backends.tvm_loops import LANES

_ELEMENTWISE = frozenset(
    f"relax.{name}"
    for name in (
        "abs", "add", "astype", "ceil", "clip", "divide", "erf", "exp", "floor", "log",
        "maximum", "minimum", "multiply", "negative", "nn.gelu", "nn.gelu_tanh",
        "nn.leakyrelu", "nn.relu", "nn.relu6", "nn.silu", "nn.softplus", "power", "round",
        "rsqrt", "sigmoid", "sqrt", "square", "subtract", "tanh",
    )
)
_POOLS: Mapping[str, str] = {"relax.nn.max_pool2d": "max", "relax.nn.avg_pool2d": "avg"}
_LAYOUT = f"NCHW{LANES}c"
_PLAIN = (("NCHW", "OIHW", "NCHW"), ("NCHW", "OIHW", ""))


@dataclass(frozen=True)
class _Blocked:
    """A blocked tensor and how many of its channels mean something."""

    value: Any
    channels: int


def block_convolutions(
    module: Any,
    features: Callable[[str], bool],
    choose: Callable[[Place, int], Tile] = rule,
) -> Any:
    """The module with its convolutions on blocked tensors.

    Args:
        module: a ``tvm.IRModule`` whose ``main`` is one dataflow block over Relax operators.
        features: whether the processor has an instruction set, by LLVM's name.
        choose: the register tile of a convolution.
    """
    from tvm import relax

    rewriter = relax.expr_functor.mutator(_rewriter())(module, accumulators(features), choose)
    module = rewriter.rewritten(module)
    return relax.transform.DeadCodeElimination(["main"])(module)


def _rewriter() -> Any:
    """The rewriting class; TVM is imported where it is needed only."""
    from tvm import relax

    class Rewriter(relax.PyExprMutator):  # type: ignore[misc]  # TVM is untyped
        def __init__(self, module: Any, vectors: int, choose: Callable[..., Tile]) -> None:
            super().__init__(module)
            self.vectors = vectors
            self.choose = choose
            self.blocked: dict[Any, _Blocked] = {}

        def rewritten(self, module: Any) -> Any:
            variable = module.get_global_var("main")
            self.builder_.update_func(variable, self.visit_expr(module["main"]))
            return self.builder_.finalize()

        def visit_var_binding_(self, binding: Any) -> None:
            plain = _flat_convolution(self, binding.value)
            made = None if plain is not None else _blocked_form(self, binding.value)
            if made is not None:
                blocked = _Blocked(self.builder_.emit(made.value), made.channels)
                self.blocked[binding.var] = blocked
                plain = _unblocked(self.builder_, blocked, binding.value.ty)
            if plain is None:
                super().visit_var_binding_(binding)
                return
            inner = isinstance(binding.var, relax.DataflowVar)
            emit = self.builder_.emit if inner else self.builder_.emit_output
            self.set_var_remap(binding.var, emit(plain))

    return Rewriter


# -- moving between layouts ----------------------------------------------------------------------


def _unblocked(builder: Any, blocked: _Blocked, like: Any) -> Any:
    from tvm import te

    n, _, height, width = like.shape

    def unblock(x: Any) -> Any:
        return te.compute(
            (n, blocked.channels, height, width),
            lambda n, c, y, x_: x[n, c // LANES, y, x_, c % LANES],
            name="unblock",
        )

    return builder.call_te(unblock, blocked.value, primfunc_name_hint="unblock")


def _block(builder: Any, value: Any) -> Any:
    from tvm import te, tirx

    def block(x: Any) -> Any:
        n, channels, height, width = x.shape

        def element(n: Any, c: Any, y: Any, x_: Any, lane: Any) -> Any:
            channel = c * LANES + lane
            if int(channels) % LANES == 0:
                return x[n, channel, y, x_]
            zero = tirx.const(0, x.dtype)
            return tirx.if_then_else(channel < channels, x[n, channel, y, x_], zero)

        shape = (n, -(-int(channels) // LANES), height, width, LANES)
        return te.compute(shape, element, name="block")

    return builder.emit(builder.call_te(block, value, primfunc_name_hint="block"))


def _as_blocked(rewriter: Any, value: Any) -> Any:
    """A tensor [n, C, H, W] as a blocked one."""
    if value in rewriter.blocked:
        return rewriter.blocked[value].value
    made = _block(rewriter.builder_, rewriter.visit_expr(value))
    rewriter.blocked[value] = _Blocked(made, int(value.ty.shape[1]))
    return made


# -- operators -----------------------------------------------------------------------------------


def _blocked_form(rewriter: Any, call: Any) -> _Blocked | None:
    """The call that computes a value blocked; None where it is to be computed as it is."""
    from tvm import relax

    name = getattr(getattr(call, "op", None), "name", "")
    if not isinstance(call, relax.Call) or _sizes(call) is None:
        return None
    if name == "relax.nn.conv2d":
        return _convolution(rewriter, call)
    if name in _ELEMENTWISE:
        return _elementwise(rewriter, call)
    if name in _POOLS:
        return _pool(rewriter, call, _POOLS[name])
    if name == "relax.concat":
        return _concatenation(rewriter, call)
    return _mean(rewriter, call) if name == "relax.mean" else None


def _sizes(value: Any) -> list[int] | None:
    """Channels, height and width of a tensor of rank 4; None where one is not constant."""
    from tvm import relax, tirx

    ty = value.ty
    if not isinstance(ty, relax.TensorType) or ty.ndim != 4 or ty.shape is None:
        return None
    sizes = list(ty.shape)[1:]
    if not all(isinstance(size, (int, tirx.IntImm)) for size in sizes):
        return None
    return [int(size) for size in sizes]


def _convolution(rewriter: Any, call: Any) -> _Blocked | None:
    attributes, (data, weight) = call.attrs, call.args
    layouts = (attributes.data_layout, attributes.kernel_layout, str(attributes.out_layout))
    sizes, window = _sizes(data), _sizes(weight)
    if layouts not in _PLAIN or sizes is None or window is None:
        return None
    constants = Convolution(
        inputs=sizes[0],
        outputs=int(weight.ty.shape[0]),
        groups=int(attributes.groups),
        kernel=(window[1], window[2]),
        strides=_pair(attributes.strides),
        dilation=_pair(attributes.dilation),
        padding=tuple(int(v) for v in attributes.padding),  # type: ignore[arg-type]  # four
    )
    narrow = constants.inputs < LANES and not constants.is_depthwise
    plain = narrow and data not in rewriter.blocked
    source = rewriter.visit_expr(data) if plain else _as_blocked(rewriter, data)
    builder = rewriter.builder_

    def packed_weight(weight: Any) -> Any:
        return pack(constants, weight)

    packed = builder.call_te(packed_weight, rewriter.visit_expr(weight),
                             primfunc_name_hint="conv2d_pack")  # fmt: skip
    made = builder.call_te(
        convolve(constants, rewriter.vectors, rewriter.choose),
        source,
        builder.emit(packed),
        primfunc_name_hint="conv2d_depthwise" if constants.is_depthwise else "conv2d",
        primfunc_attrs=ATTRIBUTES,
    )
    return _Blocked(made, constants.outputs)


def _flat_convolution(rewriter: Any, call: Any) -> Any:
    """A ``conv1d`` of constant sizes as a convolution of height one; None where it is no such."""
    from tvm import relax

    if getattr(getattr(call, "op", None), "name", "") != "relax.nn.conv1d":
        return None
    attributes, builder = call.attrs, rewriter.builder_
    if (attributes.data_layout, attributes.kernel_layout) != ("NCW", "OIW"):
        return None
    data, weight = (
        builder.emit(relax.op.expand_dims(rewriter.visit_expr(operand), 2))
        for operand in call.args
    )
    left, right = (int(v) for v in attributes.padding)
    flat = builder.normalize(
        relax.op.nn.conv2d(
            data, weight, (1, int(attributes.strides[0])), (0, left, 0, right),
            (1, int(attributes.dilation[0])), int(attributes.groups),
        )
    )  # fmt: skip
    made = _convolution(rewriter, flat) if _sizes(flat) is not None else None
    if made is None:
        return None
    blocked = _Blocked(builder.emit(made.value), made.channels)
    return relax.op.squeeze(builder.emit(_unblocked(builder, blocked, flat.ty)), [2])


def _pair(values: Any) -> tuple[int, int]:
    first, second = (int(v) for v in values)
    return first, second


def _elementwise(rewriter: Any, call: Any) -> _Blocked | None:
    """An element-wise operator, one of whose operands is blocked already."""
    from tvm import relax

    tensors = [a for a in call.args if isinstance(a.ty, relax.TensorType) and a.ty.ndim > 0]
    if not any(a in rewriter.blocked for a in tensors):
        return None
    sizes = _sizes(call)
    assert sizes is not None
    forms = [_operand(rewriter, a, sizes) if a in tensors else a for a in call.args]
    if any(form is None for form in forms):
        return None
    return _Blocked(relax.Call(call.op, forms, call.attrs), sizes[0])


def _operand(rewriter: Any, value: Any, result: list[int]) -> Any:
    """An operand that broadcasts to a blocked result, blocked; None where it can not be."""
    from tvm import relax

    if value.ty.shape is None or not 3 <= value.ty.ndim <= 4:
        return None
    if value.ty.ndim == 3:
        shape = relax.ShapeExpr([1, *value.ty.shape])
        value = rewriter.builder_.emit(relax.op.reshape(rewriter.visit_expr(value), shape))
    sizes = _sizes(value)
    if sizes is None or sizes[0] != result[0]:
        return None
    return _as_blocked(rewriter, value)


def _pool(rewriter: Any, call: Any, kind: str) -> _Blocked | None:
    from tvm import topi

    data, attributes = call.args[0], call.attrs
    if data not in rewriter.blocked or attributes.layout != "NCHW":
        return None
    source = rewriter.blocked[data]

    def pool(x: Any) -> Any:
        return topi.nn.pool2d(
            x,
            kernel=attributes.pool_size,
            stride=attributes.strides,
            dilation=attributes.dilation,
            padding=attributes.padding,
            pool_type=kind,
            ceil_mode=attributes.ceil_mode,
            layout=_LAYOUT,
            count_include_pad=bool(getattr(attributes, "count_include_pad", True)),
        )

    made = rewriter.builder_.call_te(pool, source.value, primfunc_name_hint=f"{kind}_pool2d")
    return _Blocked(made, source.channels)


def _mean(rewriter: Any, call: Any) -> _Blocked | None:
    from tvm import relax

    data, attributes = call.args[0], call.attrs
    axes = attributes.axis
    if data not in rewriter.blocked or axes is None or not attributes.keepdims:
        return None
    if sorted(int(axis) % 4 for axis in axes) != [2, 3]:
        return None
    source = rewriter.blocked[data]
    return _Blocked(relax.op.mean(source.value, [2, 3], keepdims=True), source.channels)


def _concatenation(rewriter: Any, call: Any) -> _Blocked | None:
    from tvm import relax

    parts = call.args[0]
    if not isinstance(parts, relax.Tuple) or int(call.attrs.axis) % 4 != 1:
        return None
    sources = [rewriter.blocked.get(part) for part in parts.fields]
    if any(s is None or s.channels % LANES for s in sources):
        return None
    joined = relax.op.concat([s.value for s in sources if s is not None], 1)
    return _Blocked(joined, sum(s.channels for s in sources if s is not None))
