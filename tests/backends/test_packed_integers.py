"""Integer layers against the program in float64, and what is handed on as uint8.

A layer that gives float32 equals the fake-quantised one to within float32's rounding; rounded
results may differ where a value lies next to a boundary, no more than noise before each rounding
does.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir.backends.packed_program import PackedProgram
from pruna_ir.build import build
from pruna_ir.certify import MARGIN_DB
from pruna_ir.data import TensorData
from pruna_ir.equivalence import relative_error, run_float64, sqnr_db
from pruna_ir.lowering import Verdict
from pruna_ir.noise import run_noisy
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.transform import Context
from tests.backends.test_packed_program import captured, layers_of
from tests.quantised import quantised_net

F = nn.functional

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="the processor has no VNNI, so nothing to test"
)


def quantised(program: Program, seed: int = 0) -> Program:
    """The program quantised for eager, calibrated on normal numbers."""
    torch.manual_seed(seed)
    data = tuple(torch.randn(8, *example.shape[1:]) for example in program.examples)
    context = Context(data=TensorData(data, batch_size=4), target="eager")
    return Pipeline.parse("canonicalize,insert-fake-quant").run(program, context).program


def check_integers(program: Program, batch: int = 3, seed: int = 0) -> PackedProgram:
    """Beside the program in float64, integers are no further off than noise before each rounding.

    Values that fall on other sides of a boundary differ by a step, so that few may differ at all.
    """
    torch.manual_seed(seed)
    inputs = tuple(torch.randn(batch, *example.shape[1:]) for example in program.examples)
    packed = PackedProgram(program)
    first, second = packed(*inputs), packed(*inputs)
    truths = run_float64(program, inputs)
    noisy = [run_noisy(program, inputs, seed=run) for run in range(6)]
    for position, truth in enumerate(truths):
        exact = relative_error(first[position], truth) <= 2e-6
        floor = min(sqnr_db(outputs[position], truth) for outputs in noisy) - MARGIN_DB
        assert exact or sqnr_db(first[position], truth) >= floor
        assert torch.equal(first[position], second[position])
        assert first[position].shape == truth.shape
        assert sqnr_db(first[position].flip(-1) * 0.9, truth) < 35.0, "the check can fail"
    return packed


INTEGER_CHAINS = {
    "relu": (lambda x, a, b: b(torch.relu(a(x))), ["conv2d, relu, fake_quant", "conv2d"]),
    "relu6": (lambda x, a, b: b(F.relu6(a(x))), ["conv2d, hardtanh, fake_quant", "conv2d"]),
    "hardswish": (
        lambda x, a, b: b(F.hardswish(a(x))), ["conv2d, hardswish, fake_quant", "conv2d"]
    ),
    "silu": (lambda x, a, b: b(F.silu(a(x))), ["conv2d, silu, fake_quant", "conv2d"]),
    "gelu": (lambda x, a, b: b(F.gelu(a(x))), ["conv2d, gelu", "conv2d"]),
    "residual": (
        lambda x, a, b: b(torch.relu(a(x) + x)), ["conv2d, add, relu, fake_quant", "conv2d"]
    ),
    "two branches": (
        lambda x, a, b: b(torch.relu(b(x) + a(x))),
        ["conv2d, fake_quant", "conv2d, add, relu, fake_quant", "conv2d"],
    ),
    "read twice": (
        lambda x, a, b: (lambda h: torch.relu(b(h) + h).mean((2, 3)))(torch.relu(a(x))),
        ["conv2d, relu, fake_quant", "conv2d, add, relu"],
    ),
    "pooled": (
        lambda x, a, b: b(F.max_pool2d(torch.relu(a(x)), 2)),
        ["conv2d, relu, fake_quant", "conv2d"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("chain", INTEGER_CHAINS)
def test_integer_layers_hand_on_integers(chain: str) -> None:
    forward, expected = INTEGER_CHAINS[chain]
    program = quantised(captured(forward, nn.Conv2d(5, 5, 3, padding=1), nn.Conv2d(5, 5, 1)))
    packed = check_integers(program)
    assert sorted(layers_of(packed)) == sorted(expected)
    assert {row.precision for row in packed.rows if row.kind == "conv"} == {"int8"}


SIDE = st.integers(1, 3)


@settings(max_examples=30)
@given(
    groups=st.sampled_from([1, 1, 2, 3]), inner=st.integers(1, 5), outer=st.integers(1, 5),
    depthwise=st.booleans(), kernel=st.tuples(SIDE, SIDE), stride=SIDE, dilation=SIDE,
    padding=st.integers(0, 2), bias=st.booleans(), batch=st.integers(1, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_one_convolution_equals_the_program_to_within_rounding(
    groups, inner, outer, depthwise, kernel, stride, dilation, padding, bias, batch, seed
):
    channels = groups * inner
    conv = nn.Conv2d(
        channels, channels if depthwise else groups * outer, kernel, stride, padding, dilation,
        channels if depthwise else groups, bias=bias,
    )  # fmt: skip
    program = captured(lambda x, a: a(x), conv, shape=(2, channels, 9, 8), seed=seed)
    _one_layer(program, batch, seed)


@settings(max_examples=30)
@given(
    inner=st.integers(1, 33), outer=st.integers(1, 33), rows=st.sampled_from([(), (1,), (3, 2)]),
    bias=st.booleans(), batch=st.integers(1, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_one_linear_layer_equals_the_program_to_within_rounding(
    inner, outer, rows, bias, batch, seed
):
    layer = nn.Linear(inner, outer, bias=bias)
    _one_layer(captured(lambda x, a: a(x), layer, shape=(2, *rows, inner), seed=seed), batch, seed)


def _one_layer(program: Program, batch: int, seed: int) -> None:
    quantised_program = quantised(program, seed)
    x = torch.randn(batch, *program.examples[0].shape[1:])
    (truth,) = run_float64(quantised_program, (x,))
    packed = PackedProgram(quantised_program)
    assert [row.precision for row in packed.rows if row.kind in ("conv", "linear")] == ["int8"]
    assert relative_error(packed(x)[0], truth) <= 2e-6
    # The input is on a grid: a step of it, somewhere, is far more than rounding.
    if truth.any():
        assert relative_error(packed(x * 1.05)[0], truth) > 2e-6, "the check can fail"


def test_transposed_weights_and_narrow_grids() -> None:
    """GPT-2's layout, and 4-bit grids, which are stored in the same bytes."""
    from pruna_ir.quantization import S8_SYMMETRIC, S8_WEIGHT, choose_parameters, fake_quant_op

    class Net(nn.Module):
        def __init__(self, bits: int) -> None:
            super().__init__()
            torch.manual_seed(bits)
            self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))
            high = self.weight.detach().abs().amax(0)
            grids = S8_SYMMETRIC.with_bits(bits), S8_WEIGHT.with_bits(bits)
            self.x = choose_parameters(-2.0, 2.0, grids[0], "x")
            self.w = choose_parameters(-high, high, grids[1], "w", 1)
            for name, chosen in (("x", self.x), ("w", self.w)):
                self.register_buffer(f"{name}_scale", chosen.scale)
                self.register_buffer(f"{name}_zero", chosen.zero_point)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            op = fake_quant_op()
            x = op(x, self.x_scale, self.x_zero, None, self.x.grid.qmin, self.x.grid.qmax)
            weight = op(
                self.weight, self.w_scale, self.w_zero, 1, self.w.grid.qmin, self.w.grid.qmax
            )
            return torch.addmm(self.bias, x, weight)

    from pruna_ir.capture import capture

    for bits in (8, 4):
        program = capture(Net(bits), (torch.randn(3, 6),))
        x = torch.randn(5, 6)
        packed = PackedProgram(program)
        assert [row.precision for row in packed.rows] == ["int8"]
        assert relative_error(packed(x)[0], run_float64(program, (x,))[0]) <= 2e-6


def test_artifacts_of_quantised_programs_pass_their_certificate(tmp_path) -> None:
    program = quantised(
        captured(
            lambda x, a, b: b(torch.relu(a(x) + x)).mean((2, 3)),
            nn.Conv2d(5, 5, 3, padding=1), nn.Conv2d(5, 4, 3),
        )
    )  # fmt: skip
    for each in (program, quantised_net()):
        certificate = build(each, "eager", tmp_path / "out").certificate
        assert certificate.verdict is Verdict.PASSED, certificate.summary()
        assert set(certificate.audit_summary()["conv"]) == {"int8"}
