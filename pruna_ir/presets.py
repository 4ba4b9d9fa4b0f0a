"""Presets: named pipelines, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from pruna_ir.errors import UsageError
from pruna_ir.registry import unknown


@dataclass(frozen=True)
class Preset:
    """A pipeline with a name."""

    name: str
    description: str
    pipeline: str


_FOLD = "canonicalize,fold-constants,fold-batch-norm"

PRESETS: tuple[Preset, ...] = (
    Preset(
        "float",
        "The same function in fewer operators: constants and batch norms folded, layers fused.",
        f"{_FOLD},fuse-conv-bn-relu,fuse-ffn,fuse-pooled-heads,eliminate-dead-code",
    ),
    Preset(
        "int8",
        "Static int8 quantisation on each target's own grid; calibrate with --data.",
        f"{_FOLD},fuse-conv-bn-relu,insert-fake-quant,round-biases,eliminate-dead-code",
    ),
    Preset(
        "prune-int8",
        "30% of the channels removed, then int8. Pruning costs accuracy: fine-tune afterwards.",
        "canonicalize,fold-constants,prune-channels{ratio=0.3},fold-batch-norm,"
        "fuse-conv-bn-relu,insert-fake-quant,round-biases,eliminate-dead-code",
    ),
)


def preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        UsageError: there is none; the message suggests the nearest.

    >>> preset("int8").pipeline.split(",")[0]
    'canonicalize'
    """
    for candidate in PRESETS:
        if candidate.name == name:
            return candidate
    raise UsageError(unknown("preset", name, (p.name for p in PRESETS)))
