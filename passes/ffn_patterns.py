"""What feed-forward blocks are made of: dense layers and activations, in each of their spellings.

A dense layer is ``linear``, ``addmm`` on two dimensions, or ``addmm`` between the reshapes that
flatten and restore leading dimensions (GPT-2's Conv1D), or a part of one that stores several
layers in one weight (see ``layer_parts``). An activation is one operator, or its
formula spelt out; products are compared as a number times powers of nodes, so that the order
in which a model multiplies does not matter:

    gelu        0.5 x (1 + erf(x / sqrt(2)))
    gelu_tanh   0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
    silu        x sigmoid(x)
    quick_gelu  x sigmoid(1.702 x)
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from pruna_ir.call import bind_arguments
from pruna_ir.kernels.activations import QUICK_GELU_SLOPE
from pruna_ir.passes.layer_parts import SPLITS, layer_part

aten = torch.ops.aten

_RESHAPES = (aten.reshape.default, aten.view.default)
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


@dataclass(frozen=True)
class Dense:
    """A dense layer: the node that it ends at, and before it the product where that is another.

    The weight is [out, in], or [in, out] where ``transposed``.
    """

    nodes: tuple[fx.Node, ...]
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool = False
    rows: fx.Node | None = None
    """The reshape that flattens leading dimensions before an ``addmm``, where there is one."""
    unfit: str = ""
    """Why this layer cannot be fused, although it looks like one."""
    part: tuple[int, int] | None = None
    """The first output and the one behind the last, where the weight has others, too."""

    @property
    def outputs(self) -> int:
        """How many outputs it has."""
        if self.part is not None:
            return self.part[1] - self.part[0]
        return int(self.weight.meta["val"].shape[1 if self.transposed else 0])


def dense(node: Any) -> Dense | None:
    """The dense layer that computes a node's value; None where something else does."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.linear.default:
        bound = bind_arguments(node)
        return Dense((node,), bound["input"], bound["weight"], bound["bias"])
    if node.target is aten.addmm.default:
        return _addmm((node,), node, bind_arguments(node)["mat1"], None)
    if (part := layer_part(node)) is not None:
        whole = dense(part.source)
        return part_of(whole, part.start, part.stop, part.nodes) if whole is not None else None
    if node.target not in _RESHAPES:
        return None
    product = bind_arguments(node)["self"]
    if product.target is not aten.addmm.default:
        return None
    rows = bind_arguments(product)["mat1"]
    if rows.target not in _RESHAPES:
        return None
    source = bind_arguments(rows)["self"]
    if not _same_rows(source, node, rows):
        return None
    return _addmm((node, product), product, source, rows)


def part_of(
    whole: Dense, start: int, stop: int, nodes: tuple[fx.Node, ...] = ()
) -> Dense | None:
    """The layer whose outputs are a part of another's; None where that is a part itself."""
    if whole.part is not None:
        return None
    unfit = whole.unfit
    stored = [whole.weight, *([whole.bias] if whole.bias is not None else [])]
    if not unfit and any(tensor.op != "get_attr" for tensor in stored):
        unfit = f"the weight of {whole.nodes[-1].name} is computed in the graph"
    return replace(whole, nodes=(*nodes, *whole.nodes), part=(start, stop), unfit=unfit)


def _same_rows(source: fx.Node, result: fx.Node, rows: fx.Node) -> bool:
    """Whether two reshapes only flatten and restore the leading dimensions."""
    before, after = source.meta["val"].shape, result.meta["val"].shape
    return (
        str(list(before[:-1])) == str(list(after[:-1]))
        and before[-1] == rows.meta["val"].shape[-1]
        and isinstance(before[-1], int)
        and isinstance(after[-1], int)
    )


def _addmm(
    nodes: tuple[fx.Node, ...], product: fx.Node, source: fx.Node, rows: fx.Node | None
) -> Dense:
    bound = bind_arguments(product)
    unfit = ""
    if bound["alpha"] != 1 or bound["beta"] != 1:
        unfit = f"{product.name} has alpha={bound['alpha']} and beta={bound['beta']}"
    elif len(bound["self"].meta["val"].shape) != 1:
        unfit = f"{product.name} adds a matrix, not a bias"
    elif bound["mat2"].op != "get_attr":
        unfit = f"the weight of {product.name} is computed in the graph"
    return Dense(
        nodes, source, bound["mat2"], bound["self"], transposed=True, rows=rows, unfit=unfit
    )


