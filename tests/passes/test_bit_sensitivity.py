"""Sensitivity to bits: against programs that have one layer quantised, and what goes together."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pruna_ir.capture import capture
from pruna_ir.data import Batch, TensorData
from pruna_ir.equivalence import sqnr_db
from pruna_ir.errors import PassError, UsageError
from pruna_ir.passes.bit_sensitivity import (
    Losses,
    changes,
    layer_groups,
    sensitivities,
    some_runs,
    without_fake_quants,
)
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
from pruna_ir.program import Program
from pruna_ir.transform import Context, apply
from tests.passes.test_insert_fake_quant import Net, captured, data

WIDTHS = ("w8a8", "w4a8", "w4a4")


class Chain(nn.Module):
    """Linear layers only: nothing but layers is quantised."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(7, 9), nn.Linear(9, 9), nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


def chain() -> Program:
    torch.manual_seed(3)
    return apply(Canonicalize(), capture(Chain().eval(), (torch.randn(2, 7),))).program


def samples(*shape: int, labels: int = 0, rows: int = 40) -> TensorData:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, *shape, generator=generator)
    y = torch.randint(labels, (rows,), generator=generator) if labels else None
    return TensorData((x,), y, batch_size=16)


def quantised(program: Program, source: TensorData, *bits: str, target: str = "onnx") -> Program:
    return apply(InsertFakeQuant(target=target, bits=bits), program, Context(data=source)).program


def setting(program: Program, source: TensorData, measure="noise", target: str = "onnx"):
    programs = {width: quantised(program, source, width, target=target) for width in WIDTHS}
    base = without_fake_quants(programs["w8a8"])
    groups = layer_groups(base, list(programs.values()))
    return base, groups, programs, Losses(base, list(source), measure)


def outputs(program: Program, source: TensorData) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([program(*batch.inputs)[0] for batch in source])


def test_a_layers_noise_is_that_of_the_program_in_which_it_alone_is_quantised() -> None:
    program, source = chain(), samples(7)
    base, groups, programs, losses = setting(program, source)
    assert [group.names for group in groups] == [("a",), ("b",), ("c",)]
    found = sensitivities(losses, base, groups, programs)
    wanted = outputs(program, source)
    for row, layer in zip(found, "abc", strict=True):
        for width in WIDTHS:
            alone = quantised(program, source, "float", f"{layer}:{width}")
            noise = 10 ** (-sqnr_db(outputs(alone, source), wanted) / 10)
            assert row[width]["noise"] == pytest.approx(noise, rel=1e-4)


def test_fewer_bits_lose_more() -> None:
    base, groups, programs, losses = setting(captured(Net(), 3, 15, 15), data(3, 15, 15))
    for row in sensitivities(losses, base, groups, programs):
        assert row["w8a8"]["noise"] < row["w4a8"]["noise"] < row["w4a4"]["noise"]


@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
def test_behind_a_max_pool_the_layer_reads_what_the_target_quantises(target: str) -> None:
    """TensorRT has the fake-quant before the pool, ONNX behind it: the values are the same."""
    program, source = captured(Net(), 3, 15, 15), data(3, 15, 15)
    base, groups, programs, losses = setting(program, source, target=target)
    conv1 = next(group for group in groups if group.names == ("block.conv1",))
    assert all(len(read) == 2 for read in changes(base, conv1, programs["w4a4"]).values())
    fine, coarse = (
        losses.alone(changes(base, conv1, programs[width]))["noise"] for width in ("w8a8", "w4a4")
    )
    assert 30 * fine < coarse < 1000 * fine  # (255 / 15) ** 2 = 289


def test_all_layers_together_are_the_quantised_program_where_nothing_else_is_quantised() -> None:
    program, source = chain(), samples(7)
    base, groups, programs, losses = setting(program, source)
    for width, whole in programs.items():
        changed = {k: v for g in groups for k, v in changes(base, g, whole).items()}
        assert losses.together(changed)["noise"] == pytest.approx(
            losses.of(programs[width])["noise"], rel=1e-6
        )
    some = changes(base, groups[0], programs["w4a4"])
    assert losses.together(some)["noise"] < losses.of(programs["w4a4"])["noise"]
    assert losses.together({}) == {"noise": 0.0}


