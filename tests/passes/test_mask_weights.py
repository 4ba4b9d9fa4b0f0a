"""mask-weights: masks that compute, train, compose, fold and lower as zeros do."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir import capture, verify
from pruna_ir.build import build
from pruna_ir.call import bind_arguments
from pruna_ir.checks import check
from pruna_ir.data import TensorData
from pruna_ir.errors import PassError, UsageError
from pruna_ir.kernels.fake_quant import fake_quant_reference
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.fold_batch_norm import FoldBatchNorm
from pruna_ir.passes.fold_constants import FoldConstants
from pruna_ir.passes.fuse_conv_bn_relu import FuseConvBnRelu
from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
from pruna_ir.passes.mask_weights import MaskedWeights, MaskWeights
from pruna_ir.passes.prune_channels import PruneChannels
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.serialize import load_program, save_program
from pruna_ir.training import trainable, with_state
from pruna_ir.transform import Context, PassResult, apply
from tests.networks import ConvNet, seeded

aten = torch.ops.aten


class Mixed(nn.Module):
    """Every kind of layer, grouped and transposed, with odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(12, 6, 2, groups=3, bias=False)
        self.fc = nn.Linear(6, 12)
        self.mixing = nn.Parameter(torch.randn(12, 7))
        self.bias = nn.Parameter(torch.randn(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.up(torch.relu(self.conv(x))))
        x = torch.relu(self.fc(x.mean((2, 3))))
        return torch.addmm(self.bias, x, self.mixing) + x @ self.mixing


@cache
def mixed() -> Program:
    torch.manual_seed(0)
    program = capture(Mixed().eval(), (torch.randn(2, 8, 5, 7),))
    return apply(Canonicalize(), program).program


@cache
def conv_net() -> Program:
    program = capture(seeded(ConvNet), (torch.randn(2, 3, 9, 9),))
    return apply(Canonicalize(), program).program


def data(program: Program, batches: int = 3) -> Context:
    torch.manual_seed(1)
    shape = program.examples[0].shape
    return Context(data=TensorData((torch.randn(4 * batches, *shape[1:]),), batch_size=4))


def masks(program: Program) -> dict[str, torch.Tensor]:
    return {
        name.removesuffix("_mask"): tensor != 0
        for name, tensor in program.tensors().items()
        if name.endswith("_mask")
    }


def missed(result: PassResult) -> list[str]:
    return [remark.message for remark in result.remarks if remark.kind == "missed"]


def test_a_mask_stands_between_the_weight_and_its_layer() -> None:
    module = nn.Linear(4, 2)
    program = capture(module, (torch.ones(3, 4),))
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[4.0, -1.0, 2.0, -3.0], [0.5, 0.1, -0.2, 9.0]]))
    masked = apply(MaskWeights(), program).program
    (product,) = masked.calls(aten.mul.Tensor)
    bound = bind_arguments(product)
    assert [bound["self"].target, bound["other"].target] == ["weight", "weight_mask"]
    assert torch.equal(masked.tensor("weight"), program.tensor("weight"))
    assert masked.tensor("weight_mask").tolist() == [[1, 0, 1, 1], [0, 0, 0, 1]]
    assert not isinstance(masked.tensor("weight_mask"), nn.Parameter)


PASSES = [
    MaskWeights(),
    MaskWeights(sparsity=0.31, ranking="output"),
    MaskWeights(sparsity=0.7, ranking="global"),
    MaskWeights(pattern="2:4"),
    MaskWeights(pattern="1:3", criterion="wanda"),
    MaskWeights(pattern="4x2"),
    MaskWeights(pattern="3x5", ranking="output", criterion="wanda"),
    MaskWeights(criterion="wanda", ranking="output"),
]


@pytest.mark.parametrize("pass_", PASSES, ids=[str(i) for i in range(8)])
def test_the_program_computes_what_it_did_with_these_entries_zero(pass_: MaskWeights) -> None:
    program = mixed()
    context = data(program)
    result = apply(pass_, program, context)
    verify(result.program)
    assert masks(result.program)
    report = check(pass_, program, result.program, result.oracle, context)
    assert report.passed
    assert report.measured < 1e-13


