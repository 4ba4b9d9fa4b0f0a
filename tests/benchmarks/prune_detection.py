"""Detection models: what captures of each, pruned, written back, and the whole run again.

    python tests/benchmarks/prune_detection.py                          # all of torchvision's
    python tests/benchmarks/prune_detection.py --models ssd300_vgg16 --size 160 --ratio 0.3

Each model (random weights, seeded) runs on one image; its largest capturable submodules are found
(`pruna_ir.submodules`), canonicalised, pruned by ``--ratio`` of the channels of every group with
the oracle's check, and put back. A row says what was captured, parameters before and after, the
worst oracle error of its parts, how many parts kept their class, and whether the model then runs
and returns what it did. Proposals are limited to 50 to keep the float64 checks short; images are
not resized up. Exits 1 where a model loses no parameters or does not run.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pruna_ir.errors import PrunaError
from pruna_ir.pipeline import Pipeline, PipelineResult
from pruna_ir.submodules import Parts, capture_submodules, with_programs

PROPOSALS = 50


def models() -> list[str]:
    """torchvision's detection models."""
    from torchvision.models import detection, list_models

    names: list[str] = list_models(module=detection)
    return names


def build(name: str, size: int) -> nn.Module:
    """A model with random weights whose every parameter matters."""
    from torchvision.models import get_model

    torch.manual_seed(0)
    kwargs: dict[str, Any] = {}
    if "rcnn" in name:
        kwargs = {"rpn_post_nms_top_n_test": PROPOSALS, "rpn_pre_nms_top_n_test": PROPOSALS}
    if not name.startswith("ssd"):
        # Those of SSD are part of its architecture.
        kwargs |= {"min_size": size, "max_size": size}
    model: nn.Module = get_model(name, weights=None, weights_backbone=None, **kwargs).eval()
    for child in model.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.running_mean, -0.1, 0.1)
            nn.init.uniform_(child.running_var, 0.5, 2)
    return model


@dataclass(frozen=True)
class Row:
    """One model."""

    name: str
    fine: bool
    text: str
    details: tuple[str, ...] = ()


def prune(name: str, size: int, ratio: float) -> Row:
    """Capture, prune, put back and run one model."""
    model = build(name, size)
    image = torch.rand(3, size, size, generator=torch.Generator().manual_seed(1))
    before = parameters(model)
    start = time.perf_counter()
    parts = capture_submodules(model, ([image],), seconds=1800)
    captured = time.perf_counter()
    pipeline = Pipeline.parse(f"canonicalize,prune-channels{{ratio={ratio}}}")
    runs = {path: pipeline.run(part.program) for path, part in parts.captured.items()}
    pruned = time.perf_counter()
    replaced = with_programs(model, parts, {path: run.program for path, run in runs.items()})
    after = parameters(replaced.module)
    with torch.no_grad():
        (found,) = replaced.module([image])
        (again,) = replaced.module([torch.rand(3, size + 13, size - 7)])
    same = list(found) == list(again)
    text = (
        f"{len(parts.captured)} parts of {share(model, parts):4.0%} of "
        f"{before / 1e6:5.1f} M parameters -> {after / 1e6:5.1f} M ({1 - after / before:4.0%} "
        f"less)  oracle error {worst(runs):.1e}  class kept {len(replaced.kept)}/"
        f"{len(parts.captured)}  runs, also on another size; returns {', '.join(found)}  "
        f"capture {captured - start:.0f} s, prune + check {pruned - captured:.0f} s"
    )
    return Row(name, after < 0.9 * before and same, text, tuple(details(parts, runs, replaced)))


def details(parts: Parts, runs: dict[str, PipelineResult], replaced: Any) -> list[str]:
    """One line a part, and why others were not captured."""
    lines = []
    for path, part in parts.captured.items():
        old, new = size_of(part.program), size_of(runs[path].program)
        how = "wrapped: " + first(replaced.wrapped[path]) if path in replaced.wrapped else "class"
        error = worst({path: runs[path]})
        lines.append(f"{path}: {old / 1e6:.2f} M -> {new / 1e6:.2f} M, {error:.1e}, {how}")
    return lines + [
        f"{path or '(whole)'}: not captured: {first(why)}" for path, why in parts.refused.items()
    ]


def first(text: str) -> str:
    """The first line of a message, at most 160 characters."""
    return text.splitlines()[0][:160]


def parameters(model: nn.Module) -> int:
    """Elements of the model's parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def size_of(program: Any) -> int:
    """Elements of a program's parameters."""
    unique = {id(t): t for t in program.tensors().values() if isinstance(t, nn.Parameter)}
    return sum(tensor.numel() for tensor in unique.values())


def share(model: nn.Module, parts: Parts) -> float:
    """How much of the parameters the captured parts own."""
    owned = sum(parameters(model.get_submodule(path)) for path in parts.captured)
    return owned / parameters(model)


def worst(runs: dict[str, PipelineResult]) -> float:
    """The largest error that a pruning check measured."""
    checks = [step.check for run in runs.values() for step in run.steps]
    return max((check.measured for check in checks if check is not None), default=0.0)


def main() -> None:
    """Print a row a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", help="default: all of torchvision's")
    parser.add_argument("--size", type=int, default=160, help="of the image; default 160")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--quiet", action="store_true", help="no lines about parts")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    # torch prints the graph up to the operator where an export ends; the row says why it did.
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    names = arguments.models or models()
    fine = 0
    for name in names:
        try:
            row = prune(name, arguments.size, arguments.ratio)
        except PrunaError as error:
            row = Row(name, fine=False, text=f"{type(error).__name__}: {error}")
        fine += row.fine
        print(f"{name:<38} {row.text}", flush=True)
        if not arguments.quiet:
            for line in row.details:
                print(f"    {line}", flush=True)
    print(f"{fine} of {len(names)} models smaller by over 10% and running")
    sys.exit(0 if fine == len(names) else 1)


if __name__ == "__main__":
    main()
