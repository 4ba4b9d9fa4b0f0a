"""train-quantized: what learns, what is promised, what is refused, and what is exported."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pruna_ir.build import build
from pruna_ir.call import Call
from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.data import TensorData
from pruna_ir.errors import PassError, UsageError
from pruna_ir.kernels.fake_quant import KERNEL as FAKE_QUANT
from pruna_ir.options import make_pass
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.fold_batch_norm import FoldBatchNorm
from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
from pruna_ir.passes.learned_grids import LearnedGrids, grids_of
from pruna_ir.passes.train_quantized import TrainQuantized
from pruna_ir.program import Program
from pruna_ir.spec import parse_pipeline, print_pass
from pruna_ir.training import trainable
from pruna_ir.transform import Context, PassResult, apply
from pruna_ir.verify import verify
from tests.networks import ConvNet, seeded

ROOT = Path(__file__).resolve().parents[2]


def data(labels: bool = True, rows: int = 24) -> TensorData:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 3, 9, 9, generator=generator)
    return TensorData((x,), torch.arange(rows) % 5 if labels else None, batch_size=8)


def float_program(fold: bool = True, seed: int = 0) -> Program:
    program = capture(seeded(ConvNet, seed), (torch.randn(2, 3, 9, 9),))
    program = apply(Canonicalize(), program).program
    return apply(FoldBatchNorm(), program).program if fold else program


def quantised(target: str = "onnx", few: bool = True) -> Program:
    """On 2 bits, where there is much to mend, or on 8."""
    pass_ = InsertFakeQuant(target=target, bits=("w2a2",) if few else ())
    return apply(pass_, float_program(), Context(data=data())).program


def trained(program: Program, calibration: TensorData | None = None, **options) -> PassResult:
    options = {"epochs": 8, "lr": 1e-3, **options}
    pass_ = TrainQuantized(**options)
    context = Context(data=data() if calibration is None else calibration)
    result = apply(pass_, program, context)
    verify(result.program)
    report = check(
        pass_, program, result.program, context=context, assurances=result.assurances
    )
    assert report.passed, str(report)
    return result


def error_of(program: Program) -> float:
    assert program.origin is not None
    x = data().inputs[0]
    wanted = program.origin.program(x)[0]
    found = program(x)[0].detach()
    return float((found - wanted.detach()).square().mean() / wanted.detach().square().mean())


# -- what learns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", ["lsq", "lsq+", "pact", "fixed"])
def test_training_brings_the_program_back_to_the_float_one(scales: str) -> None:
    program = quantised()
    result = trained(program, epochs=20, scales=scales, logits=0.0, mse=1.0)
    assert error_of(result.program) < 0.7 * error_of(program)
    assert result.program.origin is program.origin
    old, new = program.tensors(), result.program.tensors()
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    weights = {name for name, tensor in old.items() if isinstance(tensor, nn.Parameter)}
    activations = {g.scale for g in grids_of(program) if g.activation}
    others = {g.scale for g in grids_of(program) if not g.activation}
    assert weights <= moved
    assert bool(moved & others) == scales.startswith("lsq")
    assert bool(moved & activations) == (scales != "fixed")
    if scales != "lsq+":
        assert moved <= weights | activations | others


def test_offsets_move_zero_points_by_whole_steps_inside_the_grid() -> None:
    program = quantised()
    result = trained(program, epochs=30, scales="lsq+", scale_lr=3.0, lr=1e-3)
    moved = 0
    for grid in grids_of(result.program):
        zero = result.program.tensor(grid.zero_point)
        assert zero.dtype == torch.int32
        qmin, qmax = grid.bounds
        assert qmin <= int(zero.min()) <= int(zero.max()) <= qmax
        was = program.tensor(grid.zero_point)
        moved += int((zero != was).sum())
        if not grid.activation or int(was.max()) in (qmin, qmax):
            assert torch.equal(zero, was)
    assert moved


@pytest.mark.parametrize("scales", ["lsq", "lsq+", "pact", "fixed"])
def test_the_training_graph_computes_what_the_program_does(scales: str) -> None:
    program = quantised()
    module = trainable(program, train=False)
    grids = LearnedGrids(program, module, scales)
    grids.project()
    x = data().inputs[0]
    assert torch.equal(module(x)[0], program(x)[0])
    found = grids.values()
    assert all(torch.equal(program.tensor(name), value) for name, value in found.items())


def test_scales_have_the_gradient_scale_of_the_paper() -> None:
    """1 / sqrt(N Q): for a weight, per channel; for an activation, of one sample."""
    program = quantised(few=False)
    module = trainable(program, train=False)
    grids = LearnedGrids(program, module, "lsq")
    plain = trainable(program, train=False)
    for grid in grids_of(program):
        owner, _, leaf = grid.scale.rpartition(".")
        buffer = plain.get_submodule(owner)._buffers.pop(leaf)
        plain.get_submodule(owner).register_parameter(leaf, nn.Parameter(buffer))
    x = data().inputs[0]
    for net in (module, plain):
        net(x)[0].square().sum().backward()
    for grid in grids_of(program):
        values = 0
        for node in grid.nodes:
            shape = list(node.meta["val"].shape)
            values += int(torch.Size([int(s) for s in shape[1:]]).numel())
        qmin, qmax = grid.bounds
        zero = program.tensor(grid.zero_point)
        level = torch.maximum(qmax - zero, zero - qmin)
        expected = plain.get_parameter(grid.scale).grad / (values * level).sqrt()
        torch.testing.assert_close(grids.scales[grid.scale].grad, expected, rtol=1e-3, atol=1e-6)


def test_scales_stay_positive_whatever_the_learning_rate() -> None:
    program = quantised()
    module = trainable(program, train=False)
    grids = LearnedGrids(program, module, "lsq+")
    with torch.no_grad():
        for parameter in grids.parameters:
            parameter.copy_(torch.full_like(parameter, -1e9))
    grids.project()
    for name, scale in grids.scales.items():
        assert torch.equal(scale.detach(), program.tensor(name) / 1024)
    for grid in grids_of(program):
        zero = grids.values().get(grid.zero_point)
        assert zero is None or grid.bounds[0] <= int(zero) <= grid.bounds[1]


def test_labels_and_features_train_too() -> None:
    program = quantised()
    labelled = trained(program, labels=1.0, logits=0.0)
    assert labelled.program.hash() != program.hash()
    with_features = trained(program, features=("block*",), logits=0.5, temperature=2.0)
    assert with_features.program.hash() != labelled.program.hash()


def test_labels_alone_need_no_float_program() -> None:
    program = replace(quantised(), origin=None)
    assert trained(program, labels=1.0, logits=0.0).modified


def test_equal_runs_give_equal_programs_and_a_checkpoint_continues(tmp_path: Path) -> None:
    program, file = quantised(), str(tmp_path / "qat.pt")
    first = trained(program).program.hash()
    assert trained(program, checkpoint=file).program.hash() == first
    assert trained(program, checkpoint=file).program.hash() == first
    with pytest.raises(UsageError, match="another run"):
        trained(quantised(few=False), checkpoint=file)


# -- what is promised -----------------------------------------------------------------------------


def spoiled(result: PassResult, name: str, value: torch.Tensor) -> PassResult:
    fork = result.program.fork()
    owner, _, leaf = name.rpartition(".")
    module = fork.module.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value)
    else:
        module._buffers[leaf] = value
    return replace(result, program=fork)


def test_the_check_finds_a_result_that_breaks_each_promise() -> None:
    program = quantised()
    result = trained(program)
    grid = grids_of(program)[0]
    scale, zero = program.tensor(grid.scale), program.tensor(grid.zero_point)
    context = Context(data=data())
    weight = result.program.tensor("head.weight").detach()
    for name, value, fact in (
        (grid.scale, -scale, "not positive"),
        (grid.scale, scale * torch.nan, "not positive"),
        (grid.zero_point, zero + 1000, "off their grid"),
        ("head.weight", torch.zeros_like(weight), "loss"),
        (grid.zero_point, zero + 1, "must stay"),
    ):
        broken = spoiled(result, name, value).program
        report = check(TrainQuantized(), program, broken, context=context,
                       assurances=result.assurances)  # fmt: skip
        assert not report.passed
        found = [f.what for a in result.assurances for f in a(program, broken, context)
                 if not f.measured <= f.limit]  # fmt: skip
        assert any(fact in what for what in found), (fact, found)


# -- what is refused, before any work -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"labels": 1.0}, "add an array 'labels'"),
        ({"labels": 0.0, "logits": 0.0}, "no loss is asked for"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"mse": -1.0}, "mse is a weight"),
        ({"features": ("nowhere",)}, "unknown module 'nowhere'"),
    ],
)
def test_refuses_what_makes_no_loss(options: dict[str, object], fact: str) -> None:
    with pytest.raises(UsageError, match=fact):
        apply(TrainQuantized(**options), quantised(), Context(data=data(labels=False)))


def test_refuses_without_data_fake_quants_or_a_float_program() -> None:
    with pytest.raises(UsageError, match="trains on data, and there is none"):
        apply(TrainQuantized(), quantised())
    with pytest.raises(PassError, match="run insert-fake-quant before it"):
        apply(TrainQuantized(), float_program(), Context(data=data()))
    with pytest.raises(PassError, match="labels=1,logits=0"):
        apply(TrainQuantized(), replace(quantised(), origin=None), Context(data=data()))


def test_refuses_batch_norms_that_should_have_been_folded() -> None:
    program = apply(
        InsertFakeQuant(target="tensorrt"), float_program(fold=False), Context(data=data())
    ).program
    with pytest.raises(PassError, match="run fold-batch-norm before insert-fake-quant"):
        apply(TrainQuantized(), program, Context(data=data()))


def test_options_convert_to_text_and_back() -> None:
    text = "train-quantized{steps=20,lr=0.001,scales=lsq+,features=[block*],labels=0.5}"
    (spec,) = parse_pipeline(text)
    pass_ = make_pass(spec)
    assert pass_ == TrainQuantized(
        steps=20, lr=0.001, scales="lsq+", features=("block*",), labels=0.5
    )
    (again,) = parse_pipeline(print_pass(pass_))
    assert make_pass(again) == pass_


# -- what is exported -----------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_the_artifact_agrees_with_the_simulation(target: str, tmp_path: Path) -> None:
    program = quantised(target=target, few=False)
    result = trained(program, epochs=7, scales="lsq+", labels=0.5)
    artifact = build(result.program, target, tmp_path / "out", Context(data=data()))
    assert artifact.certificate.verdict.value == "PASSED"
    names = [Call(result.program, node).producer("scale") for node in
             result.program.calls(FAKE_QUANT.op)]  # fmt: skip
    assert any(not torch.equal(program.tensor(str(n.target)), result.program.tensor(str(n.target)))
               for n in names if n is not None)  # fmt: skip


SCRIPT = """
    import sys, torch
    sys.path.insert(0, {root!r})
    from tests.passes.test_train_quantized import *
    from pruna_ir.processes import processes
    torch.set_num_threads(1)
    result = trained(quantised(), lr=1e-4)
    if processes().first:
        torch.save({{n: t.detach() for n, t in result.program.tensors().items()}}, "found.pt")
"""


def test_two_processes_train_the_same_program(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(root=str(ROOT))), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", str(script)]  # fmt: skip
    found = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=200, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    alone = trained(quantised(), lr=1e-4).program.tensors()
    for name, value in torch.load(tmp_path / "found.pt").items():
        torch.testing.assert_close(value, alone[name].detach(), rtol=1e-3, atol=1e-4)
