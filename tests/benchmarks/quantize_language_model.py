"""Perplexity of a quantised language model, for every method and backend, on the same tokens.

    python tests/benchmarks/quantize_language_model.py --data FOLDER
    python tests/benchmarks/quantize_language_model.py --data FOLDER --choose

FOLDER holds a small trained Llama: ``config.json`` and ``model.safetensors`` as transformers
writes them, and ``eval_tokens.npz`` with token ids ``ids`` [sequences, length]. Of every five
sequences the first calibrates what needs data, the second served to choose the recipe for int4
(``--choose`` prints that comparison, in torch), and the others are evaluated, in sequences of the
captured length, whose number is open (TVM compiles no second open dimension). The parts are
interleaved since text collections are seldom shuffled: calibrating on one kind of text and
evaluating on another measures something else, and GPTQ suffers most from it.

Each artifact is built, certified against its program and then run on every token; the table shows
its perplexity, the ratio to the float program's in torch, the bound of that ratio, its size, and
what the runtime itself says of its products. Bound are: float, static int8 and weight-only int8
(at most 1 % off), and the chosen recipe for weight-only int4 (at most 5 %). Dynamic int8 and the
other int4 recipes have no bound and stand for comparison. Exits 1 where a bound is missed.
int4 weights have blocks of 32 inputs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from pruna_ir.build import Artifact, build
from pruna_ir.capture import capture
from pruna_ir.certify import audit_summary
from pruna_ir.data import TensorData
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.transform import Context

INT8, INT4 = 0.01, 0.05
_INT4 = "quantize-weights{bits=4,block=32}"
_ZEROS = "quantize-weights{bits=4,block=32,symmetric=false}"
_AWQ = "scale-salient-channels{block=32,symmetric=false}"
CHOICES: dict[str, str] = {
    "nearest": _INT4,
    "nearest, zero points": _ZEROS,
    "awq, zero points": f"{_AWQ},{_ZEROS}",
    "gptq": f"{_INT4},compensate-rounding",
    "gptq as published, zero points": f"{_ZEROS},compensate-rounding{{refits=0,follow=false}}",
    "gptq, refits, zero points": f"{_ZEROS},compensate-rounding{{follow=false}}",
    "gptq, zero points": f"{_ZEROS},compensate-rounding",
    "awq, gptq, zero points": f"{_AWQ},{_ZEROS},compensate-rounding",
    "awq, gptq damped 0.05, zero points": f"{_AWQ},{_ZEROS},compensate-rounding{{damping=0.05}}",
    "awq, gptq damped, zero points": f"{_AWQ},{_ZEROS},compensate-rounding{{damping=0.1}}",
    "awq, gptq damped 0.3, zero points": f"{_AWQ},{_ZEROS},compensate-rounding{{damping=0.3}}",
}
"""The recipes for int4 that were compared on the sequences set apart for it."""
CHOSEN = "awq, gptq damped, zero points"
"""The best of them there; more than one recipe is within its noise."""
METHODS: dict[str, tuple[str, float | None]] = {
    "float": ("canonicalize", 0.0),
    "int4": (f"canonicalize,{CHOICES[CHOSEN]}", INT4),
    "int8 weights": ("canonicalize,quantize-weights", INT8),
    "int8 static": ("canonicalize,insert-fake-quant", INT8),
    "int8 dynamic": ("canonicalize,quantize-dynamically", None),
    "int4 nearest": (f"canonicalize,{CHOICES['nearest']}", None),
    "int4 gptq": (f"canonicalize,{CHOICES['gptq']}", None),
}
"""Pipelines, and how much the perplexity may rise; None where that is only shown."""
BACKENDS = ("eager", "onnx", "openvino", "tvm")
_PRODUCTS = ("linear", "matmul", "attention")


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


def perplexity(logits: Iterator[torch.Tensor], tokens: torch.Tensor, batch: int) -> float:
    """The exponential of the mean loss of the next token."""
    total, count = 0.0, 0
    for part, found in zip(torch.split(tokens, batch), logits, strict=True):
        labels = part[:, 1:].flatten()
        predicted = found[:, :-1].double().flatten(0, 1)
        total += float(F.cross_entropy(predicted, labels, reduction="sum"))
        count += labels.numel()
    return math.exp(total / count)


def of_program(program: Program, tokens: torch.Tensor, batch: int) -> float:
    """The program's own perplexity, in torch."""
    with torch.no_grad():
        return perplexity((program(t)[0] for t in torch.split(tokens, batch)), tokens, batch)


