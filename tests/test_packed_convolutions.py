"""Packed convolutions against the program itself, and what may not be packed or fused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.packed_convolutions import packed_convolutions
from pruna_ir.packed_walk import PackedWalk
from pruna_ir.program import Program

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self, forward, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.run = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x, *self.layers)


def captured(forward, *layers: nn.Module, shape=(3, 5, 9, 7)) -> Program:
    return capture(Net(forward, *layers).eval(), (torch.randn(*shape),), dynamic_batch=True)


def conv(channels: int = 5, out: int = 5, size: int = 3, **options) -> nn.Conv2d:
    torch.manual_seed(channels + out + size)
    return nn.Conv2d(channels, out, size, **{"padding": size // 2, **options})


def chains(program: Program, *kept: torch.fx.Node) -> list[tuple[bool, bool]]:
    """(adds, ends in a ReLU) of each packed convolution."""
    found = packed_convolutions(program, kept).values()
    return [(packed.other is not None, packed.relu) for packed in found]


def values(program: Program, x: torch.Tensor, *wanted: torch.fx.Node) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    PackedWalk(program, wanted, lambda _, value: seen.append(value)).walk((x,))
    return seen


def check(program: Program, batch: int = 4) -> None:
    """The results of the walk are the program's own, and the checker can tell."""
    torch.manual_seed(0)
    x = torch.randn(batch, *program.examples[0].shape[1:])
    expected = program(x)
    found = values(program, x, *program.results())
    for ours, own in zip(found, expected, strict=True):
        assert ours.shape == own.shape
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours * 1.01, own, rtol=1e-5, atol=1e-5)


