"""fuse-attention-blocks: attention with its projections in one operator, and why others stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pruna_ir.backends.packed_program import PackedProgram
from pruna_ir.build import build
from pruna_ir.call import bind_arguments
from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.cost import cost
from pruna_ir.coupling import couple
from pruna_ir.data import TensorData
from pruna_ir.decompose import decompose
from pruna_ir.errors import PassError
from pruna_ir.lowering import Verdict
from pruna_ir.passes import fuse_attention_blocks
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.fuse_attention import FuseAttention
from pruna_ir.passes.fuse_attention_blocks import FuseAttentionBlocks
from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
from pruna_ir.passes.residual_blocks import Residuals
from pruna_ir.passes.spell_out_attention import SpellOutAttention
from pruna_ir.program import Program
from pruna_ir.serialize import load_program, save_program
from pruna_ir.sparse_layouts import weights
from pruna_ir.transform import Context, PassResult, apply
from pruna_ir.verify import verify
from tests.passes.corpus import canonical, targets

FUSED = "pruna.attention_block"
BLOCK = fuse_attention_blocks.BLOCK
sdpa = F.scaled_dot_product_attention


class Net(nn.Module):
    """A function of its layers and of [batch, 5, 6] tokens: two heads of size 4."""

    def __init__(self, function, *, keys=2, width=6, size=4, bias=True):
        super().__init__()
        self.function, self.keys = function, keys
        self.q = nn.Linear(width, 2 * size, bias=bias)
        self.k, self.v = nn.Linear(width, keys * size, bias=False), nn.Linear(width, keys * size)
        self.qkv = nn.Linear(width, 6 * size, bias=bias)
        self.conv = nn.Parameter(torch.randn(width, 6 * size))
        self.out = nn.Linear(2 * size, width)
        self.norm = nn.LayerNorm(size)

    def heads(self, x, *, keys=False):
        return x.unflatten(-1, (self.keys if keys else 2, -1)).transpose(1, 2)

    def qkv_heads(self, x, y=None):
        y = x if y is None else y
        return self.heads(self.q(x)), self.heads(self.k(y), keys=True), self.heads(
            self.v(y), keys=True
        )  # fmt: skip

    def joined(self, y):
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x, *others):
        return self.function(self, x, *others)


def program_of(function, *more, shape=(2, 5, 6), seed=0, train=False, **options) -> Program:
    torch.manual_seed(seed)
    net = Net(function, width=shape[-1], **options)
    program = capture(net, (torch.randn(shape), *more), train=train)
    return apply(FuseAttention(), apply(Canonicalize(), program).program).program


def fused(program: Program) -> PassResult:
    """The result of one run, with the effect's own check, and of a second run."""
    result = apply(FuseAttentionBlocks(), program)
    verify(result.program)
    report = check(FuseAttentionBlocks(), program, result.program, exact=result.exact)
    assert report.passed, report
    assert not apply(FuseAttentionBlocks(), result.program).modified
    return result


def refused(program: Program) -> PassResult:
    """The result of a run that changes nothing."""
    result = apply(FuseAttentionBlocks(), program)
    assert not result.modified
    return result


def missed(result: PassResult) -> list[str]:
    return [remark.message for remark in result.remarks if remark.kind == "missed"]


def block_of(program: Program) -> dict[str, object]:
    (node,) = program.calls(BLOCK)
    return bind_arguments(node)


# -- real models -------------------------------------------------------------------------------


def real(name: str) -> Program:
    return apply(FuseAttention(), canonical(name)).program


def fused_wholly(program: Program) -> PassResult:
    """The result for a model of two layers, both fused."""
    result = fused(program)
    assert targets(result.program).count(FUSED) == 2
    assert "pruna.attention" not in targets(result.program)
    assert not missed(result)
    return result


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_fires_on_real_models(name):
    program = real(name)
    result = fused_wholly(program)
    assert cost(result.program).flops == cost(program).flops
    parameters = [sum(map(torch.numel, p.tensors().values())) for p in (program, result.program)]
    assert parameters[0] == parameters[1]


def test_llama_says_what_stands_in_between():
    result = refused(real("llama"))
    first, second = [remark for remark in result.remarks if remark.kind == "missed"]
    assert first.node == "attention"
    assert first.source.startswith("llama/modeling_llama.py:")
    names, _, rest = first.message.partition(" at llama/modeling_llama.py:")
    assert names == "a rotary embedding (mul_5, neg, cat_1, mul_6, add_4"
    assert rest.endswith(") stands between linear and its queries")
    assert "linear_7" in second.message


