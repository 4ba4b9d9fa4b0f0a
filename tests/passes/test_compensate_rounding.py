"""compensate-rounding: the loop, what it promises, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir.checks import check
from pruna_ir.data import TensorData
from pruna_ir.errors import PassError, UsageError
from pruna_ir.passes.compensate_rounding import CompensateRounding, NotWorse, OnGrid, gram
from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
from pruna_ir.passes.optimal_rounding import (
    Objective,
    Rounding,
    errors,
    fitted,
    gptq,
    inverse_factor,
    refitted,
    rounded,
)
from pruna_ir.passes.quantize_weights import QuantizeWeights
from pruna_ir.passes.weight_blocks import stored_weight
from pruna_ir.program import Program
from pruna_ir.transform import Context, PassResult, Rewrite, apply
from pruna_ir.verify import verify
from tests.passes.products import captured, correlated, gpt2, products, tied

DATA = correlated()
WEIGHTS = {"wide.weight", "turned.weight", "head.weight"}


def quantised(program: Program, **options) -> Program:
    options.setdefault("bits", 4)
    options.setdefault("block", 32)
    return apply(QuantizeWeights(**options), program).program


def compensated(program: Program, data: TensorData = DATA, **options) -> PassResult:
    result = apply(CompensateRounding(**options), program, Context(data=data))
    verify(result.program)
    return result


def problem(outputs: int, inputs: int, rows: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight = draw(outputs, inputs)
    x = draw(rows, 3) @ draw(3, inputs) + 0.3 * draw(rows, inputs)
    scale = weight.abs().amax(1, keepdim=True).expand_as(weight) / 7
    zero = torch.randint(-2, 3, (outputs, 1), generator=generator).double().expand_as(weight)
    return weight, scale, zero, x.mT @ x


def naive_gptq(weight, scale, zero, hessian, damping, order):
    """Optimal Brain Quantization with a fixed order: the inverse is downdated column by column.

    GPTQ's equations (2) and (3), without a Cholesky factor and without lazy batches.
    """
    count = weight.shape[1]
    system = hessian + damping * hessian.diagonal().mean() * torch.eye(count, dtype=hessian.dtype)
    inverse = torch.linalg.inv(system)
    rest, found = weight.clone(), weight.clone()
    free = list(order)
    for j in order:
        step, point = scale[:, j], zero[:, j]
        level = (torch.round(rest[:, j] / step) + point).clamp(-8, 7)
        found[:, j] = (level - point) * step
        cost = (rest[:, j] - found[:, j]) / inverse[j, j]
        for k in free:
            rest[:, k] = rest[:, k] - cost * inverse[j, k]
        inverse = inverse - inverse[:, j, None] @ inverse[None, j] / inverse[j, j]
        free.remove(j)
    return found


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 11), st.booleans(), st.integers(0, 10**6))
def test_the_loop_is_that_of_a_naive_one(
    outputs: int, inputs: int, act_order: bool, seed: int
) -> None:
    weight, scale, zero, hessian = problem(outputs, inputs, 20, seed)
    order = list(range(inputs))
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    wanted = naive_gptq(weight, scale, zero, hessian, 0.05, order)
    nearest = rounded(weight, scale, zero, -8, 7)
    better = errors(weight, wanted, hessian) < errors(weight, nearest, hessian)
    wanted = torch.where(better[:, None], wanted, nearest)
    found = gptq(weight, scale, zero, -8, 7, hessian, damping=0.05, act_order=act_order)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_lazy_batches_change_nothing() -> None:
    weight, scale, zero, hessian = problem(3, 150, 400, 0)
    wanted = naive_gptq(weight, scale, zero, hessian, 0.05, list(range(150)))
    found = gptq(weight, scale, zero, -8, 7, hessian, damping=0.05, act_order=False)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@settings(max_examples=30)
@given(
    st.integers(1, 5), st.integers(1, 24), st.integers(1, 30), st.booleans(),
    st.integers(0, 10**6),
)  # fmt: skip
def test_never_worse_than_nearest_and_always_on_the_grid(
    outputs: int, inputs: int, rows: int, act_order: bool, seed: int
) -> None:
    weight, scale, zero, hessian = problem(outputs, inputs, rows, seed)
    found = gptq(weight, scale, zero, -8, 7, hessian, damping=0.01, act_order=act_order)
    nearest = rounded(weight, scale, zero, -8, 7)
    assert (errors(weight, found, hessian) <= errors(weight, nearest, hessian)).all()
    levels = found / scale + zero
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-9)
    assert levels.min() > -8.5
    assert levels.max() < 7.5


def test_inputs_that_are_all_zero_are_rounded_to_nearest() -> None:
    weight, scale, zero, _ = problem(3, 5, 4, 0)
    found = gptq(
        weight, scale, zero, -8, 7, torch.zeros(5, 5).double(), damping=0.01, act_order=True
    )
    assert torch.equal(found, rounded(weight, scale, zero, -8, 7))


def test_a_ridge_below_rounding_is_refused() -> None:
    ones = torch.ones(4, 4, dtype=torch.float64)
    with pytest.raises(PassError, match="raise damping"):
        inverse_factor(ones, 1e-18)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 13), st.integers(1, 5), st.integers(0, 10**6))
def test_refitted_scales_are_those_of_least_squares(
    outputs: int, inputs: int, block: int, seed: int
) -> None:
    """The best scales of fixed levels, from the data itself: one column for each block."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, inputs, generator=generator, dtype=torch.float64)
    levels = torch.randint(1, 8, (outputs, inputs), generator=generator).double()
    true = torch.rand(outputs, -(-inputs // block), generator=generator).double() + 0.5
    spread = true.repeat_interleave(block, 1)[:, :inputs]
    weight = levels * spread + 1e-3 * torch.randn(
        outputs, inputs, generator=generator, dtype=torch.float64
    )
    start = Rounding(levels, torch.full_like(weight, 2.0))
    found = refitted(weight, start, x.mT @ x, block)
    for row in range(outputs):
        blocks = [slice(b, b + block) for b in range(0, inputs, block)]
        columns = [x[:, b] @ levels[row, b] for b in blocks]
        wanted = torch.linalg.lstsq(torch.stack(columns, 1), x @ weight[row]).solution
        torch.testing.assert_close(found[row, ::block], wanted, rtol=1e-5, atol=0)


def test_rows_whose_best_scale_is_not_positive_keep_theirs() -> None:
    weight = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    levels = torch.tensor([[-1.0, -2.0], [1.0, 1.0]], dtype=torch.float64)
    start = Rounding(levels, torch.full_like(weight, 4.0))
    found = refitted(weight, start, torch.eye(2, dtype=torch.float64), 2)
    assert found.float().tolist() == [[4.0, 4.0], [1.5, 1.5]]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 10**6))
