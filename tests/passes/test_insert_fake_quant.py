"""insert-fake-quant: what is quantised, where, with which parameters, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from pruna_ir.calibration import METHODS, Histogram
from pruna_ir.call import Call
from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.data import Batch, TensorData
from pruna_ir.equivalence import sqnr_db
from pruna_ir.errors import PassError, UsageError
from pruna_ir.options import make_pass
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.fold_batch_norm import FoldBatchNorm
from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
from pruna_ir.passes.quant_placement import KINDS, is_quantised, place
from pruna_ir.passes.quantize_weights import QuantizeWeights
from pruna_ir.passes.weight_ranges import weight_parameters
from pruna_ir.program import Program
from pruna_ir.quantization import (
    S8_SYMMETRIC,
    S8_WEIGHT,
    U8_ASYMMETRIC,
    QuantScheme,
    describe,
)
from pruna_ir.reexport import reexport
from pruna_ir.registry import kernels
from pruna_ir.spec import parse_pipeline, print_pass
from pruna_ir.transform import Context, PassResult, Rewrite, apply
from pruna_ir.verify import verify

aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.pool = nn.MaxPool2d(2)
        self.block = Block(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(self.pool(torch.relu(self.stem(x))))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def captured(module: nn.Module, *shape: int) -> Program:
    torch.manual_seed(0)
    for child in module.modules():
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()
    program = capture(module.eval(), (torch.randn(2, *shape),))
    return apply(FoldBatchNorm(), apply(Canonicalize(), program).program).program


def data(*shape: int, rows: int = 48) -> TensorData:
    generator = torch.Generator().manual_seed(1)
    return TensorData((torch.randn(rows, *shape, generator=generator),), batch_size=16)


def quantised(program: Program, calibration: TensorData, **options) -> PassResult:
    options.setdefault("target", "onnx")
    result = apply(InsertFakeQuant(**options), program, Context(data=calibration))
    verify(result.program)
    return result


def layers(program: Program) -> list[torch.fx.Node]:
    return [node for node in program.calls() if node.target in KINDS]


def inputs_and_weights(program: Program) -> Counter[str]:
    rows = [r for r in describe(program) if r.operand in ("input", "x", "weight", "mat1", "mat2")]
    return Counter("weight" if r.operand in ("weight", "mat2") else "input" for r in rows)


def fake(program: Program, node: torch.fx.Node, operand: str) -> Call:
    source = Call(program, node).producer(operand)
    assert source is not None
    assert is_quantised(source)
    return Call(program, source)


# -- placement -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["onnx", "openvino", "tensorrt", "tvm"])
def test_every_layer_is_quantised_on_the_targets_grid(target: str) -> None:
    program = captured(Net(), 3, 15, 15)
    result = quantised(program, data(3, 15, 15), target=target)
    assert inputs_and_weights(result.program) == {"input": 4, "weight": 4}
    assert result.program.attributes["quantized-for"] == target
    assert result.program.inputs == program.inputs
    assert result.program.outputs == program.outputs
    x = torch.randn(9, 3, 15, 15)
    assert sqnr_db(result.program(x)[0], program(x)[0]) > 25


def test_the_first_input_is_quantised_and_the_last_linear_is_not() -> None:
    program = quantised(captured(Net(), 3, 15, 15), data(3, 15, 15)).program
    first, last = layers(program)[0], layers(program)[-1]
    assert fake(program, first, "input").producer("x") in program.placeholders()
    assert program.results() == (last,)


def test_activations_are_quantised_behind_the_relu_and_once_for_all_readers() -> None:
    program = quantised(captured(Net(), 3, 15, 15), data(3, 15, 15)).program
    for relu in program.calls(aten.relu.default):
        (reader,) = relu.users
        assert is_quantised(reader)
        assert int(Call(program, reader).parameter("zero_point")) == 0
    quantised_values = [Call(program, n).producer("x") for n in program.calls() if is_quantised(n)]
    assert len(quantised_values) == len(set(quantised_values))


def test_onnx_quantises_both_inputs_of_a_residual_add_and_tensorrt_the_identity() -> None:
    both = quantised(captured(Net(), 3, 15, 15), data(3, 15, 15)).program
    (add,) = both.calls(aten.add.Tensor)
    assert all(is_quantised(source) for source in add.all_input_nodes)
    identity = quantised(captured(Net(), 3, 15, 15), data(3, 15, 15), target="tensorrt").program
    (add,) = identity.calls(aten.add.Tensor)
    targets = {source.target for source in add.all_input_nodes}
    # The pool hands on what was quantised before it; the convolution's own result stays float.
    assert targets == {aten.max_pool2d.default, aten.conv2d.default}


def test_a_max_pool_shares_its_parameters() -> None:
    program = quantised(captured(Net(), 3, 15, 15), data(3, 15, 15)).program
    (pool,) = program.calls(aten.max_pool2d.default)
    before = fake(program, pool, "self")
    (after,) = pool.users
    assert is_quantised(after)
    for name in ("scale", "zero_point"):
        assert Call(program, after).producer(name).target == before.producer(name).target


class Concatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 3, padding=1)
        self.c = nn.Conv2d(9, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.cat([self.a(x), 3 * torch.relu(self.b(x))], 1)).mean((2, 3))


@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
def test_a_concatenation_and_its_operands_share_their_parameters(target: str) -> None:
    program = captured(Concatenation(), 3, 7, 7)
    after = quantised(program, data(3, 7, 7), target=target, ranges="minmax").program
    (cat,) = after.calls(aten.cat.default)
    sources = cat.args[0]
    assert all(is_quantised(source) for source in sources)
    scales = {Call(after, source).producer("scale").target for source in sources}
    assert len(scales) == 1
    # The range is that of both operands together.
    (joined,) = program.calls(aten.cat.default)
    x = torch.cat([batch.inputs[0] for batch in data(3, 7, 7)])
    whole = torch.fx.Interpreter(program.module)
    seen = Histogram()
    values: dict[torch.fx.Node, torch.Tensor] = {}
    run = whole.run_node
    whole.run_node = lambda node: values.setdefault(node, run(node))
    whole.run(x)
    seen.update(values[joined])
    span = (seen.high - seen.low) / 255 if target == "onnx" else None
    if span is not None:
        assert float(after.tensor(scales.pop())) == pytest.approx(span, rel=1e-5)


class Silu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(nn.functional.silu(self.conv(x)))


def test_onnx_quantises_results_that_only_float_operators_read() -> None:
    onnx = quantised(captured(Silu(), 3, 7, 7), data(3, 7, 7)).program
    (silu,) = onnx.calls(aten.silu.default)
    assert is_quantised(silu.all_input_nodes[0])
    assert is_quantised(onnx.results()[0])
    other = quantised(captured(Silu(), 3, 7, 7), data(3, 7, 7), target="tensorrt").program
    (silu,) = other.calls(aten.silu.default)
    assert silu.all_input_nodes[0].target is aten.conv2d.default


class Encoder(nn.Module):
    """A transformer layer whose projections are linear and whose adds are residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return x + self.proj(mixed)