def test_bert_packs_its_weights_under_a_name_of_their_own():
    result = fused_wholly(real("bert"))
    self = "encoder.layer.0.attention.self"
    packed = result.program.tensor(f"{self}.query.weight_packed")
    before = real("bert")
    parts = [before.tensor(f"{self}.{part}.weight") for part in ("query", "key", "value")]
    assert torch.equal(packed, torch.cat(parts))
    assert packed.requires_grad
    assert f"{self}.key.weight" not in result.program.tensors()
    assert result.remarks[0].message == (
        "fused 3 projections, attention and linear_3 into attention_block"
    )


def test_a_packed_weight_is_read_as_it_is():
    program = real("timm_vit")
    result = fused_wholly(program)
    assert set(result.program.tensors()) == set(program.tensors())
    assert all(result.program.tensor(n) is t for n, t in program.tensors().items())


def test_layers_with_the_same_weights_share_the_packed_ones():
    import transformers

    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=99, embedding_size=16, hidden_size=32, num_hidden_layers=3,
        num_attention_heads=2, intermediate_size=48, max_position_embeddings=16,
    )  # fmt: skip
    program = capture(transformers.AlbertModel(config).eval(), (torch.randint(0, 99, (2, 7)),))
    result = fused(apply(FuseAttention(), apply(Canonicalize(), program).program).program)
    assert targets(result.program).count(FUSED) == 3
    assert sum(name.endswith("_packed") for name in result.program.tensors()) == 2


# -- spellings ---------------------------------------------------------------------------------


def plain(net, x):
    return net.joined(sdpa(*net.qkv_heads(x)))


def packed(net, x):
    heads = net.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    return net.joined(sdpa(*heads.unbind(0)))


def interleaved(net, x):
    """Query, key and value of a head beside each other (GPT-NeoX, BLOOM)."""
    heads = net.qkv(x).unflatten(-1, (2, 3, -1)).permute(3, 0, 2, 1, 4)
    return net.joined(sdpa(heads[0], heads[1], heads[2]))


def conv1d(net, x):
    """GPT-2's layers, on flattened rows."""
    y = torch.addmm(net.qkv.bias, x.view(-1, x.shape[-1]), net.conv).view(*x.shape[:2], -1)
    return net.joined(sdpa(*(net.heads(part) for part in y.chunk(3, -1)), is_causal=True))


def scaled(net, x):
    """Numbers that queries and keys are multiplied by (Whisper, OPT)."""
    q, k, v = net.heads(net.q(x) * 0.3), net.heads(net.k(x)) / 2, net.heads(net.v(x))
    return net.joined(sdpa(q, k, v, scale=1.0))


def tokens_first(net, x):
    """Tokens before the batch inside, and the layer behind on flattened rows (torchvision)."""
    b, n = x.shape[:2]
    y = x.transpose(0, 1)
    q, k, v = (
        layer(y).reshape(n, b * 2, -1).transpose(0, 1).reshape(b, 2, n, -1)
        for layer in (net.q, net.k, net.v)
    )
    mixed = sdpa(q, k, v).permute(2, 0, 1, 3).reshape(n * b, -1)
    return net.out(mixed).reshape(n, b, -1).transpose(0, 1)


def tokens_first_out(net, x):
    q, k, v = (net.heads(layer(x)) for layer in (net.q, net.k, net.v))
    return net.out(sdpa(q, k, v).permute(2, 0, 1, 3).flatten(2))


def masked(net, x):
    return net.joined(sdpa(*net.qkv_heads(x), attn_mask=(x.sum(-1) > 0)[:, None, :, None]))


def grouped(net, x):
    return net.joined(sdpa(*net.qkv_heads(x), enable_gqa=True))


@pytest.mark.parametrize(
    ("function", "options", "copies"),
    [
        (plain, {}, True),
        (plain, {"bias": False}, True),
        (packed, {}, False),
        (packed, {"bias": False}, False),
        (interleaved, {}, True),
        (conv1d, {}, True),
        (scaled, {}, True),
        (tokens_first, {}, True),
        (tokens_first_out, {}, True),
        (masked, {}, True),
        (grouped, {"keys": 1}, True),
        (plain, {"size": 1}, True),
    ],
)
def test_spellings(function, options, copies):
    result = fused(program_of(function, **options))
    assert [r.kind for r in result.remarks] == ["applied"]
    found = targets(result.program)
    assert found.count(FUSED) == 1
    inside = {"aten.linear", "aten.addmm", "pruna.attention", "aten.chunk", "aten.slice.Tensor"}
    assert not inside & set(found)
    assert any("_" in name for name in result.program.tensors()) is copies


