"""Learned grids: scales and zero points of a program's fake-quants, trained with its weights.

    lsq    every scale learns, with the gradient scale of Esser et al. (ICLR 2020, section 2.2):

               g = 1 / sqrt(N Q)      N: values a scale covers (of one sample, for activations)
                                      Q: the largest level, max(qmax - zero, zero - qmin)

    lsq+   moreover the offsets of activations whose zero point lies inside of the grid (Bhalgat et
           al., 2020); rounded to integers with a straight-through gradient, with the same g
    pact   clipping bounds a = Q scale of activations learn (Choi et al., 2018); weight scales stay
    fixed  scales stay: only weights learn, straight through (Bengio et al., 2013)

Where a grid that begins at its zero point alone reads an activation, the grid's own clamp does
what the activation does: relu(x) is left out, and of relu6(x) only the upper bound remains, with
the same values and the same gradients.

Scales stay positive by projection: after each step a scale below 1/1024 of its initial value is
raised to that, and offsets are moved to where their zero point is one of the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn

from pruna_ir.call import bind_arguments
from pruna_ir.kernels.fake_quant import KERNEL as FAKE_QUANT
from pruna_ir.kernels.learned_fake_quant import learned_fake_quant, zero_point_of
from pruna_ir.program import Program, computed_nodes, shape_of

aten = torch.ops.aten

Method = Literal["lsq", "lsq+", "pact", "fixed"]

LEAST_SHARE = 2.0**-10
"""How far a scale may fall, as a share of what it was."""


@dataclass(frozen=True)
class _Grid:
    """The fake-quants that share one scale.

    Attributes:
        scale: the name of the scale.
        zero_point: the name of the zero point.
        nodes: the fake-quants of the program that read them.
        activation: whether they quantise computed values.
    """

    scale: str
    zero_point: str
    nodes: tuple[fx.Node, ...]
    activation: bool

    @property
    def bounds(self) -> tuple[int, int]:
        """``qmin`` and ``qmax``."""
        bound = bind_arguments(self.nodes[0])
        return int(bound["qmin"]), int(bound["qmax"])

    def values(self) -> int:
        """How many values one scale covers; those of one sample for activations."""
        total = 0
        for node in self.nodes:
            sizes = [_size(size) for size in shape_of(node) or ()]
            axis = bind_arguments(node)["axis"]
            if self.activation and len(sizes) > 1:
                sizes[0] = 1
            if axis is not None:
                sizes[axis] = 1
            total += math.prod(sizes)
        return max(total, 1)


def _size(size: int | torch.SymInt) -> int:
    """A size; a dynamic one's is that of the example that the program was captured with."""
    return size if isinstance(size, int) else cast("int", size.node.hint)


def grids_of(program: Program) -> list[_Grid]:
    """The grids of a program's fake-quants, by scale, in graph order."""
    computed = computed_nodes(program)
    readers: dict[tuple[str, str], list[fx.Node]] = {}
    for node in program.calls(FAKE_QUANT.op):
        bound = bind_arguments(node)
        key = (str(bound["scale"].target), str(bound["zero_point"].target))
        readers.setdefault(key, []).append(node)
    return [
        _Grid(scale, zero, tuple(nodes), bind_arguments(nodes[0])["x"] in computed)
        for (scale, zero), nodes in readers.items()
    ]