def test_residual_adds_of_transformers_stay_float() -> None:
    program = captured(Encoder(), 5, 8)
    result = quantised(program, data(5, 8))
    (add,) = result.program.calls(aten.add.Tensor)
    assert not any(is_quantised(source) for source in add.all_input_nodes)
    products = [r for r in result.remarks if "product of two activations" in r.message]
    assert len(products) == 2
    assert all(remark.kind == "missed" for remark in products)


def test_products_of_activations_are_quantised_where_the_scheme_says_so() -> None:
    program = captured(Encoder(), 5, 8)
    products = list(program.calls(aten.matmul.default))
    plan = place(program, QuantScheme(U8_ASYMMETRIC, attention=True), products)
    wanted = {reader for readers in plan.readers.values() for reader in readers}
    assert wanted == set(products)
    assert len(plan.readers) == 4


class Addmm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 7)), nn.Parameter(torch.randn(7))
        self.second = nn.Parameter(torch.randn(7, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(torch.relu(torch.addmm(self.bias, x, self.weight)), self.second)


def test_addmm_and_matmul_have_their_channels_on_the_last_axis() -> None:
    program = quantised(captured(Addmm(), 6), data(6)).program
    addmm, matmul = layers(program)
    for node, name, channels in ((addmm, "mat2", 7), (matmul, "other", 3)):
        call = fake(program, node, name)
        assert call.arg("axis") == 1
        assert call.parameter("scale").shape == (channels,)
    assert Call(program, addmm).producer("self").op == "get_attr"


@pytest.mark.parametrize(
    ("layer", "shape", "axis", "channels"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), (4, 9), 0, 6),
        (nn.Conv3d(3, 5, 2), (3, 4, 4, 4), 0, 5),
        (nn.Conv2d(4, 4, 3, groups=4, padding="same"), (4, 9, 9), 0, 4),
        (nn.ConvTranspose2d(4, 6, 3), (4, 7, 7), 1, 6),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 7, 7), 1, 3),
        (nn.ConvTranspose1d(4, 6, 3), (4, 7), 1, 6),
        (nn.Linear(7, 3, bias=False), (7,), 0, 3),
    ],
)
def test_weights_have_one_scale_per_output_channel(
    layer: nn.Module, shape: tuple[int, ...], axis: int, channels: int
) -> None:
    before = captured(nn.Sequential(layer), *shape)
    program = quantised(before, data(*shape)).program
    (node,) = layers(program)
    call = fake(program, node, "weight")
    assert call.arg("axis") == axis
    scale, weight = call.parameter("scale"), call.parameter("x")
    others = [d for d in range(weight.dim()) if d != axis]
    assert scale.shape == (channels,)
    torch.testing.assert_close(scale, weight.abs().amax(others) / 127, rtol=1e-6, atol=0)
    assert not call.parameter("zero_point").any()
    assert (call.number("qmin"), call.number("qmax")) == (-127, 127)
    assert torch.equal(weight, before.tensor("0.weight"))
    assert {"0.weight_scale", "0.weight_zero_point"} <= set(program.tensors())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.relu(self.conv(x)))


