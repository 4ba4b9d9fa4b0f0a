"""Tensors go back into the user's module where its class can express the program; else nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.errors import PassError, VerificationError
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.prune_channels import PruneChannels
from pruna_ir.program import Program
from pruna_ir.training import with_state
from pruna_ir.transform import Context, Rewrite, apply
from pruna_ir.write_back import write_back

aten = torch.ops.aten


class Net(nn.Module):
    """A grouped, a depthwise and a transposed convolution, two norms and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.layer_norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.stem(x)).relu()
        y = self.up(self.depthwise(y)).mean((2, 3))
        return self.head(self.layer_norm(y))


def captured() -> tuple[Net, Program]:
    torch.manual_seed(0)
    net = Net()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    return net, capture(net, (torch.randn(2, 3, 9, 7),))


def pruned(program: Program) -> Program:
    """Channels 1 and 5 of the stem, and output 2 of the transposed convolution, removed."""
    keep, up = [0, 2, 3, 4, 6, 7], [0, 1, 3, 4, 5]
    t = {name: tensor.detach() for name, tensor in program.tensors().items()}
    new = {"stem.weight": t["stem.weight"][keep]}
    new |= {f"norm.{n}": t[f"norm.{n}"][keep]
            for n in ("weight", "bias", "running_mean", "running_var")}
    new |= {f"depthwise.{n}": t[f"depthwise.{n}"][keep] for n in ("weight", "bias")}
    new |= {"up.weight": t["up.weight"][keep][:, up], "up.bias": t["up.bias"][up]}
    new |= {f"layer_norm.{n}": t[f"layer_norm.{n}"][up] for n in ("weight", "bias")}
    new |= {"head.weight": t["head.weight"][:, up]}
    rw = Rewrite(program, "by-hand", Context())
    for name, tensor in new.items():
        rw.set_tensor(name, tensor)
    for node in rw.calls(aten.layer_norm.default):
        rw.update(node, normalized_shape=[5])
    for node in rw.calls(aten.conv2d.default):
        if rw.call(node).arg("groups") == 8:
            rw.update(node, groups=6)
    return rw.finish()


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_a_pruned_program_goes_back_into_its_class() -> None:
    net, program = captured()
    small = pruned(program)
    write_back(small, net)
    x = torch.randn(3, 3, 9, 7)
    assert torch.allclose(net.eval()(x), small(x)[0], atol=1e-6)
    assert (net.stem.out_channels, net.norm.num_features) == (6, 6)
    assert (net.depthwise.in_channels, net.depthwise.groups) == (6, 6)
    assert (net.up.in_channels, net.up.out_channels) == (6, 5)
    assert (net.layer_norm.normalized_shape, net.head.in_features) == ((5,), 5)


def test_the_module_still_trains_and_keeps_its_mode() -> None:
    net, program = captured()
    net.train()
    write_back(pruned(program), net)
    assert net.training
    net(torch.randn(4, 3, 9, 7)).sum().backward()
    assert net.stem.weight.grad is not None
    assert net.stem.weight.grad.shape == (6, 3, 3, 3)


def test_the_module_shares_nothing_with_the_program() -> None:
    net, program = captured()
    write_back(program, net)
    before = program.hash()
    with torch.no_grad():
        net.head.weight.zero_()
        net.norm.running_mean.zero_()
    assert program.hash() == before


def test_trained_values_go_back() -> None:
    net, program = captured()
    state = {
        name: tensor + 1 if tensor.is_floating_point() else tensor
        for name, tensor in program.tensors().items()
    }
    write_back(with_state(program, state), net)
    assert torch.equal(net.head.bias, program.tensor("head.bias") + 1)


def test_a_tensor_without_a_place_is_named_and_nothing_changes() -> None:
    net, program = captured()
    before = state_of(net)
    rw = Rewrite(program, "by-hand", Context())
    node = next(rw.calls(aten.conv2d.default))
    rw.update(node, bias=rw.constant(nn.Parameter(torch.zeros(8)), "stem.bias", before=node))
    with pytest.raises(PassError, match=r"Net has no place for stem\.bias; write the program"):
        write_back(rw.finish(), net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_folded_norm_is_found_out_and_nothing_changes() -> None:
    net, program = captured()
    before = state_of(net)
    rw = Rewrite(program, "by-hand", Context())
    norm = next(rw.calls(aten.batch_norm.default))
    rw.replace(norm, rw.call(norm).producer("input"))
    with pytest.raises(VerificationError, match=r"no longer reads norm\.weight, norm\.bias"):
        write_back(rw.finish(), net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training


def test_shapes_written_into_the_class_are_found_out() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 6)
            self.b = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).relu().reshape(-1, 2, 3).sum(1))

    net = Fixed()
    program = capture(net, (torch.randn(2, 4),))
    t = program.tensors()
    rw = Rewrite(program, "by-hand", Context())
    rw.set_tensor("a.weight", t["a.weight"][[0, 1, 3, 4]])
    rw.set_tensor("a.bias", t["a.bias"][[0, 1, 3, 4]])
    rw.set_tensor("b.weight", t["b.weight"][:, :2])
    for node in rw.calls(aten.reshape.default, aten.view.default):
        shape = "shape" if node.target is aten.reshape.default else "size"
        rw.update(node, **{shape: [-1, 2, 2]})
    with pytest.raises(VerificationError, match=r"does not run .* Nothing was changed"):
        write_back(rw.finish(), net)
    assert net.a.out_features == 6


