"""quantize-weights: the grid of every block, which layers, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir.checks import check
from pruna_ir.errors import PassError, UsageError
from pruna_ir.options import make_pass
from pruna_ir.passes.fold_constants import FoldConstants
from pruna_ir.passes.quantize_weights import QuantizeWeights
from pruna_ir.passes.weight_blocks import block_parameters, stored_weight, weight_grid
from pruna_ir.program import Program
from pruna_ir.quantization import describe
from pruna_ir.reexport import reexport
from pruna_ir.spec import parse_pipeline, print_pass
from pruna_ir.transform import Context, PassResult, apply
from pruna_ir.verify import verify
from tests.passes.products import Conv1D, captured, gpt2, products, tied

aten = torch.ops.aten


def quantised(program: Program, **options) -> PassResult:
    result = apply(QuantizeWeights(**options), program)
    verify(result.program)
    return result


def stored(program: Program) -> dict[str, torch.Tensor]:
    """The weight that each product reads, [outputs, inputs], by the parameter's name."""
    found = (stored_weight(program, node) for node in program.calls())
    return {str(w.source.target): w.rounded() for w in found if w is not None}


def naive(weight: np.ndarray, block: int, low: int, high: int, symmetric: bool) -> np.ndarray:
    """Every element by itself: the module docstring's formula with loops."""
    out = np.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], block):
            part = weight[row, start : start + block]
            least, most = min(part.min(), 0.0), max(part.max(), 0.0)
            whole = (most - least) / (high - low)
            scale = max(least / low, most / high) if symmetric else whole
            scale = float(np.float32(scale or 1.0))
            zero = 0 if symmetric else int(np.clip(low - np.rint(least / scale), low, high))
            for column, value in enumerate(part):
                level = np.clip(np.rint(value / scale) + zero, low, high)
                out[row, start + column] = (level - zero) * scale
    return out


@settings(max_examples=40)
@given(
    st.sampled_from([8, 4]), st.booleans(), st.integers(1, 20), st.integers(1, 5),
    st.sampled_from([1e-30, 1.0, 1e20]), st.integers(0, 2**31),
)  # fmt: skip
def test_blocks_are_rounded_as_a_naive_loop_does(
    bits: int, symmetric: bool, block: int, count: int, size: float, seed: int
) -> None:
    rows = torch.randn(count, block, generator=torch.Generator().manual_seed(seed)) * size
    rows[0, 0] = 0.0
    grid = weight_grid(bits, symmetric=symmetric)
    parameters = block_parameters(rows, grid, "minmax", "w")
    found = parameters.reals(parameters.integers(rows)).numpy()
    wanted = naive(rows.double().numpy(), block, grid.qmin, grid.qmax, symmetric)
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-9 * size)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("inputs", "block", "used"),
    [(64, 32, 32), (48, 32, 16), (50, 32, 32), (20, 64, 20), (40, 0, 40)],
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_layer_reads_its_weight_rounded_by_blocks(
    inputs: int, block: int, used: int, symmetric: bool, turned: bool
) -> None:
    torch.manual_seed(inputs)
    layer = Conv1D(inputs, 3) if turned else nn.Linear(inputs, 3)
    program = captured(layer, torch.randn(2, inputs))
    result = quantised(program, bits=4, symmetric=symmetric, block=block, scales="minmax")
    weight = layer.weight.detach().T if turned else layer.weight.detach()
    grid = weight_grid(4, symmetric=symmetric)
    wanted = naive(weight.double().numpy(), used, grid.qmin, grid.qmax, symmetric)
    (found,) = stored(result.program).values()
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"bits": 4, "block": 32}, {"bits": 4, "block": 16,
                                                                     "symmetric": False}])
def test_the_program_computes_with_the_rounded_weights(options) -> None:
    program = products()
    result = quantised(program, **options)
    weights = stored(result.program)
    assert set(weights) == {"wide.weight", "turned.weight", "head.weight"}
    x = torch.randn(3, 3, 64)
    y = torch.relu(x @ weights["wide.weight"].float().T + program.tensor("wide.bias"))
    y = torch.relu(y @ weights["turned.weight"].float().T + program.tensor("turned.bias"))
    torch.testing.assert_close(result.program(x)[0], y @ weights["head.weight"].float().T)


def test_the_promise_holds_and_names_and_parameters_stay() -> None:
    program = products()
    pass_ = QuantizeWeights(bits=4, block=32)
    result = apply(pass_, program)
    assert check(pass_, program, result.program).passed
    for name, tensor in program.tensors().items():
        assert torch.equal(result.program.tensor(name), tensor)
    assert {n.name for n in program.calls()} <= {n.name for n in result.program.calls()}
    assert result.program.origin is not None
    assert result.program.origin.program is program


