"""reconstruct-consumers: the survivors stand in for the removed, as well as they can."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir import capture
from pruna_ir.data import TensorData
from pruna_ir.errors import PassError, UsageError, VerificationError
from pruna_ir.passes.fold_removed_means import FoldRemovedMeans
from pruna_ir.passes.reconstruct_consumers import ReconstructConsumers
from pruna_ir.passes.reestimate_batch_norm import ReestimateBatchNorm
from pruna_ir.pipeline import Pipeline
from pruna_ir.reproducer import WriteReproducer, replay
from pruna_ir.transform import Context, Rewrite, apply
from tests.passes.compensation import (
    SPOILT,
    Layers,
    Mlp,
    Residual,
    context,
    kept_promise,
    program_of,
    promise_of_spoilt,
)
from tests.passes.cutting import cut, lost_nothing

TINY = ReconstructConsumers(damping=1e-10, positions=0)


def outputs(program, where):
    with torch.no_grad():
        return torch.cat([program(*batch.inputs)[0] for batch in where.data])


def error(program, reference, where):
    return float((outputs(program, where) - outputs(reference, where)).square().mean())


@given(gone=st.sets(st.integers(0, 8), min_size=1, max_size=6), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=20)
def test_linear_combinations_of_survivors_are_restored_exactly(gone, seed):
    # Nine neurons of rank 3: any three or more survivors span what was removed.
    program, where = program_of(Mlp, 3, seed=seed), context(3, seed=seed)
    small = cut(program, one__weight=tuple(sorted(gone)))
    after = kept_promise(TINY, small, where).program
    assert error(after, program, where) < 1e-7 * float(outputs(program, where).square().mean())


@given(gone=st.sets(st.integers(0, 6), min_size=1, max_size=6), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=20)
def test_a_linear_layer_is_that_of_lstsq_on_the_stacked_data(gone, seed):
    program, where = program_of(Mlp, 3, seed=seed), context(3, seed=seed)
    small = cut(program, two__weight=tuple(sorted(gone)))
    after = kept_promise(TINY, small, where).program
    kept = [i for i in range(7) if i not in gone]
    weight = program.tensor("three.weight").detach().double()
    with torch.no_grad():
        (x,) = where.data.inputs
        hidden = nn.functional.linear(
            nn.functional.linear(x, program.tensor("one.weight"), program.tensor("one.bias")),
            program.tensor("two.weight"), program.tensor("two.bias"),
        ).relu().double()  # fmt: skip
    centred = hidden - hidden.mean(0)
    expected = torch.linalg.lstsq(centred[:, kept], centred @ weight.T, driver="gelsd").solution.T
    found = after.tensor("three.weight").detach().double()
    assert torch.allclose(centred[:, kept] @ found.T, centred[:, kept] @ expected.T, atol=1e-5)
    # ... which is the compensation of Optimal Brain Surgeon for the removed columns.
    moment = centred.T @ centred
    inverse = torch.linalg.pinv(moment[kept][:, kept], hermitian=True)
    gone_columns = sorted(gone)
    surgeon = weight[:, kept] + weight[:, gone_columns] @ moment[gone_columns][:, kept] @ inverse
    assert torch.allclose(centred[:, kept] @ found.T, centred[:, kept] @ surgeon.T, atol=1e-5)


def test_optimal_brain_surgeon_for_one_weight():
    """delta = -w_q / [H^-1]_qq * H^-1 e_q, of Hassibi and Stork."""
    program, where = program_of(Mlp, 3), context(3, samples=400)
    after = kept_promise(TINY, cut(program, two__weight=(4,)), where).program
    with torch.no_grad():
        (x,) = where.data.inputs
        module = [program.tensor(f"{n}.{p}") for n in ("one", "two") for p in ("weight", "bias")]
        hidden = nn.functional.linear(nn.functional.linear(x, *module[:2]), *module[2:]).relu()
    centred = hidden.double() - hidden.double().mean(0)
    inverse = torch.linalg.inv(centred.T @ centred)
    weight = program.tensor("three.weight").detach().double()
    delta = -weight[:, 4, None] / inverse[4, 4] * inverse[4]
    kept = [0, 1, 2, 3, 5, 6]
    found = after.tensor("three.weight").detach().double()
    assert torch.allclose(found, (weight + delta)[:, kept], atol=1e-5)


def everything_cut():
    program = program_of(Layers, 3, 8, 8)
    return program, cut(
        program, first__weight=(0, 4), normed__weight=(2,), bare__weight=(1, 5),
        grouped__weight=(0, 2),
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"positions": 3}, {"every": True}, {"damping": 1.0}])
def test_every_kind_of_layer_is_fitted_as_promised(options):
    program, small = everything_cut()
    where = context(3, 8, 8)
    pass_ = ReconstructConsumers(**options)
    result = kept_promise(pass_, small, where)
    assert error(result.program, program, where) < error(small, program, where)
    applied = [r.node for r in result.remarks if r.kind == "applied"]
    lost = ["conv2d_1", "conv2d_2", "conv2d_3", "matmul"]
    assert [name.replace("_default", "") for name in applied] == (
        ["conv2d", *lost, "linear"] if options.get("every") else lost
    )


def test_layers_that_lost_nothing_keep_their_weights():
    program, where = program_of(Mlp, 3), context(3)
    small = cut(program, two__weight=(1,))
    after = kept_promise(ReconstructConsumers(), small, where).program
    changed = [n for n, t in after.tensors().items() if not torch.equal(t, small.tensor(n))]
    assert changed == ["three.weight", "three.bias"]
    assert not apply(ReconstructConsumers(), lost_nothing(program), where).modified


def test_a_residual_branch_takes_up_what_the_shortcut_lacks():
    program, where = program_of(Residual, 4, 6, 6), context(4, 6, 6, samples=64)
    small = cut(program, blocks__0__0__weight=(1, 2, 3), blocks__1__0__weight=(0,))
    with_it = kept_promise(ReconstructConsumers(residual=True), small, where).program
    without = kept_promise(ReconstructConsumers(residual=False), small, where).program
    assert error(with_it, program, where) < error(without, program, where)


def test_compensations_in_a_row():
    program, small = everything_cut()
    where = context(3, 8, 8)
    errors = [error(small, program, where)]
    for pass_ in (
        FoldRemovedMeans(), ReconstructConsumers(), ReestimateBatchNorm(relative=True),
        ReconstructConsumers(every=True), FoldRemovedMeans(),
    ):  # fmt: skip
        small = kept_promise(pass_, small, where).program
        errors.append(error(small, program, where))
    assert errors[-1] < errors[2] < errors[1] < errors[0]


def test_a_transformer_block():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 4, batch_first=True)
            self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            x = x + self.attend(x, x, x, need_weights=False)[0]
            return x + self.down(torch.relu(self.up(self.norm(x))))

    torch.manual_seed(0)
    program = capture(Attention().eval(), (torch.randn(2, 5, 8),))
    where = context(5, 8)
    small = cut(program, up__weight=(0, 3, 4, 7, 9))
    after = kept_promise(ReconstructConsumers(), small, where).program
    assert error(after, program, where) < 0.8 * error(small, program, where)


def test_dependent_inputs_and_few_positions_stay_finite_and_are_told():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3)).eval()
    program = capture(module, (torch.randn(2, 2, 6, 6),))
    image = torch.randn(1, 2, 6, 6)
    where = Context(data=TensorData((image.expand(3, -1, -1, -1),)))
    small = cut(program, **{"0__weight": (1, 5)})
    result = kept_promise(ReconstructConsumers(damping=1e-6), small, where)
    assert error(result.program, program, where) < 1e-6
    (told,) = [r for r in result.remarks if r.kind == "note"]
    assert told.message.startswith("12 positions are fewer than its 54 inputs")


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("name", ["three.weight", "three.bias"])
def test_wrong_weights_break_the_promise(how, name):
    program, where = program_of(Mlp, 3), context(3)
    small = cut(program, two__weight=(1, 4))
    result = kept_promise(ReconstructConsumers(), small, where)
    assert not promise_of_spoilt(ReconstructConsumers(), small, result, where, name, how)


def test_another_tensor_changed_on_the_way_breaks_the_promise():
    program, where = program_of(Mlp, 3), context(3)
    small = cut(program, two__weight=(1, 4))
    result = kept_promise(ReconstructConsumers(), small, where)
    wrong = promise_of_spoilt(
        ReconstructConsumers(), small, result, where, "one.bias", "a hundredth more"
    )
    assert not wrong


def test_what_cannot_be_fitted_is_told_and_left():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 6), nn.Linear(6, 4)

        def forward(self, x):
            y = self.one(x)
            return self.two(torch.relu(y)) + self.two(torch.tanh(y))

    torch.manual_seed(0)
    program = capture(Tied(), (torch.randn(2, 3),))
    result = apply(ReconstructConsumers(), cut(program, one__weight=(1,)), context(3))
    assert not result.modified
    assert [r.message for r in result.remarks] == [
        "not refitted: its weight is also read by linear_2",
        "not refitted: its weight is also read by linear_1",
    ]
    wide = apply(
        ReconstructConsumers(max_inputs=5), cut(program_of(Mlp, 3), two__weight=(1,)), context(3)
    )
    assert [r.message for r in wide.remarks] == [
        "not refitted: it has 6 inputs, more than max_inputs=5"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping must be above 0, not 0.0"),
        ({"damping": float("nan")}, "damping must be above 0, not nan"),
        ({"positions": -1}, "positions must be at least 0, not -1"),
        ({"max_inputs": 0}, "max_inputs must be at least 1, not 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UsageError, match=message):
        ReconstructConsumers(**options)


def test_it_needs_data_and_an_origin():
    program = program_of(Mlp, 3)
    with pytest.raises(UsageError, match="reconstruct-consumers needs calibration data"):
        apply(ReconstructConsumers(), cut(program, one__weight=(1,)), Context())
    with pytest.raises(PassError, match="right after prune-channels"):
        apply(ReconstructConsumers(), program, context(3))


@dataclass(frozen=True)
class Careless(ReconstructConsumers):
    """A planted bug: it also halves a layer that lost nothing."""

    name: ClassVar[str] = "careless"

    def rewrite(self, rw: Rewrite) -> None:
        super().rewrite(rw)
        rw.set_tensor("one.weight", rw.program.tensor("one.weight").detach() / 2)


def test_a_failure_is_recorded_with_what_the_program_was_pruned_from(tmp_path):
    small, where = cut(program_of(Mlp, 3), two__weight=(1, 4)), context(3)
    pipeline = Pipeline((Careless(),))
    with pytest.raises(VerificationError, match=r"must stay: one\.weight"):
        pipeline.run(small, where, instruments=[WriteReproducer(tmp_path / "found")])
    record = json.loads((tmp_path / "found" / "reproducer.json").read_text())
    assert record["removed"] == {
        name: {str(dim): list(indices) for dim, indices in dims.items()}
        for name, dims in small.origin.removed.items()
    }
    record["pipeline"] = "reconstruct-consumers"
    (tmp_path / "found" / "reproducer.json").write_text(json.dumps(record))
    outcome = replay(tmp_path / "found")
    assert outcome.error is None
    again = kept_promise(ReconstructConsumers(), small, where).program
    assert torch.equal(outcome.result.program.tensor("three.weight"), again.tensor("three.weight"))