def test_layers_that_share_a_weight_do_not_share_its_zero_point() -> None:
    program = quantised(captured(Shared(), 3, 7, 7), data(3, 7, 7)).program
    first, second = (fake(program, node, "weight") for node in layers(program))
    assert first.producer("x").target == second.producer("x").target
    assert first.producer("zero_point").target != second.producer("zero_point").target
    assert first.producer("scale").target != second.producer("scale").target


# -- fused convolutions --------------------------------------------------------------------------


class Fused(nn.Module):
    """A fused convolution with a residual, between two plain ones."""

    def __init__(self, activation: str, *, residual: bool) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.out, self.activation, self.residual = nn.Conv2d(4, 2, 1), activation, residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernels()
        x = torch.relu(self.stem(x))
        y = torch.ops.pruna.conv_act(
            x, self.mid.weight, self.mid.bias, x if self.residual else None, [1, 1], [1, 1],
            [1, 1], 1, self.activation, [],
        )  # fmt: skip
        return self.out(y).mean((2, 3))


def fused(activation: str, *, residual: bool) -> Program:
    torch.manual_seed(0)
    return capture(Fused(activation, residual=residual).eval(), (torch.randn(2, 3, 7, 7),))


def conv_acts(program: Program) -> list[torch.fx.Node]:
    return list(program.calls(torch.ops.pruna.conv_act.default))


def test_a_fused_convolution_is_one_layer() -> None:
    program = quantised(fused("relu", residual=False), data(3, 7, 7)).program
    (node,) = conv_acts(program)
    assert is_quantised(Call(program, node).producer("x"))
    assert is_quantised(Call(program, node).producer("weight"))
    (reader,) = node.users
    assert is_quantised(reader)


@pytest.mark.parametrize(("activation", "residual"), [("silu", False), ("relu", True)])
def test_it_is_spelt_out_where_onnx_needs_a_quantiser_inside(
    activation: str, residual: bool
) -> None:
    before = fused(activation, residual=residual)
    result = quantised(before, data(3, 7, 7))
    assert conv_acts(result.program) == []
    assert any("spelt out" in remark.message for remark in result.remarks)
    assert sum(is_quantised(u) for n in layers(result.program) for u in n.users) >= 2
    x = torch.randn(5, 3, 7, 7)
    assert sqnr_db(result.program(x)[0], before(x)[0]) > 25


def test_tensorrt_keeps_it_fused_and_quantises_the_residual() -> None:
    result = quantised(fused("relu", residual=True), data(3, 7, 7), target="tensorrt")
    (node,) = conv_acts(result.program)
    assert is_quantised(Call(result.program, node).producer("residual"))


def test_a_fused_ffn_is_refused() -> None:
    kernels()

    class Ffn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.pruna.ffn(
                x, self.up.weight, self.up.bias, self.down.weight, self.down.bias, None, None,
                "gelu",
            )  # fmt: skip

    program = capture(Ffn().eval(), (torch.randn(2, 4),))
    with pytest.raises(PassError, match="before fuse-ffn"):
        quantised(program, data(4))


