"""prune-channels: the weakest channels go, the oracle holds, and bad options are refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pruna_ir import capture, verify
from pruna_ir.checks import check
from pruna_ir.coupling import RemovalPlan
from pruna_ir.equivalence import relative_error, run_float64
from pruna_ir.errors import UsageError
from pruna_ir.passes.apply_plan import ApplyPlan
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.fold_batch_norm import FoldBatchNorm
from pruna_ir.passes.importance import CRITERIA
from pruna_ir.passes.mask_weights import MaskWeights
from pruna_ir.passes.prune_channels import PruneChannels
from pruna_ir.pipeline import Pipeline
from pruna_ir.transform import apply
from tests.networks import ConvNet, seeded

TOLERANCE = 1e-11


def two_layers():
    """Linear 3 -> 10 -> 2; row i of the first layer has magnitude 10 - i."""
    module = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 2))
    with torch.no_grad():
        module[0].weight.copy_(torch.arange(10, 0, -1.0)[:, None].expand(10, 3))
    return capture(module, (torch.randn(2, 3),))


def shapes(program):
    return {name: list(tensor.shape) for name, tensor in program.tensors().items()}


def parameters(program):
    sizes = {t.data_ptr(): t.numel() for t in program.tensors().values()}
    return sum(sizes.values())


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_the_weakest_rows_go(criterion):
    program = two_layers()
    small = apply(PruneChannels(ratio=0.3, criterion=criterion), program).program
    assert torch.equal(small.tensor("0.weight"), program.tensor("0.weight")[:7])
    assert torch.equal(small.tensor("2.weight"), program.tensor("2.weight")[:, :7])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"ratio": 0.0}, 10),
        ({"ratio": 0.3}, 7),
        ({"ratio": 0.3, "round_to": 4}, 8),
        ({"ratio": 0.3, "round_to": 16}, 10),
        ({"ratio": 0.99}, 1),
        ({"ratio": 0.99, "min_channels": 3}, 3),
        ({"ratio": 0.99, "min_channels": 3, "round_to": 2}, 4),
        ({"ratio": 0.5, "ranking": "global"}, 5),
        ({"ratio": 0.5, "exclude": ("0.*",)}, 10),
        ({"ratio": 0.5, "exclude": ("2",)}, 10),
        ({"ratio": 0.5, "exclude": ("1",)}, 5),
        ({"ratio": 0.5, "ratios": ("0=0.2",)}, 8),
        ({"ratio": 0.5, "ratios": ("ffn=0.2",)}, 8),
        ({"ratio": 0.5, "ratios": ("conv=0.2",)}, 5),
        ({"ratio": 0.5, "kinds": ("ffn",)}, 5),
        ({"ratio": 0.5, "kinds": ("conv",)}, 10),
        ({"ratio": 0.5, "steps": 4}, 5),
        ({"ratio": 0.5, "of": "parameters"}, 4),
    ],
)
def test_options_say_how_many_stay(options, kept):
    assert shapes(apply(PruneChannels(**options), two_layers()).program)["0.weight"] == [kept, 3]


def test_a_global_ranking_takes_more_from_weaker_groups():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    )
    with torch.no_grad():
        module[0].weight.copy_(torch.ones(8, 3))
        module[2].weight.copy_(torch.tensor([9.0] * 2 + [0.1] * 6)[:, None].expand(8, 8))
    program = capture(module, (torch.randn(2, 3),))
    small = apply(PruneChannels(ratio=0.375, ranking="global"), program).program
    assert shapes(small)["2.weight"] == [2, 8]


def test_tied_rows_lose_in_the_order_of_their_index():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    nn.init.ones_(module[0].weight)
    program = capture(module, (torch.randn(2, 3),))
    first, second = (apply(PruneChannels(), program).program for _ in range(2))
    assert first.hash() == second.hash()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, r"ratio must be in \[0, 1\), not 1.0"),
        ({"ratio": -0.1}, r"not -0.1"),
        ({"ratio": math.nan}, r"not nan"),
        ({"criterion": "l3"}, "unknown criterion 'l3'; known: .*l1, l2"),
        ({"ranking": "gobal"}, "unknown ranking 'gobal'; did you mean 'global'"),
        ({"round_to": 0}, "round_to must be at least 1, not 0"),
        ({"min_channels": 0}, "min_channels must be at least 1, not 0"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"of": "flop"}, "unknown of 'flop'; did you mean 'flops'"),
        ({"aggregate": "median"}, "unknown aggregate 'median'"),
        ({"normalise": "men"}, "unknown normalise 'men'; did you mean 'mean'"),
        ({"kinds": ("head",)}, "kinds: unknown kind 'head'; did you mean 'heads'"),
        ({"max_ratio": 0.0}, r"max_ratio must be in \(0, 1\], not 0.0"),
        ({"max_ratio": 1.1}, r"max_ratio must be in \(0, 1\], not 1.1"),
        ({"ratios": ("conv:0.3",)}, r"an entry of ratios is KIND=RATIO .*, not 'conv:0.3'"),
        (
            {"ratio": 0.95, "ranking": "global"},
            r"a global ratio of 0\.95 is more than max_ratio=0\.9 allows",
        ),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        PruneChannels(**options)


@pytest.mark.parametrize("option", ["exclude", "ratios"])
def test_a_glob_that_means_nothing_is_refused(option):
    globs = {"exclude": ("leyer.*",), "ratios": ("leyer.*=0.3",)}
    message = (
        rf"prune-channels: {option}: 'leyer\.\*' is the name of no tensor or module; the tensors "
        r"are called 0\.weight, 0\.bias, 2\.weight\.\.\."
    )
    with pytest.raises(UsageError, match=message):
        apply(PruneChannels(**{option: globs[option]}), two_layers())


def test_options_in_pipeline_text():
    text = (
        'prune-channels{ratio=0.3,of=flops,ranking=global,ratios=["conv=0.4","layer4.*=0.2"],'
        "kinds=[conv,heads],steps=2,round_to=8}"
    )
    (pass_,) = Pipeline.parse(text).passes()
    assert pass_ == PruneChannels(
        ratio=0.3, of="flops", ranking="global", ratios=("conv=0.4", "layer4.*=0.2"),
        kinds=("conv", "heads"), steps=2, round_to=8,
    )  # fmt: skip
    assert str(Pipeline.parse(text)) == text


def transformer():
    """Width 12, 3 heads of 4, 10 hidden neurons, behind a convolution of 6 and before a head."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.patch = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 12, 2, 2)
            self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
            self.up, self.down = nn.Linear(12, 10), nn.Linear(10, 12)
            self.head = nn.Linear(12, 2)

        def forward(self, x):
            x = self.patch(self.stem(x).relu()).flatten(2).transpose(1, 2)
            n, s, _ = x.shape
            q, k, v = self.qkv(x).view(n, s, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + self.out(y.transpose(1, 2).reshape(n, s, 12))
            return self.head((x + self.down(self.up(x).relu())).mean(1))

    program = capture(Block(), (torch.randn(2, 3, 8, 8),))
    return apply(Canonicalize(), program).program


@pytest.mark.parametrize(
    ("options", "stem", "width", "heads", "hidden"),
    [
        ({}, 3, 6, 2, 5),
        ({"kinds": ("conv",)}, 3, 12, 3, 10),
        ({"kinds": ("heads", "ffn")}, 6, 12, 2, 5),
        ({"kinds": ("transformer",)}, 6, 6, 2, 5),
        ({"ratios": ("conv=0.34", "transformer=0.4")}, 4, 8, 2, 6),
        ({"ratio": 0.0, "ratios": ("ffn=0.7",)}, 6, 12, 3, 3),
        ({"ratios": ("transformer=0.4", "up=0.9")}, 3, 8, 2, 1),
        ({"ratio": 0.34, "round_to": 4}, 4, 8, 2, 8),
    ],
)
def test_kinds_and_their_ratios(options, stem, width, heads, hidden):
    small = shapes(apply(PruneChannels(**options), transformer()).program)
    assert small["stem.weight"][0] == stem
    assert small["patch.weight"][0] == width
    assert small["qkv.weight"] == [12 * heads, width]
    assert small["up.weight"] == [hidden, width]


def test_remarks_name_the_kinds():
    result = apply(PruneChannels(kinds=("conv", "heads", "ffn")), transformer())
    told = [remark.message.split(" from ")[0] for remark in result.remarks]
    assert "removed 3 of 6 conv channels" in told
    assert "removed 1 of 3 heads" in told
    assert "removed 5 of 10 ffn channels" in told
    assert any(text.endswith("stay: kinds=conv,heads,ffn leaves width out") for text in told)


# -- rounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", ["layer", "global"])
@pytest.mark.parametrize("make", [two_layers, transformer])
@pytest.mark.parametrize("steps", [2, 3, 7])
def test_rounds_end_at_the_same_number_of_channels(steps, make, ranking):
    program = make()
    at_once = apply(PruneChannels(ratio=0.5, ranking=ranking), program)
    in_rounds = apply(PruneChannels(ratio=0.5, ranking=ranking, steps=steps), program)
    if ranking == "layer":
        assert shapes(in_rounds.program) == shapes(at_once.program)
    assert removed_units(in_rounds) == removed_units(at_once)
    inputs = program.examples
    assert error_against_oracle(program, in_rounds, inputs) < TOLERANCE


def removed_units(result):
    """The number of units that the remarks tell of."""
    told = [r.message.split() for r in result.remarks if r.kind == "applied"]
    return sum(int(words[1]) for words in told)


def test_later_rounds_score_what_earlier_ones_left():
    """Row 0 of the second layer lives off the first layer's weakest channel."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([1.0, 2, 8, 9])[:, None].expand(4, 3))
        module[1].weight.copy_(
            torch.tensor([[50.0, 1, 1, 1], [0, 0, 5, 5], [0, 0, 6, 6], [0, 0, 7, 7]])
        )
    program = capture(module, (torch.randn(2, 3),))

    def kept(steps):
        small = apply(PruneChannels(ratio=0.5, steps=steps), program).program
        return small.tensor("1.weight").sum(1).tolist()

    assert kept(1) == [2.0, 14.0]
    # The second round no longer sees the weight of 50.
    assert kept(2) == [12.0, 14.0]


# -- the origin and the plan -------------------------------------------------------------------


def test_the_result_remembers_what_it_was_pruned_from():
    program = two_layers()
    result = apply(PruneChannels(ratio=0.3), program).program
    assert result.origin.program is program
    assert result.origin.removed["0.weight"] == {0: (7, 8, 9)}


def test_pruning_twice_counts_from_the_first_program():
    program = transformer()
    once = apply(PruneChannels(ratio=0.34), program).program
    twice = apply(PruneChannels(ratio=0.5, criterion="l2"), once).program
    assert twice.origin.program is program
    plan = RemovalPlan(twice.origin.removed)
    again = apply(ApplyPlan(plan.to_json()), program).program
    assert again.hash() == twice.hash()


def test_a_saved_plan_is_the_whole_removal(tmp_path):
    program, file = transformer(), tmp_path / "new" / "plan.json"
    once = apply(PruneChannels(ratio=0.34), program).program
    twice = apply(PruneChannels(ratio=0.5, save_plan=str(file)), once).program
    assert [path.name for path in file.parent.iterdir()] == ["plan.json"]
    again = apply(ApplyPlan(str(file)), program)
    assert again.program.hash() == twice.hash()


def test_weights_keep_their_names():
    program = transformer()
    small = apply(PruneChannels(), program).program
    assert list(small.tensors()) == list(program.tensors())


def test_remarks_say_what_went_and_what_stays():
    result = apply(PruneChannels(), two_layers())
    texts = {(remark.kind, remark.message.split(" [")[0]) for remark in result.remarks}
    assert texts == {
        ("applied", "removed 5 of 10 ffn channels from 0.weight[0], 0.bias[0], 2.weight[1]"),
        ("missed", "the 2 channels of 2.weight[0] stay: program output output"),
    }


def test_a_model_without_free_channels_stays_and_says_why():
    program = capture(nn.Linear(3, 2), (torch.randn(2, 3),))
    result = apply(PruneChannels(), program)
    assert not result.modified
    assert [remark.kind for remark in result.remarks] == ["missed"]


def test_a_ratio_of_zero_changes_nothing():
    result = apply(PruneChannels(ratio=0.0), two_layers())
    assert not result.modified
    assert result.oracle is None


def test_a_scope_confines_it():
    torch.manual_seed(0)
    program = apply(Canonicalize(), capture(seeded(ConvNet), (torch.randn(2, 3, 9, 9),))).program
    inside = apply(PruneChannels(), program, scope="nowhere")
    assert not inside.modified


def error_against_oracle(program, result, inputs):
    """The worst relative error in float64."""
    small = run_float64(result.program, inputs)
    truth = result.oracle(program, inputs)
    return max(relative_error(a, b) for a, b in zip(small, truth, strict=True))


def test_the_pipeline_s_own_check_holds():
    program = apply(Canonicalize(), capture(seeded(ConvNet), (torch.randn(2, 3, 9, 9),))).program
    pass_ = PruneChannels()
    result = apply(pass_, program)
    assert check(pass_, program, result.program, result.oracle).measured < TOLERANCE


def tv(name, **options):
    def make():
        import torchvision

        return getattr(torchvision.models, name)(num_classes=10, **options), image(32)

    return make


def image(size):
    return (torch.randn(2, 3, size, size),)


def vgg16_bn():
    import torchvision

    model = torchvision.models.vgg16_bn(num_classes=10, dropout=0.0, init_weights=False)
    # The stock classifier has 120 million weights; a narrow one has the same structure.
    model.classifier[0], model.classifier[3] = nn.Linear(512 * 49, 24), nn.Linear(24, 24)
    model.classifier[6] = nn.Linear(24, 10)
    return model, image(32)


def vit_b_16():
    from torchvision.models.vision_transformer import VisionTransformer

    model = VisionTransformer(32, 16, 2, 4, 48, 96, num_classes=10)
    nn.init.normal_(model.heads.head.weight)
    return model, image(32)


def vit_tiny():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    return model, image(32)


def tokens():
    return (torch.randint(0, 50, (2, 9)),)


def bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        vocab_size=50,
    )  # fmt: skip
    return BertModel(config), tokens()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=48, n_layer=2, n_head=4, vocab_size=50, n_positions=16, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), tokens()


# model, share of the parameters that may remain
MODELS = {
    "resnet50": (tv("resnet50"), 0.3),
    "vgg16_bn": (vgg16_bn, 0.35),
    "densenet": (tv("DenseNet", block_config=(3, 6, 9, 6)), 0.35),
    "mobilenet_v2": (tv("mobilenet_v2"), 0.4),
    "mobilenet_v3_large": (tv("mobilenet_v3_large"), 0.4),
    "efficientnet_b0": (tv("efficientnet_b0"), 0.4),
    "vit_b_16": (vit_b_16, 0.5),
    "vit_tiny": (vit_tiny, 0.5),
    "bert": (bert, 0.85),
    "gpt2": (gpt2, 0.5),
}


@pytest.mark.parametrize("name", MODELS)
def test_real_architectures_keep_their_oracle(name):
    torch.manual_seed(0)
    make, share = MODELS[name]
    module, inputs = make()
    program = apply(Canonicalize(), capture(seeded_norms(module).eval(), inputs)).program
    folded = apply(FoldBatchNorm(), program).program
    for start, batch in ((program, 3), (folded, 1)):
        result = apply(PruneChannels(ratio=0.5), start)
        verify(result.program)
        assert parameters(result.program) < share * parameters(start)
        given = tuple(torch.cat([x, x])[:batch] for x in inputs)
        assert error_against_oracle(start, result, given) < TOLERANCE
        assert result.program(*given)[0].shape[0] == batch


def seeded_norms(module):
    """Batch norms with statistics that a wrong index would not survive."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.running_mean, -0.5, 0.5)
            nn.init.uniform_(child.running_var, 0.5, 2)
            nn.init.uniform_(child.weight, 0.5, 1.5)
    return module


def test_the_help_names_every_criterion():
    text = PruneChannels.__doc__
    assert [name for name in CRITERIA if f"``{name}``" not in text] == []


@pytest.mark.parametrize("steps", [1, 2])
def test_groups_that_the_criterion_cannot_score_stay_with_a_remark(steps):
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(),
        nn.Conv2d(6, 2, 1),
    ).eval()  # fmt: skip
    nn.init.uniform_(module[1].weight, 0.5, 1.5)
    program = capture(module, (torch.randn(2, 3, 5, 5),))
    result = apply(PruneChannels(criterion="bn-scale", steps=steps), program)
    tensors = result.program.tensors()
    assert (tensors["0.weight"].shape[0], tensors["3.weight"].shape[0]) == (4, 6)
    (missed,) = [r.message for r in result.remarks if "3.weight[0]" in r.message]
    assert "no norm" in missed or "scale" in missed


def test_what_a_mask_hides_counts_for_nothing():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    program = capture(module, (torch.randn(2, 6),))
    masked = apply(MaskWeights(include=("0.*",), sparsity=0.5), program).program
    left = (masked.tensor("0.weight") * masked.tensor("0.weight_mask")).abs().sum(1)
    weakest = tuple(sorted(left.argsort()[:4].tolist()))
    result = apply(PruneChannels(), masked)
    assert result.program.origin.removed["0.weight"][0] == weakest
    assert check(PruneChannels(), masked, result.program, result.oracle).passed
