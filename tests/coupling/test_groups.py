"""Which channels go together, and why others stay: groups of small networks, spelt out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruna_ir import capture
from pruna_ir.coupling import ELEMENTWISE, couple
from pruna_ir.coupling.table import RULES
from pruna_ir.errors import InvalidIRError
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.fuse_conv_bn_relu import FuseConvBnRelu
from pruna_ir.transform import apply
from tests.coupling.synthetic import measure


def coupled(module, *shape):
    torch.manual_seed(0)
    program = capture(module.eval(), (torch.randn(*shape),))
    return couple(apply(Canonicalize(), program).program)


def described(coupling):
    """Group name -> (number of units, {member: indices per unit})."""
    return {
        group.name: (
            len(group.units),
            {f"{m.tensor}[{m.dim}]": m.indices.shape[1] for m in group.members},
        )
        for group in coupling.groups
        if group.reason is None
    }


def reasons(coupling):
    return {group.name: str(group.reason) for group in coupling.groups if group.reason}


class ResidualBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 8, 3, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.conv2(torch.relu(self.bn1(self.conv1(x))))
        return self.head(x.mean((2, 3)))


def test_a_residual_block_has_an_inner_and_an_outer_group():
    assert described(coupled(ResidualBlock(), 2, 3, 6, 6)) == {
        "stem.weight[0]": (
            8,
            {
                "stem.weight[0]": 1,
                "stem.bias[0]": 1,
                "conv1.weight[1]": 1,
                "conv2.weight[0]": 1,
                "conv2.bias[0]": 1,
                "head.weight[1]": 1,
            },
        ),
        "conv1.weight[0]": (
            5,
            {
                "conv1.weight[0]": 1,
                "bn1.weight[0]": 1,
                "bn1.bias[0]": 1,
                "bn1.running_mean[0]": 1,
                "bn1.running_var[0]": 1,
                "conv2.weight[1]": 1,
            },
        ),
    }


def test_inputs_and_outputs_stay_and_say_so():
    why = reasons(coupled(ResidualBlock(), 2, 3, 6, 6))
    assert why["head.weight[0]"].startswith("program output output [linear = aten.linear")
    assert why["stem.weight[1]"].startswith("program input x fixes them [conv2d = aten.conv2d")
    assert "test_groups.py:" in why["stem.weight[1]"]


def test_the_order_of_units_is_the_order_of_channels():
    coupling = coupled(ResidualBlock(), 2, 3, 6, 6)
    (group,) = [g for g in coupling.groups if g.name == "stem.weight[0]"]
    for member in group.members:
        assert member.indices[:, 0].tolist() == list(range(8))


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(36, 2)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))


def test_a_flattened_channel_is_many_columns():
    coupling = coupled(Flattened(), 2, 3, 5, 5)
    assert described(coupling)["conv.weight[0]"][1]["fc.weight[1]"] == 9
    assert coupling.groups[0].members[-1].indices[1].tolist() == list(range(9, 18))


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        return self.c(torch.cat([self.a(x), self.b(x)], 1))


def test_concatenation_shifts_indices():
    coupling = coupled(Concatenated(), 2, 3, 5, 5)
    indices = {
        group.name: member.indices[:, 0].tolist()
        for group in coupling.groups
        for member in group.members
        if member.tensor == "c.weight" and member.dim == 1
    }
    assert indices == {"a.weight[0]": [0, 1], "b.weight[0]": [2, 3, 4]}


def test_a_head_of_a_fused_projection_is_one_unit():
    layer = nn.TransformerEncoderLayer(12, 3, 7, batch_first=True, norm_first=True)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer, nn.Linear(12, 2)

        def forward(self, x):
            y = self.layer.norm1(x)
            y, _ = self.layer.self_attn(y, y, y, need_weights=False)
            return self.head(y)

    found = described(coupled(Encoder(), 2, 5, 12))
    assert found["layer.self_attn.in_proj_weight[0]"] == (
        3,
        {
            "layer.self_attn.in_proj_weight[0]": 12,
            "layer.self_attn.in_proj_bias[0]": 12,
            "layer.self_attn.out_proj.weight[1]": 4,
        },
    )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.inner, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.head.weight = self.embed.weight

    def forward(self, x):
        y = self.embed(x)
        return self.head(self.norm(y + self.inner(y)))


def test_tied_embeddings_share_their_width():
    program = capture(Tied().eval(), (torch.randint(0, 11, (2, 5)),))
    (group,) = [g for g in couple(program).groups if g.reason is None]
    assert len(group.units) == 6
    assert {"inner.weight", "norm.weight"} < {m.tensor for m in group.members}


@torch.library.custom_op("pruna_test::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1)


@opaque.register_fake
def _(x):
    return torch.empty_like(x)


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(torch.ops.pruna_test.opaque(self.a(x)))


def test_an_operator_without_a_rule_freezes_what_it_touches():
    why = reasons(couple(capture(Opaque(), (torch.randn(2, 3),))))
    assert why["a.weight[0]"].startswith(
        "has no coupling rule [opaque = pruna_test.opaque.default ("
    )
    assert "test_groups.py:" in why["a.weight[0]"]
    assert "b.weight[1]" in why


def test_fused_operators_say_that_pruning_comes_first():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    program = capture(module, (torch.randn(2, 3, 4, 4),))
    fused = apply(FuseConvBnRelu(), program).program
    assert "prune before operators are fused" in reasons(couple(fused))["0.weight[0]"]


def test_a_rule_of_ones_own_unfreezes_it(monkeypatch):
    monkeypatch.setitem(RULES, "pruna_test::opaque", ELEMENTWISE)
    assert "a.weight[0]" in described(couple(capture(Opaque(), (torch.randn(2, 3),))))


class Memory(nn.Module):
    """One step of a convolutional GRU without a reset, from a state of zeros like the input."""

    def __init__(self):
        super().__init__()
        self.gate, self.head = nn.Conv2d(3 + 6, 12, 3, padding=1), nn.Linear(6, 2)

    def forward(self, x):
        state = x.new_zeros(x.shape[0], 6, *x.shape[2:])
        for _ in range(2):
            gate, new = self.gate(torch.cat([x, state], 1)).chunk(2, 1)
            state = state + torch.sigmoid(gate) * (torch.tanh(new) - state)
        return self.head(state.mean((2, 3)))


def test_a_state_made_like_the_input_follows_its_channels():
    found = described(coupled(Memory(), 2, 3, 6, 6))
    assert found["gate.weight[0]"][0] == 6
    assert found["gate.weight[0]"][1]["head.weight[1]"] == 1


class Strongest(nn.Module):
    """The largest channel at each place, and where asked for, which one it is."""

    def __init__(self, places):
        super().__init__()
        self.conv, self.places = nn.Conv2d(3, 8, 1), places

    def forward(self, x):
        value, place = self.conv(x).max(1)
        return value + place if self.places else value


def test_a_maximum_over_channels_keeps_them_only_where_its_place_is_read():
    assert described(coupled(Strongest(places=False), 2, 3, 6, 6))
    assert "is computed along them" in reasons(coupled(Strongest(places=True), 2, 3, 6, 6))[
        "conv.weight[0]"
    ]


def test_in_place_operators_are_refused():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
    with pytest.raises(InvalidIRError, match="run canonicalize before pruning"):
        couple(capture(module, (torch.randn(2, 3, 4, 4),)))


def test_a_rule_that_gets_the_shape_wrong_is_named(monkeypatch):
    from dataclasses import replace

    wrong = replace(RULES["aten::cat"], couple=lambda site: site.tensors("tensors")[0])
    monkeypatch.setitem(RULES, "aten::cat", wrong)
    with pytest.raises(InvalidIRError, match=r"coupling rule of aten.cat.default gives cat"):
        coupled(Concatenated(), 2, 3, 5, 5)


def test_cost_grows_with_the_graph_and_no_faster():
    small, large = measure(70), measure(700)
    assert 8 < large.ids / small.ids < 12
    assert large.peak < 20 * small.peak
    assert large.couple < 30 * max(small.couple, 0.005)
