"""What measuring the register tiles gains over the rule, in TVM artifacts in float32.

    python tests/benchmarks/tuning_speed.py                          # resnet18, mobilenet_v2
    python tests/benchmarks/tuning_speed.py --models gpt2 --tune 120 --threads 2

Networks as in ``quantized_speed.py``, batch 1, random weights. For each: the artifact by rule and
the one tuned within ``--tune`` seconds, run in turns in one process, each twice untimed before it
is timed; the gain is the median over rounds. Below it every operator whose tile changed, with its
times alone. Run it on a machine that does nothing else: tuning measures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from quantized_speed import MODELS, network

from pruna_ir.backends.to_tvm import ToTvm
from pruna_ir.backends.tvm_tiles import RECORDS
from pruna_ir.build import Artifact, build
from pruna_ir.latency import measure
from pruna_ir.lowering import LoadOptions


def compare(name: str, arguments: argparse.Namespace) -> None:
    """Print one network's gain and what changed."""
    net = network(name, 8)
    options = LoadOptions(threads=arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        made = {
            "by rule": build(net.program, ToTvm(), Path(folder) / "rule", verify=False),
            "tuned": build(net.program, ToTvm(tune=arguments.tune), Path(folder) / "tuned",
                           verify=False),
        }  # fmt: skip
        runners = {label: artifact.load(options) for label, artifact in made.items()}
        calls = {label: lambda r=r: r.run(net.inputs) for label, r in runners.items()}
        found = measure(calls, repeats=arguments.rounds, budget_s=20.0, warmup=3, settle=2)
        tiles = made["tuned"].manifest.facts["tiles"]
        times = ", ".join(f"{label} {taken.p50:.2f} ms" for label, taken in found.items())
        print(f"{name}: {times}, {found['tuned'].speedup:.3f}x ({tiles})", flush=True)
        for line in _changed(made["tuned"]):
            print(f"  {line}")


def _changed(artifact: Artifact) -> list[str]:
    content = json.loads((artifact.folder / RECORDS).read_text(encoding="utf-8"))
    return [_line(record) for record in content["records"] if record["tile"] != record["rule"]]


def _line(record: dict[str, Any]) -> str:
    times = {json.dumps(row["tile"]): row["milliseconds"] for row in record["medians"]}
    before, after = (times[json.dumps(record[key])] for key in ("rule", "tile"))
    old, new = ("x".join(map(str, record[key].values())) for key in ("rule", "tile"))
    operator = {k: v for k, v in record["operator"].items() if k not in ("dtype", "blocked")}
    return f"{before:.3f} -> {after:.3f} ms, {old} -> {new}: {operator}"


def main() -> None:
    """Print a block a network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS[:2]),
                        choices=("resnet50", *MODELS))  # fmt: skip
    parser.add_argument("--tune", type=float, default=60.0, help="seconds a network")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    for name in arguments.models:
        compare(name, arguments)


if __name__ == "__main__":
    main()
