"""Calibration loss: the cross-entropy that gradient criteria differentiate, per sample.

The logits z are the program's first output: [batch, classes], [batch, ..., classes] for three
dimensions (sequences), [batch, classes, ...] for four and more (images). With y the labels,

    L_i = mean over the positions t of sample i of -log softmax(z_it)[y_it],    L = sum_i L_i

so that the gradient of a batch is the sum of those of its samples, whatever the batches.

Labels are, in this order:

- the data's own: [batch], or one a position; -100 leaves a position out;
- the next token, for language models: an int64 input [batch, seq] that an embedding of V rows
  looks up and an output [batch, seq, V]; the last position has none;
- otherwise drawn from the model's own distribution softmax(z), seeded by the content of the
  sample (Kunstner et al., Limitations of the Empirical Fisher, NeurIPS 2019, equation 3: the
  squared gradients then are the Fisher, which is the Gauss-Newton, matrix). The program's own
  argmax would do no good: its gradient all but vanishes.

Outputs that are no logits (features) are taken for logits all the same.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional as F  # noqa: N812

from pruna_ir.call import bind_arguments
from pruna_ir.data import Batch
from pruna_ir.errors import UsageError
from pruna_ir.passes.calibration_runs import rows, sample_seed
from pruna_ir.program import Program

aten = torch.ops.aten

IGNORED = -100
"""The label of a position that has none."""


def sample_losses(
    program: Program, batch: Batch, logits: torch.Tensor, *, seed: int, sampled: bool = False
) -> torch.Tensor:
    """The loss of every sample of a run, [batch].

    Args:
        program: what computed the logits.
        batch: the inputs and labels of the run.
        logits: the program's first output on them.
        seed: the seed of drawn labels.
        sampled: draw labels from the model's distribution even where there are others.

    Raises:
        UsageError: the output is no logits, or the labels do not fit it.
    """
    count = rows(program, batch.inputs)
    if not logits.is_floating_point() or logits.dim() < 2 or len(logits) != count:
        raise UsageError(
            f"gradients need logits as the first output, [batch, classes] or with positions; "
            f"{program.outputs[0]} is none for a batch of {count}"
        )
    last = logits if logits.dim() < 4 else logits.movedim(1, -1)
    flat = last.reshape(count, -1, last.shape[-1])  # [batch, positions, classes]
    labels = None if sampled else _given(program, batch, last)
    if labels is None:
        labels = _drawn(program, batch, flat.detach(), seed)
    labels = labels.reshape(count, -1).to(flat.device)
    each = F.cross_entropy(
        flat.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
    )  # [batch, positions]
    return each.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


def _given(program: Program, batch: Batch, logits: torch.Tensor) -> torch.Tensor | None:
    """The labels of the data, or the next tokens, as [batch, ...positions]."""
    if batch.labels is not None:
        labels = batch.labels
        if labels.dtype != torch.int64 or labels.shape != logits.shape[:-1]:
            raise UsageError(
                f"the labels are {labels.dtype}{list(labels.shape)}, but the first output has "
                f"{list(logits.shape)} logits (classes last): give int64{list(logits.shape[:-1])}"
            )
        outside = labels[(labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[-1]))]
        if len(outside):
            raise UsageError(
                f"label {int(outside[0])} is none of the {logits.shape[-1]} classes of the "
                "first output"
            )
        return labels
    place = language_input(program)
    if place is None:
        return None
    tokens = batch.inputs[place]
    return F.pad(tokens[:, 1:], (0, 1), value=IGNORED)


def language_input(program: Program) -> int | None:
    """The place of the token input of a language model; None where the program is none."""
    out = program.outputs[0]
    for place, (spec, node) in enumerate(
        zip(program.inputs, program.placeholders(), strict=True)
    ):
        if (
            spec.dtype == torch.int64
            and len(spec.shape) == 2
            and len(out.shape) == 3
            and spec.shape == out.shape[:2]
            and out.shape[2] in _vocabularies(node)
        ):
            return place
    return None


_PASSES_ON = (
    aten.reshape.default, aten.view.default, aten.to.dtype, aten.unsqueeze.default,
    aten.slice.Tensor,
)  # fmt: skip


def _vocabularies(node: fx.Node) -> set[int]:
    """The rows of the embeddings that look an input up."""
    found = set()
    for user in node.users:
        if user.target is aten.embedding.default:
            bound = bind_arguments(user)
            if bound["indices"] is node:
                found.add(int(bound["weight"].meta["val"].shape[0]))
        elif user.target in _PASSES_ON:
            found |= _vocabularies(user)
    return found


def _drawn(program: Program, batch: Batch, logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Labels from softmax(logits), [batch, positions]; each sample has a seed of its own."""
    drawn = []
    for row, each in enumerate(logits):
        generator = torch.Generator().manual_seed(
            sample_seed(program, batch.inputs, row, seed)
        )
        chances = torch.softmax(each.double().cpu(), -1)
        # The inverse of the distribution function: rounding of a batch hardly moves a draw.
        level = torch.rand(len(chances), 1, generator=generator, dtype=torch.float64)
        drawn.append((chances.cumsum(1) < level).sum(1).clamp(max=chances.shape[1] - 1))
    return torch.stack(drawn)
