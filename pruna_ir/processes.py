"""Processes: whether a run is one of several that ``torchrun`` started, and sums over all of them.

    torchrun --nproc-per-node 2 script.py        # both processes run the same script

Communication goes over gloo, which needs nothing but torch. Limits: one machine or a shared file
system (every process reads the checkpoint that the first one writes).
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import distributed


@dataclass(frozen=True)
class Processes:
    """This process's number, from 0, and how many run together.

    >>> Processes().first, Processes().share(torch.arange(5)).tolist()
    (True, [0, 1, 2, 3, 4])
    >>> Processes(1, 2).share(torch.arange(5)).tolist()
    [1, 3]
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, indices: torch.Tensor) -> torch.Tensor:
        """This process's part of the indices of a batch; parts differ by at most one."""
        return indices[self.rank :: self.count]

    def sum(self, vector: torch.Tensor) -> None:
        """Replace a vector, in place, by its sum over all processes."""
        if self.count > 1:
            distributed.all_reduce(vector)

    def wait(self) -> None:
        """Wait for all: whoever leaves first would cut the others' connections."""
        if self.count > 1:
            distributed.barrier()

    def agree(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every process the first one's values."""
        if self.count > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), 0)


def processes() -> Processes:
    """Who runs together, by ``torchrun`` or an initialised process group; else this one alone."""
    if not distributed.is_available():
        return Processes()
    if not distributed.is_initialized():
        if not distributed.is_torchelastic_launched():
            return Processes()
        distributed.init_process_group("gloo")
        atexit.register(distributed.destroy_process_group)
    return Processes(distributed.get_rank(), distributed.get_world_size())
