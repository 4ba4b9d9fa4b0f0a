"""remove-blocks: the most redundant go, the rest computes as if their branches added zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir import capture, verify
from pruna_ir.build import build
from pruna_ir.checks import check
from pruna_ir.data import TensorData
from pruna_ir.equivalence import differences, run_float64
from pruna_ir.errors import UsageError, VerificationError
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.fold_batch_norm import FoldBatchNorm
from pruna_ir.passes.fuse_conv_bn_relu import FuseConvBnRelu
from pruna_ir.passes.prune_channels import PruneChannels
from pruna_ir.passes.remove_blocks import RemoveBlocks, SkippedBranches
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.serialize import load_program, save_program
from pruna_ir.transform import Context, PassResult, apply
from pruna_ir.write_back import write_back
from tests.passes.test_residual_blocks import MODELS, program_of


class Block(nn.Module):
    """A pre-norm branch, scaled."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(width), nn.Linear(width, width)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * torch.relu(self.fc(self.norm(x)))


class Tower(nn.Module):
    """Blocks that change their stream by more and more: 0.01, 3, 0.5, 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.blocks = nn.Sequential(*(Block(6, scale) for scale in (0.01, 3.0, 0.5, 2.0)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.blocks(self.stem(x)))
        return y


def tower() -> Program:
    torch.manual_seed(0)
    return capture(Tower().eval(), (torch.randn(2, 4, 5),))


def tower_data() -> Context:
    torch.manual_seed(1)
    return Context(data=TensorData((torch.randn(10, 4, 5),), batch_size=4))


def removed(result: PassResult) -> list[str]:
    texts = [r.message for r in result.remarks if r.kind == "applied"]
    return [text.removeprefix("removed ").split(" (")[0] for text in texts]


def missed(result: PassResult) -> list[str]:
    return [remark.message for remark in result.remarks if remark.kind == "missed"]


def left(program: Program) -> set[str]:
    return {name.rpartition(".")[0] for name in program.tensors()}


@pytest.mark.parametrize("criterion", ["influence", "norm-ratio"])
def test_the_most_redundant_go(criterion: str) -> None:
    program = tower()
    result = apply(RemoveBlocks(count=2, criterion=criterion), program, tower_data())  # type: ignore[arg-type]
    assert removed(result) == ["blocks.0", "blocks.2"]
    assert left(result.program) == {
        "stem", "head", "blocks.1.norm", "blocks.1.fc", "blocks.3.norm", "blocks.3.fc",
    }  # fmt: skip
    verify(result.program)
    assert check(RemoveBlocks(), program, result.program, result.oracle, tower_data()).passed


def reference_scores(module: nn.Module, data: torch.Tensor) -> dict[str, list[float]]:
    """Block influence and the norm ratio, over all tokens at once."""
    entered: list[torch.Tensor] = []
    with torch.no_grad():
        x = module.stem(data)
        for block in module.blocks:
            entered.append(x.double())
            x = block(x)
    streams = list(zip(entered, [*entered[1:], x.double()], strict=True))
    cosines = [nn.functional.cosine_similarity(a, b, dim=-1) for a, b in streams]
    return {
        "influence": [float(1 - c.mean()) for c in cosines],
        "norm-ratio": [float((b - a).norm() / a.norm()) for a, b in streams],
        "magnitude": [float(b.fc.weight.detach().double().abs().mean()) for b in module.blocks],
    }


@pytest.mark.parametrize("criterion", ["influence", "norm-ratio", "magnitude"])
def test_scores_are_those_of_the_formula(criterion: str) -> None:
    torch.manual_seed(0)
    module = Tower().eval()
    program = capture(module, (torch.randn(2, 4, 5),))
    context = tower_data()
    assert isinstance(context.data, TensorData)
    expected = reference_scores(module, context.data.inputs[0])[criterion]
    result = apply(RemoveBlocks(count=0, criterion=criterion), program, context)  # type: ignore[arg-type]
    assert not result.modified
    kept = [r.message for r in result.remarks if r.message.startswith("kept")]
    found = [float(text.split()[-1]) for text in kept]
    assert any("worse than chance" in r.message for r in result.remarks) == (
        criterion == "magnitude"
    )
    assert found == pytest.approx(expected, rel=1e-3)


def test_positions_without_anything_count_as_unchanged() -> None:
    program = tower()
    zeros = Context(data=TensorData((torch.zeros(3, 4, 5),), batch_size=3))
    result = apply(RemoveBlocks(count=0), program, zeros)
    assert len(result.remarks) == 4


def test_random_follows_the_seed() -> None:
    program = tower()
    chosen = {
        seed: tuple(removed(apply(RemoveBlocks(count=2, criterion="random"), program,
                                  Context(seed=seed))))
        for seed in range(8)
    }  # fmt: skip
    again = apply(RemoveBlocks(count=2, criterion="random"), program, Context(seed=3))
    assert tuple(removed(again)) == chosen[3]
    assert len(set(chosen.values())) > 1


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({"ratio": 0.5}, 2),
        ({"ratio": 0.74}, 2),
        ({"ratio": 0.0}, 0),
        ({"count": 4}, 4),
        ({"count": 0}, 0),
        ({"count": 3, "exclude": ("blocks.3",)}, 3),
        # The share is one of all blocks, those that stay included.
        ({"ratio": 0.75, "exclude": ("blocks.[123]",)}, 1),
        ({"unit": "layer", "ratio": 0.5}, 2),
    ],
)
def test_options_say_how_many_go(options: dict[str, object], gone: int) -> None:
    result = apply(RemoveBlocks(criterion="magnitude", **options), tower())  # type: ignore[arg-type]
    assert len(removed(result)) == gone
    assert result.modified == bool(gone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, r"ratio must be in \[0, 1\), not 1.0"),
        ({"ratio": float("nan")}, "not nan"),
        ({"count": -1}, "count must be at least 0, not -1"),
        ({"unit": "layers"}, "unknown unit 'layers'; did you mean 'layer'"),
        ({"criterion": "influenc"}, "unknown criterion 'influenc'; did you mean 'influence'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RemoveBlocks(**options)  # type: ignore[arg-type]


def test_asking_for_too_much_or_for_nothing_known_is_refused() -> None:
    program = tower()
    with pytest.raises(UsageError, match="4 blocks are to go, but of the 4 found only 3 can"):
        apply(RemoveBlocks(count=4, criterion="magnitude", exclude=("blocks.0",)), program)
    with pytest.raises(UsageError, match="exclude: unknown block 'block.0'; did you mean 'block"):
        apply(RemoveBlocks(exclude=("block.0",)), program)
    with pytest.raises(UsageError, match="criterion influence compares what enters and leaves"):
        apply(RemoveBlocks(), program)


def test_a_scope_confines_it() -> None:
    result = apply(RemoveBlocks(count=1, criterion="magnitude"), tower(), scope=("blocks.1",))
    assert removed(result) == ["blocks.1"]


def test_the_pass_has_a_text() -> None:
    pipeline = Pipeline.parse("remove-blocks{count=2,unit=layer,exclude=[layers.0,layers.31]}")
    expected = RemoveBlocks(count=2, unit="layer", exclude=("layers.0", "layers.31"))
    assert pipeline.items == (expected,)
    assert Pipeline.parse(str(pipeline)) == pipeline


# -- the oracle ----------------------------------------------------------------------------------


def test_a_wrong_bypass_fails_the_check() -> None:
    program = tower()
    result = apply(RemoveBlocks(count=1, criterion="magnitude"), program)
    (name,) = result.oracle.branches  # type: ignore[union-attr]
    for wrong in ({name: "self"}, {}, {"add_9": "other"}):
        report = check(RemoveBlocks(), program, result.program, SkippedBranches(wrong))
        assert not report.passed
        assert report.measured > 1e-3


def test_the_oracle_is_that_of_zeroed_branches() -> None:
    torch.manual_seed(0)
    module = Tower().eval()
    program = capture(module, (torch.randn(2, 4, 5),))
    result = apply(RemoveBlocks(count=2, criterion="random"), program, Context(seed=5))
    for path in removed(result):
        module.get_submodule(path).scale = 0.0
    x = torch.randn(3, 4, 5)
    with torch.no_grad():
        expected = module.double()(x.double())
    assert max(differences(result.oracle(program, (x,)), [expected])) < 1e-14  # type: ignore[misc]


@pytest.mark.parametrize("unit", ["block", "layer"])
@pytest.mark.parametrize("name", MODELS)
def test_real_architectures_keep_their_oracle(name: str, unit: str) -> None:
    program, layers = program_of(name), MODELS[name][3]
    (example,) = program.examples
    pass_ = RemoveBlocks(ratio=0.5, unit=unit)  # type: ignore[arg-type]
    context = Context(data=TensorData((example,), batch_size=2))
    result = apply(pass_, program, context)
    verify(result.program)
    units = layers if unit == "layer" else [1] * sum(layers)
    assert len(removed(result)) == len(units) // 2
    assert check(pass_, program, result.program, result.oracle, context).passed
    kept = result.program.tensors()
    assert len(kept) < len(program.tensors())
    assert all(kept[name] is program.tensor(name) for name in kept)
    given_more = torch.cat([example, example])[:3]
    outputs = result.program(given_more)
    assert [o.shape[0] for o in outputs] == [3] * len(outputs)


def test_projection_shortcuts_say_why_they_stay() -> None:
    program = program_of("resnet18")
    result = apply(RemoveBlocks(count=1, criterion="magnitude"), program)
    assert missed(result) == [
        f"no residual block: batch_norm_{a} and batch_norm_{b} are both computed: no operand is "
        "the input"
        for a, b in ((6, 7), (11, 12), (16, 17))
    ]


def test_fused_sums_and_sums_in_place_name_the_remedy() -> None:
    module, example = MODELS["resnet18"][0]()
    captured = capture(module.eval(), (example,))
    raw = apply(RemoveBlocks(criterion="magnitude"), captured)
    assert "it adds in place; run canonicalize first" in missed(raw)
    program = apply(FoldBatchNorm(), apply(Canonicalize(), captured).program).program
    fused = apply(FuseConvBnRelu(), program).program
    result = apply(RemoveBlocks(criterion="magnitude"), fused)
    assert not result.modified
    assert set(missed(result)) == {
        "its residual sum is fused; run remove-blocks before fuse-conv-bn-relu"
    }


# -- with others ---------------------------------------------------------------------------------


def test_channels_are_pruned_and_the_rest_is_lowered_afterwards(tmp_path: Path) -> None:
    program = tower()
    short = apply(RemoveBlocks(count=2, criterion="magnitude"), program).program
    pass_ = PruneChannels(ratio=0.5)
    small = apply(pass_, short)
    assert small.modified
    assert check(pass_, short, small.program, small.oracle).passed
    artifact = build(small.program, "onnx", tmp_path / "onnx")
    assert artifact.certificate.verdict.value == "PASSED"


def test_a_shortened_program_is_saved_and_loaded(tmp_path: Path) -> None:
    short = apply(RemoveBlocks(count=2, criterion="magnitude"), tower()).program
    save_program(short, tmp_path / "short.pt2")
    loaded = load_program(tmp_path / "short.pt2")
    assert loaded.hash() == short.hash()
    x = torch.randn(2, 4, 5)
    assert torch.equal(loaded(x)[0], short(x)[0])


def test_the_module_s_class_cannot_leave_blocks_out() -> None:
    short = apply(RemoveBlocks(count=1, criterion="magnitude"), tower()).program
    with pytest.raises(VerificationError, match="the program no longer reads blocks"):
        write_back(short, Tower())


# -- random networks -----------------------------------------------------------------------------


class Random(nn.Module):
    """A residual net drawn from a list: branches of several kinds, norms and gates between."""

    def __init__(self, plan: list[tuple[str, int]], width: int) -> None:
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1),
                           nn.BatchNorm2d(width)])
            for _ in plan
        )  # fmt: skip
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x
        for (kind, repeats), (a, b, norm) in zip(self.plan, self.layers, strict=True):
            for _ in range(repeats):
                if kind == "plain":
                    x = b(torch.relu(a(x))) + x
                elif kind == "pre-norm":
                    x = x + a(torch.relu(norm(x)))
                elif kind == "post-relu":
                    x = torch.relu(norm(a(x)) + x)
                elif kind == "parallel":
                    x = (x + a(x)) + torch.sigmoid(b(x))
                elif kind == "gated by the input":
                    x = x + a(x) * torch.tanh(first)
                elif kind == "projected":
                    x = b(x) + a(x)
                else:
                    inner = a(x)
                    x = (x + torch.relu(inner)) * torch.sigmoid(inner)
        y: torch.Tensor = self.head(x.mean((2, 3)))
        return y


KINDS = (
    "plain", "pre-norm", "post-relu", "parallel", "gated by the input", "projected",
    "read outside",
)  # fmt: skip


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 2)), min_size=1, max_size=4),
    st.integers(0, 2**16),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(["block", "layer"]),
)
def test_random_residual_networks_keep_their_oracle(
    plan: list[tuple[str, int]], seed: int, ratio: float, unit: str
) -> None:
    torch.manual_seed(seed)
    module = Random(plan, 5).eval()
    example = torch.randn(2, 5, 6, 7)
    program = apply(Canonicalize(), capture(module, (example,))).program
    pass_ = RemoveBlocks(ratio=ratio, unit=unit, criterion="random")  # type: ignore[arg-type]
    result = apply(pass_, program, Context(seed=seed))
    if not result.modified:
        return
    verify(result.program)
    assert check(pass_, program, result.program, result.oracle).passed
    # The oracle is no echo of the program before.
    same = differences(run_float64(program, (example,)), run_float64(result.program, (example,)))
    assert max(same) > 1e-6