def test_pruned_heads_of_gpt2_go_back() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_head=3, n_embd=12, vocab_size=31, n_positions=16,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 31, (2, 5))
    # The same model without head 1: columns 4..8 of each of q, k and v, and those rows behind.
    keep = torch.tensor([i for i in range(12) if not 4 <= i < 8])
    columns = torch.cat([keep, keep + 12, keep + 24])
    small = copy.deepcopy(model)
    attention = small.transformer.h[0].attn
    attention.c_attn.weight = nn.Parameter(attention.c_attn.weight[:, columns])
    attention.c_attn.bias = nn.Parameter(attention.c_attn.bias[columns])
    attention.c_proj.weight = nn.Parameter(attention.c_proj.weight[keep])
    attention.c_attn.nf, attention.split_size, attention.num_heads = 24, 8, 2
    program = capture(small, (), {"input_ids": ids, "use_cache": False})
    write_back(program, model, kwargs={"use_cache": False})
    attention = model.transformer.h[0].attn
    assert (attention.num_heads, attention.split_size, attention.c_attn.nf) == (2, 8, 24)
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, program(ids)[0], atol=1e-5)


# -- real architectures ------------------------------------------------------------------------

Given = tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, torch.Tensor]]


def image(size: int = 32) -> tuple[torch.Tensor, ...]:
    return (torch.randn(2, 3, size, size),)


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 50, (2, 9))}


def resnet50() -> Given:
    import torchvision

    return torchvision.models.resnet50(num_classes=10), image(), {}


def swin() -> Given:
    import torchvision

    model = torchvision.models.SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10)
    return model, image(64), {}


def vit() -> Given:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    return model, image(), {}


def gpt2() -> Given:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=48, n_layer=2, n_head=4, vocab_size=50, n_positions=16, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), (), tokens()


def bert() -> Given:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        vocab_size=50,
    )  # fmt: skip
    return BertForSequenceClassification(config), (), tokens()


def llama() -> Given:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), (), tokens()


MODELS: dict[str, tuple[Callable[[], Given], tuple[str, ...]]] = {
    "resnet50": (resnet50, ()),
    "swin": (swin, ()),
    "vit": (vit, ()),
    "vit, heads only": (vit, ("heads",)),
    "gpt2": (gpt2, ()),
    "gpt2, heads only": (gpt2, ("heads",)),
    "gpt2, width only": (gpt2, ("width",)),
    "bert": (bert, ()),
    "bert, heads and neurons": (bert, ("heads", "ffn")),
    "llama": (llama, ()),
    "llama, heads only": (llama, ("heads",)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_architecture_runs_in_its_own_class(name: str) -> None:
    make, kinds = MODELS[name]
    torch.manual_seed(0)
    module, inputs, named = make()
    module.eval()
    program = apply(Canonicalize(), capture(module, inputs, named)).program
    small = apply(PruneChannels(ratio=0.5, kinds=kinds), program).program
    before = sum(parameter.numel() for parameter in module.parameters())
    write_back(small, module)
    assert sum(parameter.numel() for parameter in module.parameters()) < before
    again = apply(Canonicalize(), capture(module, inputs, named)).program
    assert {n: t.shape for n, t in again.tensors().items()} == {
        n: t.shape for n, t in small.tensors().items()
    }
    for actual, expected in zip(again(*program.examples), small(*program.examples), strict=True):
        assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_tied_weights_stay_tied() -> None:
    module, inputs, named = gpt2()
    program = apply(Canonicalize(), capture(module.eval(), inputs, named)).program
    small = apply(PruneChannels(ratio=0.5, kinds=("width",)), program).program
    write_back(small, module)
    assert module.lm_head.weight is module.transformer.wte.weight
    assert module.transformer.wte.embedding_dim == module.lm_head.in_features == 24


def test_a_class_that_cannot_lose_heads_says_so_and_stays() -> None:
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    module = VisionTransformer(32, 16, 2, 4, 48, 96, num_classes=10).eval()
    nn.init.normal_(module.heads.head.weight)
    program = apply(Canonicalize(), capture(module, image())).program
    before = state_of(module)
    small = apply(PruneChannels(ratio=0.5, kinds=("heads",)), program).program
    with pytest.raises(VerificationError, match=r"VisionTransformer does not run .* Nothing was"):
        write_back(small, module)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    # Its hidden neurons are another matter.
    write_back(apply(PruneChannels(ratio=0.5, kinds=("ffn",)), program).program, module)
    assert module.encoder.layers[0].mlp[0].out_features == 48
