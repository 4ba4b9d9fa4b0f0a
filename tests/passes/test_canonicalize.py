"""canonicalize: functional form, one spelling, nothing superfluous; bit for bit the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.errors import PassError
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.functional_form import is_write
from pruna_ir.printer import print_program
from pruna_ir.program import Program
from pruna_ir.transform import PassResult, apply
from pruna_ir.verify import verify
from tests.passes.corpus import NAMES, captured, targets


class Of(nn.Module):
    """A module from a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def program_of(function, x: torch.Tensor, **options: bool) -> Program:
    return capture(Of(function), (x,), **options)


def canonicalized(program: Program) -> PassResult:
    """The result of one run, checked bit for bit and for a second run."""
    result = apply(Canonicalize(), program)
    verify(result.program)
    report = check(Canonicalize(), program, result.program)
    assert report.passed, report
    assert not apply(Canonicalize(), result.program).modified
    return result


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_before_and_after():
    def f(x):
        y = F.relu(x + 1, inplace=True)
        y = F.dropout(y, training=False).contiguous()
        return y.view(2, -1).unflatten(1, (3, 4)) * 1

    program = program_of(f, normal(2, 3, 4), dynamic_batch=False)
    assert print_program(program) == (
        "program(x: float32[2, 3, 4]) {\n"
        "  %add = aten.add.Tensor(%x, other=1) : float32[2, 3, 4]\n"
        "  %relu_ = aten.relu_(%add) : float32[2, 3, 4]\n"
        "  %dropout = aten.dropout(%relu_, p=0.5, train=False) : float32[2, 3, 4]\n"
        "  %view = aten.view(%dropout, size=[2, -1]) : float32[2, 12]\n"
        "  %unflatten = aten.unflatten.int(%view, dim=1, sizes=[3, 4]) : float32[2, 3, 4]\n"
        "  %mul = aten.mul.Tensor(%unflatten, other=1) : float32[2, 3, 4]\n"
        "  return output=%mul\n"
        "}\n"
    )
    assert print_program(canonicalized(program).program) == (
        "program(x: float32[2, 3, 4]) {\n"
        "  %add = aten.add.Tensor(%x, other=1) : float32[2, 3, 4]\n"
        "  %relu = aten.relu(%add) : float32[2, 3, 4]\n"
        "  %reshape = aten.reshape(%relu, shape=[2, -1]) : float32[2, 12]\n"
        "  %reshape_1 = aten.reshape(%reshape, shape=[2, 3, 4])"
        " : float32[2, 3, 4]\n"
        "  return output=%reshape_1\n"
        "}\n"
    )


def _writes(program: Program) -> list[str]:
    return [n.name for n in program.calls() if is_write(n)]


@pytest.mark.parametrize("name", NAMES)
def test_real_models_stay_bit_for_bit_the_same(name):
    result = canonicalized(captured(name))
    found = targets(result.program)
    superfluous = {"aten.dropout", "aten.contiguous", "aten.view", "aten.clone", "aten.detach"}
    assert not superfluous & set(found)
    assert not _writes(result.program)


# -- in-place operators ------------------------------------------------------------------------


def _write_then_read_the_base(x):
    y = x + 0.5
    y[:, 1:3].mul_(3)
    return y


def _write_the_base_then_read_a_view(x):
    y = x + 0.5
    view = y[:, 1]
    y.mul_(2)
    return view + 1


def _write_through_two_views(x):
    y = x + 0.5
    y.view(2, 12)[:, 4:8].view(2, 2, 2).select(1, 1).add_(1)
    return y * 1.5


def _write_through_transposes(x):
    y = x + 0.5
    y.transpose(1, 2)[:, 0].neg_()
    y.permute(2, 0, 1)[1].exp_()
    y.squeeze(0).unsqueeze(1).t() if y.dim() == 1 else None
    return y


