"""Perplexity of a pruned language model, for every criterion.

    python tests/benchmarks/prune_language_model.py --data FOLDER

FOLDER holds a small trained Llama with grouped-query attention: ``config.json`` and
``model.safetensors`` as transformers writes them, and ``eval_tokens.npz`` with token ids
``ids`` [sequences, length]. Heads (whole groups of query heads with their key and value head), FFN
neurons and residual width are pruned one at a time by 10, 20 and 30 %, without any training or
compensation. Heads are ranked over all layers, since a share of the few heads of one layer would
round to none; FFN and width lose the share in every layer.

The first fifth of the sequences calibrates the criteria (with next-token labels) and the
perplexity is that of all others: no token does both. Random is the mean over 3 seeds. A criterion
that is worse than random gets a remark, with what is known of the reason. Exits 1 where one is
worse and nothing is known.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from pruna_ir.capture import capture
from pruna_ir.coupling import couple
from pruna_ir.coupling.kinds import kinds_of
from pruna_ir.data import TensorData
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.importance import CRITERIA, refusals
from pruna_ir.passes.prune_channels import PruneChannels
from pruna_ir.program import Program
from pruna_ir.transform import Context, apply

KINDS = ("heads", "ffn", "width")
RATIOS = (0.1, 0.2, 0.3)
CASES = [(kind, ratio) for kind in KINDS for ratio in RATIOS]
SEEDS = range(3)

_WEIGHTS_ALONE = (
    "it sees the weights alone; how often a gate is open or a head attends is not in them"
)
REASONS = {
    "l1": _WEIGHTS_ALONE,
    "l2": _WEIGHTS_ALONE,
    "fpgm": _WEIGHTS_ALONE,
    "bn-scale": (
        "the scales were not trained towards zero by the L1 penalty that the criterion relies on"
    ),
    "taylor": "removing a head is no small step, and taylor is of first order",
    "gradient": "it leaves out how large a weight is, so that large weights of flat loss go first",
    "snip": "near a minimum the mean gradient is mostly noise",
    "movement": (
        "a trained model hardly moves in a few steps, and the sign of a step says which way a "
        "weight is pulled, not what its removal costs; it is meant for fine-tuning"
    ),
    "activation-zeros": (
        "neither SiLU nor attention gives exact zeros, so that all scores are equal and the index "
        "decides"
    ),
    "obs-greedy": (
        "it ranks by what refitting the survivors would cost, and nothing is refitted here"
    ),
}
"""What is known of criteria that may be worse than random."""


def load(folder: Path) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model, and its token ids [sequences, length]."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**json.loads((folder / "config.json").read_text()))
    config.use_cache = False
    model = LlamaForCausalLM(config)
    state = load_file(folder / "model.safetensors")
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    ids = np.load(folder / "eval_tokens.npz")["ids"].astype(np.int64)
    return model.eval(), torch.from_numpy(ids)


@torch.no_grad()
def perplexity(program: Program, tokens: torch.Tensor) -> float:
    """The exponential of the mean loss of the next token."""
    total = 0.0
    for part in torch.split(tokens, 9):
        logits, labels = program(part)[0][:, :-1].double(), part[:, 1:]
        total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    return math.exp(total / (tokens.numel() - len(tokens)))


def pruned(program: Program, criterion: str, kind: str, ratio: float, context: Context) -> Program:
    """The program without a share of one kind of channels."""
    ranking = "global" if kind == "heads" else "layer"
    pass_ = PruneChannels(ratio=ratio, criterion=criterion, kinds=(kind,), ranking=ranking)
    result = apply(pass_, program, context)
    assert result.modified, f"nothing of {kind} was pruned at {ratio}"
    return result.program


def scorable(program: Program, criterion: str) -> set[str]:
    """The kinds of groups that a criterion can score."""
    coupling = couple(program)
    free = [
        (group, kind)
        for group, kind in zip(coupling.groups, kinds_of(program, coupling), strict=True)
        if group.reason is None
    ]
    refused = refusals(program, coupling, [group for group, _ in free], criterion)
    no = {kind for (_, kind), why in zip(free, refused, strict=True) if why}
    return {kind for _, kind in free} - no


def row(
    program: Program, criterion: str, data: TensorData, held_out: torch.Tensor, seed: int = 0
) -> Iterator[float]:
    """The perplexity of every case; NaN where the criterion cannot score the kind."""
    can = scorable(program, criterion)
    for kind, ratio in CASES:
        if kind not in can:
            yield math.nan
            continue
        context = Context(data=data, seed=seed)
        yield perplexity(pruned(program, criterion, kind, ratio, context), held_out)


def show(name: str, values: list[float], seconds: float) -> None:
    """One line of the table."""
    cells = "".join("       -" if math.isnan(v) else f"{v:8.2f}" for v in values)
    print(f"{name:<18}{cells}  {seconds:5.0f} s", flush=True)


def remarks(criterion: str, values: list[float], random: list[float]) -> tuple[bool, list[str]]:
    """Whether all that is worse than random is explained, and what to say of it."""
    said = []
    lacks = {kind for (kind, _), v in zip(CASES, values, strict=True) if math.isnan(v)}
    if lacks:
        said.append(f"{criterion}: cannot score {', '.join(sorted(lacks))}")
    worse = [
        f"{kind} {ratio:.0%} ({value:.2f}, random {baseline:.2f})"
        for (kind, ratio), value, baseline in zip(CASES, values, random, strict=True)
        if value > baseline
    ]
    if worse:
        reason = REASONS.get(criterion, "no reason is known")
        said.append(f"{criterion}: worse than random for {', '.join(worse)}: {reason}")
    return not worse or criterion in REASONS, said


def main() -> None:
    """Print the table and the remarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the model")
    parser.add_argument("--criteria", nargs="*", default=list(CRITERIA), choices=list(CRITERIA))
    arguments = parser.parse_args()
    model, tokens = load(arguments.data)
    program = apply(Canonicalize(), capture(model, (), {"input_ids": tokens[:2]})).program
    cut = len(tokens) // 5
    data, held_out = TensorData((tokens[:cut],), None, 4), tokens[cut:]
    print(
        f"{tokens.numel()} tokens: {data.inputs[0].numel()} calibrate, {held_out.numel()} are "
        f"evaluated; perplexity before pruning {perplexity(program, held_out):.3f} "
        f"(all tokens: {perplexity(program, tokens):.3f})"
    )
    print(f"{'':<18}" + "".join(f"{kind:>16}        " for kind in KINDS))
    print(f"{'criterion':<18}" + "".join(f"{ratio:8.0%}" for _, ratio in CASES))
    start = time.perf_counter()
    seeds = [list(row(program, "random", data, held_out, seed)) for seed in SEEDS]
    random = np.mean(seeds, 0).tolist()
    show("random (mean of 3)", random, time.perf_counter() - start)
    explained, said = True, []
    for criterion in arguments.criteria:
        if criterion == "random":
            continue
        start = time.perf_counter()
        values = list(row(program, criterion, data, held_out))
        show(criterion, values, time.perf_counter() - start)
        known, more = remarks(criterion, values, random)
        explained &= known
        said += more
    print("\nremarks" if said else "\nno criterion is worse than random")
    for remark in said:
        print(f"  {remark}")
    sys.exit(0 if explained else 1)


if __name__ == "__main__":
    main()
