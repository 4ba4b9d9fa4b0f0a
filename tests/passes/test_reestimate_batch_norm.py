"""reestimate-batch-norm: running statistics are those of the data, norm after norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruna_ir import capture
from pruna_ir.errors import PassError, UsageError
from pruna_ir.passes.reestimate_batch_norm import ReestimateBatchNorm
from pruna_ir.transform import Context, apply
from tests.networks import seeded
from tests.passes.compensation import (
    SPOILT,
    Residual,
    context,
    kept_promise,
    program_of,
    promise_of_spoilt,
)
from tests.passes.cutting import cut, lost_nothing

PASS, RELATIVE = ReestimateBatchNorm(), ReestimateBatchNorm(relative=True)
STATISTICS = ("running_mean", "running_var")


def norms(program):
    return sorted({n.rpartition(".")[0] for n in program.tensors() if n.endswith("running_var")})


def small_and_data():
    program = program_of(Residual, 4, 6, 6)
    small = cut(program, blocks__0__0__weight=(1, 2), blocks__1__0__weight=(0, 5))
    return program, small, context(4, 6, 6)


def test_statistics_are_those_of_torch_in_training_mode_on_all_data_at_once():
    program, where = program_of(Residual, 4, 6, 6), context(4, 6, 6)
    after = kept_promise(PASS, program, where).program
    module = seeded(Residual).train()
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0
    with torch.no_grad():
        module(where.data.inputs[0])
    values = 50 * 36
    for name in norms(after):
        norm = module.get_submodule(name)
        assert torch.allclose(after.tensor(f"{name}.running_mean"), norm.running_mean, atol=1e-5)
        biased = norm.running_var * (values - 1) / values
        assert torch.allclose(after.tensor(f"{name}.running_var"), biased, rtol=1e-5)


def test_batches_do_not_matter():
    program = program_of(Residual, 4, 6, 6)
    one = apply(PASS, program, context(4, 6, 6, batch=50)).program
    many = apply(PASS, program, context(4, 6, 6, batch=7)).program
    for name, tensor in one.tensors().items():
        assert torch.allclose(tensor, many.tensor(name), atol=1e-5), name


def test_a_second_run_changes_nothing_but_rounding():
    _, small, where = small_and_data()
    for pass_ in (PASS, RELATIVE):
        once = kept_promise(pass_, small, where).program
        twice = kept_promise(pass_, once, where).program
        for name, tensor in once.tensors().items():
            assert torch.allclose(tensor, twice.tensor(name), atol=1e-5), name


def test_relative_to_a_program_that_lost_nothing_changes_nothing_but_rounding():
    program = program_of(Residual, 4, 6, 6)
    whole = lost_nothing(program)
    after = kept_promise(RELATIVE, whole, context(4, 6, 6)).program
    for name, tensor in whole.tensors().items():
        assert torch.allclose(tensor, after.tensor(name), atol=1e-5), name


def test_relative_statistics_restore_what_leaves_the_norm():
    program, small, where = small_and_data()
    after = kept_promise(RELATIVE, small, where).program
    with torch.no_grad():
        old, cold, new = (
            torch.cat([p(*batch.inputs)[0] for batch in where.data])
            for p in (program, small, after)
        )
    assert float((new.mean() - old.mean()).abs()) < float((cold.mean() - old.mean()).abs())


def test_a_channel_that_does_not_vary_keeps_a_finite_variance():
    module = seeded(Residual)
    with torch.no_grad():
        module.blocks[0][0].weight[3].zero_()
    program, where = capture(module, (torch.randn(2, 4, 6, 6),)), context(4, 6, 6)
    small = cut(program, blocks__0__0__weight=(1,))
    for pass_ in (PASS, RELATIVE):
        after = kept_promise(pass_, small, where).program
        assert bool(torch.isfinite(after.tensor("blocks.0.1.running_var")).all())
    assert float(after.tensor("blocks.0.1.running_var")[2]) == pytest.approx(
        float(small.tensor("blocks.0.1.running_var")[2])
    )


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("pass_", [PASS, RELATIVE])
@pytest.mark.parametrize("name", [*STATISTICS, "weight"])
def test_a_wrong_tensor_breaks_the_promise(how, pass_, name):
    _, small, where = small_and_data()
    result = kept_promise(pass_, small, where)
    wrong = promise_of_spoilt(pass_, small, result, where, f"blocks.0.4.{name}", how)
    assert not wrong


def test_the_unbiased_variance_is_told_apart():
    program, where = program_of(Residual, 4, 6, 6), context(4, 6, 6)
    result = kept_promise(PASS, program, where)
    name = "blocks.1.4.running_var"
    assert not promise_of_spoilt(PASS, program, result, where, name, "unbiased")


def test_shared_statistics_and_norms_without_any_stay():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.free = nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)

        def forward(self, x):
            return self.free(self.norm(self.norm(x) * 2))

    program = capture(Shared().eval(), (torch.randn(2, 3),))
    result = apply(PASS, program, context(3))
    assert not result.modified
    assert [r.message for r in result.remarks] == [
        "its statistics are also read by batch_norm_1",
        "its statistics are also read by batch_norm",
        "it normalises with each batch's own statistics",
    ]


def test_it_needs_data_and_relative_needs_an_origin():
    program = program_of(Residual, 4, 6, 6)
    with pytest.raises(UsageError, match="reestimate-batch-norm needs calibration data"):
        apply(PASS, program, Context())
    with pytest.raises(PassError, match="right after prune-channels"):
        apply(RELATIVE, program, context(4, 6, 6))