def _two_views_see_each_other(x):
    y = x + 0.5
    a, b = y[:, :2], y[:, 1:]
    a.mul_(2)
    b.add_(a[:, :1])
    return a, b, y


def _write_one_part_of_a_split(x):
    y = x + 0.5
    first, second = y.split([1, 2], dim=1)
    second.mul_(4)
    parts = y.unbind(2)
    parts[-1].zero_()
    y.chunk(2, 2)[0].add_(1)
    return y, first, second


def _write_into_one_of_several_results(x):
    values, places = x.topk(2, -1)
    values /= values.sum(-1, keepdim=True) + 9
    values[:, 1].mul_(2)
    return values, places


def _copy_and_fill(x):
    y = torch.zeros_like(x)
    y[:, 0] = x[:, 1]
    y[:, 1] = 7
    y[:, 2, 1:] = x[:, 0, :1]
    return y


def _diagonal(x):
    y = x[:, :, :3] + 0.5
    y.diagonal(0, 1, 2).fill_(2)
    return y


def _write_twice_through_the_same_view(x):
    y = x + 0.5
    view = y[:, 0]
    view += 1
    view *= 2
    return y, view


def _masked(x):
    y = x + 0.5
    y.masked_fill_(x > 0, -1.0)
    y[y < -1] = 5.0
    return y.clamp_(-2, 3)


def _source_is_written_later(x):
    y, z = x + 0.5, x * 2
    y.copy_(z)
    z.mul_(3)
    return y, z


def _dtype_of_the_destination_wins(x):
    y = x.half()
    y.add_(x)
    return y


@pytest.mark.parametrize(
    "function",
    [
        _write_then_read_the_base, _write_the_base_then_read_a_view, _write_through_two_views,
        _write_through_transposes, _two_views_see_each_other, _write_one_part_of_a_split,
        _write_into_one_of_several_results, _copy_and_fill, _diagonal,
        _write_twice_through_the_same_view, _masked,
        _source_is_written_later, _dtype_of_the_destination_wins,
    ],
)  # fmt: skip
def test_writes_reach_every_reader(function):
    program = program_of(function, normal(2, 3, 4), dynamic_batch=False)
    result = canonicalized(program)
    assert not _writes(result.program)


def test_writes_reach_every_reader_of_a_dynamic_batch():
    def f(x):
        y = x + 0.5
        y.view(-1, 4)[:, 1].mul_(2)
        return y

    canonicalized(program_of(f, normal(2, 3, 4)))


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["slice", "select", "transpose", "reshape", "whole"]),
            st.integers(0, 3), st.sampled_from(["add", "mul", "fill", "relu"]),
        ),
        min_size=1, max_size=4,
    ),
    st.integers(0, 4),
)  # fmt: skip
def test_any_sequence_of_writes_through_views(steps, read):
    def f(x):
        y = x + 0.25
        views = [y]
        for kind, at, operation in steps:
            base = views[at % len(views)]
            view = _view(base, kind)
            views.append(view)
            _write(view, operation)
        return (y, views[read % len(views)] * 2)

    canonicalized(program_of(f, normal(2, 4, 4), dynamic_batch=False))


def _view(base, kind):
    if base.dim() < 2 or base.shape[1] < 2 or kind == "whole":
        return base[:]
    if kind == "slice":
        return base[:, 1:]
    if kind == "select":
        return base[:, 0]
    if kind == "transpose":
        return base.transpose(0, 1)
    return base.unsqueeze(1).squeeze(1)


def _write(view, operation):
    if operation == "add":
        view.add_(1)
    elif operation == "mul":
        view.mul_(-1.5)
    elif operation == "fill":
        view.fill_(0.75)
    else:
        view.relu_()


def test_an_input_is_no_longer_overwritten():
    program = program_of(lambda x: F.relu(x, inplace=True) + 1, normal(2, 3))
    result = apply(Canonicalize(), program)
    x = torch.tensor([[-1.0, 2.0, -3.0], [4.0, -5.0, 6.0]])
    (y,) = result.program(x)
    assert x.min() == -5
    assert torch.equal(y, x.relu() + 1)
    notes = [remark.message for remark in result.remarks if remark.kind == "note"]
    assert notes == ["input x is no longer overwritten"]


