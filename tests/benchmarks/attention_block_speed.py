"""Attention blocks beside the layers and attentions that they are made of, whole models.

    python tests/benchmarks/attention_block_speed.py --threads 2

Random weights, batch 1, float32: ViT-Tiny (197 tokens), GPT-2 (64 tokens) and BERT (128 tokens, a
mask), 12 blocks each. Feed-forward blocks are fused in all. Two ways to run each: as a program,
that is torch operator by operator with our kernels, and as an ``eager`` runtime, on packed
weights, which spells attention blocks out again; ``whole`` does not, for comparison, and
``unfused`` has torch's own attention. All of a kind run in turns in one process; times are
medians, ratios medians over rounds to the separate layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import nn

from pruna_ir.backends import packed_steps
from pruna_ir.backends.packed_program import PackedProgram
from pruna_ir.capture import capture
from pruna_ir.kernels.attention_block import KERNEL
from pruna_ir.latency import measure
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program

SEPARATE = "canonicalize,fold-constants,fuse-ffn,fuse-attention"
BLOCKS = f"{SEPARATE},fuse-attention-blocks"


def models(names: list[str]) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Name, module, and an input of two."""
    import timm
    import transformers

    torch.manual_seed(0)
    if "vit_tiny" in names:
        yield "vit_tiny", timm.create_model("vit_tiny_patch16_224"), torch.randn(2, 3, 224, 224)
    if "gpt2" in names:
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))
        yield "gpt2", gpt2, torch.randint(0, 50000, (2, 64))
    if "bert" in names:
        bert = transformers.BertModel(transformers.BertConfig())
        yield "bert", bert, torch.randint(0, 30000, (2, 128))


def whole(program: Program) -> PackedProgram:
    """The eager runtime with attention blocks as operators."""
    spelt_out = tuple(op for op in packed_steps._SPELT_OUT if op is not KERNEL.op)
    with mock.patch.object(packed_steps, "_SPELT_OUT", spelt_out):
        return PackedProgram(program)


def compare(name: str, model: nn.Module, x: torch.Tensor, arguments: argparse.Namespace) -> None:
    """Print a model's times."""
    captured = capture(model.eval(), (x,))
    plain, separate, blocks = (
        Pipeline.parse(text).run(captured, check_each=False).program
        for text in (SEPARATE.removesuffix(",fuse-attention"), SEPARATE, BLOCKS)
    )
    found = sum(1 for _ in blocks.calls(KERNEL.op))
    one = x[:1]
    programs: dict[str, Callable[..., object]] = {"separate": separate, "blocks": blocks}
    runtimes = {
        "separate": PackedProgram(separate), "unfused": PackedProgram(plain),
        "blocks": PackedProgram(blocks), "blocks, whole": whole(blocks),
    }  # fmt: skip
    for kind, candidates in (("program", programs), ("eager", runtimes)):
        calls = {label: lambda run=run: run(one) for label, run in candidates.items()}
        with torch.inference_mode():
            times = measure(calls, repeats=arguments.rounds, budget_s=arguments.budget, settle=2)
        for label, latency in times.items():
            print(f"{name:<9} {found} blocks  {kind:<8} {label:<14} {latency.p50:8.2f} ms "
                  f"{latency.speedup:5.2f}x", flush=True)  # fmt: skip


def main() -> None:
    """Print some lines a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_tiny", "gpt2", "bert"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a comparison")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name, model, x in models(arguments.models):
        compare(name, model, x, arguments)


if __name__ == "__main__":
    main()
