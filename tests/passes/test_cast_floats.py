"""cast-floats: what is lowered, what stays, what is refused, and real runtimes that agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pruna_ir.build import build
from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.data import TensorData
from pruna_ir.errors import PassError, UnsupportedError, UsageError
from pruna_ir.lowering import Verdict
from pruna_ir.passes.cast_floats import CastFloats, OnlyDtypes
from pruna_ir.pipeline import Pipeline
from pruna_ir.printer import print_program
from pruna_ir.program import Program, dtype_of
from pruna_ir.transform import Context, PassResult, Rewrite, apply
from pruna_ir.verify import verify
from tests.quantised import quantised_net

aten = torch.ops.aten


class Net(nn.Module):
    """A convolution with a residual, norm, head and softmax; input float32[batch, 3, 9, 7]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.stem(x))
        x = self.norm((x + self.conv(x)).mean((2, 3)))
        scores = self.head(x)
        return scores.softmax(-1), scores.argmax(-1)


def net() -> Program:
    torch.manual_seed(0)
    return capture(Net().eval(), (torch.randn(2, 3, 9, 7),))


def cast(program: Program, context: Context | None = None, **options) -> PassResult:  # type: ignore[no-untyped-def]
    result = apply(CastFloats(**options), program, context)
    verify(result.program)
    return result


def low_calls(program: Program) -> set[str]:
    """The names of the calls that compute in a lower precision, without conversions."""
    low = (torch.bfloat16, torch.float16)
    calls = (node for node in program.calls() if node.target is not aten.to.dtype)
    return {node.name for node in calls if dtype_of(node) in low}


def test_conversions_stand_where_the_precisions_meet() -> None:
    text = print_program(cast(net()).program)
    lines = [line.strip() for line in text.splitlines() if line.startswith("  %")]
    assert [_shape(line) for line in lines] == [
        "to(x) bfloat16",
        "conv2d(to) bfloat16",
        "relu(conv2d) bfloat16",
        "conv2d_1(relu) bfloat16",
        "add(relu, conv2d_1) bfloat16",
        "to_1(add) float32",
        "mean(to_1) float32",
        "layer_norm(mean) float32",
        "to_2(layer_norm) bfloat16",
        "linear(to_2) bfloat16",
        # One conversion serves both readers.
        "to_3(linear) float32",
        "softmax(to_3) float32",
        "argmax(to_3) int64",
    ]


def _shape(line: str) -> str:
    """``add(relu, conv2d_1) bfloat16`` for a printed call."""
    name, call = line.removeprefix("%").split(" = ")
    operands = [word.rstrip(",)") for word in call.split("(", 1)[1].split() if word[0] == "%"]
    dtype = call.rsplit(" : ", 1)[1].split("[")[0]
    return f"{name}({', '.join(o.lstrip('%') for o in operands)}) {dtype}"


