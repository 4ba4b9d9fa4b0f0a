"""Shapes and dtypes: run nodes on fake tensors to give them their ``meta["val"]``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import FakeTensor, FakeTensorMode

from pruna_ir.errors import InvalidIRError
from pruna_ir.program import Program, source_line


def fake_mode(program: Program) -> FakeTensorMode:
    """The fake-tensor mode (with its shape environment) that the program was captured under."""
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    raise InvalidIRError("no node of the program carries a fake tensor; capture it again")


def propagated(program: Program, node: fx.Node, mode: FakeTensorMode) -> Any:
    """The value that a node has on the values of its operands, as a fake tensor.

    Raises:
        InvalidIRError: the operator refuses its operands.
    """
    if node.op == "get_attr":
        return mode.from_tensor(program.tensor(str(node.target)), static_shapes=True)
    if node.op == "placeholder":
        return node.meta["val"]
    if node.op == "output":
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
    if not callable(node.target):
        raise InvalidIRError(f"{node.name}: {node.op} of {node.target} is not part of the IR")
    try:
        # Without the Python dispatcher some C++ kernels (pad) fix dynamic sizes to their hints.
        with mode, enable_python_dispatcher(), torch.no_grad():
            return node.target(*args, **kwargs)
    except Exception as error:
        where = f"\n  model source: {source_line(node)}" if source_line(node) else ""
        raise InvalidIRError(
            f"{node.name}: {node.target} does not accept its operands: {error}{where}"
        ) from error


class EqualCalls:
    """Propagation that runs equal calls on the same values once: layers repeat."""

    def __init__(self, program: Program, mode: FakeTensorMode) -> None:
        self._program, self._mode = program, mode
        self._known: dict[Any, tuple[list[Any], Any]] = {}

    def propagated(self, node: fx.Node) -> Any:
        """What the function `propagated` gives.

        Raises:
            InvalidIRError: the operator refuses its operands.
        """
        if node.op != "call_function":
            return propagated(self._program, node, self._mode)
        key = (node.target, _identity(node.args), _identity(tuple(node.kwargs.items())))
        if key not in self._known:
            # The operands are kept, so that no other value gets their identity.
            operands = [operand.meta["val"] for operand in node.all_input_nodes]
            self._known[key] = operands, propagated(self._program, node, self._mode)
        return self._known[key][1]


def _identity(argument: Any) -> Any:
    """Equal for arguments that are the same values, of the same types."""
    if isinstance(argument, fx.Node):
        value = argument.meta["val"]
        return value.node.expr if isinstance(value, torch.SymInt) else ("value", id(value))
    if isinstance(argument, (list, tuple)):
        return tuple(map(_identity, argument))
    # 1, 1.0 and True are equal but not the same.
    return type(argument), repr(argument)


def resized_value(value: torch.Tensor, sizes: Sequence[int | torch.SymInt]) -> torch.Tensor:
    """A fake tensor like another one, of known sizes; nothing is propagated."""
    if not isinstance(value, FakeTensor):
        raise InvalidIRError("a node's value must be a fake tensor; capture the program again")
    empty = torch.empty(sizes, dtype=value.dtype, device="meta")
    return FakeTensor(value.fake_mode, empty, value.device)


def propagate(program: Program, nodes: Iterable[fx.Node]) -> None:
    """Give each node, in order, a fresh ``meta["val"]``; for nodes of a program under rewrite."""
    mode = fake_mode(program)
    for node in nodes:
        node.meta["val"] = propagated(program, node, mode)


def same_value(a: Any, b: Any) -> bool:
    """Whether two propagated values agree in structure, dtype and (symbolic) shape."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.dim() == b.dim() and all(
            _same_size(x, y) for x, y in zip(a.shape, b.shape, strict=True)
        )
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same_value, a, b))
    return type(a) is type(b) and (isinstance(a, torch.SymInt) or bool(a == b))


def _same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and a.node.expr == b.node.expr:
        return True
    return str(a) == str(b)
