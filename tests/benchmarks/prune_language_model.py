"""Perplexity of a pruned language model, for every criterion.

    python tests/benchmarks/prune_language_model.py --data FOLDER

FOLDER holds a small trained Llama with grouped-query attention: ``config.json`` and
``model.safetensors`` as transformers writes them, and ``eval_tokens.npz`` with token ids
``ids`` [sequences, length]. Heads (whole groups of query heads with their key and value head), FFN
neurons and residual width are pruned one at a time by 10, 20 and 30 %, without any training or
compensation. Heads are ranked over all layers, since a share of the few heads of one layer would
round to none; FFN and width lose the share in every layer. A criterion scores once; every case is
what prune-channels selects by these scores.

The first fifth of the sequences calibrates the criteria (with next-token labels) and the
perplexity is that of all others: no token does both. Random is the mean over 3 seeds. A criterion
that is worse than random gets a remark with what was measured of it: the rank correlation of its
scores with the rise of the calibration loss when each unit alone is removed (all heads, all of the
width, 20 neurons a layer, on 4 sequences; neurons are ranked within their layer), and how many
units share their score with another. What is believed of the reason is marked as not measured.
Exits 1 where a criterion is worse and nothing is believed of it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch.nn import functional as F  # noqa: N812

from pruna_ir.capture import capture
from pruna_ir.coupling import couple
from pruna_ir.coupling.kinds import kinds_of
from pruna_ir.data import TensorData
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.importance import CRITERIA, refusals, scores
from pruna_ir.passes.removal_plans import without
from pruna_ir.passes.scored_members import Scores
from pruna_ir.passes.selection import Candidate, Limits, Mask, Selector
from pruna_ir.program import Program
from pruna_ir.transform import Context, Rewrite, apply

KINDS = ("heads", "ffn", "width")
RATIOS = (0.1, 0.2, 0.3)
CASES = [(kind, ratio) for kind in KINDS for ratio in RATIOS]
SEEDS = range(3)
ALONE = 20
"""Of how many neurons of a layer the loss of their lone removal is measured."""
SEQUENCES = 4
"""On how many of the calibration sequences."""

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
        "neither SiLU nor attention gives exact zeros; among equal scores the index decides"
    ),
}
"""What is believed of criteria that may be worse than random."""


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


class Network:
    """The language model, what of it may go, and its data."""

    def __init__(self, program: Program, data: TensorData, held_out: torch.Tensor) -> None:
        self.program, self.data, self.held_out = program, data, held_out
        self.coupling = couple(program)
        self.candidates = [
            Candidate(group, kind)
            for group, kind in zip(
                self.coupling.groups, kinds_of(program, self.coupling), strict=True
            )
            if group.reason is None and kind in KINDS
        ]

    def scored(self, criterion: str, seed: int = 0) -> dict[str, list[tuple[Candidate, Scores]]]:
        """The scores of every kind of groups that a criterion can score."""
        groups = [candidate.group for candidate in self.candidates]
        refused = refusals(self.program, self.coupling, groups, criterion)
        no = {c.kind for c, why in zip(self.candidates, refused, strict=True) if why}
        can = [c for c in self.candidates if c.kind not in no]
        found = scores(
            self.program, self.coupling, [c.group for c in can], criterion,
            context=Context(data=self.data, seed=seed),
        )  # fmt: skip
        pairs = list(zip(can, found, strict=True))
        kinds = (kind for kind in KINDS if kind not in no)
        return {kind: [pair for pair in pairs if pair[0].kind == kind] for kind in kinds}

    def without(self, gone: Mask) -> Program:
        """The program without some units."""
        return without(Rewrite(self.program, "prune", Context()), self.coupling, gone)

    def row(self, scored: dict[str, list[tuple[Candidate, Scores]]]) -> Iterator[float]:
        """The perplexity of every case; NaN where the criterion cannot score the kind."""
        for kind, ratio in CASES:
            if kind not in scored:
                yield math.nan
                continue
            candidates, values = zip(*scored[kind], strict=True)
            ranking = "global" if kind == "heads" else "layer"
            selector = Selector(
                self.coupling, candidates, values, Limits(ranking), capped=ranking == "global"
            )
            gone = selector.at(ratio)
            assert gone.any(), f"nothing of {kind} was pruned at {ratio}"
            yield perplexity(self.without(gone), self.held_out)

    @cached_property
    def alone(self) -> list[tuple[Candidate, np.ndarray, np.ndarray]]:
        """Of some units of every group: by how much the calibration loss rises without each."""
        tokens = self.data.inputs[0][:SEQUENCES]
        base = math.log(perplexity(self.program, tokens))
        found = []
        for candidate in self.candidates:
            count = ALONE if candidate.kind == "ffn" else candidate.size
            units = np.random.default_rng(0).permutation(candidate.size)[:count]
            rises = []
            for unit in units:
                gone = np.zeros(len(self.coupling.solved.frozen), np.bool_)
                gone[candidate.group.units[unit]] = True
                rises.append(math.log(perplexity(self.without(gone), tokens)) - base)
            found.append((candidate, units, np.array(rises)))
        return found

    def measured(self, kind: str, scored: list[tuple[Candidate, Scores]]) -> str:
        """How well the scores of one kind rank what the lone removal of units costs."""
        pairs = []
        for (candidate, score), (_, units, rises) in zip(
            scored, [each for each in self.alone if each[0].kind == kind], strict=True
        ):
            pairs.append((score[units], rises))
            assert len(score) == candidate.size
        if kind == "heads":
            # Ranked over all layers.
            pairs = [tuple(np.concatenate(parts) for parts in zip(*pairs, strict=True))]
        values = [
            0.0 if np.ptp(score) == 0 else float(spearmanr(score, rises).statistic)
            for score, rises in pairs
        ]
        every = np.concatenate([score for _, score in scored]) if kind == "heads" else None
        lists = [every] if every is not None else [score for _, score in scored]
        tied = sum(_tied(score) for score in lists) / sum(map(len, lists))
        return f"{kind} {np.mean(values):+.2f}" + (f" ({tied:.0%} tied)" if tied else "")


def _tied(score: Scores) -> int:
    """How many units share their score with another."""
    _, counts = np.unique(score, return_counts=True)
    return int(counts[counts > 1].sum())


def show(name: str, values: list[float], seconds: float) -> None:
    """One line of the table."""
    cells = "".join("       -" if math.isnan(v) else f"{v:8.2f}" for v in values)
    print(f"{name:<18}{cells}  {seconds:5.0f} CPU s", flush=True)


def remarks(
    network: Network,
    criterion: str,
    scored: dict[str, list[tuple[Candidate, Scores]]],
    values: list[float],
    random: list[list[float]],
) -> tuple[bool, list[str]]:
    """Whether something is believed of all that is worse than random, and what to say of it."""
    said = []
    if lacks := [kind for kind in KINDS if kind not in scored]:
        said.append(f"{criterion}: cannot score {', '.join(lacks)}")
    worse = [
        (kind, f"{kind} {ratio:.0%} ({value:.2f}; random {min(each):.2f} to {max(each):.2f})")
        for (kind, ratio), value, *each in zip(CASES, values, *random, strict=True)
        if value > np.mean(each)
    ]
    if worse:
        kinds = dict.fromkeys(kind for kind, _ in worse)
        told = ", ".join(network.measured(kind, scored[kind]) for kind in kinds)
        reason = REASONS.get(criterion, "no reason is known")
        said.append(
            f"{criterion}: worse than random for {', '.join(text for _, text in worse)}. Rank "
            f"correlation with the loss of lone removals: {told}. Believed, not measured: {reason}"
        )
    return not worse or criterion in REASONS, said


def main() -> None:
    """Print the table and the remarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the model")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=list(CRITERIA))
    arguments = parser.parse_args()
    model, tokens = load(arguments.data)
    program = apply(Canonicalize(), capture(model, (), {"input_ids": tokens[:2]})).program
    cut = len(tokens) // 5
    data, held_out = TensorData((tokens[:cut],), None, 4), tokens[cut:]
    network = Network(program, data, held_out)
    print(
        f"{tokens.numel()} tokens: {data.inputs[0].numel()} calibrate, {held_out.numel()} are "
        f"evaluated; perplexity before pruning {perplexity(program, held_out):.3f} "
        f"(all tokens: {perplexity(program, tokens):.3f})"
    )
    print(f"{'':<18}" + "".join(f"{kind:>16}        " for kind in KINDS))
    print(f"{'criterion':<18}" + "".join(f"{ratio:8.0%}" for _, ratio in CASES))
    start = time.process_time()
    random = [list(network.row(network.scored("random", seed))) for seed in SEEDS]
    show("random (mean of 3)", np.mean(random, 0).tolist(), time.process_time() - start)
    explained, said = True, []
    for criterion in arguments.criteria:
        if criterion == "random":
            continue
        start = time.process_time()
        scored = network.scored(criterion)
        values = list(network.row(scored))
        show(criterion, values, time.process_time() - start)
        known, more = remarks(network, criterion, scored, values, random)
        explained &= known
        said += more
    print(f"\n{time.process_time():.0f} s of one core")
    print("\nremarks" if said else "\nno criterion is worse than random")
    for remark in said:
        print(f"  {remark}")
    sys.exit(0 if explained else 1)


if __name__ == "__main__":
    main()
