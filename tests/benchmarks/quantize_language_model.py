"""Perplexity of a quantised language model, for every method and backend, on the same tokens.

    python tests/benchmarks/quantize_language_model.py --data FOLDER

FOLDER holds a small trained Llama: ``config.json`` and ``model.safetensors`` as transformers
writes them, and ``eval_tokens.npz`` with token ids ``ids`` [sequences, length]. The first fifth of
the sequences calibrates what needs data; the perplexity is that of all others, in sequences of the
captured length, whose number is open (TVM compiles no second open dimension).

Each artifact is built, certified against its program and then run on every token; the table shows
its perplexity, the ratio to the float program's in torch, its size, and what the runtime itself
says of its products. int4 weights have blocks of 32 inputs. Exits 1 where static or
weight-only int8 is more than 1 % off, or the best int4 method 5 %; the others are only shown.
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
_INT4 = "bits=4,block=32"
_ASYMMETRIC = f"{_INT4},symmetric=false"
_AWQ = "block=32,symmetric=false"
METHODS: dict[str, tuple[str, float | None]] = {
    "float": ("canonicalize", 0.0),
    "int8 static": ("canonicalize,insert-fake-quant", INT8),
    "int8 dynamic": ("canonicalize,quantize-dynamically", None),
    "int8 weights": ("canonicalize,quantize-weights", INT8),
    "int4 nearest": (f"canonicalize,quantize-weights{{{_INT4}}}", None),
    "int4 awq": (
        f"canonicalize,scale-salient-channels{{block=32}},quantize-weights{{{_INT4}}}", None
    ),
    "int4 gptq": (f"canonicalize,quantize-weights{{{_INT4}}},compensate-rounding", None),
    "int4 awq, gptq, zero points": (
        f"canonicalize,scale-salient-channels{{{_AWQ}}},quantize-weights{{{_ASYMMETRIC}}},"
        "compensate-rounding",
        INT4,
    ),
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the model")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--backends", nargs="*", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--batch", type=int, default=8, help="sequences in a run")
    arguments = parser.parse_args()
    model, tokens = load(arguments.data)
    program = capture(model, (), {"input_ids": tokens[:2]})
    cut = len(tokens) // 5
    data, held_out = TensorData((tokens[:cut],), None, 4), tokens[cut:]
    base = of_program(program, held_out, arguments.batch)
    print(
        f"{tokens.numel()} tokens: {data.inputs[0].numel()} calibrate, {held_out.numel()} are "
        f"evaluated in {len(held_out)} sequences of {held_out.shape[1]}; float {base:.4f}"
    )
    print(f"{'method':<28}{'backend':<10}{'perplexity':>11}{'ratio':>8}{'bytes':>10}  products")
    missed = []
    for method in arguments.methods:
        text, limit = METHODS[method]
        for backend in arguments.backends:
            context = Context(data=data, target=backend)
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                quantised = Pipeline.parse(text).run(program, context).program
                artifact = build(quantised, backend, Path(folder) / "artifact", context)
                value = of_artifact(artifact, held_out, arguments.batch)
                ratio = value / base
                print(
                    f"{method:<28}{backend:<10}{value:11.4f}{ratio:8.4f}{artifact.size():10,}"
                    f"  {audited(artifact)}  [{artifact.certificate.verdict.value}, "
                    f"{time.perf_counter() - start:.0f} s]",
                    flush=True,
                )
            if limit is not None and not ratio <= 1 + max(limit, 1e-4):
                missed.append(f"{method} on {backend}: {ratio:.4f}, not {1 + limit}")
    print("\n".join(["missed:", *missed]) if missed else "all within their limits")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