def test_the_oracle_is_that_of_zeroed_weights() -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(6, 3), torch.randn(2, 6)
    program = capture(module, (x,))
    result = apply(MaskWeights(), program)
    zeroed = nn.Linear(6, 3).double()
    with torch.no_grad():
        zeroed.weight.copy_(module.weight * masks(result.program)["weight"])
        zeroed.bias.copy_(module.bias)
        assert torch.equal(result.oracle(program, (x,))[0], zeroed(x.double()))


@pytest.mark.parametrize("spoil", ["one entry revived", "one more entry gone", "no mask"])
def test_a_wrong_mask_fails_the_check(spoil: str) -> None:
    program, pass_ = mixed(), MaskWeights()
    result = apply(pass_, program)
    assert isinstance(result.oracle, MaskedWeights)
    wrong = dict(result.oracle.masks)
    mask = wrong["fc.weight"].clone()
    if spoil == "no mask":
        mask[:] = True
    else:
        place = (mask != (spoil == "one entry revived")).nonzero()[0]
        mask[tuple(place)] = ~mask[tuple(place)]
    wrong["fc.weight"] = mask
    assert not check(pass_, program, result.program, MaskedWeights(wrong)).passed


# -- counts, criteria ---------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.floats(0, 1, exclude_max=True))
def test_the_share_of_zeros_is_exact(sparsity: float) -> None:
    program = conv_net()
    found = masks(apply(MaskWeights(sparsity=sparsity), program).program)
    for name, mask in found.items():
        assert mask.numel() - int(mask.sum()) == int(sparsity * mask.numel() + 1e-9), name


def test_magnitude_removes_the_smallest() -> None:
    program = conv_net()
    for name, mask in masks(apply(MaskWeights(sparsity=0.4), program).program).items():
        size = program.tensor(name).detach().abs()
        assert float(size[~mask].max()) < float(size[mask].min())


def test_a_global_ranking_has_one_threshold() -> None:
    program = conv_net()
    found = masks(apply(MaskWeights(sparsity=0.4, ranking="global"), program).program)
    gone = torch.cat([program.tensor(n).detach()[~m].abs() for n, m in found.items()])
    left = torch.cat([program.tensor(n).detach()[m].abs() for n, m in found.items()])
    assert float(gone.max()) < float(left.min())
    assert len(gone) == int(0.4 * (len(gone) + len(left)))