class LearnedGrids:
    """The scales and offsets of a module as parameters, and what they must stay.

    The module is `training.trainable` of the program. Its fake-quants are edited in place.
    """

    def __init__(self, program: Program, module: fx.GraphModule, method: Method) -> None:
        self._module = module
        self.scales: dict[str, nn.Parameter] = {}
        self._offsets: dict[str, tuple[nn.Parameter, _Grid]] = {}
        self._floors: dict[str, Tensor] = {}
        for grid in grids_of(program):
            learns = method != "fixed" and (grid.activation or method != "pact")
            offset = self._learn(program, grid, method) if learns else ""
            zero = program.tensor(grid.zero_point)
            self._replace(
                grid, offset=offset, rounding=method != "pact",
                starts_at_zero=zero.dim() == 0 and int(zero) == grid.bounds[0],
            )  # fmt: skip
        graph = module.graph
        graph.eliminate_dead_code()
        module.recompile()

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Everything that learns."""
        return (*self.scales.values(), *(offset for offset, _ in self._offsets.values()))

    def _learn(self, program: Program, grid: _Grid, method: Method) -> str:
        """Make a scale a parameter; returns the name of the offset, where there is one."""
        scale, zero = program.tensor(grid.scale), program.tensor(grid.zero_point)
        qmin, qmax = grid.bounds
        level = torch.maximum(qmax - zero, zero - qmin).to(scale.dtype)
        learned = _own_parameter(self._module, grid.scale)
        self.scales[grid.scale] = learned
        self._floors[grid.scale] = scale.detach() * LEAST_SHARE
        factor = (grid.values() * level).rsqrt()
        # da = Q dscale, so that a step on a is one on the scale with 1 / Q^2 of its gradient.
        _scale_gradient(learned, level.square().reciprocal() if method == "pact" else factor)
        inside = bool(((zero > qmin) & (zero < qmax) & (zero != 0)).all())
        if not (method == "lsq+" and grid.activation and inside):
            return ""
        name = f"{grid.scale}_offset"
        offset = nn.Parameter(-zero.to(scale.dtype) * scale.detach())
        _scale_gradient(offset, factor)
        _register(self._module, name, offset)
        self._offsets[grid.zero_point] = (offset, grid)
        return name

    def _replace(
        self, grid: _Grid, *, offset: str, rounding: bool, starts_at_zero: bool
    ) -> None:
        """Let the fake-quants of a grid have the gradients of the method."""
        names = {node.name for node in grid.nodes}
        for node in [n for n in self._module.graph.nodes if n.name in names]:
            bound = bind_arguments(node)
            with self._module.graph.inserting_before(node):
                shift = self._module.graph.get_attr(offset) if offset else None
            x, cap = bound["x"], None
            if not offset and starts_at_zero:
                x, cap = _without_clip(node, x, capped=rounding)
            node.args = (x, *(bound[n] for n in ("scale", "zero_point", "axis", "qmin", "qmax")))
            node.kwargs = {"offset": shift, "rounding": rounding, "cap": cap}
            node.target = learned_fake_quant

    def project(self) -> None:
        """Bring everything back to where it must be; to be called after each step."""
        with torch.no_grad():
            for name, scale in self.scales.items():
                torch.maximum(scale, self._floors[name], out=scale)
            for offset, grid in self._offsets.values():
                qmin, qmax = grid.bounds
                scale = self.scales[grid.scale]
                offset.copy_(offset.clamp(-qmax * scale, -qmin * scale))

    def values(self) -> dict[str, Tensor]:
        """The scales and zero points as a program holds them: buffers, zero points int32."""
        found = {name: scale.detach().clone() for name, scale in self.scales.items()}
        for name, (offset, grid) in self._offsets.items():
            found[name] = zero_point_of(self.scales[grid.scale], offset, *grid.bounds)
        return found


def _without_clip(reader: fx.Node, x: fx.Node, *, capped: bool) -> tuple[fx.Node, float | None]:
    """What to quantise, and its upper bound, where the grid's own clamp at 0 does the rest."""
    if len(x.users) > 1 or reader not in x.users:
        return x, None
    if x.target is aten.relu.default:
        return bind_arguments(x)["self"], None
    if capped and x.target is aten.hardtanh.default:
        bound = bind_arguments(x)
        if bound["min_val"] == 0 < bound["max_val"]:
            return bound["self"], float(bound["max_val"])
    return x, None


def _scale_gradient(parameter: nn.Parameter, factor: Tensor) -> None:
    parameter.register_hook(lambda grad: grad * factor)  # type: ignore[no-untyped-call]


def _owner(module: nn.Module, name: str) -> tuple[Any, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf


def _own_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """Make a buffer of the module a parameter of the same name and value."""
    owner, leaf = _owner(module, name)
    parameter = nn.Parameter(getattr(owner, leaf).detach().clone())
    delattr(owner, leaf)
    owner.register_parameter(leaf, parameter)
    return parameter


def _register(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, leaf = _owner(module, name)
    owner.register_parameter(leaf, parameter)