class Counter(nn.Module):
    def __init__(self, *, read: bool):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.read = read

    def forward(self, x):
        self.calls.add_(1)
        return x + self.calls if self.read else x + 1


def test_refuses_state_that_is_read():
    program = capture(Counter(read=True), (normal(2, 3),))
    with pytest.raises(PassError) as caught:
        apply(Canonicalize(), program)
    message = str(caught.value)
    assert "aten.add_.Tensor writes into the tensor 'calls', which the program also reads" in (
        message
    )
    assert "model source: passes/test_canonicalize.py:" in message


def test_drops_a_counter_that_nothing_reads():
    result = apply(Canonicalize(), capture(Counter(read=False), (normal(2, 3),)))
    assert targets(result.program) == ["aten.add.Tensor"]
    assert [r.message for r in result.remarks] == [
        "the update of 'calls', which nothing reads, is dropped"
    ]


def test_keeps_the_counter_of_a_training_batch_norm():
    program = capture(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()), (normal(4, 3),), train=True)
    found = targets(apply(Canonicalize(), program).program)
    assert sorted(found) == ["aten.add_.Tensor", "aten.batch_norm", "aten.dropout"]


def test_refuses_a_write_through_a_view_without_an_inverse():
    def f(x):
        y = x + 0.5
        y.unfold(1, 2, 2).mul_(2)
        return y

    with pytest.raises(PassError, match=r"aten.mul_.Tensor writes through the view unfold"):
        apply(Canonicalize(), program_of(f, normal(2, 4), dynamic_batch=False))


def test_refuses_an_operator_that_reshapes_in_place():
    def f(x):
        y = x + 0.5
        return y.squeeze_(1)

    with pytest.raises(PassError, match=r"squeeze_.* changes the shape of a tensor in place"):
        apply(Canonicalize(), program_of(f, normal(2, 1, 4), dynamic_batch=False))


# -- spellings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.view(2, 12), ["aten.reshape"]),
        (lambda x: x.view_as(x.reshape(2, 4, 3)), ["aten.reshape"]),
        (lambda x: x.swapaxes(0, 2), ["aten.transpose.int"]),
        (lambda x: x.mT, ["aten.transpose.int"]),
        (lambda x: x.movedim(0, 2), ["aten.permute"]),
        (lambda x: torch.movedim(x, (0, 1), (2, 0)), ["aten.permute"]),
        (lambda x: x.narrow(1, 1, 2), ["aten.slice.Tensor"]),
        (lambda x: x[:, :1].expand_as(x), ["aten.slice.Tensor", "aten.expand"]),
        (lambda x: F.relu6(x), ["aten.hardtanh"]),
        (lambda x: 1.5 - x, ["aten.neg", "aten.add.Tensor"]),
        (lambda x: torch.rsub(x, x.exp()), ["aten.exp", "aten.sub.Tensor"]),
        (lambda x: torch.clip(x, 0, 1), ["aten.clamp"]),
        (lambda x: torch.concat([x, x], 1), ["aten.cat"]),
        (lambda x: torch.multiply(x, x), ["aten.mul.Tensor"]),
        (lambda x: (x > 0) & (x < 1), ["aten.gt.Scalar", "aten.lt.Scalar",
                                      "aten.bitwise_and.Tensor"]),
        (lambda x: x.to(torch.float64), ["aten.to.dtype"]),
        (lambda x: x.type_as(torch.ones(1, dtype=torch.float64)), ["aten.to.dtype"]),
        (lambda x: F.pad(x, (1, 2)), ["aten.constant_pad_nd"]),
    ],
)  # fmt: skip
def test_one_spelling(function, expected):
    program = program_of(function, normal(2, 3, 4), dynamic_batch=False)
    assert targets(canonicalized(program).program) == expected


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_paddings_by_name(kernel, padding):
    conv = nn.Conv2d(3, 4, kernel, padding=padding, dilation=2)
    found = targets(canonicalized(capture(conv, (normal(2, 3, 9, 9),))).program)
    odd = padding == "same" and (2 * (kernel - 1)) % 2
    assert found == (["aten.constant_pad_nd"] if odd else []) + ["aten.conv2d"]