# -- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", METHODS)
def test_the_promise_holds_for_every_kind_of_range(ranges: str) -> None:
    program, calibration = captured(Net(), 3, 15, 15), data(3, 15, 15)
    pass_ = InsertFakeQuant(target="onnx", ranges=ranges)
    context = Context(data=calibration)
    result = apply(pass_, program, context)
    report = check(
        pass_, program, result.program, context=context, assurances=result.assurances
    )
    assert report.passed, report


@pytest.mark.parametrize("factor", [256.0, 1 / 16])
def test_the_promise_fails_for_a_wrong_scale(factor: float) -> None:
    program, calibration = captured(Net(), 3, 15, 15), data(3, 15, 15)
    pass_, context = InsertFakeQuant(target="onnx"), Context(data=calibration)
    after = apply(pass_, program, context).program
    head = after.module.get_submodule("head")
    good = head.weight_scale
    head.weight_scale = good * factor
    assert not check(pass_, program, after, context=context).passed
    head.weight_scale = good
    assert check(pass_, program, after, context=context).passed


def test_a_higher_budget_is_the_users_choice() -> None:
    program, context = captured(Net(), 3, 15, 15), Context(data=data(3, 15, 15))
    pass_ = InsertFakeQuant(target="onnx", sqnr_db=90.0)
    after = apply(pass_, program, context).program
    report = check(pass_, program, after, context=context)
    assert not report.passed
    assert report.limit == 90.0


def test_weight_ranges_by_error_are_no_worse_per_channel() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 3, 15, 15)
    weight[1, 2, 0, 0] = 20.0
    for axis in (0, 1):
        found = {m: weight_parameters(weight, S8_WEIGHT, axis, "w", m) for m in ("minmax", "mse")}
        others = [d for d in range(4) if d != axis]
        errors = {
            method: (p.reals(p.integers(weight)) - weight).square().sum(others)
            for method, p in found.items()
        }
        assert (errors["mse"] <= errors["minmax"]).all()
        assert (found["mse"].scale < found["minmax"].scale).any()


def test_all_zero_channels_and_weights_work() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3))
    program = captured(module, 3, 7, 7)
    with torch.no_grad():
        module[0].weight[1] = 0.0
    program = capture(module.eval(), (torch.randn(2, 3, 7, 7),))
    after = quantised(program, data(3, 7, 7)).program
    assert float(after.tensor("0.weight_scale")[1]) == 1.0
    x = torch.randn(3, 3, 7, 7)
    assert sqnr_db(after(x)[0], program(x)[0]) > 25


def test_remarks_state_range_clipping_and_error() -> None:
    result = quantised(captured(Net(), 3, 15, 15), data(3, 15, 15))
    notes = [remark for remark in result.remarks if remark.kind == "note"]
    assert len(notes) == 6
    assert all("% clipped" in note.message and " dB" in note.message for note in notes)
    applied = [remark.message for remark in result.remarks if remark.kind == "applied"]
    assert applied == [
        "stem: w8a8 for onnx", "block.conv1: w8a8 for onnx", "block.conv2: w8a8 for onnx",
        "head: w8a8 for onnx",
    ]  # fmt: skip


def test_symmetric_targets_have_zero_points_of_zero() -> None:
    program = quantised(captured(Net(), 3, 15, 15), data(3, 15, 15), target="tensorrt").program
    assert all(row.zero_point == (0, 0) for row in describe(program))
    assert {row.grid for row in describe(program)} == {str(S8_SYMMETRIC), str(S8_WEIGHT)}


# -- the program ---------------------------------------------------------------------------------


def test_second_run_changes_nothing() -> None:
    once = quantised(captured(Net(), 3, 15, 15), data(3, 15, 15)).program
    assert not quantised(once, data(3, 15, 15)).modified
    assert not apply(InsertFakeQuant(target="onnx"), once).modified


def test_excluded_layers_stay_float_with_a_remark() -> None:
    result = quantised(captured(Net(), 3, 15, 15), data(3, 15, 15), exclude=("head", "block.*1"))
    missed = {r.message for r in result.remarks if r.kind == "missed"}
    assert missed == {"excluded by 'head'", "excluded by 'block.*1'"}
    assert inputs_and_weights(result.program)["weight"] == 2
    (linear,) = result.program.calls(aten.linear.default)
    assert not any(is_quantised(source) for source in linear.all_input_nodes)