def of_artifact(artifact: Artifact, tokens: torch.Tensor, batch: int) -> float:
    """An artifact's perplexity, by its runtime."""
    runner = artifact.load()
    parts = torch.split(tokens, batch)
    found = (torch.from_numpy(runner.run([part.numpy()])[0]) for part in parts)
    return perplexity(found, tokens, batch)


def audited(artifact: Artifact) -> str:
    """How many products run in which precision, by the runtime's own word."""
    summary = audit_summary(artifact.certificate.audit)
    parts = []
    for kind in _PRODUCTS:
        if kind in summary:
            counts = ", ".join(f"{n} {what}" for what, n in summary[kind].items())
            parts.append(f"{kind}: {counts}")
    return "; ".join(parts)


def choose(program: Program, data: TensorData, tokens: torch.Tensor, batch: int) -> None:
    """Print the perplexity of every recipe on the sequences that are set apart for the choice."""
    base = of_program(program, tokens, batch)
    print(f"{len(tokens)} sequences for the choice, none of them evaluated; float {base:.4f}")
    for name, text in CHOICES.items():
        start = time.perf_counter()
        context = Context(data=data, target="eager")
        found = Pipeline.parse(f"canonicalize,{text}").run(program, context).program
        value = of_program(found, tokens, batch)
        mark = "  chosen" if name == CHOSEN else ""
        print(
            f"{name:<36}{value:9.4f}{value / base:8.4f}  [{time.perf_counter() - start:.0f} s]"
            f"{mark}",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the model")
    parser.add_argument("--choose", action="store_true", help="compare recipes for int4 instead")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--batch", type=int, default=8, help="sequences in a run")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    model, tokens = load(arguments.data)
    program = capture(model, (), {"input_ids": tokens[:2]})
    part = torch.arange(len(tokens)) % 5
    calibration, choice, held_out = tokens[part == 0], tokens[part == 1], tokens[part > 1]
    data = TensorData((calibration,), None, 4)
    if arguments.choose:
        choose(program, data, choice, arguments.batch)
        return
    base = of_program(program, held_out, arguments.batch)
    print(
        f"{tokens.numel()} tokens: {calibration.numel()} calibrate, {choice.numel()} served to "
        f"choose, {held_out.numel()} are evaluated in {len(held_out)} sequences of "
        f"{held_out.shape[1]}; float {base:.4f}"
    )
    print(f"{'method':<14}{'backend':<10}{'perplexity':>11}{'ratio':>8}{'bound':>8}{'bytes':>10}"
          "  products")  # fmt: skip
    missed = []
    for method in arguments.methods:
        text, limit = METHODS[method]
        bound = None if limit is None else 1 + max(limit, 1e-4)
        for backend in arguments.backends:
            context = Context(data=data, target=backend)
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                quantised = Pipeline.parse(text).run(program, context).program
                artifact = build(quantised, backend, Path(folder) / "artifact", context)
                value = of_artifact(artifact, held_out, arguments.batch)
                ratio = value / base
                print(
                    f"{method:<14}{backend:<10}{value:11.4f}{ratio:8.4f}"
                    f"{'none' if bound is None else format(bound, '.4f'):>8}"
                    f"{artifact.size():10,}"
                    f"  {audited(artifact)}  [{artifact.certificate.verdict.value}, "
                    f"{time.perf_counter() - start:.0f} s]",
                    flush=True,
                )
            if bound is not None and not ratio <= bound:
                missed.append(f"{method} on {backend}: {ratio:.4f}, not {bound}")
    verdict = ["missed:", *missed] if missed else ["every bound holds"]
    print("\n".join(verdict))
    print(f"{time.perf_counter() - begin:.0f} s in all")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
