"""Plans are data: text both ways, composition, and the first misfit with another model by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir import capture
from pruna_ir.call import Call
from pruna_ir.coupling import RemovalPlan
from pruna_ir.errors import UsageError
from tests.coupling.random_networks import networks
from tests.coupling.random_removal import applied, program_of, pruned

PHASES = [Phase.explicit, Phase.reuse, Phase.generate]


def shapes_of(program):
    return {name: tuple(tensor.shape) for name, tensor in program.tensors().items()}


@st.composite
def tensors_and_plans(draw):
    """Shapes, a plan for them, and a second one for what the first leaves."""
    shapes = draw(
        st.dictionaries(
            st.text(st.characters(codec="utf-8"), min_size=1),
            st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple),
            max_size=4,
        )
    )
    first = draw(plans(shapes))
    left = {
        name: tuple(n - len(first.get(name, {}).get(d, ())) for d, n in enumerate(shape))
        for name, shape in shapes.items()
    }
    return shapes, RemovalPlan(first), RemovalPlan(draw(plans(left)))


def plans(shapes):
    return st.fixed_dictionaries(
        {},
        optional={
            name: st.fixed_dictionaries(
                {},
                optional={
                    dim: st.sets(st.integers(0, size - 1)).map(lambda s: tuple(sorted(s)))
                    for dim, size in enumerate(shape)
                    if size
                },
            )
            for name, shape in shapes.items()
        },
    )


def cut(arrays, plan):
    result = dict(arrays)
    for name, dim, indices in plan.items():
        result[name] = np.delete(result[name], indices, axis=dim)
    return result


@settings(deadline=None)
@given(tensors_and_plans())
def test_a_plan_survives_json(case):
    shapes, plan, _ = case
    for one in (plan, plan.with_shapes(shapes)):
        again = RemovalPlan.from_json(one.to_json())
        assert (list(again.items()), again.shapes) == (list(one.items()), one.shapes)


@settings(deadline=None)
@given(tensors_and_plans())
def test_a_composed_plan_removes_what_both_remove(case):
    shapes, first, second = case
    arrays = {n: np.arange(np.prod(s, dtype=int)).reshape(s) for n, s in shapes.items()}
    once = cut(arrays, first.then(second, shapes))
    twice = cut(cut(arrays, first), second)
    assert all(np.array_equal(once[name], twice[name]) for name in arrays)
    assert first.then(second, shapes) == first.with_shapes(shapes).then(second, shapes)


def test_the_text_is_made_for_editing():
    plan = RemovalPlan({"fc.weight": {0: (1, 2, 4), 1: (0,)}, "fc.bias": {0: (1, 2, 4)}})
    plan = plan.with_shapes({"fc.weight": (6, 3), "fc.bias": (6,), "other": (2,)})
    assert plan.to_json() == (
        '{\n "format": 2,\n "shapes": {"fc.bias": [6], "fc.weight": [6, 3]},\n "removed": {\n'
        '  "fc.bias": {"0": [1, 2, 4]},\n  "fc.weight": {"0": [1, 2, 4], "1": [0]}\n }\n}\n'
    )
    assert str(plan) == (
        "fc.bias: dimension 0 loses 3 of 6: 1-2, 4\n"
        "fc.weight: dimension 0 loses 3 of 6: 1-2, 4\nfc.weight: dimension 1 loses 1 of 3: 0"
    )


def test_the_first_format_is_read():
    text = '{"format": 1, "removed": {"w": {"0": [4, 1, 4]}}}'
    assert RemovalPlan.from_json(text) == RemovalPlan({"w": {0: (1, 4)}})


@pytest.mark.parametrize(
    "change",
    [
        {"format": 3},
        {"format": None},
        {"removed": 3},
        {"removed": {"w": {"0": [-1]}}},
        {"removed": {"w": {"x": [1]}}},
        {"removed": {"w": {"0": [True]}}},
        {"shapes": {"w": [2.5]}},
        {"shapes": []},
    ],
)
def test_text_that_is_no_plan_is_refused(change):
    data = {"format": 2, "shapes": {}, "removed": {}} | change
    with pytest.raises(UsageError, match="this is not a removal plan"):
        RemovalPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("removed", "shapes", "message"),
    [
        ({"v": {0: (1,)}}, {}, "the plan names v, which is no tensor of the program"),
        ({}, {"v": (3,)}, "the plan names v, which is no tensor of the program"),
        (
            {"w": {0: (1,)}}, {"b": (4,), "w": (5, 3)},
            r"for a model whose w is \[5, 3\], but here it is \[4, 3\]",
        ),
        ({"w": {2: ()}}, {}, "names dimension 2 of w, which has 2"),
        ({"w": {0: (1, 4)}}, {}, "names index 4 of dimension 0 of w, which has 4"),
    ],
)  # fmt: skip
def test_a_plan_for_another_model_is_refused_by_its_first_misfit(removed, shapes, message):
    with pytest.raises(UsageError, match=message):
        RemovalPlan(removed, shapes).check({"w": (4, 3), "b": (4,)})


def test_a_plan_for_this_model_is_taken():
    RemovalPlan({"w": {0: (1,), 1: (2,)}}, {"w": (4, 3)}).check({"w": [4, 3], "b": [4]})


def test_composing_needs_shapes_and_a_second_plan_that_fits():
    first = RemovalPlan({"w": {0: (0, 1)}}, {"w": (4, 3)})
    with pytest.raises(UsageError, match="needs the shape of b before the first"):
        first.then(RemovalPlan({"b": {0: (0,)}}))
    with pytest.raises(UsageError, match="names index 2 of dimension 0 of w, which has 2"):
        first.then(RemovalPlan({"w": {0: (2,)}}))
    with pytest.raises(UsageError, match=r"whose w is \[4, 3\], but here it is \[2, 3\]"):
        first.then(RemovalPlan({}, {"w": (4, 3)}))


# -- on programs -------------------------------------------------------------------------------


def tensors_are_identical(a, b):
    one, other = a.tensors(), b.tensors()
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


def has_lone_groups(program):
    """Whether a group norm has groups of one channel each: those go whole, larger ones do not."""
    return any(
        call.arg("num_groups") == call.producer("input").meta["val"].shape[1]
        for call in (Call(program, n) for n in program.calls(torch.ops.aten.group_norm.default))
    )


@settings(max_examples=15, phases=PHASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks, st.sampled_from([0.2, 0.5]), st.integers(0, 9))
def test_pruning_twice_is_the_composed_plan_bit_for_bit(network, share, seed):
    program = program_of(network)
    smaller, first = pruned(program, share, seed)
    assume(not has_lone_groups(smaller))
    smallest, second = pruned(smaller, share, seed + 1)
    both = first.then(second, shapes_of(program))
    at_once = applied(program, both)
    tensors_are_identical(smallest, at_once)
    inputs = program.examples
    assert all(map(torch.equal, smallest(*inputs), at_once(*inputs)))


def test_the_order_of_two_plans_matters():
    """The control: the second plan, read in the numbers of the first program, is another one."""
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), (torch.randn(2, 3),))
    first, second = (
        RemovalPlan({"0.weight": {0: g}, "0.bias": {0: g}, "1.weight": {1: g}})
        for g in ((0,), (1,))
    )
    shapes = shapes_of(program)
    composed = first.then(second, shapes)
    assert composed.removed["0.weight"] == {0: (0, 2)}
    assert composed != second.then(first, shapes)
    tensors_are_identical(applied(applied(program, first), second), applied(program, composed))