def test_wanda_weighs_by_the_norm_of_each_input() -> None:
    program = mixed()
    context = data(program)
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for batch in context.data or ():
            x = batch.inputs[0].double()
            module = Mixed().double().eval()
            module.load_state_dict({k: v.double() for k, v in program.tensors().items()})
            first = torch.relu(module.conv(x))
            second = torch.relu(module.up(first)).mean((2, 3))
            third = torch.relu(module.fc(second))
            for name, value in (("conv", x), ("up", first)):
                squares = value.square().sum((0, 2, 3))
                seen[name] = seen.get(name, torch.zeros(())) + squares
            seen["fc"] = seen.get("fc", torch.zeros(())) + second.square().sum(0)
            # Two layers share the weight `mixing`, and both read the same input.
            seen["mixing"] = seen.get("mixing", torch.zeros(())) + 2 * third.square().sum(0)
    norms = {name: value.sqrt() for name, value in seen.items()}
    scores = {
        "conv.weight": program.tensor("conv.weight").double().abs()
        * norms["conv"].reshape(2, 4).repeat_interleave(6, 0)[:, :, None, None],
        "up.weight": program.tensor("up.weight").double().abs() * norms["up"][:, None, None, None],
        "fc.weight": program.tensor("fc.weight").double().abs() * norms["fc"],
        "mixing": program.tensor("mixing").double().abs() * norms["mixing"][:, None],
    }
    found = masks(apply(MaskWeights(criterion="wanda"), program, context).program)
    for name, score in scores.items():
        order = score.flatten().argsort(stable=True)[: score.numel() // 2]
        expected = torch.ones(score.numel(), dtype=torch.bool)
        expected[order] = False
        assert torch.equal(found[name].flatten(), expected), name


def test_wanda_needs_data() -> None:
    with pytest.raises(UsageError, match="criterion wanda weighs entries by the layers' inputs"):
        apply(MaskWeights(criterion="wanda"), mixed())


# -- composing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pass_", PASSES, ids=[str(i) for i in range(8)])
def test_a_second_run_changes_nothing(pass_: MaskWeights) -> None:
    program = mixed()
    context = data(program)
    masked = apply(pass_, program, context).program
    # Masks change what wanda sees; the entries that are gone already make up the whole share.
    assert not apply(pass_, masked, context).modified


@settings(max_examples=25)
@given(st.lists(st.sampled_from(PASSES), min_size=2, max_size=3))
def test_masks_compose_and_never_revive(passes: list[MaskWeights]) -> None:
    program = mixed()
    context, before = data(program), masks(program)
    start = program
    for pass_ in passes:
        result = apply(pass_, program, context)
        if result.modified:
            assert check(pass_, program, result.program, result.oracle).passed
        program, now = result.program, masks(result.program)
        assert all(not bool((now[name] & ~mask).any()) for name, mask in before.items())
        before = now
    assert {n for n in program.tensors() if not n.endswith("_mask")} == set(start.tensors())


def test_a_higher_sparsity_adds_to_a_lower_one() -> None:
    program = conv_net()
    twice = apply(MaskWeights(sparsity=0.6), apply(MaskWeights(sparsity=0.3), program).program)
    once = apply(MaskWeights(sparsity=0.6), program)
    assert twice.program.hash() == once.program.hash()


# -- what stays dense, and why ------------------------------------------------------------------


def test_layers_that_do_not_fit_n_of_m_say_why() -> None:
    result = apply(MaskWeights(pattern="2:4"), conv_net())
    assert set(masks(result.program)) == {"block.0.weight", "head.weight"}
    assert missed(result) == ["stem.weight stays dense: 3 inputs are no multiple of 4"]


def test_a_library_s_rule_can_be_asked_for() -> None:
    pass_ = MaskWeights(pattern="2:4", accepted_by="cusparselt", include=("head",))
    result = apply(pass_, conv_net())
    assert not result.modified
    assert "head.weight stays dense: cusparselt: 5 outputs are no multiple of 16; 8 inputs " \
        "are no multiple of 16" in missed(result)  # fmt: skip


def test_include_and_exclude() -> None:
    program = conv_net()
    assert set(masks(apply(MaskWeights(exclude=("block",)), program).program)) == {
        "stem.weight", "head.weight",
    }  # fmt: skip
    assert set(masks(apply(MaskWeights(include=("*.0.weight",)), program).program)) == {
        "block.0.weight"
    }
    with pytest.raises(UsageError, match="exclude: unknown weight 'blok'; did you mean 'block"):
        apply(MaskWeights(exclude=("blok",)), program)


def test_a_scope_confines_it() -> None:
    result = apply(MaskWeights(), conv_net(), scope=("block",))
    assert set(masks(result.program)) == {"block.0.weight"}


def test_a_tied_embedding_stays_dense() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(9, 6), nn.Linear(6, 6)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.fc(self.table(ids)), self.table.weight)

    result = apply(MaskWeights(), capture(Tied(), (torch.zeros(2, 3, dtype=torch.int64),)))
    assert set(masks(result.program)) == {"fc.weight"}
    assert missed(result) == ["table.weight stays dense: embedding reads it too"]


def test_layers_that_share_a_weight_share_its_mask() -> None:
    result = apply(MaskWeights(include=("mixing",)), mixed())
    (product,) = result.program.calls(aten.mul.Tensor)
    assert sorted(str(user.target) for user in product.users) == [
        "aten.addmm.default", "aten.matmul.default",
    ]  # fmt: skip