def test_heads_of_keys_are_shared_and_causal_masks_kept():
    block = block_of(fused(program_of(grouped, keys=1)).program)
    assert (block["heads"], block["key_heads"], block["causal"]) == (2, 1, False)
    assert block_of(fused(program_of(conv1d)).program)["causal"] is True


@settings(max_examples=5, deadline=None)
@given(
    st.integers(2, 5), st.integers(1, 7), st.integers(1, 7), st.sampled_from([1, 2]),
    st.integers(1, 5), st.sampled_from([plain, tokens_first_out, masked, grouped, conv1d]),
    st.integers(0, 99),
)  # fmt: skip
def test_any_shape(batch, tokens, width, keys, size, function, seed):
    keys = keys if function is grouped else 2
    program = program_of(function, shape=(batch, tokens, width), keys=keys, size=size, seed=seed)
    assert targets(fused(program).program).count(FUSED) == 1


# -- what else knows it ------------------------------------------------------------------------


def test_is_saved_and_read_again(tmp_path):
    program = fused(program_of(masked)).program
    save_program(program, tmp_path / "program.pt2")
    again = load_program(tmp_path / "program.pt2")
    assert targets(again).count(FUSED) == 1
    assert torch.equal(again(*program.examples)[0], program(*program.examples)[0])


@pytest.mark.parametrize(("function", "keys"), [(masked, 2), (grouped, 1), (conv1d, 2)])
def test_decomposes_into_layers_and_torchs_own_attention(function, keys):
    program = program_of(function, keys=keys)
    spelt = decompose(fused(program).program)
    assert [targets(spelt).count(f"aten.{name}") for name in (
        "linear", "scaled_dot_product_attention"
    )] == [2, 1]  # fmt: skip
    torch.testing.assert_close(spelt(*program.examples), program(*program.examples))


def test_eager_runs_its_layers_packed():
    program = program_of(masked)
    runner = PackedProgram(fused(program).program)
    details = [row.detail for row in runner.rows]
    assert sum(detail.startswith("packed by oneDNN: linear") for detail in details) == 2
    assert any("scaled_dot_product_attention" in detail for detail in details)
    torch.testing.assert_close(runner(*program.examples), program(*program.examples))


@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_lowers_to_the_same_function(target, tmp_path):
    program = fused(program_of(grouped, keys=1)).program
    artifact = build(program, target, tmp_path / target)
    assert artifact.certificate.verdict is Verdict.PASSED


def test_spell_out_attention_opens_it():
    program = fused(program_of(masked)).program
    result = apply(SpellOutAttention(), program)
    verify(result.program)
    assert check(SpellOutAttention(), program, result.program).passed
    found = targets(result.program)
    assert (found.count("aten.linear"), found.count("aten.matmul")) == (2, 2)
    assert FUSED not in found


def test_quantisation_is_refused_with_the_remedy():
    context = Context(data=TensorData((torch.randn(8, 5, 6),)), target="onnx")
    with pytest.raises(PassError, match="insert-fake-quant before fuse-attention-blocks"):
        apply(InsertFakeQuant(), fused(program_of(packed)).program, context)


def test_pruning_is_refused_with_the_remedy():
    groups = couple(fused(program_of(packed)).program).groups
    reasons = {group.reason.text for group in groups if group.reason is not None}
    assert "is fused already; prune before operators are fused" in reasons
    assert all(group.reason is not None for group in groups)


def test_its_weights_are_known_to_sparse_kernels():
    found = {weight.name: weight.layout for weight in weights(fused(program_of(packed)).program)}
    assert set(found) == {"qkv.weight", "out.weight"}
    assert {(layout.outputs, layout.inputs) for layout in found.values()} == {(0, 1)}


def test_a_residual_branch_with_it_is_an_attention():
    program = fused(program_of(lambda net, x: x + packed(net, x))).program
    (branch,) = Residuals(program).blocks
    assert branch.attention
    assert branch.nodes == tuple(program.calls(BLOCK))


# -- refusals ----------------------------------------------------------------------------------


def _normed(net, x):
    q, k, v = net.qkv_heads(x)
    return net.joined(sdpa(net.norm(q), k, v))


def _turned(net, x):
    q, k, v = net.qkv_heads(x)
    a, b = k.chunk(2, -1)
    return net.joined(sdpa(q, k * 0.7 + torch.cat([-b, a], -1) * 0.7, v))