def test_the_objective_is_the_error_of_the_product(outputs: int, inputs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = (30, 30, outputs, outputs)
    draws = (torch.randn(size, inputs, generator=generator).double() for size in sizes)
    x, f, weight, found = draws
    drift, spread = (f - x).mT @ x, (f - x).mT @ (f - x)
    objective = Objective(weight, x.mT @ x, drift, spread)
    wanted = (f @ weight.mT - x @ found.mT).square().sum(0)
    torch.testing.assert_close(objective.errors(found), wanted)
    # Nothing is better than the aim, without a ridge.
    aim = objective.aim(1e-12)
    assert (objective.errors(aim) <= wanted + 1e-9).all()
    best = torch.linalg.lstsq(x, f @ weight.mT).solution.mT
    torch.testing.assert_close(aim, best, rtol=1e-6, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(2, 24), st.integers(0, 3), st.integers(0, 10**6))
def test_no_row_errs_more_than_the_nearest(
    outputs: int, inputs: int, refits: int, seed: int
) -> None:
    weight, scale, zero, hessian = problem(outputs, inputs, 30, seed)
    objective = Objective(weight, hessian)
    found = fitted(
        objective, scale, zero, -8, 7, damping=0.01, act_order=True, refits=refits, block=inputs
    )
    nearest = rounded(weight, scale, zero, -8, 7)
    assert (objective.errors(found.matrix) <= objective.errors(nearest)).all()
    levels = found.levels + zero
    assert torch.equal(levels, levels.round())
    assert levels.min() >= -8
    assert levels.max() <= 7
    if not refits:
        assert torch.equal(found.scale, scale)


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"block": 0}, {"bits": 8}])
@pytest.mark.parametrize("choice", [{}, {"act_order": False}, {"refits": 0}, {"follow": False}])
def test_the_promise_holds(options, choice) -> None:
    program = quantised(products(), **options)
    pass_ = CompensateRounding(**choice)
    context = Context(data=DATA)
    result = apply(pass_, program, context)
    assert len([r for r in result.remarks if r.kind == "applied"]) == 3
    report = check(pass_, program, result.program, context=context, assurances=result.assurances)
    assert report.passed, report


def test_the_network_errs_less_on_correlated_inputs() -> None:
    program = products()
    nearest = quantised(program)
    found = compensated(nearest).program
    (x,) = (torch.cat([b.inputs[0] for b in DATA]),)
    truth = program(x)[0]
    old, new = ((p(x)[0] - truth).square().sum() for p in (nearest, found))
    assert new < 0.6 * old


def test_the_origin_and_the_grids_stay() -> None:
    program = quantised(products())
    result = compensated(program).program
    assert result.origin is program.origin
    for name, tensor in program.tensors().items():
        same = torch.equal(result.tensor(name), tensor)
        assert same == (name.split("_")[0] not in WEIGHTS or name.endswith("zero_point"))


