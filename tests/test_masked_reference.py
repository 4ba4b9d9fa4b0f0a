"""The masked reference against independent ground truths: hand-cut modules and plain execution."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pruna_ir import (
    capture,
    masked_layers,
    masked_layout,
    masked_operators,
    masked_reference,
    masked_statistics,
    masked_table,
)
from pruna_ir.equivalence import run_float64
from pruna_ir.errors import UnsupportedError
from pruna_ir.masked_operators import Masked, masked
from pruna_ir.masked_reference import MaskedOracle, survivors

KEPT = [0, 2, 5]
GONE = (1, 3, 4)


def reference(module, x, removed):
    program = capture(module.double().eval(), (x,))
    (result,) = masked_reference.masked_reference(program, (x,), removed)
    return result


def inputs(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64)


def test_nothing_removed_is_plain_execution():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2))
    program = capture(module, (inputs(3, 4).float(),))
    x = inputs(5, 4)
    assert torch.equal(MaskedOracle({})(program, (x,))[0], run_float64(program, (x,))[0])


def cut(layer, dim):
    """A layer's weight (and the bias of a cut output) without what is gone."""
    weight = layer.weight.index_select(dim, torch.tensor(KEPT))
    bias = layer.bias[KEPT] if dim == 0 else layer.bias
    return weight, bias


def test_linear_layers_agree_with_cut_weights():
    torch.manual_seed(0)
    a, b = nn.Linear(4, 6), nn.Linear(6, 2)
    x = inputs(3, 4)
    removed = {"0.weight": {0: GONE}, "0.bias": {0: GONE}, "2.weight": {1: GONE}}
    result = reference(nn.Sequential(a, nn.Sigmoid(), b), x, removed)
    expected = F.linear(torch.sigmoid(F.linear(x, *cut(a, 0))), *cut(b, 1))
    assert torch.allclose(result, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("norm", "functional"),
    [
        (nn.LayerNorm(6), lambda y, w, b: F.layer_norm(y, (3,), w, b)),
        (nn.RMSNorm(6, eps=1e-5), lambda y, w, _: F.rms_norm(y, (3,), w, 1e-5)),
    ],
)
def test_norms_take_the_statistics_of_the_survivors(norm, functional):
    torch.manual_seed(0)
    a, b, x = nn.Linear(4, 6), nn.Linear(6, 2), inputs(3, 4)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    removed = {"0.weight": {0: GONE}, "0.bias": {0: GONE}, "2.weight": {1: GONE}}
    removed |= {f"1.{name}": {0: GONE} for name, _ in norm.named_parameters()}
    result = reference(nn.Sequential(a, norm, b), x, removed)
    bias = getattr(norm, "bias", None)
    bias = None if bias is None else bias[KEPT]
    y = functional(F.linear(x, *cut(a, 0)), norm.weight[KEPT], bias)
    assert torch.allclose(result, F.linear(y, *cut(b, 1)), rtol=1e-12, atol=1e-12)


