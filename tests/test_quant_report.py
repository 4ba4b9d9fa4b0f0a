"""The quantisation report: figures against naive arithmetic, culprits first, reasons, kernels."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.data import TensorData
from pruna_ir.errors import PassError, UsageError
from pruna_ir.lowering import KernelRow
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Origin, Program
from pruna_ir.quant_report import (
    NOT_AUDITED,
    NOT_NAMED,
    Bars,
    LayerNoise,
    QuantReport,
    has_report,
    quant_report,
    table,
)
from pruna_ir.transform import Context, Remark, Rewrite
from tests.quantised import QuantisedNet, quantised_net


def batches(samples: int = 7, size: int = 3) -> TensorData:
    generator = torch.Generator().manual_seed(1)
    return TensorData((torch.randn(samples, 3, 9, 9, generator=generator),), batch_size=size)


def by_node(report: QuantReport) -> dict[str, LayerNoise]:
    return {row.node: row for row in report.layers}


def naive_db(actual: torch.Tensor, truth: torch.Tensor) -> float:
    truth = truth.detach().double()
    lost = (actual.detach().double() - truth).square().sum()
    return float(10 * torch.log10(truth.square().sum() / lost))


class _Naive:
    """The tiny network, spelt out, with every value that the report speaks of."""

    def __init__(self, x: torch.Tensor) -> None:
        torch.manual_seed(0)
        net = QuantisedNet().eval()
        with torch.no_grad():
            self.x = x
            self.qx = net._round("x", x)
            first, bias = net.first.weight, net.first.bias
            self.weight, self.qweight = first, net._round("first_w", first)
            quantised = torch.conv2d(self.qx, self.qweight, bias, padding=1)
            self.first, self.float_first = quantised, torch.conv2d(x, first, bias, padding=1)
            a = torch.relu(quantised)
            second, bias = net.second.weight, net.second.bias
            qsecond = net._round("second_w", second)
            self.second = torch.conv2d(net._round("a", a), qsecond, bias, stride=2, groups=2)
            self.own_second = torch.conv2d(a, second, bias, stride=2, groups=2)
            float_a = torch.relu(self.float_first)
            self.float_second = torch.conv2d(float_a, second, bias, stride=2, groups=2)


def test_figures_equal_naive_arithmetic_over_all_samples_at_once() -> None:
    data = batches()
    rows = by_node(quant_report(quantised_net(), data))
    naive = _Naive(data.inputs[0])
    first, second = rows["conv2d"], rows["conv2d_1"]
    x, weight = first.operands
    assert (x.name, x.constant, x.bits, x.granularity) == ("input", False, 8, "per tensor")
    assert (weight.name, weight.constant, weight.grid) == ("weight", True, "s8[-127, 127]")
    assert weight.granularity == "per channel (8)"
    assert x.sqnr_db == pytest.approx(naive_db(naive.qx, naive.x), abs=1e-6)
    assert weight.sqnr_db == pytest.approx(naive_db(naive.qweight, naive.weight), abs=1e-6)
    assert x.range == (float(naive.x.min()), float(naive.x.max()))
    step = 6 / 255
    outside = (naive.x < -3 - 0.55 * step) | (naive.x > 3 + 0.55 * step)
    assert x.clipped == pytest.approx(float(outside.double().mean()), abs=2 / naive.x.numel())
    assert x.clipped > 0
    assert x.reach == pytest.approx((-3, 3), abs=step)
    assert first.own_db == pytest.approx(naive_db(naive.first, naive.float_first), abs=1e-3)
    # Nothing stands before the first layer: all noise is its own.
    assert first.accumulated_db == pytest.approx(first.own_db, abs=1e-6)
    assert second.own_db == pytest.approx(naive_db(naive.second, naive.own_second), abs=1e-3)
    expected = naive_db(naive.second, naive.float_second)
    assert second.accumulated_db == pytest.approx(expected, abs=1e-3)


def test_batches_add_up_to_the_same_figures() -> None:
    program = quantised_net()
    whole, split = (quant_report(program, batches(7, size)) for size in (7, 2))
    assert whole.samples == split.samples == 7
    for one, other in zip(whole.layers, split.layers, strict=True):
        assert one.node == other.node
        assert one.own_db == pytest.approx(other.own_db, abs=1e-4)
        assert one.accumulated_db == pytest.approx(other.accumulated_db, abs=1e-4)
        for a, b in zip(one.operands, other.operands, strict=True):
            assert (a.clipped, a.bars) == (b.clipped, b.bars)


def test_no_more_samples_than_asked_for() -> None:
    program = quantised_net()
    assert quant_report(program, batches(7, 3), samples=5).samples == 5
    first = TensorData((batches().inputs[0][:5],), batch_size=5)
    some = quant_report(program, batches(7, 3), samples=5).layers[0].own_db
    assert some == pytest.approx(quant_report(program, first).layers[0].own_db, abs=1e-4)


@pytest.mark.parametrize(
    ("spoiled", "factor", "node"),
    # The head's bias is most of what it computes, so that its weight can take more.
    [("a_scale", 10, "conv2d_1"), ("second_w_scale", 10, "conv2d_1"),
     ("head_w_scale", 60, "linear")],
)  # fmt: skip
def test_a_layer_spoiled_on_purpose_comes_first(spoiled: str, factor: int, node: str) -> None:
    program = quantised_net()
    # Half as large, so that nothing is clipped: the first layer would be a culprit, too.
    data = TensorData((batches().inputs[0] / 2,), batch_size=3)
    rw = Rewrite(program, "spoil", Context())
    rw.set_tensor(spoiled, program.tensor(spoiled) * factor)
    sound, worse = quant_report(program, data), quant_report(rw.finish(), data)
    assert worse.layers[0].node == node
    before, after = by_node(sound)[node].own_db, worse.layers[0].own_db
    assert before is not None
    assert after is not None
    assert after < before - 10
    # The layer before it, whose own rounding is as it was, is not blamed.
    assert by_node(worse)["conv2d"].own_db == pytest.approx(by_node(sound)["conv2d"].own_db)


def test_clipping_is_counted_and_blamed() -> None:
    program = quantised_net()
    rw = Rewrite(program, "spoil", Context())
    rw.set_tensor("x_scale", program.tensor("x_scale") / 10)
    row = quant_report(rw.finish(), batches()).layers[0]
    assert row.node == "conv2d"
    expected = float((batches().inputs[0].abs() > 0.302).double().mean())
    assert row.operands[0].clipped == pytest.approx(expected, abs=0.01)


def pipeline(text: str, target: str = "onnx") -> tuple[Program, tuple[Remark, ...]]:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()  # fmt: skip
    program = capture(net, (torch.randn(3, 3, 9, 9),))
    run = Pipeline.parse(text).run(program, Context(data=batches(), target=target))
    return run.program, tuple(run.remarks)


def test_layers_that_stayed_float_have_their_reason() -> None:
    program, remarks = pipeline("canonicalize,insert-fake-quant{exclude=6}")
    (left,) = quant_report(program, batches(), remarks=remarks).floats
    assert (left.layer, left.operator, left.reason) == ("6", "aten.linear", "excluded by '6'")


def test_the_origin_is_the_reference_and_mended_weights_are_compared_with_it() -> None:
    program, _ = pipeline("canonicalize,insert-fake-quant")
    found = quant_report(program, batches())
    assert found.reference == "the program that was quantised"
    rw = Rewrite(program, "mend", Context())
    rw.set_tensor("0.weight", program.tensor("0.weight") * 0.75)
    rw.set_origin(program.origin)
    mended = by_node(quant_report(rw.finish(), batches()))["conv2d"]
    lost = 10 * math.log10(1 / 0.25**2)
    assert mended.operands[1].sqnr_db == pytest.approx(lost, abs=0.5)
    assert mended.own_db == pytest.approx(lost, abs=3)


def test_without_origin_the_fake_quants_are_left_out() -> None:
    program, _ = pipeline("canonicalize,insert-fake-quant")
    with_origin = quant_report(program, batches())
    without = quant_report(replace(program, origin=None), batches())
    assert without.reference == "the program without its fake-quants"
    assert [r.own_db for r in with_origin.layers] == pytest.approx(
        [r.own_db for r in without.layers]
    )
    assert dict(with_origin.outputs) == pytest.approx(dict(without.outputs))


def test_outputs_equal_the_programs_run_alone() -> None:
    program, _ = pipeline("canonicalize,insert-fake-quant")
    assert program.origin is not None
    x = batches().inputs[0]
    expected = naive_db(program(x)[0].detach(), program.origin.program(x)[0].detach())
    (found,) = quant_report(program, batches()).outputs.values()
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_reference_that_was_not_quantised_is_refused() -> None:
    program, _ = pipeline("canonicalize,insert-fake-quant")
    other = capture(nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), (torch.randn(2, 3, 9, 9),))
    with pytest.raises(UsageError, match="not the one that was quantised: it has no call relu"):
        quant_report(program, batches(), reference=other)
    # An origin with other calls, as after a fusion, is passed over.
    found = quant_report(replace(program, origin=Origin(other, {})), batches())
    assert found.reference == "the program without its fake-quants"


@pytest.mark.parametrize("text", ["quantize-weights{bits=4,block=16}", "quantize-dynamically"])
def test_weight_only_and_dynamic_programs(text: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 5)).eval()
    data = TensorData((torch.randn(9, 32),), batch_size=4)
    program = Pipeline.parse(text).run(
        capture(net, (torch.randn(2, 32),)), Context(data=data)
    ).program
    found = quant_report(program, data)
    rows = {row.layer: row for row in found.layers}
    assert set(rows) == {"0", "2"}
    names = {operand.name: operand for operand in rows["0"].operands}
    if "dynamic" in text:
        assert names["input"].granularity == "at run time"
        assert names["input"].clipped == 0
        assert found.reference == "the program that was quantised"
    else:
        assert names["weight"].granularity == "per block (32)"
    expected = naive_db(program(*data.inputs)[0], capture(net, (torch.randn(2, 32),))(
        *data.inputs)[0])  # fmt: skip
    # Dynamic ranges depend on the batch, so that batches round a little otherwise.
    assert found.outputs["output"] == pytest.approx(expected, abs=2 if "dynamic" in text else 1e-3)


def test_kernels_are_found_by_node_and_by_module() -> None:
    program, _ = pipeline("canonicalize,insert-fake-quant")
    assert {r.kernel for r in quant_report(program, batches()).layers} == {NOT_AUDITED}
    audit = [
        KernelRow("0/conv2d/Convolution", "conv", "int8"),
        KernelRow("0/conv2d/Convolution", "Reorder", "float32"),
        KernelRow("3", "conv", "float32"),
    ]
    rows = by_node(quant_report(program, batches(), audit=audit))
    assert rows["conv2d"].kernel == "int8"
    assert rows["conv2d_1"].kernel == "float32"
    assert rows["linear"].kernel == NOT_NAMED


def test_nan_is_refused_by_name() -> None:
    x = batches().inputs[0].clone()
    x[6, 0, 0, 0] = math.nan
    with pytest.raises(PassError, match=r"^conv2d \(fake_quant\) reads NaN or infinity"):
        quant_report(quantised_net(), TensorData((x,), batch_size=3))


def test_no_data_is_refused() -> None:
    class Nothing:
        def __len__(self) -> int:
            return 0

        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(())

    with pytest.raises(UsageError, match="holds no sample"):
        quant_report(quantised_net(), Nothing())


def test_a_float_program_has_nothing_to_report() -> None:
    program = capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    assert not has_report(program)
    assert has_report(quantised_net())


def test_json_is_plain_and_finite() -> None:
    found = quant_report(quantised_net(), batches())
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [row["node"] for row in plain["layers"]] == [row.node for row in found.layers]
    bars = plain["layers"][0]["operands"][0]["bars"]
    assert 0 < len(bars["counts"]) <= 64
    exact = replace(found.layers[0], own_db=math.inf)
    assert replace(found, layers=(exact,)).to_json()["layers"][0]["own_db"] == "inf"


def test_bars_lose_no_value() -> None:
    from pruna_ir.calibration import Histogram

    seen = Histogram(1000)
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)).relu()
    seen.update(x)
    bars = Bars.of(seen)
    assert sum(bars.counts) + bars.zeros == 5000
    edge = bars.low + bars.width * 3
    assert sum(bars.counts[:3]) == int(((x < edge) & (x != 0)).sum())


def test_the_table_shows_the_worst_and_says_how_many_more() -> None:
    found = quant_report(quantised_net(), batches())
    title, columns, rows = table(found, shown=1)
    assert title.endswith(f"worst first ({len(found.layers) - 1} more are not shown)")
    assert rows[0][0] == found.layers[0].layer
    assert all(len(row) == len(columns) for row in rows)