def test_without_refits_the_scales_stay() -> None:
    program = quantised(products())
    result = compensated(program, refits=0).program
    changed = {n for n, t in program.tensors().items() if not torch.equal(result.tensor(n), t)}
    assert changed == WEIGHTS


def test_a_second_run_changes_nothing() -> None:
    once = compensated(quantised(products())).program
    again = compensated(once)
    assert again.program.hash() == once.hash()
    assert {r.message for r in again.remarks} == {
        "rounded to nearest: its weight is on its grid already, and its float values are gone"
    }


def test_weights_that_insert_fake_quant_left_are_rounded_too() -> None:
    program = apply(InsertFakeQuant(target="onnx"), products(), Context(data=DATA)).program
    result = compensated(program)
    assert len([r for r in result.remarks if r.kind == "applied"]) == 3


def test_following_the_float_program_makes_up_for_layers_before() -> None:
    """The same levels and scales to choose from; the second product undoes what it can."""
    program = products()
    truth = torch.cat([program(b.inputs[0])[0] for b in DATA])
    nearest = quantised(program, bits=4, block=0)

    def error(**options) -> float:
        found = compensated(nearest, **options).program
        return (torch.cat([found(b.inputs[0])[0] for b in DATA]) - truth).square().sum().item()

    assert error(follow=True) < 0.9 * error(follow=False)


def test_without_a_float_program_it_follows_its_inputs() -> None:
    program = quantised(products())
    alone = replace(program, origin=None)
    result = compensated(alone)
    assert result.program.hash() == compensated(program, follow=False).program.hash()
    notes = [r.message for r in result.remarks if r.kind == "note"]
    assert notes == ["the float program has no such product to follow"] * 3


def test_gpt2() -> None:
    program = quantised(gpt2())
    ids = TensorData((torch.randint(0, 61, (6, 8)),), batch_size=2)
    result = compensated(program, ids)
    assert len([r for r in result.remarks if r.kind == "applied"]) == 8


def test_a_weight_that_others_read_is_left_alone() -> None:
    program = quantised(tied(), tied=True)
    ids = TensorData((torch.randint(0, 20, (6, 5)),), batch_size=2)
    (missed,) = [r for r in compensated(program, ids).remarks if r.kind == "missed"]
    assert missed.message == "rounded to nearest: its weight is also read by embedding"


def test_a_float_program_stays() -> None:
    assert not compensated(products()).modified


def changed(program: Program, name: str, tensor: torch.Tensor) -> Program:
    rw = Rewrite(program, "test", Context())
    rw.set_origin(program.origin)
    rw.set_tensor(name, tensor)
    return rw.finish()


def test_planted_faults_are_found() -> None:
    """Weights off the grid, and a rounding that is worse than the nearest."""
    program, context = quantised(products()), Context(data=DATA)
    good = compensated(program).program
    name = "wide.weight"
    (node,) = [n for n in good.calls() if n.name == "linear"]

    def excess(assurance, after: Program) -> float:
        return max(f.measured - f.limit for f in assurance(program, after, context))

    assert excess(OnGrid(("linear",)), good) <= 0
    assert excess(NotWorse(("linear",)), good) <= 0
    off = changed(good, name, good.tensor(name) * 1.01)
    assert excess(OnGrid(("linear",)), off) > 0
    weight = stored_weight(good, node)
    assert weight is not None
    step = replace(weight, program=good).parameters()[0].float()
    worse = changed(good, name, good.tensor(name) + weight.stored(step))
    assert excess(NotWorse(("linear",)), worse) > 0


def test_moments_are_sums_over_all_positions() -> None:
    torch.manual_seed(0)
    values = [torch.randn(2, 3, 5), torch.randn(1, 3, 5)]
    rows = torch.cat([v.reshape(-1, 5) for v in values]).double()
    torch.testing.assert_close(gram(values), rows.T @ rows)


def test_data_must_be_there() -> None:
    with pytest.raises(UsageError, match="needs calibration data"):
        apply(CompensateRounding(), quantised(products()))


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"max_inputs": 0}, {"refits": -1}])
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        CompensateRounding(**options)


def test_data_that_overflows_is_refused_with_the_layer() -> None:
    program = quantised(captured(nn.Linear(32, 4), torch.randn(2, 32)))
    huge = TensorData((torch.full((4, 32), torch.inf),), batch_size=2)
    with pytest.raises(PassError, match="to inf or NaN"):
        compensated(program, huge)


def test_layers_beyond_the_limit_are_left_alone() -> None:
    result = compensated(quantised(products()), max_inputs=50)
    missed = [r.message for r in result.remarks if r.kind == "missed"]
    assert missed == [
        "rounded to nearest: it has 64 inputs, more than max_inputs=50",
        "rounded to nearest: it has 52 inputs, more than max_inputs=50",
    ]