def test_group_norm_takes_the_survivors_of_each_group():
    torch.manual_seed(0)
    a, norm, b = nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.Conv2d(6, 2, 1)
    nn.init.normal_(norm.weight)
    x = inputs(2, 3, 4, 4)
    gone, kept = (1, 3, 5), [0, 2, 4]
    removed = {name: {0: gone} for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
    result = reference(nn.Sequential(a, norm, b), x, removed | {"2.weight": {1: gone}})
    y = F.conv2d(x, a.weight[kept], a.bias[kept])
    y = F.group_norm(y, 3, norm.weight[kept], norm.bias[kept])
    expected = F.conv2d(y, b.weight[:, kept], b.bias)
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_a_filter_along_channels_reads_dead_ones_as_zero():
    torch.manual_seed(0)
    a, b = nn.Linear(4, 6), nn.Linear(6, 2)
    slide = nn.Conv1d(1, 1, 3, padding=1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.slide = a, b, slide

        def forward(self, x):
            return self.b(self.slide(self.a(x).unsqueeze(1)).squeeze(1))

    x = inputs(3, 4)
    removed = {"a.weight": {0: GONE}, "a.bias": {0: GONE}, "b.weight": {1: GONE}}
    result = reference(Net(), x, removed)
    y = F.pad(a(x).index_fill(1, torch.tensor(GONE), 0.0), (1, 1))
    w = slide.weight[0, 0]
    y = sum(w[k] * y[:, k : k + 6] for k in range(3)) + slide.bias
    assert torch.allclose(result, F.linear(y[:, KEPT], *cut(b, 1)), rtol=1e-12, atol=1e-12)


class Statistics(nn.Module):
    def __init__(self, statistic):
        super().__init__()
        self.a, self.statistic = nn.Linear(4, 6), statistic

    def forward(self, x):
        return self.statistic(self.a(x))


STATISTICS = {
    "mean": lambda y: y.mean(-1),
    "mean-keepdim": lambda y: y.mean(-1, keepdim=True),
    "sum": lambda y: y.sum(-1),
    "amax": lambda y: (-y.square()).amax(-1),
    "amin": lambda y: y.square().amin(-1),
    "var": lambda y: y.var(-1),
    "biased var": lambda y: y.var(-1, unbiased=False),
    "norm": lambda y: torch.linalg.vector_norm(y, dim=-1),
    "softmax": lambda y: (torch.softmax(y, -1) * y).sum(-1),
    "new": lambda y: (y + y.new_ones(3, 1)).sum(-1),
    "rms": lambda y: (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True))).sum(-1),
    "normalised": lambda y: F.normalize(y, dim=-1).sum(-1),
    "var and mean": lambda y: torch.add(*torch.var_mean(y, -1)),
    "std and mean": lambda y: torch.add(*torch.std_mean(y, -1, unbiased=False)),
    "max": lambda y: y.max().reshape(1),
    "min": lambda y: (-y).min().reshape(1),
    "logsumexp": lambda y: y.logsumexp(-1),
    "log-softmax": lambda y: y.log_softmax(-1).sum(-1),
    "prod": lambda y: y.prod(-1),
    "any": lambda y: (y > 1).any(-1).double(),
    "all": lambda y: (y > -1).all(-1).double(),
    "cumsum": lambda y: y.cumsum(-1).square().sum(-1),
    "cumprod": lambda y: y.cumprod(-1).sum(-1),
    "logcumsumexp": lambda y: y.logcumsumexp(-1).sum(-1),
    "layer norm": lambda y: F.layer_norm(y, y.shape[-1:]).square().mul(y).sum(-1),
    "native layer norm": lambda y: torch.native_layer_norm(y, y.shape[-1:], None, None, 1e-5)[2],
    "group norm": lambda y: F.group_norm(y, 1).mul(y).sum(-1),
    "instance norm": lambda y: F.instance_norm(y.unsqueeze(1)).mul(y.unsqueeze(1)).sum((1, 2)),
    "batch statistics": lambda y: F.batch_norm(y, None, None, training=True).mul(y).sum(-1),
    "weight norm": lambda y: torch._weight_norm(y, torch.ones(3, 1).to(y), 0).sum(-1),
    "einsum": lambda y: torch.einsum("ni,nj->n", y, y.square()),
    "einsum of rows": lambda y: torch.einsum("ni,mi", y, y),
    "einsum with dots": lambda y: torch.einsum("...i,...i->...", y.unsqueeze(1), y.unsqueeze(1)),
    "distances": lambda y: torch.cdist(y, y.flip(0)),
    "dot": lambda y: torch.dot(y[0], y[1]).reshape(1),
    "mv": lambda y: torch.mv(y, y[0]),
    "flipped": lambda y: (y * torch.arange(3.0).to(y)[:, None]).flip(-1).flip(-1).sum(-1),
    "rolled": lambda y: y.roll(1, 0).sum(-1),
    "unfolded": lambda y: F.unfold(y[:, :, None, None].expand(-1, -1, 3, 3), 2).sum(1),
    "folded": lambda y: F.fold(y.repeat_interleave(4, 1).unsqueeze(-1), (2, 2), 2).sum((1, 2, 3)),
    "padded": lambda y: F.pad(y[:, :, None], (1, 2), value=2.0).prod(-1).add(y.square()).sum(-1),
    "reflected": lambda y: F.pad(y[:, :, None].expand(-1, -1, 4), (1, 2), "reflect").sum((1, 2)),
    "gathered": lambda y: torch.gather(y, 0, torch.zeros(1, y.shape[1], dtype=int)).sum(-1),
    "scattered": lambda y: torch.slice_scatter(y, y[:1] * 2, 0, 1, 2).sum(-1),
    "complex": lambda y: torch.view_as_real(
        torch.view_as_complex(torch.stack([y, y * 2], -1)) * 1j
    ).sum((1, 2)),
    "spectrum": lambda y: torch.fft.rfft(y, dim=0).abs().sum(-1),
    "pixels": lambda y: F.pixel_shuffle(
        y.repeat_interleave(4, 1)[:, :, None, None], 2
    ).sum((1, 2)),
    "samples": lambda y: F.grid_sample(
        y[:, :, None, None].expand(-1, -1, 2, 2), torch.zeros(3, 1, 1, 2).to(y), align_corners=True
    ).sum((1, 2, 3)),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_those_of_the_survivors(name):
    torch.manual_seed(0)
    module, x = Statistics(STATISTICS[name]), inputs(3, 4)
    result = reference(module, x, {"a.weight": {0: GONE}, "a.bias": {0: GONE}})
    expected = STATISTICS[name](F.linear(x, *cut(module.a, 0)))
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)


