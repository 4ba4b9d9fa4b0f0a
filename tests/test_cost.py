"""FLOPs agree with torch's own counter, parameters with the module, bytes with what is stored."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pruna_ir.capture import capture
from pruna_ir.cost import cost
from pruna_ir.transform import Context, Rewrite

F = nn.functional


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)


class Products(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b + torch.bmm(a, b) + torch.einsum("bij,bjk->bik", a, b)


CASES = {
    "conv": (nn.Conv2d(6, 9, 3, 2, 1, groups=3), (2, 6, 13, 7)),
    "conv1d": (nn.Conv1d(4, 6, 5, dilation=2), (2, 4, 21)),
    "conv3d": (nn.Conv3d(2, 3, 3), (2, 2, 5, 6, 7)),
    "same padding": (nn.Conv2d(3, 5, 3, padding="same"), (2, 3, 9, 9)),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), (2, 8, 9, 9)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, 2, groups=2), (2, 6, 5, 4)),
    "linear": (nn.Linear(7, 5), (2, 3, 7)),
    "attention": (Attention(), (2, 5, 12)),
}


def counted(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CASES)
def test_flops_agree_with_torch(name: str) -> None:
    module, shape = CASES[name]
    program = capture(module, (torch.randn(shape),))
    one = torch.randn(1, *shape[1:])
    # torch's counter has no row for attention on the CPU's fused kernel.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert cost(program).flops == counted(module, (one,))
        assert cost(program, {"batch": 3}).flops == 3 * counted(module, (one,))


def test_products_of_activations_are_counted() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    program = capture(Products(), (a, b))
    assert cost(program).flops == 3 * 2 * 3 * 4 * 5 == counted(Products(), (a[:1], b[:1]))


def test_other_dynamic_dimensions_keep_the_example_size() -> None:
    program = capture(
        Attention(), (torch.randn(2, 5, 12),), dynamic_dims={"x": {1: "length"}}
    )
    fixed = capture(Attention(), (torch.randn(2, 5, 12),))
    assert cost(program).flops == cost(fixed).flops
    longer = capture(Attention(), (torch.randn(2, 9, 12),))
    assert cost(program, {"length": 9}).flops == cost(longer).flops


def test_a_lstm_counts_its_weights_once_per_step() -> None:
    program = capture(nn.LSTM(3, 4, batch_first=True), (torch.randn(2, 6, 3),))
    assert cost(program).flops == 2 * 6 * (16 * 3 + 16 * 4)


def test_parameters_and_bytes_count_tied_tensors_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight
            self.register_buffer("shift", torch.ones(4, dtype=torch.float16))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids) + self.shift)

    total = cost(capture(Tied(), (torch.zeros(2, 3, dtype=torch.int64),)))
    assert total.parameters == 28
    assert total.bytes == 28 * 4 + 4 * 2
    assert sum(row.parameters for row in total.nodes) == 28
    assert sum(row.bytes for row in total.nodes) == total.bytes


def test_rows_name_the_node_and_the_module() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    total = cost(capture(net, (torch.randn(2, 1, 4, 4),)))
    assert [(r.module, r.flops) for r in total.nodes if r.flops] == [
        ("0", 2 * 2 * 2 * 2 * 9), ("3", 2 * 3 * 8)
    ]  # fmt: skip
    assert total.flops == sum(row.flops for row in total.nodes)


def test_fake_quantised_weights_count_with_their_bits() -> None:
    from pruna_ir.kernels.fake_quant import KERNEL

    program = capture(nn.Linear(10, 6, bias=False), (torch.randn(2, 10),))
    rw = Rewrite(program, "by-hand", Context())
    (linear,) = rw.calls()
    weight = rw.call(linear).producer("weight")
    scale = rw.constant(torch.ones(6), "scale", before=linear)
    zero = rw.constant(torch.zeros(6, dtype=torch.int32), "zero", before=linear)
    quantised = rw.insert(
        KERNEL.op, before=linear, like=linear, x=weight, scale=scale, zero_point=zero, axis=0,
        qmin=-7, qmax=7,
    )  # fmt: skip
    rw.update(linear, weight=quantised)
    total = cost(rw.finish())
    assert total.bytes == 60 // 2 + 6 * 4 + 6 * 4
    assert total.flops == cost(program).flops
    assert total.uncounted == ()


def test_operators_of_third_parties_are_named() -> None:
    @torch.library.custom_op("pruna_cost_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @twice.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return twice(x)

    program = capture(Net(), (torch.randn(2, 3),))
    assert cost(program).uncounted == ("pruna_cost_test.twice.default",)
