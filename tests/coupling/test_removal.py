"""Plans are data, and removal refuses those that break a coupling; broken rules are caught."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pruna_ir import capture, verify
from pruna_ir.coupling import RemovalPlan, couple, remove
from pruna_ir.errors import UsageError
from pruna_ir.transform import Context, Rewrite

plans = st.dictionaries(
    st.text(st.characters(codec="ascii"), min_size=1),
    st.dictionaries(
        st.integers(0, 3),
        st.lists(st.integers(0, 99), unique=True).map(lambda indices: tuple(sorted(indices))),
    ),
).map(RemovalPlan)


@given(plans)
def test_a_plan_survives_json(plan):
    again = RemovalPlan.from_json(plan.to_json())
    assert list(again.items()) == list(plan.items())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"format": 3, "removed": {}}',
        '{"format": 1, "removed": {"w": {"0": [-1]}}}',
        '{"format": 1, "removed": {"w": {"0": [1.5]}}}',
        '{"format": 1, "removed": {"w": 3}}',
    ],
)
def test_text_that_is_no_plan_is_refused(text):
    with pytest.raises(UsageError, match="not a removal plan"):
        RemovalPlan.from_json(text)


def network():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    return capture(module, (torch.randn(2, 3),))


def applied(program, plan):
    rw = Rewrite(program, "remove", Context())
    remove(rw, couple(program), plan)
    return rw.finish()


WHOLE = {"0.weight": {0: (1, 4)}, "0.bias": {0: (1, 4)}, "2.weight": {1: (1, 4)}}


def test_a_plan_made_by_hand_is_applied():
    program = network()
    small = applied(program, RemovalPlan(WHOLE))
    verify(small)
    kept = [0, 2, 3, 5]
    assert torch.equal(small.tensor("0.weight"), program.tensor("0.weight")[kept])
    assert torch.equal(small.tensor("2.weight"), program.tensor("2.weight")[:, kept])
    assert isinstance(small.tensor("0.weight"), nn.Parameter)
    assert program.tensor("0.weight").shape == (6, 3)


def test_a_plan_applied_in_two_parts_is_the_plan():
    program = network()
    second = {"2.weight": {0: (2,)}, "2.bias": {0: (2,)}, "4.weight": {1: (2,)}}
    both = WHOLE | second | {"2.weight": {0: (2,), 1: (1, 4)}}
    parts = applied(applied(program, RemovalPlan(WHOLE)), RemovalPlan(second))
    assert parts.hash() == applied(program, RemovalPlan(both)).hash()


def test_an_empty_plan_changes_nothing():
    program = network()
    assert applied(program, RemovalPlan({})).hash() == program.hash()


class ChannelAttention(nn.Module):
    """Gates from a filter that runs along the channels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 7, 3), nn.Conv2d(7, 2, 1)
        self.filter = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        x = self.a(x)
        gates = self.filter(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return self.b(x * gates.transpose(1, 2).unsqueeze(-1))


def test_a_filter_along_channels_sees_zeros_where_channels_went():
    module = ChannelAttention()
    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(1))
    gone, kept = (0, 3, 4), [1, 2, 5, 6]
    plan = {"a.weight": {0: gone}, "a.bias": {0: gone}, "b.weight": {1: gone}}
    small = applied(capture(module, (x,)), RemovalPlan(plan))
    verify(small)
    with torch.no_grad():
        y = module.a(x)
        y[:, list(gone)] = 0
        gates = module.filter(y.mean((2, 3)).unsqueeze(1)).sigmoid()[:, 0, kept, None, None]
        expected = module.b.bias.view(-1, 1, 1) + torch.einsum(
            "oc,nchw->nohw", module.b.weight[:, kept, 0, 0], y[:, kept] * gates
        )
        assert torch.allclose(small(x)[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ({"nope": {0: (1,)}}, "names nope, which is no tensor"),
        ({"0.weight": {2: (1,)}}, "dimension 2 of 0.weight, which has no channels"),
        ({"0.weight": {0: (6,)}}, "index 6 of dimension 0 of 0.weight, which has 6"),
        ({"0.weight": {0: (1,)}}, "in part: index 1 of dimension 0 of 0.bias must go with it"),
        (WHOLE | {"0.bias": {0: (1,)}}, "in part: index 4 of dimension 0 of 0.bias"),
        ({"4.weight": {0: (1,)}, "4.bias": {0: (1,)}}, "must stay: program output output"),
        ({k: {d: tuple(range(6)) for d in v} for k, v in WHOLE.items()}, "leaves nothing"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(removed, message):
    with pytest.raises(UsageError, match=message):
        applied(network(), RemovalPlan(removed))
