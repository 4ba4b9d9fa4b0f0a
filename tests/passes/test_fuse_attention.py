"""fuse-attention: attention in every spelling as one operator, and why others stay."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pruna_ir.capture import capture
from pruna_ir.checks import check
from pruna_ir.cost import cost
from pruna_ir.decompose import decompose
from pruna_ir.passes import fuse_attention
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.fold_constants import FoldConstants
from pruna_ir.passes.fuse_attention import FuseAttention
from pruna_ir.passes.fuse_ffn import FuseFfn
from pruna_ir.program import Program
from pruna_ir.serialize import load_program, save_program
from pruna_ir.transform import PassResult, apply
from pruna_ir.verify import verify
from tests.passes import attention_spellings as spell
from tests.passes.corpus import canonical, targets

FUSED = "pruna.attention"
sdpa = F.scaled_dot_product_attention


class Net(nn.Module):
    """A function of queries, keys and values, and of constant masks."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        causal = torch.ones(5, 5, dtype=torch.bool).tril()
        self.register_buffer("causal", causal)
        self.register_buffer("added", torch.zeros(5, 5).masked_fill(~causal, -math.inf))
        self.register_buffer("bias", torch.randn(3, 5, 5))

    def forward(self, q, k, v):
        return self.function(self, q, k, v)


def program_of(function, *, shapes=((2, 3, 5, 4),) * 3, train=False, seed=0) -> Program:
    torch.manual_seed(seed)
    program = capture(Net(function), tuple(torch.randn(s) for s in shapes), train=train)
    return apply(Canonicalize(), program).program


def fused(program: Program) -> PassResult:
    """The result of one run, with the effect's own check, and of a second run."""
    result = apply(FuseAttention(), program)
    verify(result.program)
    report = check(FuseAttention(), program, result.program, exact=result.exact)
    assert report.passed, report
    assert not apply(FuseAttention(), result.program).modified
    return result


def missed(result: PassResult) -> list[str]:
    return [remark.message for remark in result.remarks if remark.kind == "missed"]


# -- real models -------------------------------------------------------------------------------


def _text(kind: str, **options) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=99, attn_implementation="eager", use_cache=False, **options
    )
    return getattr(transformers, f"{kind}Model")(config)


def _timm(make: str, **options) -> nn.Module:
    import timm

    model = getattr(timm.models.vision_transformer, make)(32, 8, **options)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


def _vit() -> nn.Module:
    import transformers

    return transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
            image_size=32, patch_size=8, attn_implementation="eager",
        )
    )  # fmt: skip


_GPT2 = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
_BERT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 16,
}  # fmt: skip
_SPELT_OUT = {
    "gpt2": lambda: _text("GPT2", **_GPT2),
    "bert": lambda: _text("Bert", **_BERT),
    "llama": lambda: _text("Llama", num_key_value_heads=1, **_BERT),
    "qwen3": lambda: _text("Qwen3", num_key_value_heads=1, head_dim=16, **_BERT),
    "vit": _vit,
    "timm_vit": lambda: _timm("VisionTransformer", depth=2, embed_dim=32, num_heads=2),
}
_LAYERS = {"vit": 3}


@cache
def spelt_out(name: str) -> Program:
    """A model whose attention is written as two products and a softmax."""
    torch.manual_seed(0)
    image = torch.randn(2, 3, 32, 32) if "vit" in name else torch.randint(0, 99, (2, 7))
    return apply(Canonicalize(), capture(_SPELT_OUT[name]().eval(), (image,))).program


def _torchvision_vit() -> Program:
    """Its head is zero at first, and the comparison would see nothing."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64).eval()
    nn.init.normal_(model.heads.head.weight)
    return apply(Canonicalize(), capture(model, (torch.randn(2, 3, 32, 32),))).program


@pytest.mark.parametrize("name", ["vit", "timm_vit", "gpt2", "bert", "llama"])
def test_fires_on_real_models(name):
    """Every layer's attention and feed-forward block: as many of each as there are layers."""
    program = _torchvision_vit() if name == "vit" else canonical(name)
    result = fused(program)
    assert float(program(*program.examples)[0].abs().max()) > 0
    assert cost(result.program).flops == cost(program).flops
    both = apply(FuseFfn(), result.program)
    assert targets(both.program).count(FUSED) == targets(both.program).count("pruna.ffn") == 2
    assert not missed(result)
    assert not missed(both)
    assert "aten.softmax.int" not in targets(result.program)