@pytest.mark.parametrize("kernel", [2, 4])
def test_odd_padding_by_name(kernel):
    conv = nn.Conv1d(3, 4, kernel, padding="same")
    found = targets(canonicalized(capture(conv, (normal(2, 3, 9),))).program)
    assert found == ["aten.constant_pad_nd", "aten.conv1d"]


# -- identities --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clone(), lambda x: x.contiguous(), lambda x: x.detach(), lambda x: x.float(),
        lambda x: x.reshape(2, 3, 4), lambda x: x.expand(2, -1, 4), lambda x: x[:, 0:],
        lambda x: x[:, :99], lambda x: x.permute(0, 1, 2), lambda x: x.transpose(1, 1),
        lambda x: x * 1, lambda x: x / 1.0, lambda x: x - 0, lambda x: F.pad(x, (0, 0)),
        lambda x: F.dropout(x, training=False), lambda x: torch.cat([x]),
        lambda x: x.squeeze(1), lambda x: x.flatten(1, 1), lambda x: x.repeat(1, 1, 1),
        lambda x: F.alpha_dropout(x, training=False), lambda x: x.to("cpu"),
    ],
)  # fmt: skip
def test_what_returns_its_operand_vanishes(function):
    program = program_of(lambda x: function(x.exp()), normal(2, 3, 4), dynamic_batch=False)
    assert targets(canonicalized(program).program) == ["aten.exp"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 0, lambda x: x - (-0.0), lambda x: x[:, 1:], lambda x: x * 2,
        lambda x: x[:, ::2], lambda x: x.permute(0, 2, 1), lambda x: x.double(),
        lambda x: x.reshape(2, 4, 3), lambda x: x * torch.ones(()), lambda x: x / 2,
    ],
)  # fmt: skip
def test_what_may_differ_stays(function):
    program = program_of(lambda x: function(x.exp()), normal(2, 3, 4), dynamic_batch=False)
    found = targets(canonicalized(program).program)
    assert found[0] == "aten.exp"
    assert len(found) > 1


def test_negative_zero_plus_zero_stays_positive():
    program = program_of(lambda x: x * 0 + 0, torch.tensor([-1.0, 2.0]))
    (y,) = canonicalized(program).program(torch.tensor([-1.0, 2.0]))
    assert not torch.signbit(y).any()


def test_dropout_in_training_stays():
    program = capture(nn.Dropout(), (normal(4, 3),), train=True)
    assert targets(apply(Canonicalize(), program).program) == ["aten.dropout"]


def test_the_check_sees_a_lost_write():
    """A control: dropping one in-place operator is caught by the check used above."""
    program = program_of(_write_then_read_the_base, normal(2, 3, 4), dynamic_batch=False)
    wrong = program.fork()
    (write,) = wrong.calls(torch.ops.aten.mul_.Tensor)
    wrong.graph.erase_node(write)
    wrong.module.recompile()
    assert not check(Canonicalize(), program, wrong).passed


def test_a_copy_that_an_operator_needs_stays() -> None:
    """``view_as_complex`` refuses pairs that do not lie side by side."""

    class Turned(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.view_as_real(torch.view_as_complex(x.transpose(1, 2).contiguous()) * 2)

    x = torch.randn(2, 2, 5)
    program = apply(Canonicalize(), capture(Turned().eval(), (x,))).program
    assert torch.equal(program(x)[0], Turned()(x))