class Recurrence(nn.Module):
    """A recurrent layer whose output is summed over its units."""

    def __init__(self, kind, **options):
        super().__init__()
        self.layer = kind(4, 6, batch_first=True, **options)

    def forward(self, x):
        return self.layer(x)[0].square().sum(-1)


def cut_rows(tensor, gates):
    return tensor.reshape(gates, 6, -1)[:, KEPT].reshape(gates * 3, -1)


@pytest.mark.parametrize(
    ("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)], ids=["lstm", "gru", "rnn"]
)
def test_a_dead_hidden_unit_is_zero_at_every_step(kind, gates):
    torch.manual_seed(0)
    module, x = Recurrence(kind), inputs(2, 5, 4)
    rows = tuple(gate * 6 + index for gate in range(gates) for index in GONE)
    removed = {f"layer.{name}": {0: rows} for name, _ in module.layer.named_parameters()}
    removed["layer.weight_hh_l0"] = {0: rows, 1: GONE}
    result = reference(module, x, removed)
    small = kind(4, 3, batch_first=True).double()
    with torch.no_grad():
        for name, tensor in module.layer.named_parameters():
            rest = cut_rows(tensor, gates)
            rest = rest[:, KEPT] if name == "weight_hh_l0" else rest
            getattr(small, name).copy_(rest.reshape(getattr(small, name).shape))
    expected = small(x)[0].square().sum(-1)
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)


class Step(nn.Module):
    """One step of a cell."""

    def __init__(self, kind):
        super().__init__()
        self.layer = kind(4, 6)

    def forward(self, x):
        states = self.layer(x)
        states = states if isinstance(states, tuple) else (states,)
        return sum(state.square().sum(-1) for state in states)


@pytest.mark.parametrize(
    ("kind", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)]
)
def test_a_dead_hidden_unit_is_zero_after_a_step(kind, gates):
    torch.manual_seed(0)
    module, x = Step(kind), inputs(5, 4)
    rows = tuple(gate * 6 + index for gate in range(gates) for index in GONE)
    removed = {f"layer.{name}": {0: rows} for name, _ in module.layer.named_parameters()}
    removed["layer.weight_hh"] = {0: rows, 1: GONE}
    result = reference(module, x, removed)
    small = Step(lambda *_: kind(4, 3).double())
    with torch.no_grad():
        for name, tensor in module.layer.named_parameters():
            rest = cut_rows(tensor, gates)
            rest = rest[:, KEPT] if name == "weight_hh" else rest
            getattr(small.layer, name).copy_(rest.reshape(getattr(small.layer, name).shape))
    assert torch.allclose(result, small(x), rtol=1e-12, atol=1e-12)


def test_a_unit_dead_in_some_of_its_gates_is_refused():
    with pytest.raises(UnsupportedError, match="mixes dead elements with alive ones"):
        reference(Recurrence(nn.LSTM), inputs(2, 5, 4), {"layer.weight_ih_l0": {0: (1,)}})


class Small(nn.Module):
    """conv-bn-relu-linear, of any width."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.head = nn.Linear(width * 4, 5)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


def test_a_network_built_small_by_hand():
    torch.manual_seed(0)
    module, small, x = Small(6).eval(), Small(3).double().eval(), inputs(2, 3, 4, 4)
    nn.init.normal_(module.norm.running_mean)
    nn.init.uniform_(module.norm.running_var, 0.5, 2)
    columns = tuple(4 * index + place for index in GONE for place in range(4))
    removed = {name: {0: GONE} for name in ("conv.weight", "conv.bias", "norm.weight",
               "norm.bias", "norm.running_mean", "norm.running_var")}  # fmt: skip
    result = reference(module, x, removed | {"head.weight": {1: columns}})
    with torch.no_grad():
        for name, tensor in small.state_dict().items():
            full = module.state_dict()[name]
            if name == "head.weight":
                tensor.copy_(full.view(5, 6, 4)[:, KEPT].flatten(1))
            elif tensor.shape != full.shape:
                tensor.copy_(full[KEPT])
            else:
                tensor.copy_(full)
    assert torch.allclose(result, small(x), rtol=1e-12, atol=1e-12)


def test_every_value_is_float64():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.GELU(), nn.Linear(6, 2))
    program = capture(module, (inputs(3, 4).float(),))
    seen = []
    removed = {"0.weight": {0: GONE}, "0.bias": {0: GONE}, "1.weight": {0: GONE}}
    masked_reference.masked_reference(
        program, (inputs(3, 4).float(),), removed | {"3.weight": {1: GONE}},
        lambda _, result: seen.append(result.value.dtype),
    )  # fmt: skip
    assert seen == [torch.float64] * 4


class Heads(nn.Module):
    """Two heads of three through scaled dot-product attention."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 6)
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        q, k, v = (f(x).view(-1, 5, 2, 3).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(-1, 5, 6))


