"""Signed grids without a zero point where a target is faster on them: queries, keys, products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pruna_ir.build import build
from pruna_ir.call import Call
from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.data import TensorData
from pruna_ir.lowering import Verdict
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
from pruna_ir.program import Program
from pruna_ir.quantization import describe
from pruna_ir.transform import Context, PassResult, apply
from pruna_ir.verify import verify

aten = torch.ops.aten


class Attention(nn.Module):
    """One head, its projections, and a product behind an activation of one sign."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))
        self.out, self.last = nn.Linear(24, 40), nn.Linear(40, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unsqueeze(1) for f in (self.query, self.key, self.value))
        y = nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)
        return self.last(self.out(y).relu())


def calibration() -> TensorData:
    generator = torch.Generator().manual_seed(3)
    return TensorData((torch.randn(32, 7, 24, generator=generator),), batch_size=8)


def quantised(target: str, **options) -> tuple[Program, PassResult]:
    torch.manual_seed(0)
    program = apply(Canonicalize(), capture(Attention(), (torch.randn(2, 7, 24),))).program
    found = apply(
        InsertFakeQuant(target=target, **options), program, Context(data=calibration())
    )
    verify(found.program)
    return program, found


def grids(program: Program) -> dict[tuple[str, str], str]:
    return {(row.layer or row.node, row.operand): row.grid for row in describe(program)}


def test_openvino_gets_query_and_key_signed_and_the_value_as_it_is() -> None:
    before, found = quantised("openvino")
    (attention,) = found.program.calls(aten.scaled_dot_product_attention.default)
    call = Call(found.program, attention)
    fakes = {name: call.producer(name) for name in ("query", "key", "value")}
    kinds = {name: str(node.target) for name, node in fakes.items() if node is not None}
    assert kinds["query"] == kinds["key"] == "pruna.fake_quant.default"
    assert kinds["value"] != "pruna.fake_quant.default"
    for name in ("query", "key"):
        source = fakes[name]
        assert source is not None
        own = Call(found.program, source)
        assert (own.number("qmin"), own.number("qmax")) == (-128, 127)
        zero = own.parameter("zero_point")
        assert zero is not None
        assert int(zero) == 0
    context = Context(data=calibration())
    report = check(InsertFakeQuant(target="openvino"), before, found.program, None, context,
                   assurances=found.assurances)  # fmt: skip
    assert report.passed, report


def test_only_nearly_symmetric_inputs_of_products_are_signed() -> None:
    found = grids(quantised("openvino")[1].program)
    assert found["query", "input"] == "s8[-128, 127]"
    assert found["last", "input"] == "u8[0, 255]"  # behind a ReLU: half of the grid would be idle
    assert found["last", "weight"] == "s8[-127, 127]"


@pytest.mark.parametrize(("target", "attention"), [("onnx", 2), ("tvm", 0)])
def test_other_targets_keep_their_grid(target: str, attention: int) -> None:
    """ONNX Runtime takes query and key unsigned; TVM does not take them on integers at all."""
    program = quantised(target)[1].program
    found = grids(program)
    assert found["query", "input"] == "u8[0, 255]"
    (node,) = program.calls(aten.scaled_dot_product_attention.default)
    fakes = [x for x in node.all_input_nodes if str(x.target) == "pruna.fake_quant.default"]
    assert len(fakes) == attention
    assert all(Call(program, x).number("qmin") == 0 for x in fakes)


@pytest.mark.parametrize("bits", [(), ("w4a4",)])
def test_the_artifact_is_certified(bits: tuple[str, ...], tmp_path: Path) -> None:
    _, found = quantised("openvino", bits=bits)
    certificate = build(
        found.program, "openvino", tmp_path / "out", Context(data=calibration())
    ).certificate
    assert certificate.verdict is Verdict.PASSED, certificate.summary()


def test_data_in_larger_batches_serves_a_program_of_a_fixed_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = capture(Attention(), (torch.randn(1, 7, 24),), dynamic_batch=False)
    program = apply(Canonicalize(), program).program
    context = Context(data=calibration(), target="onnx")
    pass_ = InsertFakeQuant()
    found = apply(pass_, program, context)
    assert check(pass_, program, found.program, None, context, assurances=found.assurances).passed
    certificate = build(found.program, "onnx", tmp_path / "out", context).certificate
    assert certificate.verdict is Verdict.PASSED, certificate.summary()
