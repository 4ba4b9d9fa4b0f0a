"""Capture: modules, dynamic dimensions, keyword inputs, and errors with the user's own line."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.errors import CaptureError, InvalidIRError
from pruna_ir.printer import print_program
from pruna_ir.serialize import load_program, save_program
from tests.networks import ConvNet, conv_net, seeded


class Attend(nn.Module):
    def forward(self, query, key=None, *, scale=1.0):
        scores = query @ (query if key is None else key).transpose(1, 2) * scale
        return {"scores": scores, "pair": (scores.sum(-1), scores.amax(-1))}


def test_the_batch_is_dynamic_even_from_an_example_of_one():
    program = capture(nn.Linear(3, 2), (torch.zeros(1, 3),))
    assert program.inputs[0].shape == ("batch", 3)
    for batch in (1, 4):
        assert program(torch.zeros(batch, 3))[0].shape == (batch, 2)


def test_the_batch_can_be_fixed():
    program = capture(nn.Linear(3, 2), (torch.zeros(1, 3),), dynamic_batch=False)
    assert program.inputs[0].shape == (1, 3)
    assert program.dims == {}


def test_further_dimensions_on_request_and_keyword_inputs():
    query, key = torch.randn(2, 5, 4), torch.randn(2, 6, 4)
    program = capture(
        Attend(), (query,), {"key": key, "scale": 0.5},
        dynamic_dims={"query": {1: "length"}, "key": {1: "memory"}},
    )  # fmt: skip
    assert [spec.shape for spec in program.inputs] == [
        ("batch", "length", 4), ("batch", "memory", 4),
    ]  # fmt: skip
    assert [spec.name for spec in program.outputs] == ["scores", "pair_0", "pair_1"]
    query, key = torch.randn(3, 1, 4), torch.randn(3, 9, 4)
    expected = Attend()(query, key, scale=0.5)
    found = program(query, key=key)
    assert torch.equal(found[0], expected["scores"])
    assert torch.equal(found[2], expected["pair"][1])


def test_a_model_that_fixes_its_batch_is_captured_at_the_example():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(1, 12)

    program = capture(Fixed(), (torch.randn(1, 3, 4),))
    assert program.inputs[0].shape == (1, 3, 4)
    assert "static" in program.attributes["batch"]


def test_a_requested_dimension_that_the_model_fixes_is_refused():
    class Fixed(nn.Module):
        def forward(self, x):
            return x + torch.arange(5.0)

    with pytest.raises(CaptureError, match="dimension 1 of input x cannot be dynamic"):
        capture(Fixed(), (torch.randn(2, 5),), dynamic_dims={"x": {1: "length"}})


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ({"y": {1: "n"}}, "the tensor inputs are input"),
        ({"input": {7: "n"}}, "input input has no dimension 7"),
        ({"input": {1: "n"}}, "give an example with at least 2"),
    ],
)
def test_an_impossible_request_is_refused(dims, message):
    with pytest.raises(CaptureError, match=message):
        capture(nn.Identity(), (torch.zeros(2, 1),), dynamic_dims=dims)


def test_a_model_that_cannot_be_captured_names_its_own_line():
    class Branches(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(CaptureError) as caught:
        capture(Branches(), (torch.zeros(2, 2),))
    message = str(caught.value)
    assert "tests/test_capture.py:" in message
    assert "if x.sum() > 0:" in message
    assert "torch.where" in message


def test_wrong_example_shapes_say_so():
    with pytest.raises(CaptureError, match="example inputs"):
        capture(nn.Linear(3, 2), (torch.zeros(2, 4),))


def test_no_tensor_at_all_is_refused():
    with pytest.raises(CaptureError, match="at least one example input"):
        capture(nn.Identity(), (1,))


def test_nan_weights_are_refused_with_their_name():
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight[0, 0] = torch.nan
    with pytest.raises(InvalidIRError, match="weight holds NaN"):
        capture(module, (torch.zeros(2, 3),))


def test_capture_leaves_the_module_in_its_modes():
    module = seeded(ConvNet).train()
    module.bn.eval()
    capture(module, (torch.randn(2, 3, 9, 9),))
    assert module.training
    assert module.block.training
    assert not module.bn.training


def test_the_printed_program_is_stable():
    assert print_program(conv_net()) == print_program(conv_net())
    assert print_program(capture(nn.Linear(3, 2), (torch.zeros(2, 3),))) == (
        "program(input: float32[batch, 3]) {\n"
        "  %linear = aten.linear(%input, @weight, @bias) : float32[batch, 2]\n"
        "  return output=%linear\n"
        "}\n"
        "@bias: float32[2]\n"
        "@weight: float32[2, 3]\n"
    )


def test_any_number_of_positional_inputs():
    class Sum(nn.Module):
        def forward(self, first, *rest, **named):
            return first + sum(rest) * named["scale"]

    inputs = [torch.randn(2, 3) for _ in range(4)]
    program = capture(Sum(), inputs[:3], {"scale": inputs[3]})
    assert program.inputs[0].shape == ("batch", 3)
    assert len(program.inputs) == 4
    assert torch.equal(program(*inputs)[0], Sum()(*inputs[:3], scale=inputs[3]))


def test_a_tied_weight_has_one_name_and_always_the_same():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    program = capture(Tied(), (torch.tensor([[1, 2], [3, 4]]),))
    assert list(program.tensors()) == ["head.weight"]


def test_a_failed_export_leaves_the_terminal_to_its_error(capsys):
    class Chatty(nn.Module):
        def forward(self, x):
            print("what the model says", file=sys.stderr)
            kept = x[x[:, 0] > 0]
            return kept * 2 if kept.numel() > 4 else kept

    with pytest.raises(CaptureError, match="data-dependent"):
        capture(Chatty(), (torch.ones(3, 2),))
    said = capsys.readouterr().err
    assert "what the model says" in said
    assert "def forward(" not in said


class NamedLikeBuiltins(nn.Module):
    """Arguments that have the names of Python's own functions."""

    def forward(self, input, filter):  # noqa: A002
        return torch.sum(input * filter, 1), input.max()


def test_forks_keep_the_names_of_nodes(tmp_path):
    program = capture(NamedLikeBuiltins(), (torch.ones(2, 3), torch.ones(2, 3)))
    save_program(program, tmp_path / "p.pt2")
    for one in (program, load_program(tmp_path / "p.pt2")):
        names = [node.name for node in one.graph.nodes]
        assert [node.name for node in one.fork().graph.nodes] == names
        assert [spec.name for spec in one.inputs] == ["input", "filter"]
