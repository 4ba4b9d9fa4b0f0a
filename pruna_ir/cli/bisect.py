"""``pruna-opt bisect``: the first pass whose promise does not hold."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from pruna_ir.bisect import bisect
from pruna_ir.cli.console import Console
from pruna_ir.cli.inputs import calibration, chosen_pipeline, needs_data, read_data, request
from pruna_ir.registry import find_backend
from pruna_ir.sources import load_source
from pruna_ir.transform import Context


def execute(args: argparse.Namespace, out: Console) -> int:
    """Bisect; 0 where every promise holds, 1 where a culprit was found."""
    pipeline = chosen_pipeline(args)
    if args.target:
        find_backend(args.target)
    program = load_source(args.model, request(args))
    data = read_data(args.data, program, args.batch_size)
    if data is None and needs_data(pipeline):
        data = calibration(program, args.seed)
        out.warn("no --data was given: ranges come from random inputs")
    context = Context(data=data, target=args.target, progress=out.progress, seed=args.seed)
    culprit = bisect(pipeline, program, context)
    if out.as_json:
        out.json({"culprit": None if culprit is None else _plain(culprit)})
    else:
        out.data("every promise holds" if culprit is None else str(culprit))
    return 0 if culprit is None else 1


def _plain(culprit: object) -> dict[str, object]:
    from pruna_ir.bisect import Culprit

    assert isinstance(culprit, Culprit)
    return {
        "position": culprit.position,
        "pass": culprit.text,
        "check": str(culprit.report),
        "divergence": None if culprit.divergence is None else asdict(culprit.divergence),
    }