def test_a_weight_behind_constant_operators_names_the_remedy() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T

    program = capture(Transposed(), (torch.ones(2, 4),))
    result = apply(MaskWeights(), program)
    assert not result.modified
    assert "is computed from constants; run fold-constants first" in missed(result)[0]
    folded = apply(FoldConstants(), program).program
    assert set(masks(apply(MaskWeights(), folded).program)) == {"weight"}


def test_fused_and_quantised_programs_are_refused() -> None:
    program = apply(FoldBatchNorm(), conv_net()).program
    fused = apply(FuseConvBnRelu(), program).program
    with pytest.raises(PassError, match="fused or quantised already; run mask-weights before"):
        apply(MaskWeights(), fused)
    quantised = apply(InsertFakeQuant(target="onnx"), program, data(program)).program
    with pytest.raises(PassError, match="fused or quantised already"):
        apply(MaskWeights(), quantised)


def test_a_weight_with_infinity_is_refused() -> None:
    module = nn.Linear(4, 2)
    with torch.no_grad():
        module.weight[0, 0] = torch.inf
    with pytest.raises(PassError, match="weight holds NaN or infinity"):
        apply(MaskWeights(), capture(module, (torch.ones(2, 4),)))


def test_a_layer_that_loses_everything_is_noted() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        module[0].weight.mul_(1e-3)
    result = apply(MaskWeights(ranking="global"), capture(module, (torch.ones(2, 4),)))
    assert "all of 0.weight is zero; lower the sparsity" in [r.message for r in result.remarks]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), not 1.0"),
        ({"sparsity": float("nan")}, "not nan"),
        ({"pattern": "2:4", "sparsity": 0.6}, "makes 0.5 of the entries zero, not 0.6"),
        ({"pattern": "1:4", "sparsity": 0.5}, "makes 0.75 of the entries zero, not 0.5"),
        ({"pattern": "3:2"}, "0 < N < M"),
        ({"criterion": "magnitud"}, "unknown criterion 'magnitud'; did you mean 'magnitude'"),
        ({"ranking": "row"}, "unknown ranking 'row'"),
        ({"accepted_by": "tensorrt"}, "tensorrt accepts pattern 2:4 only"),
        ({"accepted_by": "trt", "pattern": "2:4"}, "unknown library 'trt'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MaskWeights(**options)  # type: ignore[arg-type]


def test_the_pass_has_a_text() -> None:
    pipeline = Pipeline.parse("mask-weights{pattern=2:4},mask-weights{pattern=16x16,sparsity=0.3}")
    assert pipeline.items == (
        MaskWeights(pattern="2:4"), MaskWeights(pattern="16x16", sparsity=0.3),
    )  # fmt: skip
    assert Pipeline.parse(str(pipeline)) == pipeline


# -- training, folding, other passes ------------------------------------------------------------


def test_training_moves_what_stays_and_nothing_else() -> None:
    program = apply(MaskWeights(pattern="2:4"), mixed()).program
    module = trainable(program)
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, weight_decay=0.01)
    before = {name: program.tensor(name).clone() for name in masks(program)}
    for step in range(3):
        torch.manual_seed(step)
        optimiser.zero_grad()
        module(torch.randn(4, 8, 5, 7))[0].square().sum().backward()
        for name, mask in masks(program).items():
            gradient = module.get_parameter(name).grad
            assert gradient is not None
            assert not bool(gradient[~mask].any())
            assert bool(gradient[mask].any())
        optimiser.step()
    trained = with_state(program, module)
    folded = apply(FoldConstants(), trained).program
    for name, mask in masks(program).items():
        assert not torch.equal(trained.tensor(name)[mask], before[name][mask])
        assert not bool(folded.tensor(name)[~mask].any())
        assert torch.equal(folded.tensor(name)[mask], trained.tensor(name)[mask])


