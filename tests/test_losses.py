"""Losses are one figure a sample and equal torch's own where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pruna_ir.data import Batch
from pruna_ir.errors import UsageError
from pruna_ir.losses import LossOptions, Objective, cross_entropy, divergence, squared_error

SHAPES = [(3, 5), (3, 7, 5), (3, 5, 4, 6)]  # classes: last, last, 1


def scores(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def classes_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1) if x.dim() == 4 else x


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_is_torchs_averaged_over_positions(shape: tuple[int, ...]) -> None:
    x = scores(shape, 0)
    labels = torch.arange(classes_last(x)[..., 0].numel()).reshape(classes_last(x).shape[:-1]) % 5
    for sample in range(3):
        rows = classes_last(x)[sample].reshape(-1, 5)
        expected = F.cross_entropy(rows, labels[sample].reshape(-1))
        torch.testing.assert_close(cross_entropy(x, labels)[sample], expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_is_torchs_with_hintons_factor(
    shape: tuple[int, ...], temperature: float
) -> None:
    x, wanted = scores(shape, 0), scores(shape, 1)
    found = divergence(x, wanted, temperature)
    for sample in range(3):
        ours, theirs = (classes_last(t)[sample].reshape(-1, 5) / temperature for t in (x, wanted))
        expected = F.kl_div(
            torch.log_softmax(ours, -1), torch.softmax(theirs, -1), reduction="batchmean"
        )
        torch.testing.assert_close(found[sample], expected * temperature**2)
    assert float(divergence(x, x, temperature).abs().max()) < 1e-6


def test_losses_add_up_with_their_weights() -> None:
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 5), nn.Linear(4, 5)
    batch = Batch((torch.randn(6, 4),), torch.arange(6) % 5)

    def run(net: nn.Module):
        return lambda x: (net(x), 2 * net(x))

    options = LossOptions(labels=0.5, logits=2.0, temperature=3.0, mse=0.25, feature_weight=0.75)
    found = Objective(options, run(student), run(teacher), features=1)(batch)
    x = batch.inputs[0]
    ours, theirs = student(x), teacher(x)
    shares = squared_error(2 * ours, 2 * theirs) / (2 * theirs).square().mean(1)
    expected = (
        0.5 * cross_entropy(ours, batch.labels) + 2.0 * divergence(ours, theirs, 3.0)
        + 0.25 * squared_error(ours, theirs) + 0.75 * shares
    )  # fmt: skip
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert teacher.weight.grad is None
    assert student.weight.grad is not None


def test_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match=r"labels are \[3, 1\], but scores \[3, 5\]"):
        cross_entropy(scores((3, 5), 0), torch.zeros(3, 1, dtype=torch.int64))
    objective = Objective(LossOptions(labels=1.0, logits=0.0), lambda x: (x,))
    with pytest.raises(UsageError, match="needs labels"):
        objective(Batch((scores((3, 5), 0),)))