@pytest.mark.parametrize("name", sorted(_SPELT_OUT))
def test_fires_on_real_models_that_spell_attention_out(name):
    result = fused(spelt_out(name))
    assert targets(result.program).count(FUSED) == _LAYERS.get(name, 2)
    assert not missed(result)
    assert "aten.softmax.int" not in targets(result.program)


@pytest.mark.parametrize("program", [lambda: canonical("llama"), lambda: spelt_out("llama")])
def test_llama_reads_its_grouped_keys_in_place(program):
    result = fused(program())
    for node in result.program.calls(fuse_attention.ATTENTION):
        query, key, value = node.args[:3]
        heads = [n.meta["val"].shape[1] for n in (query, key, value)]
        assert heads[0] == 2 * heads[1] == 2 * heads[2]


def test_swin_says_what_stands_in_the_way_of_shifted_windows():
    result = fused(canonical("swin"))
    assert targets(result.program).count(FUSED) == 2
    (message,) = missed(result)
    assert message.startswith("its scores are computed by reshape_")


def test_gpt2_of_a_fixed_batch_is_causal():
    """Its mask is a constant there, and equals the causal one."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=99, use_cache=False, **_GPT2)
    model = transformers.GPT2Model(config).eval()
    program = capture(model, (torch.randint(0, 99, (1, 7)),), dynamic_batch=False)
    for pass_ in (Canonicalize(), FoldConstants()):
        program = apply(pass_, program).program
    result = fused(program)
    *fusions, projections = [r.message for r in result.remarks]
    assert fusions == [
        "fused attention (causal) into attention", "fused attention (causal) into attention_1"
    ]  # fmt: skip
    assert projections == (
        "2 layers project queries, keys and values; they stay layers: fuse-attention-blocks fuses "
        "those that only views part from their attention"
    )


# -- spellings ---------------------------------------------------------------------------------


_PLAIN = "fused attention into attention"
_MASKED = "fused attention (masked) into attention"
_CAUSAL = "fused attention (causal) into attention"
_GROUPED = "fused attention (3 heads of queries share one of keys) into attention"


@pytest.mark.parametrize(
    ("function", "remark"),
    [
        (spell.products, _PLAIN),
        (spell.scaled_query, _PLAIN),
        (spell.einsum, _PLAIN),
        (spell.tokens_first, _PLAIN),
        (spell.heads_outside, _PLAIN),
        (spell.keys_first, _PLAIN),
        (spell.values_first, _PLAIN),
        (spell.permuted, _PLAIN),
        (spell.three_dimensions, _PLAIN),
        (spell.baddbmm, _MASKED),
        (spell.filled, _MASKED),
        (spell.where_lowest, _CAUSAL),
        (spell.biased, _MASKED),
        (spell.torch_bias, _MASKED),
        (spell.torch_grouped, _GROUPED),
        (spell.repeated, _GROUPED),
        (spell.expanded, _GROUPED),
        (lambda _, q, k, v: sdpa(q, k, v, is_causal=True), _CAUSAL),
        (lambda net, q, k, v: sdpa(q, k, v, net.causal), _CAUSAL),
        (lambda net, q, k, v: sdpa(q, k, v, net.added), _CAUSAL),
        (lambda net, q, k, v: sdpa(q, k, v, net.causal | ~net.causal), _MASKED),
        (lambda net, q, k, v: ((q @ k.mT) + net.bias * 2).softmax(-1) @ v, _MASKED),
        (lambda _, q, k, v: (1.5 + q @ k.mT).softmax(-1) @ v, _PLAIN),
    ],
)
def test_spellings(function, remark):
    result = fused(program_of(function))
    assert [r.message for r in result.remarks] == [remark]
    found = targets(result.program)
    assert found.count(FUSED) == 1
    assert not {"aten.matmul", "aten.bmm", "aten.einsum", "aten.softmax.int"} & set(found)
    inside = {"aten.scaled_dot_product_attention", "aten.expand", "aten.repeat_interleave"}
    assert not inside & set(found)


@settings(max_examples=8)
@given(
    st.integers(1, 3), st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]), st.integers(1, 6),
    st.integers(1, 6), st.integers(1, 5), st.integers(1, 5),
    st.sampled_from(["none", "causal", "seen", "added"]), st.integers(0, 99),
)  # fmt: skip
def test_any_shape(batch, heads, queries, keys, size, out, mask, seed):
    """Torch's operator, and the formula, give one fused operator of the same function."""

    def f(net, q, k, v):
        seen = (q[:, :1, :, :1] < 9) & (k[:, :1, :, 0].unsqueeze(-2) < 9)
        added = q[:, :1, :, :1] * k[:, :1, :, 0].unsqueeze(-2)
        given = {"seen": seen, "added": added}.get(mask)
        groups = heads[0] // heads[1]
        k, v = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (k, v))
        return sdpa(q, k, v, given, is_causal=mask == "causal", scale=0.6)

    shapes = (
        (batch + 1, heads[0], queries, size), (batch + 1, heads[1], keys, size),
        (batch + 1, heads[1], keys, out),
    )  # fmt: skip
    result = fused(program_of(f, shapes=shapes, seed=seed))
    assert targets(result.program).count(FUSED) == 1


