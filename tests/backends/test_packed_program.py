"""Packed programs against the program itself: what runs packed, what stays plain, and why.

Tolerance: that of certificates. Relative to the largest number of the program in float64, the
error is at most `FLOAT_FACTOR` times that of the program run by torch itself (counted as at least
`FLOOR_EPS` eps); for bfloat16, the signal-to-noise ratio is at least that of the program whose
results are rounded to either neighbour, less `MARGIN_DB`.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir.backends.packed_program import PLANS, PackedProgram
from pruna_ir.capture import capture
from pruna_ir.certify import FLOAT_FACTOR, FLOOR_EPS
from pruna_ir.equivalence import relative_error, run_float64, run_native
from pruna_ir.errors import UsageError
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program

aten = torch.ops.aten
F = nn.functional


class Net(nn.Module):
    def __init__(self, forward, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.run = forward

    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        return self.run(*x, *self.layers)


def captured(forward, *layers: nn.Module, shape=(2, 5, 9, 7), seed: int = 0) -> Program:
    torch.manual_seed(seed)
    for layer in layers:
        for value in layer.parameters():
            nn.init.uniform_(value, -0.5, 0.5)
    return capture(Net(forward, *layers).eval(), (torch.randn(*shape),))


def limit(program: Program, inputs, position: int = 0) -> float:
    """The largest relative error that a certificate would let pass."""
    truth, own = run_float64(program, inputs)[position], run_native(program, inputs)[position]
    return FLOAT_FACTOR * max(relative_error(own, truth), FLOOR_EPS * torch.finfo(own.dtype).eps)


def check(program: Program, batch: int = 3, seed: int = 0) -> PackedProgram:
    """The packed program computes what the program does, the same bits twice."""
    torch.manual_seed(seed)
    inputs = tuple(torch.randn(batch, *example.shape[1:]) for example in program.examples)
    packed = PackedProgram(program)
    first, second = packed(*inputs), packed(*inputs)
    for position, truth in enumerate(run_float64(program, inputs)):
        ours, tolerance = first[position], limit(program, inputs, position)
        assert ours.shape == truth.shape
        assert ours.is_contiguous()
        assert ours.dtype == program.outputs[position].dtype
        assert relative_error(ours, truth) <= tolerance
        assert torch.equal(ours, second[position])
        if truth.any():
            assert relative_error(ours * 1.001, truth) > tolerance, "the check can fail"
    return packed


def layers_of(packed: PackedProgram) -> list[str]:
    """What is said of each convolution and product, in order."""
    return [
        row.detail.removeprefix("packed by oneDNN: ")
        for row in packed.rows
        if row.kind in ("conv", "linear", "matmul") and "bmm" not in row.detail
    ]


ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardtanh": lambda y: F.hardtanh(y, -0.25, 0.5),
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky_relu": lambda y: F.leaky_relu(y, 0.1),
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
RESIDUALS = ("none", "before", "after")


def epilogue(y: torch.Tensor, residual: torch.Tensor, activation: str, where: str) -> torch.Tensor:
    y = y + residual if where == "before" else y
    y = ACTIVATIONS[activation](y)
    return y + residual if where == "after" else y


SIDE = st.integers(1, 3)


@settings(max_examples=36)
@given(
    groups=st.sampled_from([1, 1, 2, 3]), inner=st.integers(1, 6), outer=st.integers(1, 6),
    depthwise=st.booleans(), kernel=st.tuples(SIDE, SIDE), stride=st.tuples(SIDE, SIDE),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)), dilation=st.tuples(SIDE, SIDE),
    bias=st.booleans(), activation=st.sampled_from(sorted(ACTIVATIONS)),
    where=st.sampled_from(RESIDUALS), batch=st.integers(1, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_convolutions_of_any_shape(
    groups, inner, outer, depthwise, kernel, stride, padding, dilation, bias, activation, where,
    batch, seed,
):  # fmt: skip
    channels = groups * inner
    out = channels * 2 if depthwise else groups * outer
    conv = nn.Conv2d(
        channels, out, kernel, stride, padding, dilation,
        channels if depthwise else groups, bias=bias,
    )  # fmt: skip
    program = captured(
        lambda x, a: epilogue(a(x), a(x).flip(1), activation, where),
        conv, shape=(2, channels, 9, 8), seed=seed,
    )  # fmt: skip
    packed = check(program, batch, seed)
    assert all("plain" not in detail for detail in layers_of(packed))


@settings(max_examples=24)
@given(
    inner=st.integers(1, 33), outer=st.integers(1, 33), rows=st.sampled_from([(), (1,), (3, 2)]),
    bias=st.booleans(), activation=st.sampled_from(sorted(ACTIVATIONS)),
    where=st.sampled_from(RESIDUALS), batch=st.integers(1, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_linear_layers_of_any_shape(inner, outer, rows, bias, activation, where, batch, seed):
    program = captured(
        lambda x, a: epilogue(a(x), a(x).flip(-1), activation, where),
        nn.Linear(inner, outer, bias=bias), shape=(2, *rows, inner), seed=seed,
    )  # fmt: skip
    packed = check(program, batch, seed)
    assert all("plain" not in detail for detail in layers_of(packed))


CHAINS = {
    "relu": (lambda x, a, _: torch.relu(a(x)), ["conv2d, relu"]),
    "add": (lambda x, a, _: x + a(x), ["conv2d, add"]),
    "add and silu": (lambda x, a, _: F.silu(a(x) + x), ["conv2d, add, silu"]),
    "two convolutions added": (
        lambda x, a, b: torch.relu(a(x) + b(x)), ["conv2d, add, relu", "conv2d"]
    ),
    "residual after": (lambda x, a, _: torch.relu(a(x)) + x, ["conv2d, relu"]),
    "one after the other": (lambda x, a, b: b(F.gelu(a(x))), ["conv2d, gelu", "conv2d"]),
    "twice itself": (lambda x, a, _: (lambda c: c + c)(a(x)), ["conv2d"]),
    "alpha": (lambda x, a, _: torch.add(a(x), x, alpha=2), ["conv2d"]),
    "broadcast": (lambda x, a, _: a(x) + x.mean((2, 3), keepdim=True), ["conv2d"]),
    "number": (lambda x, a, _: torch.relu(a(x) + 1.0), ["conv2d"]),
    "constant": (lambda x, a, b: torch.relu(a(x) + b.weight[0, 0, 0, 0]), ["conv2d"]),
    "two readers": (lambda x, a, _: (lambda c: torch.relu(c) * c)(a(x)), ["conv2d"]),
    "the same weights twice": (lambda x, a, _: a(a(x)[:, :, ::2]), ["conv2d", "conv2d"]),
    "reshaped behind": (lambda x, a, _: a(x).reshape(x.shape[0], -1).cumsum(1), ["conv2d"]),
    "flattened view": (lambda x, a, _: a(x).flatten(2).transpose(1, 2).softmax(1), ["conv2d"]),
    "split and joined": (
        lambda x, a, _: torch.cat(a(x).split([2, 3], 1)[::-1], 1).relu(), ["conv2d"]
    ),
    "mean over images": (lambda x, a, _: a(x).mean((2, 3)), ["conv2d"]),
    "mean over channels": (lambda x, a, _: a(x).mean(1), ["conv2d"]),
    "of a permuted image": (lambda x, a, _: a(x.transpose(2, 3)), ["conv2d"]),
    "two results": (lambda x, a, b: (a(x), torch.relu(b(x))), ["conv2d", "conv2d, relu"]),
}  # fmt: skip


@pytest.mark.parametrize("chain", CHAINS)
def test_what_follows_is_fused_where_nobody_else_reads_it(chain: str) -> None:
    forward, expected = CHAINS[chain]
    program = captured(forward, nn.Conv2d(5, 5, 3, padding=1), nn.Conv2d(5, 5, 1))
    assert sorted(layers_of(check(program))) == sorted(expected)


def test_products_with_stored_weights() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.empty(6, 4)), nn.Parameter(torch.empty(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.bias, x, self.weight) + torch.mm(x, self.weight)

    packed = check(captured(lambda x, a: a(x), Conv1D(), shape=(2, 6)))
    assert sorted(layers_of(packed)) == ["addmm, add", "mm"]


PLAIN = {
    "conv1d": (lambda x, a: a(x), nn.Conv1d(5, 4, 3), (2, 5, 9), "one-dimensional"),
    "conv3d": (lambda x, a: a(x), nn.Conv3d(5, 4, 3), (2, 5, 4, 4, 4), "three-dimensional"),
    "transposed": (
        lambda x, a: a(x), nn.ConvTranspose2d(5, 4, 3), (2, 5, 4, 4), "transposed convolutions"
    ),
    "float64": (
        lambda x, a: a(x.double()).float(), nn.Conv2d(5, 4, 3).double(), (2, 5, 9, 9),
        "not in float64",
    ),
    "computed weight": (
        lambda x, a: F.conv2d(x, a.weight * x.mean()), nn.Conv2d(5, 4, 3), (2, 5, 9, 9),
        "weight or bias is computed",
    ),
    "scaled product": (
        lambda x, a: torch.addmm(a.bias, x, a.weight.T, alpha=2), nn.Linear(5, 4), (2, 5), "scales"
    ),
    "no batch": (
        lambda x, a: a(x.sum(0)) + x.mean(), nn.Conv2d(5, 4, 3), (2, 5, 9, 9), "no batch"
    ),
    "channels-last": (
        lambda x, a: a(x.to(memory_format=torch.channels_last)).contiguous(), nn.Conv2d(5, 4, 3),
        (2, 5, 9, 9), "another layout",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PLAIN)
def test_what_cannot_be_packed_runs_plain_and_is_listed(case: str) -> None:
    forward, layer, shape, reason = PLAIN[case]
    packed = check(captured(forward, layer, shape=shape))
    (detail,) = [row.detail for row in packed.rows if ", plain: " in row.detail]
    assert reason in detail


def test_nan_and_infinity_are_not_hidden() -> None:
    program = captured(
        lambda x, a, b: F.relu6(b(torch.relu(a(x)))), nn.Conv2d(5, 5, 1), nn.Conv2d(5, 5, 1)
    )
    x = torch.randn(2, 5, 9, 7)
    x[1, 2, 3, 4] = math.nan
    (found,) = PackedProgram(program)(x)
    assert torch.equal(found.isnan(), program(x)[0].isnan())
    assert found[1, :, 3, 4].isnan().all()


def test_every_shape_gets_its_own_plan_and_old_ones_go() -> None:
    program = captured(lambda x, a: a(x), nn.Conv2d(5, 5, 3))
    packed = PackedProgram(program)
    inputs = [torch.randn(batch, 5, 9, 7) for batch in range(1, PLANS + 3)]
    first = [packed(x)[0] for x in inputs]
    assert len(packed._plans) == PLANS
    assert all(torch.equal(packed(x)[0], y) for x, y in zip(inputs, first, strict=True))


def test_threads_may_share_a_packed_program() -> None:
    program = captured(lambda x, a: torch.relu(a(x)), nn.Conv2d(5, 5, 3))
    inputs = [torch.randn(batch, 5, 9, 7) for batch in (1, 2, 3, 4, 5, 6)] * 4
    expected = [PackedProgram(program)(x)[0] for x in inputs]
    packed = PackedProgram(program)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: packed(x)[0], inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_empty_batch_gives_an_empty_result() -> None:
    program = captured(lambda x, a: torch.relu(a(x)), nn.Conv2d(5, 4, 3))
    if program.dims["batch"].lower == 0:
        assert PackedProgram(program)(torch.zeros(0, 5, 9, 7))[0].shape == (0, 4, 7, 5)


def test_a_wrong_input_is_refused_by_name() -> None:
    packed = PackedProgram(captured(lambda x, a: a(x), nn.Conv2d(5, 5, 3)))
    with pytest.raises(UsageError, match="dimension 1 must be 5"):
        packed(torch.zeros(2, 4, 9, 7))


def test_the_program_and_the_inputs_stay_as_they_are() -> None:
    program = captured(lambda x, a: torch.relu(a(x) + x), nn.Conv2d(5, 5, 1))
    before, x = program.hash(), torch.randn(2, 5, 9, 7)
    copy = x.clone()
    PackedProgram(program)(x)
    assert program.hash() == before
    assert torch.equal(x, copy)


def test_fused_operators_are_packed_layer_by_layer() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.up, self.down = nn.Linear(6, 24), nn.Linear(24, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
            return x + self.down(F.gelu(self.up(x)))

    program = capture(Block().eval(), (torch.randn(2, 5, 9, 7),))
    fused = Pipeline.parse("canonicalize,fuse-conv-bn-relu,fuse-ffn").run(program).program
    targets = {str(node.target) for node in fused.calls()}
    assert {"pruna.conv_act.default", "pruna.ffn.default"} <= targets
    packed = check(fused)
    assert layers_of(packed) == ["conv2d, relu", "linear, gelu", "linear, add"]
    assert packed.rows[0].layer == "conv"


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="the processor has no bfloat16"
)
def test_bfloat16_layers_are_packed() -> None:
    from pruna_ir.certify import MARGIN_DB
    from pruna_ir.equivalence import sqnr_db
    from pruna_ir.low_precision import run_rounded

    program = captured(
        lambda x, a, b: b(F.gelu(a(x) + x).mean((2, 3))), nn.Conv2d(5, 5, 3, padding=1),
        nn.Linear(5, 4),
    )  # fmt: skip
    low = Pipeline.parse("canonicalize,cast-floats").run(program).program
    packed = PackedProgram(low)
    assert [(r.kind, r.precision) for r in packed.rows if "packed" in r.detail] == [
        ("conv", "bfloat16"), ("linear", "bfloat16"),
    ]  # fmt: skip
    x = torch.randn(3, 5, 9, 7)
    (truth,) = run_float64(low, (x,))
    floor = min(sqnr_db(run_rounded(low, (x,), seed=seed)[0], truth) for seed in range(3))
    assert sqnr_db(packed(x)[0], truth) >= floor - MARGIN_DB
    assert sqnr_db(packed(x)[0] * 1.2, truth) < floor - MARGIN_DB, "the check can fail"
