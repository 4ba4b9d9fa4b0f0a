"""apply-plan: what was saved is removed again, by hand if need be; misfits are refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from pruna_ir import capture, verify
from pruna_ir.checks import check
from pruna_ir.cli.main import main
from pruna_ir.coupling import RemovalPlan
from pruna_ir.errors import UsageError
from pruna_ir.passes.apply_plan import ApplyPlan
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.prune_channels import PruneChannels
from pruna_ir.pipeline import Pipeline
from pruna_ir.serialize import load_program, save_program
from pruna_ir.transform import apply
from tests.networks import ConvNet, seeded

TOLERANCE = 1e-11


def layers(width=6):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 4), nn.ReLU(), nn.Linear(4, 2)
    )
    return capture(module, (torch.randn(2, 3),))


WHOLE = RemovalPlan({"0.weight": {0: (1, 4)}, "0.bias": {0: (1, 4)}, "2.weight": {1: (1, 4)}})


def shapes(program):
    return {name: list(tensor.shape) for name, tensor in program.tensors().items()}


@pytest.fixture
def saved(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(WHOLE.to_json())
    return file


def test_a_plan_from_a_file(saved):
    program = layers()
    result = apply(ApplyPlan(str(saved)), program)
    verify(result.program)
    kept = [0, 2, 3, 5]
    assert torch.equal(result.program.tensor("0.weight"), program.tensor("0.weight")[kept])
    assert torch.equal(result.program.tensor("2.weight"), program.tensor("2.weight")[:, kept])
    assert [r.message for r in result.remarks] == ["removed 2 of 6 channels of 0.weight[0]"]


def test_its_promise_holds():
    program = apply(Canonicalize(), capture(seeded(ConvNet), (torch.randn(2, 3, 9, 9),))).program
    removed = apply(PruneChannels(), program).program.origin.removed
    pass_ = ApplyPlan(RemovalPlan(removed).to_json())
    result = apply(pass_, program)
    assert check(pass_, program, result.program, result.oracle).measured < TOLERANCE


def test_what_prune_channels_saved_gives_the_same_program(tmp_path):
    program, file = layers(), tmp_path / "plan.json"
    pruned = Pipeline.parse(f'prune-channels{{ratio=0.5,save_plan="{file}"}}').run(program)
    again = Pipeline.parse(f'apply-plan{{plan="{file}"}}').run(program)
    assert again.program.hash() == pruned.program.hash()
    assert again.program.origin.removed == pruned.program.origin.removed


def test_a_plan_after_another_counts_from_the_first_program(saved):
    program = layers()
    second = {"0.weight": {0: (1,)}, "0.bias": {0: (1,)}, "2.weight": {1: (1,)}}
    once = apply(ApplyPlan(str(saved)), program).program
    twice = apply(ApplyPlan(RemovalPlan(second).to_json()), once).program
    assert twice.origin.program is program
    assert twice.origin.removed["0.weight"] == {0: (1, 2, 4)}


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight"])
def test_a_plan_by_hand_may_be_completed(name):
    program = layers()
    part = RemovalPlan({name: WHOLE.removed[name]})
    with pytest.raises(UsageError, match="in part"):
        apply(ApplyPlan(part.to_json()), program)
    whole = apply(ApplyPlan(part.to_json(), complete=True), program).program
    assert whole.hash() == apply(ApplyPlan(WHOLE.to_json()), program).program.hash()


def test_an_empty_plan_changes_nothing():
    result = apply(ApplyPlan(RemovalPlan({}).to_json()), layers())
    assert not result.modified
    assert result.oracle is None


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"nope": {0: (1,)}}, "the plan names nope, which is no tensor of the program"),
        ({"0.weight": {2: (1,)}}, "names dimension 2 of 0.weight, which has 2"),
        ({"0.weight": {0: (6,)}}, "names index 6 of dimension 0 of 0.weight, which has 6"),
        ({"4.weight": {0: (1,)}, "4.bias": {0: (1,)}}, "must stay: program output output"),
        (
            {name: {dim: tuple(range(6)) for dim in dims} for name, dims in WHOLE.removed.items()},
            "leaves nothing of a dimension of",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan, message, complete):
    with pytest.raises(UsageError, match=rf"^apply-plan: .*{message}"):
        apply(ApplyPlan(RemovalPlan(plan).to_json(), complete), layers())


def test_a_plan_for_another_model_is_refused_by_its_shapes():
    plan = WHOLE.with_shapes({n: tuple(s) for n, s in shapes(layers(6)).items()})
    with pytest.raises(
        UsageError, match=r"for a model whose 0\.bias is \[6\], but here it is \[7\]"
    ):
        apply(ApplyPlan(plan.to_json()), layers(7))


def test_files_that_are_no_plan(tmp_path):
    with pytest.raises(UsageError, match=r"the plan .*none\.json cannot be read"):
        apply(ApplyPlan(str(tmp_path / "none.json")), layers())
    file = tmp_path / "other.json"
    file.write_text("[1]")
    with pytest.raises(UsageError, match=r"other\.json: this is not a removal plan"):
        apply(ApplyPlan(str(file)), layers())
    with pytest.raises(UsageError, match="plan must be the file of a plan"):
        ApplyPlan("")


def test_on_the_command_line(tmp_path):
    """Prune and save the plan, take a channel out of it by hand, apply it to the model again."""
    model, plan = tmp_path / "model.pt2", tmp_path / "plan.json"
    save_program(layers(), model)
    first = f'prune-channels{{ratio=0.5,save_plan="{plan}"}}'
    assert main(["run", str(model), "-p", first, "-o", str(tmp_path / "first")]) == 0
    data = json.loads(plan.read_text())
    spared = data["removed"]["0.weight"]["0"][0]
    for name, dim in (("0.weight", "0"), ("0.bias", "0"), ("2.weight", "1")):
        data["removed"][name][dim].remove(spared)
    plan.write_text(json.dumps(data))
    second = f'apply-plan{{plan="{plan}"}}'
    assert main(["run", str(model), "-p", second, "-o", str(tmp_path / "second")]) == 0
    small = [load_program(tmp_path / name / "program.pt2") for name in ("first", "second")]
    assert [len(program.tensor("0.weight")) for program in small] == [3, 4]
    kept = [k for k in range(6) if k not in data["removed"]["0.weight"]["0"]]
    assert spared in kept
    assert torch.equal(small[1].tensor("0.weight"), layers().tensor("0.weight")[kept])


class Attention(nn.Module):
    """Self-attention with 2 heads of 4."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(5, 24), nn.Linear(8, 3)

    def forward(self, x):
        n, s, _ = x.shape
        q, k, v = self.qkv(x).view(n, s, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(n, s, 8))


@pytest.mark.parametrize(("attention", "heads"), [("heads", 1), ("size", 2)])
def test_a_plan_is_applied_at_its_own_granularity_of_attention(tmp_path, attention, heads):
    torch.manual_seed(0)
    program = apply(Canonicalize(), capture(Attention(), (torch.randn(2, 7, 5),))).program
    file = tmp_path / "plan.json"
    first = apply(PruneChannels(attention=attention, save_plan=str(file)), program)
    second = apply(ApplyPlan(str(file)), program)
    assert second.program.hash() == first.program.hash()
    assert shapes(second.program)["qkv.weight"] == [12, 5]
    heads_touched = {index % 8 // 4 for index in second.program.origin.removed["qkv.weight"][0]}
    assert len(heads_touched) == heads
    assert check(PruneChannels(), program, second.program, second.oracle).passed