@dataclass(frozen=True)
class Activation:
    """An activation by name, what it reads, and the nodes that compute it (the last one first)."""

    name: str
    input: fx.Node
    nodes: tuple[fx.Node, ...]


def activation(node: Any) -> Activation | None:
    """The activation that computes a node's value; None where something else does."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target is aten.gelu.default:
        bound = bind_arguments(node)
        name = "gelu_tanh" if bound["approximate"] == "tanh" else "gelu"
        return Activation(name, bound["self"], (node,))
    if node.target in _PLAIN:
        return Activation(_PLAIN[node.target], bind_arguments(node)["self"], (node,))
    return _spelt_out(node)


_PLAIN = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.sigmoid.default: "sigmoid",
}


_MOVERS = (
    *_RESHAPES, *SPLITS, operator.getitem, aten.slice.Tensor, aten.permute.default,
    aten.transpose.int, aten.flatten.using_ints, aten.unsqueeze.default, aten.squeeze.dim,
)  # fmt: skip
_OTHER_LAYERS = (
    aten.layer_norm.default, aten.rms_norm.default, aten.batch_norm.default,
    aten.group_norm.default, aten.dropout.default, aten.glu.default, aten.prelu.default,
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
)  # fmt: skip
_BENDS = frozenset(
    {
        "celu", "clamp", "elu", "erf", "exp", "gelu", "glu", "hardsigmoid", "hardswish",
        "hardtanh", "leaky_relu", "log_sigmoid", "mish", "prelu", "relu", "relu6", "selu",
        "sigmoid", "silu", "softplus", "tanh",
    }
)  # fmt: skip
_FARTHEST = 32
"""How many nodes two layers of one block may have between them."""


def between_layers(node: fx.Node) -> str:
    """The names of what stands between dense layers and a node's value; empty for anything else.

    Pointwise operators alone, or an activation with norms, convolutions and moves around it.
    """
    found: list[fx.Node] = []
    todo, seen = [node], {node}
    pointwise = True
    while todo:
        current = todo.pop()
        if dense(current) is not None:
            continue
        if current.op == "get_attr" and current is not node:
            pointwise = False
            continue
        plain = _is_pointwise(current)
        if not (plain or current.target in _MOVERS or current.target in _OTHER_LAYERS):
            return ""
        if len(found) == _FARTHEST:
            return ""
        pointwise &= plain
        found.append(current)
        sources = [source for source in current.all_input_nodes if source not in seen]
        todo += [source for source in sources if source.target is not aten.sym_size.int]
        seen.update(sources)
    if not pointwise and not any(_short_name(one) in _BENDS for one in found):
        return ""
    return ", ".join(one.name for one in reversed(found))


def _is_pointwise(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _short_name(node: fx.Node) -> str:
    parts = str(node.target).split(".")
    return parts[1] if len(parts) > 1 else parts[0]


# -- formulas ----------------------------------------------------------------------------------


@dataclass
class _Product:
    """``scale`` times the product of ``powers``, computed by ``nodes``."""

    scale: float = 1.0
    powers: Counter[fx.Node] = field(default_factory=Counter)
    nodes: list[fx.Node] = field(default_factory=list)


def _product(node: fx.Node) -> _Product:
    """A node's value as a product; the node itself to the power 1 where it is none."""
    found = _Product()
    todo = [(node, 1)]
    while todo:
        current, power = todo.pop()
        parts = _factors(current)
        if parts is None:
            found.powers[current] += power
            continue
        found.nodes.append(current)
        scale, operands, exponent = parts
        found.scale *= scale**power
        todo += [(operand, power * exponent) for operand in operands]
    return found