def test_folding_puts_the_zeros_under_the_weight_s_name() -> None:
    program = mixed()
    masked = apply(MaskWeights(), program)
    result = apply(FoldConstants(), masked.program)
    assert set(result.program.tensors()) == set(program.tensors())
    assert not list(result.program.calls(aten.mul.Tensor))
    for name, mask in masks(masked.program).items():
        expected = torch.where(mask, program.tensor(name), torch.zeros(()))
        assert torch.equal(result.program.tensor(name), expected)
        assert isinstance(result.program.tensor(name), nn.Parameter)
    assert not apply(FoldConstants(freeze=False), masked.program).modified


def test_channel_pruning_cuts_the_masks_along() -> None:
    program = conv_net()
    masked = apply(MaskWeights(), program).program
    pass_ = PruneChannels(ratio=0.5)
    result = apply(pass_, masked)
    verify(result.program)
    assert check(pass_, masked, result.program, result.oracle).passed
    for name in masks(masked):
        shape = result.program.tensor(name).shape
        assert result.program.tensor(f"{name}_mask").shape == shape
        assert shape.numel() < masked.tensor(name).numel()


def test_quantised_zeros_are_zeros() -> None:
    program = apply(FoldBatchNorm(), conv_net()).program
    masked = apply(MaskWeights(), program)
    folded = apply(FoldConstants(), masked.program).program
    quantised = apply(InsertFakeQuant(target="onnx"), folded, data(folded)).program
    seen = 0
    for node in quantised.calls(torch.ops.pruna.fake_quant.default):
        bound = bind_arguments(node)
        if bound["x"].op != "get_attr":
            continue
        values = {
            key: quantised.tensor(str(value.target)) if hasattr(value, "target") else value
            for key, value in bound.items()
        }
        mask = masks(masked.program)[str(bound["x"].target)]
        assert not bool(fake_quant_reference(**values)[~mask].any())
        seen += 1
    assert seen == 3


@pytest.mark.parametrize("backend", ["eager", "onnx", "openvino"])
def test_backends_compute_with_zeros(backend: str, tmp_path: Path) -> None:
    masked = apply(MaskWeights(pattern="2:4"), conv_net()).program
    for name, program in (("masks", masked), ("zeros", apply(FoldConstants(), masked).program)):
        artifact = build(program, backend, tmp_path / name)
        assert artifact.certificate.verdict.value == "PASSED"


def test_the_onnx_file_holds_the_zeros(tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    program = apply(MaskWeights(pattern="2:4"), capture(module, (torch.ones(2, 8),))).program
    for name, start in (("masks", program), ("zeros", apply(FoldConstants(), program).program)):
        artifact = build(start, "onnx", tmp_path / name)
        graph = onnx.load(tmp_path / name / artifact.manifest.main).graph
        assert [node.op_type for node in graph.node] == ["Gemm", "Relu", "Gemm"]
        matrices = [numpy_helper.to_array(t) for t in graph.initializer if len(t.dims) == 2]
        expected = [program.tensor(n) * m for n, m in masks(program).items()]
        for matrix, value in zip(matrices, expected, strict=True):
            found = matrix if matrix.shape == tuple(value.shape) else matrix.T
            assert np.array_equal(found, value.detach().numpy())
            assert np.count_nonzero(found) == found.size // 2


def test_a_masked_program_is_saved_and_loaded(tmp_path: Path) -> None:
    program = apply(MaskWeights(), mixed()).program
    save_program(program, tmp_path / "masked.pt2")
    assert load_program(tmp_path / "masked.pt2").hash() == program.hash()


def test_half_precision_weights_are_masked_in_their_type() -> None:
    torch.manual_seed(0)
    program = capture(nn.Linear(8, 4).bfloat16(), (torch.ones(2, 8, dtype=torch.bfloat16),))
    result = apply(MaskWeights(), program)
    assert result.program.tensor("weight_mask").dtype is torch.bfloat16
    assert int(masks(result.program)["weight"].sum()) == 16
    assert check(replace(MaskWeights()), program, result.program, result.oracle).passed
