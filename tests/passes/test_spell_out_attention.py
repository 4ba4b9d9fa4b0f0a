"""spell-out-attention: the same function as two products; what it leaves alone, and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.data import TensorData
from pruna_ir.kernels import attention
from pruna_ir.passes.fuse_attention import FuseAttention
from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
from pruna_ir.passes.quant_placement import is_quantised
from pruna_ir.passes.spell_out_attention import SpellOutAttention
from pruna_ir.program import Program
from pruna_ir.transform import Context, apply
from pruna_ir.verify import verify
from tests.passes.corpus import targets

aten = torch.ops.aten
FUSED = attention.KERNEL.op


class Attention(nn.Module):
    """Self-attention of two heads over [batch, 5, 8]."""

    def __init__(self, kind: str, scale: float | None = None) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.kind, self.scale = kind, scale
        mask = torch.tril(torch.ones(5, 5, dtype=torch.bool))
        self.register_buffer("mask", mask if kind == "boolean" else torch.randn(5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(x).unflatten(-1, (3, 2, 4)).transpose(1, 3)
        q, k, v = (part.squeeze(2) for part in heads.split(1, 2))
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask if self.kind in ("boolean", "float") else None,
            is_causal=self.kind == "causal", scale=self.scale,
        )  # fmt: skip
        return self.out(mixed.transpose(1, 2).flatten(2))


def captured(kind: str, scale: float | None = None) -> Program:
    torch.manual_seed(0)
    return capture(Attention(kind, scale).eval(), (torch.randn(2, 5, 8),))


@pytest.mark.parametrize("kind", ["plain", "boolean", "float", "causal"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_keeps_the_function_at_float64(kind: str, scale: float | None) -> None:
    program = captured(kind, scale)
    result = apply(SpellOutAttention(), program)
    verify(result.program)
    assert len(list(result.program.calls(aten.matmul.default))) == 2
    assert not list(result.program.calls(aten.scaled_dot_product_attention.default))
    report = check(SpellOutAttention(), program, result.program)
    assert report.passed, report
    assert not apply(SpellOutAttention(), result.program).modified


def test_its_products_are_quantised_where_asked_for() -> None:
    program = apply(SpellOutAttention(), captured("causal")).program
    data = TensorData((torch.randn(32, 5, 8),))
    context = Context(data=data, target="onnx")
    left = apply(InsertFakeQuant(), program, context)
    assert sum("product of two activations" in r.message for r in left.remarks) == 2
    pass_ = InsertFakeQuant(products=True)
    result = apply(pass_, program, context)
    for product in result.program.calls(aten.matmul.default):
        assert all(is_quantised(source) for source in product.all_input_nodes)
    report = check(pass_, program, result.program, context=context, assurances=result.assurances)
    assert report.passed, report


def test_fused_attention_says_how_its_products_are_reached() -> None:
    context = Context(data=TensorData((torch.randn(32, 5, 8),)), target="tvm")
    result = apply(InsertFakeQuant(products=True), captured("plain"), context)
    assert any("run spell-out-attention first" in r.message for r in result.remarks)


def test_grouped_queries_get_keys_of_their_own() -> None:
    class Grouped(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    program = capture(Grouped().eval(), (torch.randn(2, 4, 5, 3), torch.randn(2, 2, 5, 3)))
    result = apply(SpellOutAttention(), program)
    assert len(list(result.program.calls(aten.matmul.default))) == 2
    report = check(SpellOutAttention(), program, result.program)
    assert report.passed, report


def test_spells_out_the_fused_operator_too() -> None:
    program = captured("boolean")
    fused = apply(FuseAttention(), program).program
    spelt_out = apply(SpellOutAttention(), fused).program
    assert sum(name == "aten.matmul" for name in targets(spelt_out)) == 2
    assert not list(spelt_out.calls(FUSED))
    torch.testing.assert_close(spelt_out(*program.examples), program(*program.examples))


def test_rows_that_are_masked_wholly_give_zeros() -> None:
    program = captured("boolean")
    hidden = program.tensor("mask").clone()
    hidden[2] = False
    program.module.mask.copy_(hidden)
    spelt_out = apply(SpellOutAttention(), program).program
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(spelt_out(x)[0], program(x)[0])


def test_what_it_leaves_alone() -> None:
    class Dropping(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5)

    program = capture(Dropping(), (torch.randn(2, 4, 5, 3),), train=True)
    result = apply(SpellOutAttention(), program)
    assert not result.modified
    assert [r.message for r in result.remarks] == [
        "it has dropout; call model.eval() before capture"
    ]