def _factors(node: fx.Node) -> tuple[float, list[fx.Node], int] | None:
    """(scale, operands, exponent) with value = scale * (product of operands) ^ exponent."""
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        bound = bind_arguments(node)
        other = bound["other"]
        if isinstance(other, fx.Node):
            return 1.0, [bound["self"], other], 1
        return float(other), [bound["self"]], 1
    if node.target in (aten.div.Tensor, aten.div.Scalar):
        bound = bind_arguments(node)
        if isinstance(bound["other"], fx.Node) or not bound["other"]:
            return None
        return 1.0 / float(bound["other"]), [bound["self"]], 1
    if node.target is aten.pow.Tensor_Scalar:
        bound = bind_arguments(node)
        exponent = bound["exponent"]
        if isinstance(exponent, fx.Node) or exponent not in (2, 3):
            return None
        return 1.0, [bound["self"]], int(exponent)
    return None


def _plus_one(node: fx.Node) -> fx.Node | None:
    """a where the node computes a + 1."""
    if node.target not in (aten.add.Tensor, aten.add.Scalar):
        return None
    bound = bind_arguments(node)
    one = not isinstance(bound["other"], fx.Node) and bound["other"] == 1 and bound["alpha"] == 1
    return bound["self"] if one and isinstance(bound["self"], fx.Node) else None


def _near(value: float, expected: float) -> bool:
    """Equal up to the digits in which formulas are commonly written down."""
    return math.isclose(value, expected, rel_tol=1e-10)


def _spelt_out(node: fx.Node) -> Activation | None:
    product = _product(node)
    if len(product.powers) != 2 or set(product.powers.values()) != {1}:
        return None
    for factor in product.powers:
        (x,) = (other for other in product.powers if other is not factor)
        found = _gated_by(factor, x, product.scale)
        if found is not None:
            name, inner = found
            return Activation(name, x, (*product.nodes, factor, *inner))
    return None


def _gated_by(factor: fx.Node, x: fx.Node, scale: float) -> tuple[str, list[fx.Node]] | None:
    """The activation ``scale * x * factor``, by name, with the inner nodes of ``factor``."""
    if factor.target is aten.sigmoid.default:
        argument = _product(bind_arguments(factor)["self"])
        if scale != 1.0 or argument.powers != Counter({x: 1}):
            return None
        if argument.scale == 1.0:
            return "silu", argument.nodes
        quick = _near(argument.scale, QUICK_GELU_SLOPE)
        return ("quick_gelu", argument.nodes) if quick else None
    curve = _plus_one(factor)
    if curve is None or not _near(scale, 0.5):
        return None
    if curve.target is aten.erf.default:
        argument = _product(bind_arguments(curve)["self"])
        exact = argument.powers == Counter({x: 1}) and _near(argument.scale, math.sqrt(0.5))
        return ("gelu", [curve, *argument.nodes]) if exact else None
    if curve.target is aten.tanh.default:
        inner = _cubic(bind_arguments(curve)["self"], x)
        return ("gelu_tanh", [curve, *inner]) if inner is not None else None
    return None


def _cubic(node: fx.Node, x: fx.Node) -> list[fx.Node] | None:
    """The nodes that compute sqrt(2/pi) (x + 0.044715 x^3), or sqrt(2/pi) x (1 + 0.044715 x^2)."""
    product = _product(node)
    if not _near(product.scale, _SQRT_2_OVER_PI):
        return None
    sums = [factor for factor in product.powers if factor is not x]
    if len(sums) != 1 or product.powers[sums[0]] != 1 or product.powers[x] > 1:
        return None
    (total,) = sums
    outer = product.powers[x]
    cube = _plus_one(total) if outer == 1 else _sum_with(total, x)
    if cube is None:
        return None
    term = _product(cube)
    if term.powers != Counter({x: 3 - outer}) or not _near(term.scale, 0.044715):
        return None
    return [*product.nodes, total, *term.nodes]


def _sum_with(node: fx.Node, x: fx.Node) -> fx.Node | None:
    """a where the node computes x + a or a + x."""
    if node.target is not aten.add.Tensor:
        return None
    bound = bind_arguments(node)
    operands = [bound["self"], bound["other"]]
    if bound["alpha"] != 1 or x not in operands:
        return None
    operands.remove(x)
    return operands[0] if isinstance(operands[0], fx.Node) else None
