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
from pruna_ir.passes.optimal_rounding import errors, gptq, inverse_factor, rounded
from pruna_ir.passes.quantize_weights import QuantizeWeights
from pruna_ir.passes.weight_blocks import stored_weight
from pruna_ir.program import Program
from pruna_ir.transform import Context, PassResult, Rewrite, apply
from pruna_ir.verify import verify
from tests.passes.products import captured, correlated, gpt2, products, tied

DATA = correlated()


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


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"block": 0}, {"bits": 8}])
@pytest.mark.parametrize("act_order", [True, False])
def test_the_promise_holds(options, act_order: bool) -> None:
    program = quantised(products(), **options)
    pass_ = CompensateRounding(act_order=act_order)
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
        assert same == (name not in {"wide.weight", "turned.weight", "head.weight"})


def test_a_second_run_changes_nothing() -> None:
    once = compensated(quantised(products())).program
    assert compensated(once).program.hash() == once.hash()


def test_weights_that_insert_fake_quant_left_are_rounded_too() -> None:
    program = apply(InsertFakeQuant(target="onnx"), products(), Context(data=DATA)).program
    result = compensated(program)
    assert len([r for r in result.remarks if r.kind == "applied"]) == 3


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


@pytest.mark.parametrize("options", [{"damping": 0.0}, {"max_inputs": 0}])
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
