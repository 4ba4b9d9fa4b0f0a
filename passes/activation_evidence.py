"""Activation evidence: sums over what consumers read, reduced as the program runs.

For the input x of a consumer with channels c, over all samples and positions n (for images: all
places of the unpadded input):

    abs      sum_n |x_nc|                 [channels]
    square   sum_n x_nc^2                 [channels]
    zeros    number of n with x_nc = 0    [channels], int64
    count    number of n                  [], int64
    gram     sum_n x_nc x_nd              [channels, channels]

The graph is interpreted node by node and values are freed at their last use: no activation is
kept, and no channel is visited by Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from pruna_ir.errors import UsageError
from pruna_ir.passes.calibration_runs import runs
from pruna_ir.passes.consumers import Consumer
from pruna_ir.passes.evidence import Evidence, Window
from pruna_ir.program import Program
from pruna_ir.transform import Context

_CHUNK = 1 << 22
"""Elements lifted to float64 at a time."""


def activation_evidence(
    program: Program,
    found: Mapping[str, tuple[Consumer, tuple[str, ...]]],
    context: Context,
    *,
    window: int | None = None,
) -> Evidence:
    """The sums, under ``key/statistic``, over the calibration data and all ranks.

    Args:
        program: what to run; it is only read.
        found: for each key, a consumer that reads these channels, and the statistics to take.
        context: the data and who hears of progress.
        window: only the last so many batches count; None for all.

    Raises:
        UsageError: there is no data, it does not fit, or an activation is not finite.
    """
    if context.data is None:
        raise UsageError("activations need calibration data; give it with Context(data=...)")
    recent = None if window is None else Window(window)
    total = Evidence()
    for number, batch in enumerate(runs(program, context.data)):
        seen = Evidence() if recent is not None else total
        with torch.no_grad():
            _Observed(program, found, seen).run(*batch.inputs)
        if recent is not None:
            recent.push(seen)
        context.progress("activations", number + 1, max(number + 1, len(context.data)))
    if recent is not None:
        total = recent.total()
    total.over_ranks()
    _check(total)
    return total


class _Observed(fx.Interpreter):
    """Runs a graph and adds up what consumers read, just before they do."""

    def __init__(
        self,
        program: Program,
        found: Mapping[str, tuple[Consumer, tuple[str, ...]]],
        evidence: Evidence,
    ) -> None:
        super().__init__(program.module, garbage_collect_values=True, graph=program.graph)
        self.extra_traceback = False
        self._evidence = evidence
        self._wanted: dict[fx.Node, list[tuple[str, int, tuple[str, ...]]]] = {}
        for key, (consumer, statistics) in found.items():
            wanted = self._wanted.setdefault(consumer.source, [])
            wanted.append((key, consumer.axis, statistics))

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, added up where a consumer reads it."""
        value = super().run_node(n)
        for key, axis, statistics in self._wanted.get(n, ()):
            _observe(self._evidence, key, value, axis, statistics)
        return value


def _observe(
    evidence: Evidence, key: str, x: torch.Tensor, axis: int, statistics: tuple[str, ...]
) -> None:
    flat = x.detach().movedim(axis, -1).reshape(-1, x.shape[axis])
    evidence.add(f"{key}/count", torch.tensor(len(flat)))
    for part in torch.split(flat, max(1, _CHUNK // max(flat.shape[1], 1))):
        for statistic in statistics:
            evidence.add(f"{key}/{statistic}", STATISTICS[statistic](part))


STATISTICS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "abs": lambda x: x.double().abs().sum(0),
    "square": lambda x: x.double().square().sum(0),
    "zeros": lambda x: (x == 0).sum(0),
    "gram": lambda x: x.double().T @ x.double(),
}
"""From activations [n, channels] to the sum of a statistic."""


def _check(evidence: Evidence) -> None:
    for key, value in evidence.sums().items():
        if not bool(torch.isfinite(value).all()):
            raise UsageError(
                f"{key.partition('[')[0]} takes NaN or infinite values on the calibration data; "
                "repair the data or the model"
            )