def _cached(net, x, past):
    q, k, v = net.qkv_heads(x)
    return net.joined(sdpa(q, torch.cat([past, k], 2), torch.cat([past, v], 2)))


def _returned(net, x):
    q, k, v = net.qkv_heads(x)
    return net.joined(sdpa(q, k, v)), k


def _tied_input(net, x):
    return net.joined(sdpa(*net.qkv_heads(x, torch.relu(x))))


def _gated(net, x):
    return net.joined(torch.sigmoid(sdpa(*net.qkv_heads(x))))


def _mixed_heads(net, x):
    return net.out(sdpa(*net.qkv_heads(x)).permute(0, 2, 3, 1).flatten(2))


def _computed_weight(net, x):
    q = F.linear(x, net.q.weight * 2, net.q.bias)
    return net.joined(sdpa(net.heads(q), net.heads(net.k(x)), net.heads(net.v(x))))


def _twice_read(net, x):
    y = sdpa(*net.qkv_heads(x))
    return net.joined(y) + y.sum()


def _unprojected(net, x, past):
    return net.joined(sdpa(net.heads(net.q(x)), past, past))


def _without_heads(net, x):
    return net.out(sdpa(net.q(x), net.q(x), net.q(x)))


def _tokens_cut(net, x):
    q, k, v = net.qkv_heads(x)
    return net.joined(sdpa(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:]))


@pytest.mark.parametrize(
    ("function", "more", "reason"),
    [
        (_normed, (), "a norm (layer_norm at "),
        (_turned, (), "a rotary embedding (mul, neg, cat, mul_1, add at "),
        (_cached, ((2, 2, 3, 4),), "a cache (cat at "),
        (_returned, (), "transpose_1 is also read by output"),
        (
            _tied_input, (),
            "its queries are projected from input_0, its keys from relu: cross attention has no "
            "fused form",
        ),
        (_gated, (), "sigmoid stands between its heads and a layer"),
        (_mixed_heads, (), "linear_3 does not read its heads one behind the other"),
        (_computed_weight, (), "the weight or bias of linear is computed in the graph"),
        (_twice_read, (), "attention is read by sum_1, transpose_3, not by one layer"),
        (_unprojected, ((2, 2, 3, 4),), "its keys are input_1, which no layer projects"),
        (_without_heads, (), "it has no dimension of heads"),
        (_tokens_cut, (), "the views between linear and its queries, keys or values do not"),
    ],
)  # fmt: skip
def test_refuses_with_the_reason(function, more, reason):
    (message,) = missed(refused(program_of(function, *map(torch.randn, more))))
    assert message.startswith(reason), message


def test_the_reason_names_layer_and_role():
    (message,) = missed(refused(program_of(_turned)))
    assert message.endswith(") stands between linear_1 and its keys")


def test_attention_without_projections_has_no_remark():
    program = program_of(lambda _, x: sdpa(x[:, None], x[:, None], x[:, None]))
    assert not refused(program).remarks


# -- training and controls ---------------------------------------------------------------------


def test_the_fused_program_trains():
    program = fused(program_of(plain)).program
    program(*program.examples)[0].square().sum().backward()
    packed_weight = program.tensor("q.weight_packed")
    assert all(float(part.abs().max()) > 0 for part in packed_weight.grad.chunk(3))


@pytest.mark.parametrize("wrong", ["rows", "factor", "order", "heads"])
def test_the_check_sees_a_wrong_fusion(wrong, monkeypatch):
    """Controls: keys and values exchanged, a number or a transpose forgotten, heads halved."""
    function = {"factor": scaled, "order": tokens_first_out}.get(wrong, packed)
    program = program_of(function)
    right = fuse_attention_blocks._block

    def block(*given):
        found = right(*given)
        projected = found.projected
        q, k, v = projected.rows
        return {
            "rows": replace(found, projected=replace(projected, rows=(q, v, k))),
            "factor": replace(found, projected=replace(projected, factor=1.0)),
            "order": replace(found, output=replace(found.output, order=(0, 1, 2))),
            "heads": replace(found, heads=(1, 1)),
        }[wrong]

    assert fused(program).modified
    monkeypatch.setattr(fuse_attention_blocks, "_block", block)
    if wrong == "order":
        program = program_of(tokens_first_out, shape=(5, 5, 6))
    result = apply(FuseAttentionBlocks(), program)
    assert result.modified
    assert not check(FuseAttentionBlocks(), program, result.program).passed
