"""quantize-dynamically: what is rounded, by which range, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruna_ir.checks import check
from pruna_ir.errors import UsageError
from pruna_ir.kernels.dynamic_range import SCALE
from pruna_ir.passes.quantize_dynamically import QuantizeDynamically
from pruna_ir.passes.weight_blocks import stored_weight
from pruna_ir.program import Program
from pruna_ir.quantization import describe
from pruna_ir.transform import PassResult, apply
from pruna_ir.verify import verify
from tests.passes.products import captured, gpt2, products, tied

aten = torch.ops.aten


def quantised(program: Program, **options) -> PassResult:
    result = apply(QuantizeDynamically(**options), program)
    verify(result.program)
    return result


def by_hand(x: torch.Tensor) -> torch.Tensor:
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = torch.tensor((high - low) / 255)
    zero = torch.round(-low / scale)
    return (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale


def test_the_program_rounds_activations_by_their_own_range() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(20, 5)
    program = quantised(captured(layer, torch.randn(2, 20))).program
    (node,) = program.calls(aten.linear.default)
    stored = stored_weight(program, node)
    assert stored is not None
    for size in (0.1, 50.0):
        x = torch.randn(3, 20) * size
        wanted = by_hand(x) @ stored.rounded().float().T + layer.bias.detach()
        torch.testing.assert_close(program(x)[0], wanted, rtol=1e-4, atol=1e-5 * size)


def test_the_promise_holds() -> None:
    program = products()
    pass_ = QuantizeDynamically()
    result = apply(pass_, program)
    assert check(pass_, program, result.program).passed
    assert [r.message.split(":")[0] for r in result.remarks] == ["wide", "turned", "head"]
    assert not apply(pass_, result.program).modified


def test_reports_say_which_ranges_are_found_at_run_time() -> None:
    rows = describe(quantised(products()).program)
    assert [(r.layer, r.operand, r.grid, r.ranged) for r in rows] == [
        ("wide", "input", "u8[0, 255]", "at run time"),
        ("wide", "weight", "s8[-127, 127]", "ahead of time"),
        ("turned", "mat1", "u8[0, 255]", "at run time"),
        ("turned", "mat2", "s8[-127, 127]", "ahead of time"),
        ("head", "input", "u8[0, 255]", "at run time"),
        ("head", "weight", "s8[-127, 127]", "ahead of time"),
    ]
    unknown = [(r.scale is None, r.zero_point is None) for r in rows]
    assert unknown == [(True,) * 2, (False,) * 2] * 3


def test_products_that_read_one_tensor_share_its_quantisation() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) * self.b(x)

    program = quantised(captured(Gated(), torch.randn(2, 16))).program
    assert len(list(program.calls(SCALE.op))) == 1
    read = {node.all_input_nodes[0].name for node in program.calls(aten.linear.default)}
    assert len(read) == 1


def test_every_addmm_of_gpt2_but_the_excluded() -> None:
    program = quantised(gpt2(), exclude=("transformer.h.0.attn*",)).program
    flags = [stored_weight(program, n) is not None for n in program.calls(aten.addmm.default)]
    assert flags == [False] * 2 + [True] * 6


def test_a_tied_weight_stays_float_unless_asked() -> None:
    assert len([r for r in quantised(tied()).remarks if r.kind == "applied"]) == 1
    assert len([r for r in quantised(tied(), tied=True).remarks if r.kind == "applied"]) == 2


def test_a_reduced_range_has_seven_bits() -> None:
    program = quantised(products(), reduce_range=True).program
    stored = [stored_weight(program, node) for node in program.calls()]
    assert {str(w.grid) for w in stored if w is not None} == {"s7[-63, 63]"}


def test_a_glob_that_covers_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'head'"):
        quantised(products(), exclude=("heat",))