def test_scopes_can_be_quantised_one_after_the_other() -> None:
    program, context = captured(Net(), 3, 15, 15), Context(data=data(3, 15, 15))
    pass_ = InsertFakeQuant(target="onnx", ranges="minmax")
    part = apply(pass_, program, context, scope=("block",)).program
    assert len([n for n in layers(part) if is_quantised(Call(part, n).producer("weight"))]) == 2
    whole = apply(pass_, part, context).program
    verify(whole)
    assert inputs_and_weights(whole) == {"input": 4, "weight": 4}
    assert not apply(pass_, whole, context).modified


def test_the_original_program_is_untouched() -> None:
    program = captured(Net(), 3, 15, 15)
    before, digest = program(*program.examples)[0], program.hash()
    quantised(program, data(3, 15, 15))
    assert program.hash() == digest
    assert torch.equal(program(*program.examples)[0], before)


def test_integer_programs_are_left_alone() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(11, 4), nn.Linear(4, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids + 1))

    program = capture(Lookup().eval(), (torch.randint(0, 10, (2, 5)),))
    calibration = TensorData((torch.randint(0, 10, (20, 5)),))
    result = quantised(program, calibration)
    assert any(r.message == "embedding tables stay float" for r in result.remarks)
    (placeholder,) = result.program.placeholders()
    assert not any(is_quantised(user) for user in placeholder.users)
    assert inputs_and_weights(result.program) == {"input": 1, "weight": 1}


def test_the_quantised_program_is_exported_again_with_dynamic_batch() -> None:
    program = quantised(captured(Net(), 3, 15, 15), data(3, 15, 15)).program
    exported = reexport(program)
    count = sum(is_quantised(node) for node in program.calls())
    assert sum(is_quantised(node) for node in exported.graph.nodes) == count
    x = torch.randn(5, 3, 15, 15)
    assert torch.equal(exported.module()(x)[0], program(x)[0])


def test_options_round_trip_through_pipeline_text() -> None:
    pass_ = InsertFakeQuant(
        target="openvino", ranges="percentile", percentile=99.9, exclude=("head", "layer4*"),
        samples=7, sqnr_db=12.5,
    )  # fmt: skip
    (spec,) = parse_pipeline(print_pass(pass_))
    assert make_pass(spec) == pass_


# -- refusals ------------------------------------------------------------------------------------


def test_without_data_it_says_how_to_give_some() -> None:
    with pytest.raises(UsageError, match=r"calibrates .* on data, and there is none; give"):
        apply(InsertFakeQuant(target="onnx"), captured(Net(), 3, 15, 15))


class Counted:
    """A data source that knows how many of its batches were read."""

    def __init__(self, source: TensorData, length: int | None = None) -> None:
        self.source, self.read = source, 0
        self.length = len(source) if length is None else length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.source:
            self.read += 1
            yield batch


def test_too_few_samples_are_refused_before_the_walk() -> None:
    program, source = captured(Net(), 3, 15, 15), Counted(data(3, 15, 15))
    with pytest.raises(UsageError, match=r"samples=49 were asked for, but .* at most 48; give m"):
        quantised(program, source, samples=49)
    assert source.read == 1
    assert quantised(program, Counted(data(3, 15, 15)), samples=48).modified
    # A source that promises more batches than it yields is found out behind the walk.
    with pytest.raises(UsageError, match=r"samples=60 .* holds at most 48"):
        quantised(program, Counted(data(3, 15, 15), length=4), samples=60)


def test_an_empty_source_is_refused_before_the_walk() -> None:
    source = Counted(data(3, 15, 15), length=0)
    with pytest.raises(UsageError, match="the calibration data is empty; give at least one"):
        quantised(captured(Net(), 3, 15, 15), source)
    assert source.read == 0


