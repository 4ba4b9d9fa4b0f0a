"""Convolutions of bfloat16: sums within float32's rounding, whatever shape is drawn; networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruna_ir.backends.to_tvm import ToTvm
from pruna_ir.backends.tvm_bfloat16 import narrow, narrow_words
from pruna_ir.backends.tvm_build import has_dots, host_target
from pruna_ir.backends.tvm_convolutions import (
    ACCUMULATE,
    Convolution,
    convolve,
    pack,
    schedule_convolution,
)
from pruna_ir.backends.tvm_dot import BFLOAT16, multiplied, with_dots
from pruna_ir.build import build
from pruna_ir.capture import capture
from pruna_ir.lowering import LoadOptions, Verdict
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.transform import Context
from tests.backends.test_tvm_bytes import Array, computed, convolutions

NATIVE = pytest.mark.skipif(
    not has_dots(host_target(), BFLOAT16), reason="this processor has no AVX512-BF16"
)
NAN = 0x7FC1


def halves(x: Array) -> Array:
    """The upper halves of float32 numbers that are rounded to bfloat16."""
    return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)


def convolved(constants: Convolution, data: Array, weight: Array, *, words: bool) -> Array:
    """The sums, float32[n, O, H, W], of numbers; memory begins as NaN."""
    import tvm
    from tvm import s_tir, te

    held = computed(narrow_words, data) if words else _halves_blocked(constants, data)
    kept = weight if constants.is_depthwise else halves(weight)
    w = te.placeholder(kept.shape, kept.dtype.name, name="weight")
    p = pack(constants, w)
    d = te.placeholder(held.shape, held.dtype.name, name="data")
    q = te.placeholder(p.shape, p.dtype, name="packed")
    result = convolve(constants, 16)(d, q)
    schedule = s_tir.Schedule(te.create_prim_func([d, q, result]))
    schedule_convolution(schedule, schedule.get_sblock(ACCUMULATE))
    function = with_dots(schedule.mod["main"])
    assert multiplied(function) == ("" if constants.is_depthwise else "bfloat16")
    made = tvm.compile(tvm.IRModule({"main": function}), target=host_target())
    out = tvm.runtime.tensor(np.full([int(v) for v in result.shape], np.nan, np.float32))
    packed = tvm.runtime.tensor(computed(lambda x: pack(constants, x), kept))
    made["main"](tvm.runtime.tensor(held), packed, out)
    plain = out.numpy().transpose(0, 1, 4, 2, 3)
    n, blocks, lanes, height, width = plain.shape
    whole = plain.reshape(n, blocks * lanes, height, width)
    return np.asarray(whole[:, : constants.outputs])


def _halves_blocked(constants: Convolution, data: Array) -> Array:
    """Blocked halves: NaN behind the last channel, but where a sum reads that."""
    n, channels, height, width = data.shape
    filled = constants.depth > channels // constants.groups * constants.merged
    behind = 0 if filled and not constants.is_depthwise else NAN
    whole = np.full((n, -(-channels // 16) * 16, height, width), behind, np.uint16)
    whole[:, :channels] = halves(data)
    lanes = whole.reshape(n, -1, 16, height, width).transpose(0, 1, 3, 4, 2)
    return np.ascontiguousarray(lanes)


def within_rounding(actual: Array, constants: Convolution, data: Array, weight: Array) -> bool:
    """Whether each sum is as near to that of the rounded numbers as float32 additions leave it.

    A sum of K products takes K additions, each of which rounds by 2^-24 of at most the sum of the
    products' magnitudes; the products themselves are exact.
    """
    x, w = (torch.from_numpy(v).bfloat16().double() for v in (data, weight))
    exact, magnitude = (
        _sums(constants, a, b).numpy() for a, b in ((x, w), (x.abs(), w.abs()))
    )
    terms = weight[0].size * constants.merged + 3
    return bool((np.abs(actual - exact) <= terms * 2.0**-24 * magnitude).all())


def _sums(constants: Convolution, data: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    top, left, bottom, right = constants.padding
    padded = torch.nn.functional.pad(data, (left, right, top, bottom))
    return torch.nn.functional.conv2d(
        padded, weight, None, constants.strides, 0, constants.dilation, constants.groups
    )


def operands(constants: Convolution, size: tuple[int, int], seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    shape = (constants.outputs, constants.inputs // constants.groups, *constants.kernel)
    data = rng.standard_normal((2, constants.inputs, *size), np.float32)
    return data, rng.standard_normal(shape, np.float32)


def of_halves(constants: Convolution) -> Convolution:
    """The constants with which `tvm_narrow_convolutions` multiplies halves."""
    return replace(constants, quad=1 if constants.is_depthwise else BFLOAT16.depth)


@NATIVE
@settings(max_examples=6, deadline=None)
@given(
    drawn=convolutions(),
    size=st.tuples(st.integers(7, 9), st.sampled_from([7, 13, 16])),
    seed=st.integers(0, 2**16),
)
def test_sums_are_within_rounding(
    drawn: Convolution, size: tuple[int, int], seed: int
) -> None:
    constants = of_halves(drawn)
    words = constants.inputs < 16 and not constants.is_depthwise
    data, weight = operands(constants, size, seed)
    if constants.is_depthwise:
        weight = torch.from_numpy(weight).bfloat16().float().numpy()
    actual = convolved(constants, data, weight, words=words)
    assert within_rounding(actual, constants, data, weight)


def test_the_check_finds_what_was_not_rounded_or_left_out() -> None:
    one = (1, 1)
    constants = Convolution(6, 4, 1, (3, 3), one, one, (1, 1, 1, 1), 2)
    data, weight = operands(constants, (7, 7), 0)
    x, w = (torch.from_numpy(v) for v in (data, weight))
    right = _sums(constants, x.bfloat16().double(), w.bfloat16().double())
    assert within_rounding(right.numpy(), constants, data, weight)
    for wrong in (
        _sums(constants, x.double(), w.double()),
        _sums(constants, x.bfloat16().double(), w.bfloat16().double() * (torch.arange(3) > 0)),
        right * 2, right.flip(1), torch.full_like(right, torch.nan),
    ):  # fmt: skip
        assert not within_rounding(wrong.numpy(), constants, data, weight)


@NATIVE
def test_denormal_numbers_count_as_zeros() -> None:
    """As the instruction has it; the smallest normal number is multiplied."""
    one = (1, 1)
    constants = Convolution(16, 16, 1, one, one, one, (0, 0, 0, 0), 2)
    weight = np.full((16, 16, 1, 1), 2.0**100, np.float32)
    for smallest, expected in ((2.0**-127, 0.0), (2.0**-126, 2.0**-22)):
        data = np.full((1, 16, 1, 16), smallest, np.float32)
        assert (convolved(constants, data, weight, words=False) == expected).all()


def test_halves_are_blocked_in_pairs_of_channels() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5), np.float32)
    found = computed(narrow_words, x).view(np.uint16).reshape(2, 2, 4, 5, 2)
    plain = found.transpose(0, 1, 4, 2, 3).reshape(2, 4, 4, 5)
    assert np.array_equal(plain[:, :3], computed(narrow, x))
    assert (plain[:, 3] == 0).all()


# -- networks -------------------------------------------------------------------------------------

CAST = "canonicalize,fold-batch-norm,fuse-conv-bn-relu,cast-floats{dtype=bfloat16}"


class Residual(torch.nn.Module):
    """A stem of three channels, a pool, a residual, a stride, groups, depthwise, odd channels."""

    def __init__(self) -> None:
        super().__init__()
        conv = torch.nn.Conv2d
        self.stem = conv(3, 32, 3, 2, 1, bias=False)
        self.norm = torch.nn.BatchNorm2d(32)
        self.same = conv(32, 32, 3, padding=1)
        self.grouped = conv(32, 48, 3, 2, groups=4, padding="valid")
        self.depthwise = conv(48, 48, 3, padding=1, groups=48)
        self.down = conv(48, 17, 1)
        self.odd = conv(17, 16, (1, 3), dilation=(1, 2), padding=(0, 2))
        self.head = torch.nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.nn.functional.max_pool2d(self.norm(self.stem(x)).relu(), 3, 2, 1)
        y = (self.same(y) + y).relu()
        y = self.depthwise(self.grouped(y)).relu()
        last = self.odd(torch.nn.functional.silu(self.down(y)))
        return self.head(last.mean((2, 3))), last


class Chain(torch.nn.Module):
    """Two layers, the second depthwise, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.nn.Conv2d(3, 20, 3)
        self.depthwise = torch.nn.Conv2d(20, 20, 3, padding=1, groups=20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.wide(x).relu()
        made: torch.Tensor = self.depthwise(y) + y
        return made


def cast(make: Callable[[], torch.nn.Module]) -> tuple[Program, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 33, 40)
    program = capture(make().eval(), (x[:2],))
    return Pipeline.parse(CAST).run(program, Context()).program, x


def precisions(runner: Any) -> list[str]:
    return [row.precision for row in runner.audit() if row.kind == "conv"]


def agrees(found: Sequence[Array], program: Program, x: torch.Tensor) -> bool:
    """Whether outputs are those of the program within four units of bfloat16's last place.

    The program rounds to it behind each operator, the artifact less often.
    """
    with torch.no_grad():
        own = [t.double().numpy() for t in program(x)]
    pairs = zip(found, own, strict=True)
    return all(np.abs(a - b).max() <= 4 * 2.0**-7 * np.abs(b).max() for a, b in pairs)


@NATIVE
def test_networks_pass_their_certificates(tmp_path: Path) -> None:
    program, x = cast(Residual)
    artifact = build(program, "tvm", tmp_path / "artifact")
    assert artifact.certificate.verdict is Verdict.PASSED
    runner = artifact.load()
    # stem, same, grouped, depthwise, down, odd
    kinds = ["bfloat16"] * 3 + ["float32", "bfloat16", "float32"]
    assert precisions(runner) == kinds
    found = runner.run([x.numpy()])
    assert agrees(found, program, x)
    assert not agrees([2 * v for v in found], program, x)


def test_a_processor_without_the_instruction_convolves_float32(tmp_path: Path) -> None:
    program, x = cast(Chain)
    backend = ToTvm(cpu="x86-64-v3")
    with pytest.warns(RuntimeWarning, match="convolutions in bfloat16 multiply float32: x86-64"):
        lowered = backend.lower(program, tmp_path, Context())
    assert any("AVX512-BF16" in text for text in lowered.warnings)
    assert lowered.facts["tvm-default-schedules"] == []
    runner = backend.load(tmp_path, LoadOptions(threads=1))
    assert precisions(runner) == ["float32"] * 2
    assert agrees(runner.run([x.numpy()]), program, x)