def test_remarks_say_which_blocks_were_taken() -> None:
    said = [r.message for r in quantised(products(), bits=4, block=32).remarks]
    assert said == [
        "wide: s4[-8, 7], blocks of 32 inputs",
        "turned: s4[-8, 7], blocks of 32 inputs, the last of 20",
        "blocks of 32 do not divide its 52 inputs: blocks of 32 inputs, the last of 20",
        "head: s4[-8, 7], blocks of 16 inputs",
        "blocks of 32 do not divide its 48 inputs: blocks of 16 inputs",
    ]


def test_reports_see_the_grids_behind_the_views() -> None:
    rows = describe(quantised(products(), bits=4, block=32).program)
    assert [(row.layer, row.operand, row.bits) for row in rows] == [
        ("wide", "weight", 4), ("turned", "mat2", 4), ("head", "weight", 4),
    ]  # fmt: skip


def test_a_second_run_changes_nothing() -> None:
    once = quantised(products(), bits=4, block=32)
    assert not apply(QuantizeWeights(bits=4, block=32), once.program).modified
    assert not apply(QuantizeWeights(bits=8), once.program).modified


def test_two_runs_give_layers_different_bits() -> None:
    first = quantised(products(), bits=4, block=32, exclude=("head",)).program
    rows = describe(quantised(first, bits=8).program)
    assert {row.layer: row.bits for row in rows} == {"wide": 4, "turned": 4, "head": 8}


def test_folded_views_are_read_the_same() -> None:
    program = quantised(products(), bits=4, block=32).program
    folded = apply(FoldConstants(), program).program
    assert folded.hash() != program.hash()
    before, after = stored(program), stored(folded)
    # A padded weight is no view of its parameter: it is stored anew.
    assert len(before) == len(after) == 3
    pairs = zip(before.values(), after.values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(folded(x)[0], program(x)[0])
    constants = [n for n in reexport(program).graph.nodes if "pad" in str(n.target)]
    assert not constants


def test_a_tied_weight_stays_float_unless_asked() -> None:
    result = quantised(tied(), bits=8)
    assert set(stored(result.program)) == {"body.weight"}
    (missed,) = [r for r in result.remarks if r.kind == "missed"]
    assert missed.message == (
        "its weight is also read by embedding; tied=true quantises it for this reader alone"
    )
    both = quantised(tied(), bits=8, tied=True)
    assert set(stored(both.program)) == {"body.weight", "table.weight"}
    (embedding,) = both.program.calls(aten.embedding.default)
    assert embedding.all_input_nodes[0].op == "get_attr"


def test_every_addmm_of_gpt2_is_quantised() -> None:
    program = gpt2()
    result = quantised(program, bits=4, block=32)
    addmms = list(result.program.calls(aten.addmm.default))
    assert len(addmms) == 8
    assert all(stored_weight(result.program, node) is not None for node in addmms)
    kept = quantised(program, bits=4, block=32, exclude=("transformer.h.0*",)).program
    flags = [stored_weight(kept, n) is not None for n in kept.calls(aten.addmm.default)]
    assert flags == [False] * 4 + [True] * 4


def test_least_squares_scales_err_less_than_the_range() -> None:
    torch.manual_seed(0)
    rows = torch.randn(50, 64, dtype=torch.float64)
    for symmetric in (True, False):
        grid = weight_grid(4, symmetric=symmetric)
        errors = []
        for scales in ("minmax", "mse"):
            p = block_parameters(rows, grid, scales, "w")
            errors.append((p.reals(p.integers(rows)) - rows).square().sum(1))
        assert (errors[1] <= errors[0]).all()
        assert errors[1].sum() < 0.93 * errors[0].sum()


def test_the_text_form_comes_back() -> None:
    pass_ = QuantizeWeights(bits=4, block=64, symmetric=False, exclude=("head",))
    (spec,) = parse_pipeline(print_pass(pass_))
    assert make_pass(spec) == pass_


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits must be 8 or 4, not 3"),
        ({"block": 24}, "block must be 16, 32, 64, 128 or 256"),
        ({"block": 8}, "block must be 16"),
    ],
)
def test_options_out_of_range_are_refused(options, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        QuantizeWeights(**options)


def test_a_glob_that_covers_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'head'"):
        quantised(products(), exclude=("heat",))


def test_zero_points_for_tensorrt_are_refused() -> None:
    with pytest.raises(UsageError, match="TensorRT takes weights without zero points only"):
        apply(QuantizeWeights(symmetric=False), products(), Context(target="tensorrt"))


def test_a_weight_without_a_range_is_refused_by_name() -> None:
    layer = nn.Linear(32, 3)
    with torch.no_grad():
        layer.weight[1, 2] = float("inf")
    with pytest.raises(PassError, match="weight"):
        apply(QuantizeWeights(bits=4, block=16), captured(layer, torch.zeros(2, 32)))