def test_infinite_weights_are_refused_before_the_walk() -> None:
    program = captured(Net(), 3, 15, 15)
    rw = Rewrite(program, "edit", Context())
    rw.set_tensor("head.weight", torch.full((5, 6), float("inf")))
    source = Counted(data(3, 15, 15))
    with pytest.raises(PassError, match=r"head\.weight: its range holds NaN or infinity"):
        quantised(rw.finish(), source)
    assert source.read == 0


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"percentile": 50.0}, {"ends": "w9a8"}])
def test_impossible_options_are_refused_when_the_pass_is_made(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        InsertFakeQuant(**wrong)


def test_without_a_target_it_says_how_to_give_one() -> None:
    with pytest.raises(UsageError, match=r"insert-fake-quant\{target=onnx\}"):
        apply(InsertFakeQuant(), captured(Net(), 3, 15, 15), Context(data=data(3, 15, 15)))


def test_the_pipelines_target_is_used_and_must_agree() -> None:
    program, context = captured(Net(), 3, 15, 15), Context(data=data(3, 15, 15), target="tensorrt")
    after = apply(InsertFakeQuant(), program, context).program
    assert after.attributes["quantized-for"] == "tensorrt"
    with pytest.raises(UsageError, match="make them agree"):
        apply(InsertFakeQuant(target="onnx"), program, context)


def test_an_unknown_target_or_layer_suggests_the_nearest() -> None:
    program, context = captured(Net(), 3, 15, 15), Context(data=data(3, 15, 15))
    with pytest.raises(UsageError, match="did you mean 'onnx'"):
        apply(InsertFakeQuant(target="onxn"), program, context)
    with pytest.raises(UsageError, match=r"unknown layer 'block\.conv3'; did you mean 'block\."):
        apply(InsertFakeQuant(target="onnx", exclude=("block.conv3",)), program, context)


def test_a_program_quantised_for_another_target_is_refused() -> None:
    once = quantised(captured(Net(), 3, 15, 15), data(3, 15, 15)).program
    with pytest.raises(UsageError, match="already quantised for 'onnx'"):
        quantised(once, data(3, 15, 15), target="tensorrt")


def test_infinite_weights_are_refused_by_name() -> None:
    module = Net()
    program = captured(module, 3, 15, 15)
    with torch.no_grad():
        module.block.conv1.weight[0, 0, 0, 0] = float("inf")
    program = capture(module.eval(), (torch.randn(2, 3, 15, 15),))
    with pytest.raises(PassError, match=r"block(\.conv1\.weight)?"):
        quantised(program, data(3, 15, 15))


def test_nan_in_the_data_names_the_layer_and_batch() -> None:
    calibration = data(3, 15, 15)
    calibration.inputs[0][40] = float("nan")
    with pytest.raises(PassError, match="calibration batch 2"):
        quantised(captured(Net(), 3, 15, 15), calibration)


def test_a_weight_in_blocks_is_said_to_be_on_a_grid_already() -> None:
    program = captured(nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)), 64)
    pass_ = QuantizeWeights(bits=4, block=32, exclude=("2",))
    blocks = apply(pass_, program).program
    result = quantised(blocks, data(64))
    missed = [remark.message for remark in result.remarks if remark.kind == "missed"]
    assert missed == ["its weight is on a grid in blocks already; its input stays float"]
    assert inputs_and_weights(result.program)["input"] == 1


# -- real architectures --------------------------------------------------------------------------


def test_resnet18() -> None:
    import torchvision
    program = captured(torchvision.models.resnet18(weights=None), 3, 64, 64)
    calibration = data(3, 64, 64, rows=16)
    result = quantised(program, calibration)
    assert inputs_and_weights(result.program) == {"input": 21, "weight": 21}
    adds = list(result.program.calls(aten.add.Tensor))
    assert len(adds) == 8
    assert all(is_quantised(source) for add in adds for source in add.all_input_nodes)
    assert not [remark for remark in result.remarks if remark.kind == "missed"]
    x = calibration.inputs[0][:4]
    assert sqnr_db(result.program(x)[0], program(x)[0]) > 20


def test_gpt2() -> None:
    import transformers
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=101, n_positions=16, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = transformers.GPT2LMHeadModel(config)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    program = capture(Logits().eval(), (torch.randint(0, 101, (2, 12)),))
    program = apply(Canonicalize(), program).program
    result = quantised(program, TensorData((torch.randint(0, 101, (16, 12)),)))
    assert inputs_and_weights(result.program) == {"input": 9, "weight": 9}
    for add in result.program.calls(aten.add.Tensor):
        assert not any(is_quantised(source) for source in add.all_input_nodes)
    ids = torch.randint(0, 101, (4, 12))
    assert sqnr_db(result.program(ids)[0], program(ids)[0]) > 25
