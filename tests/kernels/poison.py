"""Memory that holds NaN before it is written: an output that is not written wholly shows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def poisoned() -> Iterator[None]:
    """Torch fills fresh memory with NaN, or the largest integer."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(mode=True)
    try:
        assert torch.isnan(torch.empty(3)).all()
        yield
    finally:
        torch.use_deterministic_algorithms(mode=False)