@settings(max_examples=12)
@given(*[st.permutations(letters) for letters in ("bhqd", "bhkd", "bhkd", "bhqk", "bhqd")])
def test_any_order_of_dimensions(q, k, v, s, y):
    """Every operand, the scores and the result in orders of their own."""
    q, k, v, s, y = ("".join(letters) for letters in (q, k, v, s, y))

    def f(_net, *given):
        a, b, c = (
            torch.einsum(f"bhnd->{letters.translate(str.maketrans('qk', 'nn'))}", t)
            for letters, t in zip((q, k, v), given, strict=True)
        )
        shares = torch.einsum(f"{q},{k}->{s}", a, b).softmax(s.index("k"))
        return torch.einsum(f"{s},{v}->{y}", shares, c)

    result = fused(program_of(f, shapes=((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4))))
    assert targets(result.program).count(FUSED) == 1, missed(result)


def test_is_saved_and_read_again(tmp_path):
    program = fused(canonical("llama")).program
    save_program(program, tmp_path / "program.pt2")
    again = load_program(tmp_path / "program.pt2")
    assert torch.equal(again(*program.examples)[0], program(*program.examples)[0])
    assert targets(again).count(FUSED) == 2


def test_decomposes_into_torchs_own_operator():
    program = program_of(lambda _, q, k, v: sdpa(q, k[:, :1], v[:, :1], enable_gqa=True))
    spelt = decompose(fused(program).program)
    assert targets(spelt).count("aten.scaled_dot_product_attention") == 1
    assert not list(spelt.calls(fuse_attention.ATTENTION))
    torch.testing.assert_close(spelt(*program.examples), program(*program.examples))


# -- refusals ----------------------------------------------------------------------------------


def _shares_read_twice(net, q, k, v):
    shares = torch.softmax(q @ k.mT, -1)
    return shares @ v + shares.sum(-1, keepdim=True)


