"""The calibration loss: labels given, next tokens, or drawn; one loss a sample."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pruna_ir import capture
from pruna_ir.data import Batch
from pruna_ir.errors import UsageError
from pruna_ir.passes.calibration_loss import language_input, sample_losses
from tests.passes.scored_networks import shared


def linear(classes=4, *shape):
    return capture(nn.Linear(3, classes), (torch.randn(2, *shape, 3),))


def losses(program, inputs, labels=None, **options):
    batch = Batch(inputs, labels)
    return sample_losses(program, batch, program(*inputs)[0], seed=0, **options)


def test_labels_of_a_classifier():
    program = linear()
    x, y = torch.randn(5, 3), torch.tensor([0, 3, 1, 1, 2])
    expected = F.cross_entropy(program(x)[0], y, reduction="none")
    torch.testing.assert_close(losses(program, (x,), y), expected)


def test_labels_of_positions_are_averaged_and_some_left_out():
    program = linear(4, 3)
    x = torch.randn(2, 3, 3)
    y = torch.tensor([[0, -100, 2], [3, 1, 1]])
    chances = torch.log_softmax(program(x)[0], -1)
    first = -(chances[0, 0, 0] + chances[0, 2, 2]) / 2
    second = -(chances[1, 0, 3] + chances[1, 1, 1] + chances[1, 2, 1]) / 3
    torch.testing.assert_close(losses(program, (x,), y), torch.stack([first, second]))


def test_images_have_their_classes_in_dimension_1():
    program = capture(nn.Conv2d(3, 4, 1), (torch.randn(2, 3, 5, 5),))
    x, y = torch.randn(2, 3, 5, 5), torch.randint(0, 4, (2, 5, 5))
    expected = F.cross_entropy(program(x)[0], y, reduction="none").mean((1, 2))
    torch.testing.assert_close(losses(program, (x,), y), expected)


def test_a_language_model_predicts_the_next_token():
    scored = shared("language")
    assert language_input(scored.program) == 0
    found = losses(scored.program, (scored.inputs,))
    expected = torch.stack([scored.sample_loss(scored.module, n) for n in range(7)])
    torch.testing.assert_close(found, expected)


def test_hidden_states_of_an_encoder_are_no_language_model():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(11, 6), nn.Linear(6, 6)

        def forward(self, ids):
            return self.out(self.embed(ids))

    assert language_input(capture(Encoder(), (torch.randint(0, 6, (2, 4)),))) is None


def test_tokens_that_are_reshaped_first_are_found():
    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(11, 6), nn.Linear(6, 11)

        def forward(self, ids):
            return self.out(self.embed(ids.view(-1, 4)))

    assert language_input(capture(Reshaped(), (torch.randint(0, 6, (2, 4)),))) == 0


def test_drawn_labels_belong_to_a_sample_whatever_its_batch():
    program = linear()
    x = torch.randn(6, 3)
    together = losses(program, (x,))
    alone = torch.cat([losses(program, (x[n : n + 1],)) for n in (5, 0, 3)])
    torch.testing.assert_close(alone, together[[5, 0, 3]])


def test_drawn_labels_follow_the_model_s_distribution():
    program = linear(3)
    # Samples of all but the same distribution; equal ones would draw equal labels.
    x = torch.randn(1, 3) + torch.arange(4000.0)[:, None] * 1e-6
    chances = torch.softmax(program(x)[0], 1).mean(0)
    found = losses(program, (x,))
    by_class = -torch.log_softmax(program(x)[0], 1).T
    drawn = (by_class - found).abs().argmin(0)
    share = torch.bincount(drawn, minlength=3) / 4000
    assert (share - chances).abs().max() < 0.03


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 4]), "label 4 is none of the 4 classes of the first output"),
        (torch.tensor([0, -1]), "label -1 is none of the 4 classes"),
        (torch.tensor([0.0, 1.0]), "the labels are torch.float32"),
        (torch.tensor([[0], [1]]), "give int64"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(UsageError, match=message):
        losses(linear(), (torch.randn(2, 3),), labels)


def test_an_output_without_a_batch_is_refused():
    class Total(nn.Module):
        def forward(self, x):
            return x.sum(0)

    program = capture(Total(), (torch.randn(2, 3),))
    with pytest.raises(UsageError, match="gradients need logits as the first output"):
        losses(program, (torch.randn(2, 3),))
