"""fold-removed-means: the mean of what was removed goes into the next bias, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir import capture
from pruna_ir.errors import PassError, UsageError
from pruna_ir.passes.fold_removed_means import FoldRemovedMeans
from pruna_ir.pipeline import Pipeline
from pruna_ir.transform import Context, apply
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

PASS = FoldRemovedMeans()


def changed(before, after):
    old = before.tensors()
    return {n for n, t in after.tensors().items() if n not in old or not torch.equal(t, old[n])}


def outputs(program, where, node=None):
    """All outputs over the data."""
    with torch.no_grad():
        return torch.cat([program(*batch.inputs)[0] for batch in where.data])


@given(gone=st.sets(st.integers(0, 6), min_size=1, max_size=6), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=20)
def test_a_linear_layer_gets_the_means_of_its_removed_inputs(gone, seed):
    program, where = program_of(Mlp, 3, seed=seed), context(3, seed=seed)
    small = cut(program, two__weight=tuple(sorted(gone)))
    after = kept_promise(PASS, small, where).program
    with torch.no_grad():
        (x,) = where.data.inputs
        hidden = program.tensor("one.weight").double() @ x.double().T
        hidden = hidden + program.tensor("one.bias").double()[:, None]
        hidden = program.tensor("two.weight").double() @ hidden
        read = (hidden + program.tensor("two.bias").double()[:, None]).relu().mean(1)
        columns = sorted(gone)
        wanted = program.tensor("three.bias").double() + (
            program.tensor("three.weight").double()[:, columns] @ read[columns]
        )
        assert torch.allclose(after.tensor("three.bias").double(), wanted, atol=1e-6)
    assert changed(small, after) == {"three.bias"}


def test_a_convolution_gets_the_mean_over_all_positions_borders_included():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 5, 1), nn.Conv2d(5, 3, 3, padding=1)).eval()
    program, where = capture(module, (torch.randn(2, 2, 4, 4),)), context(2, 4, 4)
    small = cut(program, **{"0__weight": (1, 3)})
    after = kept_promise(PASS, small, where).program
    wanted = outputs(program, where)
    gaps = [(wanted - outputs(p, where)).mean((0, 2, 3)).abs().max() for p in (after, small)]
    assert float(gaps[0]) < 1e-6
    assert float(gaps[1]) > 0.1


def test_without_padding_that_is_the_sum_over_taps_times_means():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 5, 1), nn.Conv2d(5, 3, 3)).eval()
    program, where = capture(module, (torch.randn(2, 2, 4, 4),)), context(2, 4, 4)
    after = kept_promise(PASS, cut(program, **{"0__weight": (1, 3)}), where).program
    with torch.no_grad():
        read = module[0](where.data.inputs[0])[:, [1, 3]]
        taps = nn.functional.unfold(read, 3).mean((0, 2)).reshape(2, 9)
        kernel = module[1].weight[:, [1, 3]].flatten(2)
        wanted = module[1].bias + torch.einsum("oct,ct->o", kernel, taps)
    assert torch.allclose(after.tensor("1.bias"), wanted, atol=1e-5)


def test_every_place_for_a_bias():
    program, where = program_of(Layers, 3, 8, 8), context(3, 8, 8)
    small = cut(
        program, first__weight=(0, 4), normed__weight=(2,), bare__weight=(1, 5),
        grouped__weight=(0, 2),
    )  # fmt: skip
    result = kept_promise(PASS, small, where)
    assert changed(small, result.program) == {
        "norm.running_mean", "bare.bias", "grouped.bias", "matmul_bias",
    }  # fmt: skip
    assert "bare.bias" not in small.tensors()
    assert isinstance(result.program.tensor("bare.bias"), nn.Parameter)


def test_the_output_of_a_transposed_convolution_keeps_its_mean():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 5, 1), nn.ReLU(), nn.ConvTranspose2d(5, 3, 3, stride=2, bias=False)
    )
    program, where = capture(module.eval(), (torch.randn(2, 2, 4, 4),)), context(2, 4, 4)
    after = kept_promise(PASS, cut(program, **{"0__weight": (0, 4)}), where).program
    gap = outputs(program, where) - outputs(after, where)
    assert float(gap.mean((0, 2, 3)).abs().max()) < 1e-6
    assert "2.bias" in after.tensors()


def test_no_pass_changes_what_lost_nothing():
    program = program_of(Mlp, 3)
    assert not apply(PASS, lost_nothing(program), context(3)).modified


def test_a_second_run_finds_nothing_left_to_fold():
    program, where = program_of(Layers, 3, 8, 8), context(3, 8, 8)
    small = cut(program, first__weight=(0, 4), bare__weight=(1, 5), grouped__weight=(0, 2))
    once = kept_promise(PASS, small, where).program
    twice = kept_promise(PASS, once, where).program
    assert set(once.tensors()) == set(twice.tensors())
    for name, tensor in once.tensors().items():
        assert torch.allclose(tensor, twice.tensor(name), atol=1e-5), name


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("name", ["blocks.0.4.running_mean", "blocks.1.3.weight"])
def test_a_wrong_tensor_breaks_the_promise(how, name):
    program, where = program_of(Residual, 4, 6, 6), context(4, 6, 6)
    small = cut(program, blocks__0__0__weight=(1, 2), blocks__1__0__weight=(0, 5))
    result = kept_promise(PASS, small, where)
    assert not promise_of_spoilt(PASS, small, result, where, name, how)


def test_it_needs_data_and_an_origin():
    program = program_of(Mlp, 3)
    with pytest.raises(UsageError, match="fold-removed-means needs calibration data"):
        apply(PASS, cut(program, one__weight=(1,)), Context())
    with pytest.raises(PassError, match="run fold-removed-means right after prune-channels"):
        apply(PASS, program, context(3))


def test_data_that_overflows_is_refused_with_the_layer():
    program = program_of(Mlp, 3)
    where = context(3)
    where.data.inputs[0][7] = float("inf")
    with pytest.raises(PassError, match=r"drives it to inf or NaN\n  %linear_\d"):
        apply(PASS, cut(program, one__weight=(1,)), where)


def test_in_a_pipeline_right_after_pruning():
    program, where = program_of(Residual, 4, 6, 6), context(4, 6, 6)
    text = "canonicalize,prune-channels{ratio=0.4},fold-removed-means,reestimate-batch-norm"
    result = Pipeline.parse(text).run(program, where)
    assert [step.check.effect.value for step in result.steps if step.modified] == [
        "oracle", "fitted", "fitted",
    ]  # fmt: skip
    with pytest.raises(PassError, match="after: canonicalize, prune-channels"):
        Pipeline.parse(
            "canonicalize,prune-channels{ratio=0.4},fold-batch-norm,fold-removed-means"
        ).run(program, where)
