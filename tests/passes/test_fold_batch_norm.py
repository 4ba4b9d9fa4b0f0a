"""fold-batch-norm: the same real-number function, in fewer operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.passes import batch_norm_folding
from pruna_ir.passes.fold_batch_norm import FoldBatchNorm
from pruna_ir.printer import print_program
from pruna_ir.program import Program
from pruna_ir.transform import PassResult, apply
from pruna_ir.verify import verify
from tests.passes.corpus import canonical, targets


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded weights, and statistics and affine parameters away from their defaults."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.uniform_(-1, 1, generator=generator)
                module.running_var.uniform_(0.01, 2, generator=generator)
            if module.affine:
                with torch.no_grad():
                    module.weight.uniform_(-2, 2, generator=generator)
                    module.bias.uniform_(-1, 1, generator=generator)
    return model.eval()


def program_of(*layers: nn.Module, shape: tuple[int, ...], seed: int = 0, **options) -> Program:
    torch.manual_seed(seed)
    model = randomised(nn.Sequential(*layers), seed)
    return capture(model, (torch.randn(shape),), **options)


def folded(program: Program) -> PassResult:
    """The result of one run, with the effect's own check, and of a second run."""
    result = apply(FoldBatchNorm(), program)
    verify(result.program)
    report = check(FoldBatchNorm(), program, result.program, exact=result.exact)
    assert report.passed, report
    assert not apply(FoldBatchNorm(), result.program).modified
    return result


def missed(result: PassResult) -> list[str]:
    return [remark.message for remark in result.remarks if remark.kind == "missed"]


def test_before_and_after():
    program = program_of(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), shape=(2, 3, 5, 5)
    )
    result = folded(program)
    assert print_program(result.program) == (
        "program(input: float32[batch, 3, 5, 5]) {\n"
        "  %conv2d = aten.conv2d(%input, @0.weight, @0.bias) : float32[batch, 4, 3, 3]\n"
        "  return output=%conv2d\n"
        "}\n"
        "@0.bias: float32[4]\n"
        "@0.weight: float32[4, 3, 3, 3]\n"
    )
    assert [r.message for r in result.remarks] == ["folded into conv2d"]