def test_a_removed_head_adds_nothing():
    torch.manual_seed(0)
    module, x = Heads(), inputs(2, 5, 4)
    gone = (0, 1, 2)
    removed = {f"{n}.{p}": {0: gone} for n in "qkv" for p in ("weight", "bias")}
    result = reference(module, x, removed | {"out.weight": {1: gone}})
    q, k, v = (F.linear(x, f.weight[3:], f.bias[3:]) for f in (module.q, module.k, module.v))
    y = F.scaled_dot_product_attention(q, k, v)
    expected = F.linear(y, module.out.weight[:, 3:], module.out.bias)
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_a_removed_head_size_keeps_the_scale():
    torch.manual_seed(0)
    module, x = Heads(), inputs(2, 5, 4)
    gone = (1, 4)
    removed = {f"{n}.{p}": {0: gone} for n in "qk" for p in ("weight", "bias")}
    result = reference(module, x, removed)
    q, k, v = (f(x).view(-1, 5, 2, 3).transpose(1, 2) for f in (module.q, module.k, module.v))
    y = F.scaled_dot_product_attention(q[..., [0, 2]], k[..., [0, 2]], v, scale=3**-0.5)
    expected = module.out(y.transpose(1, 2).reshape(-1, 5, 6))
    assert torch.allclose(result, expected, rtol=1e-12, atol=1e-12)


def test_what_removal_leaves_of_each_value_is_traced():
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    program = capture(module, (inputs(3, 4).float(),))
    seen = {}
    removed = {"0.weight": {0: GONE}, "0.bias": {0: GONE}, "2.weight": {1: GONE}}
    x = inputs(3, 4)
    MaskedOracle(removed).trace(program, (x,), lambda node, value: seen.update({node.name: value}))
    expected = F.linear(x, *(t.double() for t in cut(module[0], 0)))
    assert torch.allclose(seen["linear"], expected)
    assert {name: list(value.shape) for name, value in seen.items()} == {
        "linear": [3, 3],
        "relu": [3, 3],
        "linear_1": [3, 2],
    }


def test_dead_elements_never_leak():
    value = torch.tensor([1.0, float("nan"), float("inf")])
    pair = masked(value, torch.tensor([True, False, False]))
    assert pair.value.tolist() == [1.0, 0.0, 0.0]
    assert survivors(pair).tolist() == [1.0]
    assert masked(torch.ones(2), torch.tensor([True, True])).alive is None
    assert Masked(torch.ones(2)).mask.all()


def test_an_output_that_would_be_dead_in_part_is_refused():
    module = nn.Linear(4, 6)
    with pytest.raises(UnsupportedError, match="linear = aten.linear.default .* dead in part"):
        reference(module, inputs(3, 4), {"weight": {0: GONE}, "bias": {0: GONE}})


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (lambda y: torch.linalg.matrix_exp(y.unsqueeze(1) * y.unsqueeze(2)), "is not defined"),
        (lambda y: sum(y.max(-1)), "mixes dead elements with alive ones"),
        (lambda y: y.argmax(-1), "mixes dead elements with alive ones"),
        (lambda y: y.sort(-1)[0], "mixes dead elements with alive ones"),
        (lambda y: F.avg_pool1d(y.unsqueeze(1), 2), "mixes dead elements with alive ones"),
    ],
)
def test_what_it_cannot_know_is_refused_by_node(operator, message):
    with pytest.raises(UnsupportedError, match=message):
        reference(Statistics(operator), inputs(3, 4), {"a.weight": {0: GONE}, "a.bias": {0: GONE}})


def test_it_shares_no_code_with_the_analysis():
    for module in (
        masked_reference, masked_operators, masked_table, masked_layout, masked_layers,
        masked_statistics,
    ):  # fmt: skip
        tree = ast.parse(inspect.getsource(module))
        names = [
            name
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            + [alias.name for alias in node.names]
        ]
        assert not [name for name in names if "coupling" in name]
