"""What arrives at each layer: calibration batches carried through a program node by node.

A pass that fits one layer after another needs the inputs of layer n as the layers before it,
already changed, produce them. Running the program anew for each layer costs O(layers^2); a
`Frontier` instead holds every batch at one node and steps all of them together, so that a whole
walk costs one run of the program over the data, whatever is changed on the way.

Limits: all batches are held at once, so memory is that of the live activations at the widest place
times the number of samples. Values run at the program's own precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from pruna_ir.data import DataSource
from pruna_ir.errors import PassError, UsageError
from pruna_ir.kernels.fake_quant import KERNEL as FAKE_QUANT
from pruna_ir.program import Origin, Program
from pruna_ir.transform import Rewrite

Inputs = tuple[torch.Tensor, ...]


def calibration_inputs(rw: Rewrite, name: str) -> list[Inputs]:
    """The inputs of every batch of the context's data, checked against the program.

    Args:
        rw: the rewrite of a pass that is fitted to data.
        name: the pass's name, for the error.

    Raises:
        UsageError: there is no data, or it does not fit the program.
    """
    if rw.context.data is None:
        raise UsageError(
            f"{name} needs calibration data: give --data FILE.npz, or Context(data=...)"
        )
    return batches_of(rw.before, rw.context.data)


def batches_of(program: Program, data: DataSource) -> list[Inputs]:
    """The inputs of every batch, checked against the program.

    Raises:
        UsageError: there is no batch, or one does not fit.
    """
    found = [tuple(program.bind(batch.inputs, {})) for batch in data]
    if not found:
        raise UsageError("the calibration data holds no batch")
    return found


def origin_of(rw: Rewrite, name: str) -> Origin:
    """What the program under rewrite was pruned from.

    Raises:
        PassError: it does not know.
    """
    origin = rw.before.origin
    if origin is None:
        raise PassError(
            f"{name}: the program does not know what it was pruned from; run {name} right after "
            "prune-channels, in the same pipeline (only compensation passes may stand between)"
        )
    return origin


class Frontier:
    """All batches of a program, at one place of its graph.

    The graph may be edited ahead of the frontier and its tensors may be replaced; both are read
    when a node runs. Values are freed once every reader has run.

    >>> from pruna_ir import capture
    >>> program = capture(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Tanh()), (torch.ones(2),))
    >>> frontier = Frontier(program, [(torch.tensor([-1.0, 2.0]),)])
    >>> relu, tanh = program.calls()
    >>> frontier.reach(tanh)
    >>> frontier.values(relu)
    [tensor([0., 2.])]
    """

    def __init__(self, program: Program, batches: Sequence[Inputs]) -> None:
        self._program = program
        self._env: dict[fx.Node, list[Any]] = {}
        self._done: set[fx.Node] = set()
        self.count = len(batches)
        for position, node in enumerate(program.placeholders()):
            self._env[node] = [inputs[position] for inputs in batches]
            self._done.add(node)
        self._next = next(iter(program.graph.nodes))

    def reach(self, node: fx.Node) -> None:
        """Run everything that stands before a node; what has run already does not run again."""
        while self._next is not node and self._next.op != "output":
            self._step(self._next)
            self._next = self._next.next

    def pass_by(self, node: fx.Node) -> None:
        """Run everything up to a node, and the node."""
        if node not in self._done:
            self.reach(node.next)

    def ahead(self) -> Iterator[fx.Node]:
        """The calls that have not run yet, in order."""
        node = self._next
        while node.op != "output":
            if node.op == "call_function":
                yield node
            node = node.next

    def values(self, node: fx.Node) -> list[Any]:
        """A node's value for every batch; it must have run, and have a reader that has not.

        Tensors of the program are read as they are now.
        """
        if node.op == "get_attr":
            return [self._program.tensor(str(node.target)).detach()] * self.count
        return self._env[node]

    def again(self, node: fx.Node) -> None:
        """Run a node anew, whose operands are stored tensors, since one of them was replaced."""
        if node in self._env:
            self._env[node] = self._results(node)

    def evaluate(
        self, node: fx.Node, batch: int, instead: Mapping[fx.Node, Any] | None = None
    ) -> Any:
        """What a node yields for one batch, with some of its operands replaced."""
        replaced = instead or {}

        def read(operand: fx.Node) -> Any:
            return replaced[operand] if operand in replaced else self.values(operand)[batch]

        args, kwargs = fx.map_arg((node.args, node.kwargs), read)
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        with torch.no_grad():
            return target(*args, **kwargs)

    def _results(self, node: fx.Node) -> list[Any]:
        if node.target is FAKE_QUANT.op and all(n.op == "get_attr" for n in node.all_input_nodes):
            return [self.evaluate(node, 0)] * self.count
        return [self.evaluate(node, batch) for batch in range(self.count)]

    def _step(self, node: fx.Node) -> None:
        if node.op == "call_function":
            self._env[node] = self._results(node)
        self._done.add(node)
        for operand in (*node.all_input_nodes, node):
            if all(user in self._done for user in operand.users):
                self._env.pop(operand, None)


def observed(
    program: Program, inputs: Inputs, nodes: Sequence[fx.Node]
) -> dict[fx.Node, torch.Tensor]:
    """The values of some nodes on one batch, at the program's own precision."""
    found: dict[fx.Node, torch.Tensor] = {}
    wanted = set(nodes)

    class Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n in wanted:
                found[n] = result.detach()
            return result

    watcher = Watcher(program.module, garbage_collect_values=True)
    watcher.extra_traceback = False
    with torch.no_grad():
        watcher.run(*(value.clone() for value in inputs))
    return found