def test_what_layers_lose_adds_up_nearly() -> None:
    base, groups, programs, losses = setting(captured(Net(), 3, 15, 15), data(3, 15, 15))
    rows = sensitivities(losses, base, groups, programs)
    for width in ("w8a8", "w4a8"):
        changed = {k: v for g in groups for k, v in changes(base, g, programs[width]).items()}
        predicted = sum(row[width]["noise"] for row in rows)
        assert losses.together(changed)["noise"] == pytest.approx(predicted, rel=0.5)


def test_the_loss_is_the_rise_of_the_cross_entropy() -> None:
    program, source = chain(), samples(7, labels=5)
    base, groups, programs, losses = setting(program, source, "loss")
    found = sensitivities(losses, base, groups, programs)
    alone = quantised(program, source, "float", "b:w4a4")
    before, after = (
        float(F.cross_entropy(outputs(p, source).double(), source.labels))
        for p in (program, alone)
    )
    assert found[1]["w4a4"]["loss"] == pytest.approx(after - before, abs=1e-6)
    assert found[1]["w4a4"].keys() == {"noise", "loss"}


def test_the_divergence_needs_no_labels_and_is_not_below_0() -> None:
    base, groups, programs, losses = setting(chain(), samples(7), "divergence")
    found = sensitivities(losses, base, groups, programs)
    for row in found:
        assert 0 <= row["w8a8"]["divergence"] < row["w4a4"]["divergence"]


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice, self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.twice(torch.relu(self.one(x))))
        return self.other(torch.relu(self.twice(x)))


def test_calls_of_one_module_and_readers_of_one_weight_go_together() -> None:
    torch.manual_seed(0)
    program = apply(Canonicalize(), capture(Shared().eval(), (torch.randn(2, 6),))).program
    base, groups, programs, losses = setting(program, samples(6))
    names = [{name.split("@")[0] for name in group.names} for group in groups]
    assert names == [{"one", "other"}, {"twice"}]
    assert [len(group.nodes) for group in groups] == [2, 2]
    found = sensitivities(losses, base, groups, programs)
    whole = {k: v for g in groups for k, v in changes(base, g, programs["w4a4"]).items()}
    assert losses.together(whole)["noise"] > max(row["w4a4"]["noise"] for row in found) / 2


def test_the_base_is_the_program_before_quantisation() -> None:
    program, source = captured(Net(), 3, 15, 15), data(3, 15, 15)
    base = without_fake_quants(quantised(program, source, "w4a4"))
    assert torch.equal(outputs(base, source), outputs(program, source))
    assert base.hash() == program.hash() or base.attributes != program.attributes


def test_samples_end_the_walk() -> None:
    program, source = chain(), samples(7)
    assert [len(batch.inputs[0]) for batch in some_runs(program, source, 20)] == [16, 16]
    assert len(some_runs(program, source, 1000)) == 3


def test_a_loss_needs_labels() -> None:
    with pytest.raises(UsageError, match="measured against labels, and the data has none"):
        Losses(chain(), list(samples(7)), "loss")


def test_outputs_without_numbers_are_refused() -> None:
    program = capture(nn.Linear(7, 3).eval(), (torch.randn(2, 7),))
    for parameter in program.tensors().values():
        parameter.data.zero_()
    with pytest.raises(UsageError, match="floating-point numbers other than 0"):
        Losses(program, [Batch((torch.ones(2, 7),))], "noise")


def test_nan_names_what_was_quantised() -> None:
    program, source = chain(), samples(7)
    losses = Losses(program, list(source), "noise")
    first = next(iter(program.calls(torch.ops.aten.linear.default)))
    bad = {first: {first.all_input_nodes[1]: torch.full((9, 7), float("nan"))}}
    with pytest.raises(PassError, match="with a quantised, an output is NaN or infinite"):
        losses.alone(bad)