def _scores_read_twice(net, q, k, v):
    scores = q @ k.mT
    return torch.softmax(scores * 0.5, -1) @ v + scores.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_shares_read_twice, "softmax is also read by sum_1"),
        (_scores_read_twice, "matmul is also read by sum_1"),
        (
            lambda _, q, k, v: torch.softmax(q @ k.mT, 1) @ v,
            "its softmax runs over dimension 1, which is not the one of the keys",
        ),
        (
            lambda _, q, k, v: torch.softmax(q @ k.mT, -2) @ v,
            "its softmax runs over dimension -2, which is not the one of the keys",
        ),
        (
            lambda _, q, k, v: torch.softmax(torch.tanh(q @ k.mT), -1) @ v,
            "its scores are computed by tanh, not by a product",
        ),
        (
            lambda _, q, k, v: torch.softmax(q @ k.mT, -1).exp() @ v,
            "its shares are read by exp, not by a product with values",
        ),
        (
            lambda net, q, k, v: torch.softmax(((q @ k.mT) + net.bias) * 2, -1) @ v,
            "mul scales scores that are masked already",
        ),
        (
            lambda _, q, k, v: torch.softmax((q @ k.mT).masked_fill(q[..., :1] > 0, -5), -1) @ v,
            "gt hides scores behind -5, which leaves them a weight",
        ),
        (
            lambda _, q, k, v: torch.softmax(
                (q @ k.mT).masked_fill(q[..., :1] > 0, torch.finfo(torch.float32).min), -1
            ) @ v,
            "gt hides scores behind -3.40282e+38: rows that it hides wholly need not be zero; "
            "only -inf or a constant is",
        ),
        (
            lambda net, q, k, v: torch.softmax(
                torch.where(net.causal, (q @ k.mT) + net.bias, -math.inf), -1
            ) @ v,
            "its scores are masked in two ways, by addition and by filling in",
        ),
        (
            lambda net, q, k, v: torch.softmax(q[:, :1] @ k[:, :1].mT + net.bias, -1) @ v,
            "a mask widens the scores",
        ),
        (
            lambda _, q, k, v: torch.softmax(q[:, :1] @ k.mT, -1) @ v,
            "1 heads of queries and 3 heads of keys broadcast against each other",
        ),
        (
            lambda _, q, k, v: torch.softmax(q @ k[:1].mT, -1) @ v,
            "query [s",
        ),
        (
            lambda _, q, k, v: torch.softmax(q.double() @ k.double().mT, -1).float() @ v,
            "its shares are read by to_2, not by a product with values",
        ),
        (
            lambda _, q, k, v: torch.einsum("bhqk,bhkd->bhd", (q @ k.mT).softmax(-1), v),
            "its shares are read by einsum, not by a product with values",
        ),
    ],
)  # fmt: skip
def test_refuses_with_the_reason(function, reason):
    result = fused(program_of(function))
    assert not result.modified
    (message,) = missed(result)
    assert message.startswith(reason)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (
            lambda _, q, k, v: sdpa(q, k, v, dropout_p=0.5),
            "it has dropout; call model.eval() before capture",
        ),
        (
            lambda _, q, k, v: F.dropout(torch.softmax(q @ k.mT, -1), 0.5, training=True) @ v,
            "dropout drops values in training mode",
        ),
    ],
)
def test_refuses_live_dropout(function, reason):
    assert missed(apply(FuseAttention(), program_of(function, train=True))) == [reason]


def test_refuses_dropout_that_canonicalize_removes():
    def f(net, q, k, v):
        return F.dropout(torch.softmax(q @ k.mT, -1), 0.5, training=False) @ v

    program = capture(Net(f), tuple(torch.randn(2, 3, 5, 4) for _ in range(3)))
    assert missed(apply(FuseAttention(), program)) == [
        "dropout stands in between; run canonicalize first"
    ]


def test_a_softmax_that_is_no_attention_has_no_remark():
    result = fused(program_of(lambda _, q, k, _v: torch.softmax(q * 2, -1) + k))
    assert not result.modified
    assert not result.remarks


# -- training and controls ---------------------------------------------------------------------


def test_the_fused_program_trains():
    program = fused(canonical("llama")).program
    logits = program(*program.examples)[0]
    logits.square().sum().backward()
    assert all(
        float(t.grad.abs().max()) > 0
        for name, t in program.tensors().items()
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    )


@pytest.mark.parametrize("wrong", ["scale", "mask", "value", "key"])
def test_the_check_sees_a_wrong_fusion(wrong, monkeypatch):
    def f(net, q, k, v):
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.5 + net.bias
        return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v)

    program = program_of(f)
    right = fuse_attention._joined

    def joined(*args):
        block = right(*args)
        fields = dict(vars(block))
        changed = {
            "scale": {"scale": block.scale * 1.001},
            "mask": {"mask": type(block.mask)()},
            "value": {"value": block.key},
            "key": {"key": block.value},
        }[wrong]
        return fuse_attention._Block(**(fields | changed))

    assert fused(program).modified
    monkeypatch.setattr(fuse_attention, "_joined", joined)
    result = apply(FuseAttention(), program)
    assert result.modified
    assert not check(FuseAttention(), program, result.program).passed