OPTIONS = [
    {}, {"bias": False}, {"stride": 2}, {"stride": (1, 2), "padding": (0, 1)}, {"dilation": 2},
    {"groups": 5}, {"out": 7}, {"size": 1}, {"size": 5}, {"padding": "same"},
    {"padding": "valid"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_convolution_alone(options: dict) -> None:
    program = captured(lambda x, a: a(x), conv(**options))
    check(program)


FORMS = {
    "relu": (lambda x, a, _: torch.relu(a(x)), [(False, True)]),
    "add": (lambda x, a, _: a(x) + x, [(True, False)]),
    "add on the right": (lambda x, a, _: x + a(x), [(True, False)]),
    "add and relu": (lambda x, a, _: torch.relu(a(x) + x), [(True, True)]),
    "two convolutions added": (
        lambda x, a, b: torch.relu(a(x) + b(x)), [(True, True), (False, False)]
    ),
    "one after the other": (
        lambda x, a, b: torch.relu(b(torch.relu(a(x)))), [(False, True), (False, True)]
    ),
    "twice itself": (lambda x, a, _: a(x).relu() + a(x).relu(), None),
    "same node twice": (lambda x, a, _: (lambda c: c + c)(a(x)), [(False, False)]),
    "alpha": (lambda x, a, _: torch.add(a(x), x, alpha=2), [(False, False)]),
    "broadcast": (lambda x, a, _: a(x) + x.mean((2, 3), keepdim=True), [(False, False)]),
    "number": (lambda x, a, _: torch.relu(a(x) + 1.0), [(False, False)]),
    "two readers": (lambda x, a, _: (lambda c: torch.relu(c) * c)(a(x)), [(False, False)]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_follows_is_fused_where_nobody_else_reads_it(form: str) -> None:
    forward, expected = FORMS[form]
    program = captured(forward, conv(), conv(size=1))
    if expected is not None:
        assert sorted(chains(program)) == sorted(expected)
    check(program)


def test_a_wanted_value_is_not_fused_away() -> None:
    program = captured(lambda x, a: torch.relu(a(x) + x), conv())
    (node,) = program.calls(aten.conv2d.default)
    (added,) = program.calls(aten.add.Tensor)
    assert chains(program) == [(True, True)]
    assert chains(program, added) == [(True, False)]
    assert chains(program, node) == [(False, False)]
    x = torch.randn(2, 5, 9, 7)
    inner, outer, last = values(program, x, node, added, *program.results())
    torch.testing.assert_close(outer, inner + x)
    torch.testing.assert_close(last, outer.relu())


def test_weights_that_are_computed_stay_plain() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.conv2d(x, self.weight * 2, self.bias)

    program = captured(lambda x, a: a(x), Scaled(5, 5, 1))
    assert chains(program) == []
    check(program)


def test_other_dtypes_and_ranks_stay_plain() -> None:
    double = capture(conv().double(), (torch.randn(2, 5, 9, 7).double(),))
    assert chains(double) == []
    image = capture(conv(), (torch.randn(5, 9, 7),))
    assert chains(image) == []
    line = capture(nn.Conv1d(5, 3, 3), (torch.randn(2, 5, 9),))
    assert chains(line) == []


def test_operators_that_write_leave_everything_plain() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            x.add_(1.0)
            return torch.relu(y) + x

    program = capture(Writes(), (torch.randn(2, 5, 9, 7),), dynamic_batch=False)
    if any(node.target._schema.is_mutable for node in program.calls()):
        assert chains(program) == []
    x = torch.randn(2, 5, 9, 7)
    (found,) = values(program, x.clone(), *program.results())
    torch.testing.assert_close(found, program(x.clone())[0], rtol=1e-5, atol=1e-5)


READERS = {
    "view": lambda y: y.view(y.shape[0], -1),
    "view of pairs": lambda y: y.view(y.shape[0], 5, 63).transpose(1, 2),
    "flatten": lambda y: y.flatten(2).transpose(1, 2),
    "reshape": lambda y: y.reshape(y.shape[0], 9, -1),
    "permute": lambda y: y.permute(0, 2, 3, 1).reshape(-1, 5),
    "mean": lambda y: y.mean(2).view(y.shape[0], -1),
    "linear": lambda y: y @ torch.ones(7, 2),
    "sum of two layouts": lambda y: (y.relu() + y.flip(2)).view(y.shape[0], -1),
    "pool": lambda y: torch.nn.functional.max_pool2d(y, 2).view(y.shape[0], -1),
    "cat": lambda y: torch.cat([y, y.sigmoid()], 1).view(y.shape[0], -1),
    "comparison": lambda y: (y > 0).view(y.shape[0], -1).float() * 2 + 1,
    "norm": lambda y: torch.nn.functional.group_norm(y, 5).view(y.shape[0], -1),
}


@pytest.mark.parametrize("reader", READERS)
def test_readers_that_care_for_strides_get_the_programs_own(reader: str) -> None:
    program = captured(lambda x, a: READERS[reader](torch.nn.functional.silu(a(x))), conv())
    assert chains(program) == [(False, False)]
    check(program)


def test_channels_last_programs_stay_as_they_are() -> None:
    module = Net(lambda x, a: a(x).permute(0, 2, 3, 1).view(-1, 5), conv())
    module = module.to(memory_format=torch.channels_last)
    x = torch.randn(2, 5, 9, 7).contiguous(memory_format=torch.channels_last)
    program = capture(module, (x,), dynamic_batch=False)
    assert chains(program) == []
    (found,) = values(program, x, *program.results())
    torch.testing.assert_close(found, program(x)[0])


def test_inputs_of_any_strides() -> None:
    program = captured(lambda x, a: torch.relu(a(x)), conv())
    (result,) = program.results()
    wide = torch.randn(2, 5, 9, 14)
    for x in (
        wide[..., ::2], wide[..., :7].contiguous(memory_format=torch.channels_last),
        torch.randn(1, 5, 9, 7).expand(3, 5, 9, 7), wide.transpose(2, 3)[:, :, :9, :7],
    ):  # fmt: skip
        (found,) = values(program, x, result)
        torch.testing.assert_close(found, program(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    """A ReLU keeps NaN, which oneDNN's own would hide."""
    program = captured(lambda x, a: torch.relu(a(x) + x), conv())
    assert chains(program) == [(True, True)]
    x = torch.randn(2, 5, 9, 7)
    x[0, 2, 4, 3] = bad
    (found,) = values(program, x, *program.results())
    assert torch.equal(found.isnan(), program(x)[0].isnan())
    assert torch.equal(found.isinf(), program(x)[0].isinf())
    assert not bool(found.isfinite().all())


def test_an_empty_batch() -> None:
    program = captured(lambda x, a: torch.relu(a(x) + x), conv())
    (packed,) = packed_convolutions(program, ()).values()
    empty = torch.zeros(0, 5, 9, 7)
    assert packed(empty, empty).shape == (0, 5, 9, 7)
