"""scale-salient-channels: the function stays, rounding then costs less, and where it cannot go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruna_ir.checks import check
from pruna_ir.data import TensorData
from pruna_ir.equivalence import sqnr_db
from pruna_ir.errors import UsageError
from pruna_ir.passes.quantize_weights import QuantizeWeights
from pruna_ir.passes.scale_salient_channels import ScaleSalientChannels
from pruna_ir.program import Program
from pruna_ir.transform import Context, PassResult, apply
from pruna_ir.verify import verify
from tests.passes.products import captured, gpt2, products, tied


class Root(nn.Module):
    """A norm by the root mean square, spelt out, as Llama has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))


class Gated(nn.Module):
    """Two residual branches behind norms: a SwiGLU and a layer behind ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Root(48), nn.LayerNorm(48)
        self.gate, self.up = nn.Linear(48, 40), nn.Linear(48, 40, bias=False)
        self.down = nn.Linear(40, 48)
        self.inner, self.outer = nn.Linear(48, 33), nn.Linear(33, 48)
        with torch.no_grad():
            self.first.weight[:3] *= 12
            self.second.weight[5:8] *= 12
            self.second.bias.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        x = x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))
        return x + self.outer(torch.relu(self.inner(self.second(x))))


def gated() -> Program:
    torch.manual_seed(0)
    return captured(Gated(), torch.randn(2, 5, 48))


def data(width: int = 48) -> TensorData:
    generator = torch.Generator().manual_seed(1)
    return TensorData((torch.randn(12, 5, width, generator=generator),), batch_size=4)


def scaled(program: Program, found: TensorData, **options) -> PassResult:
    options.setdefault("block", 16)
    result = apply(ScaleSalientChannels(**options), program, Context(data=found))
    verify(result.program)
    return result


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_promise_holds_for_every_kind_of_carrier(symmetric: bool) -> None:
    """A spelt-out norm, the up branch of a SwiGLU, a layer norm, and a layer behind ReLU."""
    program = gated()
    pass_ = ScaleSalientChannels(block=16, symmetric=symmetric)
    context = Context(data=data())
    result = apply(pass_, program, context)
    touched = {r.message.split(" for ")[1].split(":")[0] for r in result.remarks
               if r.kind == "applied"}  # fmt: skip
    assert touched == {"gate, up", "down", "inner", "outer"}
    report = check(pass_, program, result.program, context=context, exact=result.exact)
    assert report.passed, report


def test_rounding_costs_less_afterwards() -> None:
    program, found = gated(), data()
    (x,) = (torch.cat([batch.inputs[0] for batch in found]),)
    pass_ = QuantizeWeights(bits=4, block=16)
    truth = program(x)[0]
    plain = sqnr_db(apply(pass_, program).program(x)[0], truth)
    better = sqnr_db(apply(pass_, scaled(program, found).program).program(x)[0], truth)
    assert better > plain + 1.0


def test_remarks_name_what_stands_in_the_way() -> None:
    ids = TensorData((torch.randint(0, 61, (6, 8)),), batch_size=2)
    result = scaled(gpt2(), ids)
    missed = [r.message for r in result.remarks if r.kind == "missed"]
    assert len(missed) == 5
    # Behind attention, and behind a GELU that is spelt out.
    assert sum("cannot carry a scale" in message for message in missed) == 2
    assert sum("is a stored vector or a layer" in message for message in missed) == 2
    assert any("its weight is also read by embedding" in message for message in missed)


def test_a_reader_that_is_no_product_stands_in_the_way() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.body = nn.LayerNorm(48), nn.Linear(48, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            return y + self.body(y)

    result = scaled(captured(Split(), torch.randn(2, 5, 48)), data())
    assert not result.modified
    assert [r.message for r in result.remarks] == ["its channels are not scaled: add reads it too"]


def test_excluded_layers_keep_their_group_as_it_is() -> None:
    result = scaled(gated(), data(), exclude=("up",))
    (missed,) = [r.message for r in result.remarks if r.kind == "missed"]
    assert missed.endswith("reads it and is excluded by 'up'")


def test_an_input_of_the_program_carries_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    x = TensorData((torch.randn(8, 3, 64, generator=generator),), batch_size=4)
    result = scaled(products(), x)
    missed = [r.message for r in result.remarks if r.kind == "missed"]
    assert missed == ["its channels are not scaled: x cannot carry a scale"]


def test_a_tied_weight_is_not_scaled() -> None:
    ids = TensorData((torch.randint(0, 20, (6, 5)),), batch_size=2)
    assert not scaled(tied(), ids).modified


def test_data_must_be_there() -> None:
    with pytest.raises(UsageError, match="needs calibration data"):
        apply(ScaleSalientChannels(), gated())


@pytest.mark.parametrize("options", [{"steps": 0}, {"bits": 5}, {"block": 24}])
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        ScaleSalientChannels(**options)
