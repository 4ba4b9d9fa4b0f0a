"""The oracle of structured pruning: the unpruned program with removed channels dead.

Executes a program in float64 on pairs (value, alive): ``alive`` is a bool tensor of the value's
shape. Parameters are dead where a removal plan says so, and nowhere else; everything further
follows from what each operator computes:

- layout operators are applied to ``alive`` itself;
- an elementwise result is alive where all operands are;
- a contraction (convolution, matmul, attention) reads dead elements as 0, and a row or column of
  its result is alive where the operand's row or column has anything alive;
- statistics (mean, variance, norms) over an axis are those of the alive elements;
- softmax gives dead elements no weight.

An operator that reads dead elements and is not described here is refused by name: the oracle
never guesses. It shares no code with the analysis it judges (`pruna_ir.coupling`), which relates
indices before anything runs, where this file only executes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pruna_ir.call import bind_arguments
from pruna_ir.depthwise import ShiftedDepthwise
from pruna_ir.masked_operators import (
    Masked,
    Operands,
    lift,
    lifted,
    masked,
    plain,
    refusal,
    restrided,
    wrap,
)
from pruna_ir.masked_statistics import rms_norm
from pruna_ir.masked_table import handler_of
from pruna_ir.program import Program, Removed


@dataclass(frozen=True)
class MaskedOracle:
    """What a program must compute after removal, as an oracle for `Rewrite.promise`.

    Attributes:
        removed: the removed indices of each tensor dimension.
    """

    removed: Removed

    def __call__(self, program: Program, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The float64 outputs that the pruned program must have."""
        return masked_reference(program, inputs, self.removed)

    def trace(
        self,
        program: Program,
        inputs: Sequence[Tensor],
        observe: Callable[[fx.Node, Any], None] | None = None,
    ) -> tuple[Tensor, ...]:
        """The outputs; ``observe`` sees every call with the value that survives of it."""

        def compact(node: fx.Node, result: Any) -> None:
            if observe is not None and isinstance(result, Masked):
                observe(node, survivors(result))

        return masked_reference(program, inputs, self.removed, compact)


def survivors(pair: Masked) -> Tensor:
    """The alive part of a tensor, in the shape that it has after removal.

    >>> alive = torch.tensor([[True, False, True], [True, False, True]])
    >>> survivors(Masked(torch.arange(6.0).view(2, 3), alive))
    tensor([[0., 2.],
            [3., 5.]])
    """
    value, alive = pair.value, pair.alive
    if alive is None:
        return value
    for dim in range(value.dim()):
        others = [d for d in range(value.dim()) if d != dim]
        kept = alive.any(others) if others else alive
        if not bool(kept.all()):
            value = value.index_select(dim, kept.nonzero().flatten())
    return value


def masked_reference(
    program: Program,
    inputs: Sequence[Tensor],
    removed: Removed,
    observe: Callable[[fx.Node, Any], None] | None = None,
) -> tuple[Tensor, ...]:
    """The float64 outputs of a program whose removed parameter indices are dead.

    Args:
        program: the unpruned program.
        inputs: one tensor per input; floating-point ones are lifted to float64.
        removed: the removed indices of each tensor dimension.
        observe: sees every call with its result, a `Masked` where it is a tensor.

    Raises:
        UnsupportedError: an operator reads dead elements and is not known here, or an output of
            the program would be dead in part.
    """
    with torch.no_grad(), ShiftedDepthwise():
        return _interpret(program, inputs, removed, observe)


def _interpret(
    program: Program,
    inputs: Sequence[Tensor],
    removed: Removed,
    observe: Callable[[fx.Node, Any], None] | None,
) -> tuple[Tensor, ...]:
    env: dict[fx.Node, Any] = {}
    left = {node: len(node.users) for node in program.graph.nodes}
    given = iter(inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = Masked(lift(next(given)))
        elif node.op == "get_attr":
            name = str(node.target)
            env[node] = _parameter(program.tensor(name), removed.get(name, {}))
        elif node.op == "call_function":
            env[node] = _run(node, env)
            if observe is not None:
                observe(node, env[node])
            for source in node.all_input_nodes:
                left[source] -= 1
                if not left[source]:
                    del env[source]
    return tuple(_output(node, env[node]) for node in program.results())


def _parameter(tensor: Tensor, dims: Mapping[int, Sequence[int]]) -> Masked:
    value = lift(tensor.detach())
    if not any(len(indices) for indices in dims.values()):
        return Masked(value)
    alive = torch.ones(value.shape, dtype=torch.bool)
    for dim, indices in dims.items():
        alive.index_fill_(dim, torch.as_tensor(indices, dtype=torch.int64), False)  # noqa: FBT003
    return masked(value, alive)


def _output(node: fx.Node, result: Any) -> Tensor:
    if not isinstance(result, Masked) or result.alive is not None:
        raise refusal(node, "would be dead in part, though it is an output of the program")
    return result.value


def _run(node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
    if not isinstance(node.target, torch._ops.OpOverload):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: plain(env[n]))
        if node.target is operator.getitem:
            return env[node.args[0]][args[1]]  # type: ignore[index]
        return node.target(*args, **kwargs)  # type: ignore[operator]
    operands = [env[n] for n in node.all_input_nodes]
    if node.target is torch.ops.aten.rms_norm.default:
        # Its default epsilon depends on the dtype, which is float64 here.
        return rms_norm(Operands(node, fx.map_arg(bind_arguments(node), lambda n: env[n])))
    if not _yields_tensors(node) or not any(_is_dead(operand) for operand in operands):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: plain(env[n]))
        return wrap(restrided(node.target)(*lifted(args), **lifted(kwargs)))
    bound = fx.map_arg(bind_arguments(node), lambda n: env[n])
    return handler_of(node)(Operands(node, lifted(bound)))


def _yields_tensors(node: fx.Node) -> bool:
    """False for ``sym_size`` and its like, which read the full sizes."""
    return isinstance(node.meta.get("val"), (Tensor, tuple, list))


def _is_dead(operand: Any) -> bool:
    if isinstance(operand, (tuple, list)):
        return any(map(_is_dead, operand))
    return isinstance(operand, Masked) and operand.alive is not None