def test_norms_sums_and_comparisons_stay_and_the_borders_are_float32() -> None:
    program = cast(net()).program
    assert low_calls(program) == {"conv2d", "relu", "conv2d_1", "add", "linear"}
    assert [spec.dtype for spec in program.inputs] == [torch.float32]
    assert [spec.dtype for spec in program.outputs] == [torch.float32, torch.int64]
    assert program.attributes["computes-in"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_to_nearest_and_half_as_large(dtype: str) -> None:
    before = net()
    after = cast(before, dtype=dtype).program
    for name in ("stem.weight", "conv.bias", "head.weight"):
        stored = after.tensor(name)
        assert isinstance(stored, nn.Parameter)
        assert torch.equal(stored, before.tensor(name).to(getattr(torch, dtype)))
    assert after.tensor("norm.weight").dtype is torch.float32
    assert before.tensor("stem.weight").dtype is torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_promise_holds_and_a_second_run_changes_nothing(dtype: str) -> None:
    before, pass_ = net(), CastFloats(dtype=dtype)
    result = cast(before, dtype=dtype)
    found = check(pass_, before, result.program, assurances=result.assurances)
    assert found.passed, str(found)
    assert not apply(pass_, result.program).modified


def promise(before: Program, after: Program, stored: tuple[str, ...]) -> list[bool]:
    findings = OnlyDtypes({name: name for name in stored})(before, after, Context())
    return [finding.measured <= finding.limit for finding in findings]


def test_the_promise_is_broken_by_a_lost_relu_a_changed_weight_and_another_output() -> None:
    before, after = net(), cast(net()).program
    stored = ("stem.weight", "stem.bias", "conv.weight", "conv.bias", "head.weight", "head.bias")
    assert promise(before, after, stored) == [True, True, True]
    rw = Rewrite(after, "spoil", Context())
    (relu,) = rw.calls(aten.relu.default)
    rw.replace(relu, rw.call(relu).producer("self"))  # type: ignore[arg-type]
    assert promise(before, rw.finish(), stored) == [False, True, True]
    rw = Rewrite(after, "spoil", Context())
    rw.set_tensor("conv.weight", after.tensor("conv.weight") * 1.01)
    assert promise(before, rw.finish(), stored) == [True, False, True]
    (spec, other) = after.outputs
    wrong = replace(after, outputs=(replace(spec, dtype=torch.bfloat16), other))
    assert promise(before, wrong, stored) == [True, True, False]


def test_keep_takes_paths_operators_and_modules_above() -> None:
    assert low_calls(cast(net(), keep=("head",)).program) == {"conv2d", "relu", "conv2d_1", "add"}
    kept = cast(net(), keep=("aten.conv2d", "aten.add", "head"))
    assert not low_calls(kept.program)
    with pytest.raises(UsageError, match=r"unknown layer 'hea'; did you mean 'head'"):
        cast(net(), keep=("hea",))
    with pytest.raises(UsageError, match="unknown dtype"):
        CastFloats(dtype="float8")  # type: ignore[arg-type]


def test_a_tied_weight_is_stored_in_both_precisions_where_both_read_it() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    torch.manual_seed(0)
    program = capture(Tied().eval(), (torch.randint(0, 11, (2, 4)),))
    both = cast(program).program
    assert {t.dtype for t in both.tensors().values()} == {torch.bfloat16}
    result = cast(program, keep=("head",))
    assert check(CastFloats(keep=("head",)), program, result.program,
                 assurances=result.assurances).passed  # fmt: skip
    assert dtype_of(next(result.program.calls(aten.linear.default))) is torch.float32
    assert dtype_of(next(result.program.calls(aten.embedding.default))) is torch.bfloat16


def test_rotary_angles_stay_in_float32() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(13, 8)
            self.register_buffer("rate", 10000 ** -(torch.arange(4.0) / 4))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            at = torch.arange(ids.shape[1]).float()
            angle = torch.cat([at[:, None] * self.rate] * 2, -1)
            return self.embed(ids) * torch.cos(angle)

    torch.manual_seed(0)
    program = capture(Rotary().eval(), (torch.randint(0, 13, (2, 400)),))
    after = cast(program).program
    assert {dtype_of(n) for n in after.calls(aten.cos.default)} == {torch.float32}
    (before_cos,) = after.calls(aten.cos.default)
    waiting = list(before_cos.all_input_nodes)
    while waiting:
        node = waiting.pop()
        assert dtype_of(node) is not torch.bfloat16
        waiting += node.all_input_nodes
    # The control: in bfloat16, position 257 would be 256, and its first angle a whole radian off.
    assert float(torch.tensor(257.0).bfloat16()) == 256


def test_arithmetic_between_what_stays_stays() -> None:
    class Rms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.scale = nn.Linear(6, 9), nn.Parameter(torch.rand(9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.up(x)
            return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale

    torch.manual_seed(0)
    program = capture(Rms().eval(), (torch.randn(2, 6),))
    after = cast(program).program
    (add,) = after.calls(aten.add.Tensor)
    assert dtype_of(add) is torch.float32


def test_float16_refuses_weights_and_activations_beyond_its_range_by_name() -> None:
    program = net()
    rw = Rewrite(program, "grow", Context())
    rw.set_tensor("conv.weight", program.tensor("conv.weight") * 1e6)
    with pytest.raises(PassError, match=r"the weight conv.weight reaches .*keep=\[conv"):
        cast(rw.finish(), dtype="float16")
    data = TensorData((torch.full((3, 3, 9, 7), 5e4),))
    huge = Context(data=TensorData((data.inputs[0] * 1e3,)))
    with pytest.raises(PassError, match=r"ends at 65504, but .* or give dtype=bfloat16"):
        cast(program, huge, dtype="float16")
    # Where the data is in range, so is the program; bfloat16 takes all.
    assert cast(program, Context(data=TensorData((torch.randn(3, 3, 9, 7),))),
                dtype="float16").modified  # fmt: skip
    assert cast(program, huge).modified
    assert cast(rw.finish()).modified


def test_the_remedy_that_the_refusal_names_works() -> None:
    class Big(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.big, self.last = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            grown = self.big(self.first(x)) * 1e6
            return self.last(grown / 1e6)

    torch.manual_seed(0)
    program = capture(Big().eval(), (torch.randn(5, 4),))
    with pytest.raises(PassError, match=r"mul reaches .*keep=\[mul\]"):
        cast(program, dtype="float16")
    kept = cast(program, dtype="float16", keep=("mul", "div"))
    assert low_calls(kept.program) == {"linear", "linear_1", "linear_2"}
    assert check(CastFloats(dtype="float16"), program, kept.program,
                 assurances=kept.assurances).passed  # fmt: skip


def test_activations_that_vanish_in_float16_are_remarked() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(x) * 1e-9 + x

    program = capture(Small().eval(), (torch.randn(5, 4),))
    notes = [r.message for r in cast(program, dtype="float16").remarks if r.kind == "note"]
    assert any("mul stays below" in note and "keep it in float32" in note for note in notes)


def test_quantised_programs_are_refused() -> None:
    with pytest.raises(PassError, match="the program is quantised, and integer kernels take"):
        cast(quantised_net())


# -- runtimes ------------------------------------------------------------------------------------


def lowered(tmp_path: Path, dtype: str, target: str, text: str = "") -> tuple[Program, Path]:
    program = Pipeline.parse(f"canonicalize,{text}cast-floats{{dtype={dtype}}}").run(net()).program
    return program, tmp_path / target


@pytest.mark.parametrize("text", ["", "fuse-conv-bn-relu,"])
@pytest.mark.parametrize(
    ("dtype", "target", "runs"),
    [
        ("bfloat16", "eager", "bfloat16"),
        ("float16", "eager", "float16"),
        ("float16", "onnx", "float32"),
        ("float16", "openvino", "float32"),
    ],
)
def test_artifacts_pass_and_the_audit_says_what_runs(
    tmp_path: Path, dtype: str, target: str, runs: str, text: str
) -> None:
    program, folder = lowered(tmp_path, dtype, target, text)
    certificate = build(program, target, folder).certificate
    assert certificate.verdict is Verdict.PASSED, certificate.summary()
    assert certificate.audit_summary()["conv"] == {runs: 2}
    assert certificate.audit_summary()["linear"] == {runs: 1}


def test_openvino_runs_bfloat16_where_the_processor_has_it(tmp_path: Path) -> None:
    program, folder = lowered(tmp_path, "bfloat16", "openvino")
    certificate = build(program, "openvino", folder).certificate
    assert certificate.verdict is Verdict.PASSED, certificate.summary()
    native = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
    rows = {row.layer.split("/")[-2]: row.precision for row in certificate.audit
            if row.kind in ("conv", "linear")}  # fmt: skip
    assert rows == {"conv2d": native, "conv2d_1": native, "linear": native}
    norm = [row.precision for row in certificate.audit if "layer_norm" in row.layer]
    assert set(norm) == {"float32"}


def test_onnx_names_the_layers_that_onnx_runtime_cannot_run(tmp_path: Path) -> None:
    program, folder = lowered(tmp_path, "bfloat16", "onnx")
    with pytest.raises(UnsupportedError, match=r"conv2d: aten.conv2d.* no bfloat16 kernels"):
        build(program, "onnx", folder)
    assert not folder.exists()
