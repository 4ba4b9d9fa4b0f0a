"""A walk over the values of a program that somebody wants to see, as fast as torch allows.

Values are those of the program up to rounding, and each is freed at its last use. What makes it
faster than the program itself:

    - only what the wanted values depend on is computed;
    - convolutions are packed (see `packed_convolutions`), and fused with what follows where
      nobody wants the value in between;
    - a batch is run in parts where its rows are provably independent (see `row_independence`) and
      its values are so large that the system would hand out fresh memory for each of them, whose
      first use costs more than many an operator.

A wanted value is shown once for each part. Where several ask to be shown values, parts are run
side by side, one thread for each who asks, and each sees some of the parts: that uses processors
better than threads within operators, most of which are too short to share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import fx

from pruna_ir.packed_convolutions import Layouts, PackedConvolution, packed_convolutions
from pruna_ir.program import Program, shape_of
from pruna_ir.row_independence import rows_are_independent

PART_BYTES = 1 << 24
"""The largest value of a part; allocators keep twice as much at hand, but not four times."""


@dataclass(frozen=True)
class _Step:
    """One node to compute, and what to do before and after."""

    node: fx.Node
    packed: PackedConvolution | None
    restores: tuple[fx.Node, ...]
    frees: tuple[fx.Node, ...]

    def reads(self) -> tuple[fx.Node, ...]:
        return tuple(self.node.all_input_nodes) if self.packed is None else self.packed.reads()


class PackedWalk:
    """Runs as much of a graph as is wanted and shows the wanted values, in the graph's order.

    Args:
        program: what to run; its graph may be under rewrite, but must stay as it is meanwhile.
        wanted: the nodes whose values to show.
        shows: called with each of them and its value, which has the program's shape, but not
            always its strides. They may keep the value, but not write into it. One sees all parts,
            in the order of their rows; several see some each, in threads of their own.
    """

    def __init__(
        self,
        program: Program,
        wanted: Collection[fx.Node],
        *shows: Callable[[fx.Node, Any], None],
    ) -> None:
        self._wanted = frozenset(wanted)
        packed = packed_convolutions(program, self._wanted)
        self._steps = _steps(program, self._wanted, packed)
        self._most_rows = _most_rows(program, {step.node for step in self._steps})
        self._least_rows = max((bounds.lower for bounds in program.dims.values()), default=1)
        self._runners = [_Runner(program, self._steps, self._wanted, show) for show in shows]

    def walk(self, inputs: tuple[torch.Tensor, ...]) -> None:
        """Run on one batch: a tensor for each input."""
        parts = self._parts(inputs)
        runners = self._runners[: len(parts)]
        if len(runners) == 1:
            for part in parts:
                runners[0](part)
        else:
            _side_by_side(runners, parts)

    def _parts(self, inputs: tuple[torch.Tensor, ...]) -> list[tuple[torch.Tensor, ...]]:
        if self._most_rows is None or len(inputs[0]) <= self._most_rows:
            return [inputs]
        count = math.ceil(len(inputs[0]) / self._most_rows)
        if len(inputs[0]) // count < self._least_rows:
            return [inputs]
        return list(zip(*(torch.tensor_split(value, count) for value in inputs), strict=True))


class _Runner(fx.Interpreter):
    """Runs the steps on one part and shows the wanted values to one."""

    def __init__(
        self,
        program: Program,
        steps: Sequence[_Step],
        wanted: Collection[fx.Node],
        show: Callable[[fx.Node, Any], None],
    ) -> None:
        super().__init__(program.module, garbage_collect_values=False, graph=program.graph)
        self._steps, self._wanted, self._show = steps, wanted, show

    @torch.no_grad()
    def __call__(self, inputs: tuple[torch.Tensor, ...]) -> None:
        self.args_iter = iter(inputs)
        self.env = {}
        for step in self._steps:
            value = self.env[step.node] = self._compute(step)
            if step.node in self._wanted:
                self._show(step.node, value)
            del value
            for node in step.frees:
                del self.env[node]
        self.env = {}

    def _compute(self, step: _Step) -> Any:
        for node in step.restores:
            self.env[node] = self.env[node].contiguous()
        if step.packed is None:
            return self.run_node(step.node)
        return step.packed(*(self.env[node] for node in step.packed.reads()))


def _side_by_side(runners: Sequence[_Runner], parts: Sequence[tuple[torch.Tensor, ...]]) -> None:
    """Run the parts, each by whichever runner is free, which share the threads that torch has.

    Raises:
        Whatever the first part that failed has raised.
    """
    free: SimpleQueue[_Runner] = SimpleQueue()
    threads = torch.get_num_threads()
    each = max(1, threads // len(runners))
    for runner in runners:
        free.put(runner)

    def run(part: tuple[torch.Tensor, ...]) -> None:
        runner = free.get()
        try:
            runner(part)
        finally:
            free.put(runner)

    try:
        # The number of threads is each thread's own, but what new threads start with is shared.
        with ThreadPoolExecutor(len(runners), "walk", torch.set_num_threads, (each,)) as pool:
            for _ in pool.map(run, parts):
                pass
    finally:
        torch.set_num_threads(threads)


def _steps(
    program: Program, wanted: Collection[fx.Node], packed: dict[fx.Node, PackedConvolution]
) -> list[_Step]:
    """What to compute, in order, and what is not needed any more after each."""
    needed = set(wanted)
    for node in reversed(program.graph.nodes):
        if node in needed:
            needed.update(packed[node].reads() if node in packed else node.all_input_nodes)
    layouts = Layouts(frozenset(packed))
    # Each placeholder takes its turn at the inputs, needed or not.
    steps = [
        _Step(node, packed.get(node), layouts.restores(node), ())
        for node in program.graph.nodes
        if node in needed or node.op == "placeholder"
    ]
    last: dict[fx.Node, int] = {}
    for position, step in enumerate(steps):
        last.update(dict.fromkeys((step.node, *step.reads()), position))
    frees: list[list[fx.Node]] = [[] for _ in steps]
    for node, position in last.items():
        frees[position].append(node)
    return [
        _Step(step.node, step.packed, step.restores, tuple(freed))
        for step, freed in zip(steps, frees, strict=True)
    ]


def _most_rows(program: Program, nodes: Collection[fx.Node]) -> int | None:
    """How many rows to run at a time; None for whole batches."""
    if not rows_are_independent(program, nodes):
        return None
    largest = max((_row_bytes(node) for node in nodes if node.op != "get_attr"), default=0)
    return max(1, PART_BYTES // largest) if largest else None


def _row_bytes(node: fx.Node) -> int:
    """The bytes of one row of a value; 0 where they are not known."""
    value = node.meta.get("val")
    sizes = (shape_of(node) or ())[1:]
    if not isinstance(value, torch.Tensor) or any(not isinstance(size, int) for size in sizes):
        return 0
    return math.prod(int(size) for size in sizes) * value.dtype.itemsize