_LAYERS = {
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "transposed": (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@settings(max_examples=25)
@given(
    st.sampled_from(["conv", "transposed"]), st.integers(1, 3), st.sampled_from([1, 2, 3]),
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans(),
    st.sampled_from([1e-5, 1e-3, 0.5]), st.integers(0, 99),
)  # fmt: skip
def test_any_convolution(
    kind, spatial, groups, per_in, per_out, kernel, with_bias, affine, eps, seed
):
    layer = _LAYERS[kind][spatial - 1](
        groups * per_in, groups * per_out, kernel, groups=groups, bias=with_bias
    )
    norm = _NORMS[spatial - 1](groups * per_out, eps=eps, affine=affine)
    shape = (2, groups * per_in, *[kernel + 1] * spatial)
    result = folded(program_of(layer, norm, shape=shape, seed=seed))
    assert len(targets(result.program)) == 1


@settings(max_examples=15)
@given(st.integers(1, 5), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 99))
def test_any_linear_layer(width, out, with_bias, affine, seed):
    layers = nn.Linear(width, out, bias=with_bias), nn.BatchNorm1d(out, affine=affine)
    result = folded(program_of(*layers, shape=(3, width), seed=seed))
    assert targets(result.program) == ["aten.linear"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_keep_their_dtype(dtype):
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(dtype)
    program = capture(model, (torch.ones(2, 3, 5, 5, dtype=dtype),))
    result = apply(FoldBatchNorm(), program)
    assert {t.dtype for t in result.program.tensors().values()} == {dtype}
    report = check(FoldBatchNorm(), program, result.program, exact=result.exact)
    assert report.measured <= 1e-12


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v3", "efficientnet"])
def test_real_models_lose_every_batch_norm(name):
    result = folded(canonical(name))
    assert "aten.batch_norm" not in targets(result.program)
    assert not missed(result)


def test_densenet_keeps_those_in_front_of_its_convolutions():
    result = folded(canonical("densenet"))
    assert "batch norm reads aten.max_pool2d.default, not a convolution or linear layer" in (
        missed(result)
    )


# -- refusals ----------------------------------------------------------------------------------


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y.exp()


def test_refuses_when_the_convolution_has_another_reader():
    program = capture(randomised(TwoReaders()), (torch.randn(2, 3, 5, 5),))
    result = apply(FoldBatchNorm(), program)
    assert not result.modified
    assert missed(result) == ["conv2d is also read by exp"]
    (remark,) = result.remarks
    assert remark.source.endswith("batchnorm.py:193") or ".py:" in remark.source


def test_refuses_training_mode():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    result = apply(FoldBatchNorm(), program_of(*layers, shape=(2, 3, 5, 5), train=True))
    assert missed(result) == [
        "batch norm is in training mode; call model.eval() before capture"
    ]


def test_refuses_statistics_of_the_batch():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)
    result = apply(FoldBatchNorm(), program_of(*layers, shape=(2, 3, 5, 5)))
    assert missed(result) == [
        "batch norm has no running_mean and normalises with each batch's own statistics"
    ]


def test_refuses_a_batch_norm_of_an_input():
    result = apply(FoldBatchNorm(), program_of(nn.BatchNorm1d(3), shape=(2, 3)))
    assert missed(result) == ["batch norm reads an input, not a convolution or linear layer"]


def test_refuses_when_dimension_one_holds_no_output_channels():
    layers = nn.Linear(3, 4), nn.BatchNorm1d(5)
    result = apply(FoldBatchNorm(), program_of(*layers, shape=(2, 5, 3)))
    assert missed(result) == [
        "linear has 3 dimensions, so that dimension 1, which batch norm normalises, does not "
        "hold its output channels"
    ]


def test_refuses_weights_that_would_not_be_finite():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.0)).eval()
    model[1].running_var.zero_()
    result = apply(FoldBatchNorm(), capture(model, (torch.randn(2, 3, 5, 5),)))
    assert missed(result) == ["the folded weights would not be finite in torch.float32"]


class Tied(nn.Module):
    """One convolution called twice, a batch norm after the first call only."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.conv(self.bn(self.conv(x)).relu())


def test_tied_weights_keep_their_value_for_the_others():
    model = randomised(Tied())
    program = capture(model, (torch.randn(2, 3, 5, 5),))
    result = folded(program)
    assert torch.equal(result.program.tensor("conv.weight"), model.conv.weight)
    assert "conv.weight_1" in result.program.tensors()


# -- controls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["eps", "mean", "groups"])
def test_the_check_sees_a_wrong_fold(wrong, monkeypatch):
    program = program_of(
        nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), shape=(2, 4, 5, 5)
    )
    right = batch_norm_folding._fold

    def fold(call, norm):
        found = right(call, norm)
        if wrong == "eps":
            ratio = torch.rsqrt(norm.parameter("running_var").double() + 1e-6) / torch.rsqrt(
                norm.parameter("running_var").double() + 1e-5
            )
            grouped = found.weight.reshape(2, 2, 3, 3, 3) * ratio.reshape(2, 1, 3, 1, 1)
            return batch_norm_folding.Folded(grouped.reshape(4, 3, 3, 3), found.bias)
        if wrong == "mean":
            return batch_norm_folding.Folded(found.weight, found.bias + 1e-6)
        return batch_norm_folding.Folded(found.weight.flip(0), found.bias)

    monkeypatch.setattr(batch_norm_folding, "_fold", fold)
    result = apply(FoldBatchNorm(), program)
    assert not check(FoldBatchNorm(), program, result.program, exact=result.exact).passed
