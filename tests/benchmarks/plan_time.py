"""Planning time and memory: analysis + plan + rewrite, beside Torch-Pruning from the same weights.

    python tests/benchmarks/plan_time.py                       # the comparison, and a deep net
    python tests/benchmarks/plan_time.py --models resnet50 --rounds 9
    python tests/benchmarks/plan_time.py --all                 # every torchvision model < 100 M

Ours is ``prune-channels{ratio=0.5}`` on a captured, canonical program: coupling, L1 scores, plan,
cut tensors, new shapes; unchecked. The hash of the result, which every pass pays for the proof
that it changed anything, is timed apart. Theirs is the construction of ``MagnitudePruner``
(dependency graph and groups) and one ``step`` on a copy of the module with the same ratio, the
classifier ignored as they ask for. Both run in processes of their own, round about, one
measurement of each a round; a process that takes longer than ``--limit`` seconds or more than
``--memory`` GB is ended, and the row says so: what it had taken until then is a lower bound of its
time, and so is the ratio. Capture is timed apart: it is needed once, and serves everything else
too.

Memory is the growth of the process's high-water mark while planning, as a share of the weights.
Exits 1 where a bound does not hold: 5x at the median of the models below 100 M parameters, 5 s and
2 GB for each of them, 30 s for the deep net, memory twice the weights.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

COMPARED = ("resnet50", "densenet201", "swin_t", "llama", "vgg16")
TIMES_FASTER, SECONDS, GIGABYTES, DEEP_SECONDS, SHARE = 5.0, 5.0, 2.0, 30.0, 2.0
RATIO = 0.5


# -- models ---------------------------------------------------------------------------------


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], list[nn.Module]]:
    """A model, its example inputs (args, kwargs), and the layers that make its outputs."""
    torch.manual_seed(0)
    if name == "llama":
        return llama()
    if is_deep(name):
        from tests.coupling.synthetic import deep_network

        net = deep_network(int(name.removeprefix("deep")))
        return net, (torch.randn(2, 3, 8, 8),), {}, []
    import torchvision

    model = torchvision.models.get_model(name, weights=None, **construction(name)).eval()
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    return model, (example(name),), {}, heads


def is_deep(name: str) -> bool:
    """Whether a name such as ``deep10000`` asks for a net of so many operators."""
    return name.startswith("deep") and name.removeprefix("deep").isdigit()


def construction(name: str) -> dict[str, Any]:
    """Arguments without which torchvision would download a backbone or train auxiliary heads."""
    if name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": False}
    segmentation = ("fcn_", "deeplabv3_", "lraspp_")
    return {"weights_backbone": None} if name.startswith(segmentation) else {}


def example(name: str) -> torch.Tensor:
    """An image, or a clip, of the smallest size that suits the model."""
    if name.startswith(("r3d", "mc3", "r2plus1d", "s3d", "mvit", "swin3d")):
        frames, side = (16, 224) if name.startswith(("mvit", "s3d")) else (8, 112)
        return torch.randn(2, 3, frames, side, side)
    return torch.randn(2, 3, 299 if name == "inception_v3" else 224, 224)


def llama() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], list[nn.Module]]:
    """24 layers, width 512, 8 query heads on 2 key heads, gated FFN."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=24, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=8000, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return model, (), {"input_ids": torch.randint(0, 8000, (2, 16))}, [model.lm_head]


# -- workers: one measurement for every line on stdin ---------------------------------------


def memory(key: str) -> float:
    """A figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line for line in lines if line.startswith(key)).split()[1])


def measured(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Seconds of some work, the growth of the high-water mark in bytes, and what it says."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    base, start = memory("VmRSS"), time.perf_counter()
    found = work()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": memory("VmHWM") - base} | found


def ours(name: str) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """What capture says, and a call that plans once."""
    from pruna_ir import capture
    from pruna_ir.coupling import couple
    from pruna_ir.passes.prune_channels import PruneChannels
    from pruna_ir.pipeline import Pipeline
    from pruna_ir.transform import Context, Rewrite

    module, args, kwargs, _ = build(name)
    start = time.perf_counter()
    program = capture(module, args, kwargs)
    captured = time.perf_counter() - start
    program = Pipeline.parse("canonicalize").run(program, check_each=False).program
    canonical = time.perf_counter() - start - captured
    pruning, smaller = PruneChannels(ratio=RATIO), program

    def plan() -> dict[str, Any]:
        nonlocal smaller
        rw = Rewrite(program, pruning.name, Context())
        pruning.rewrite(rw)
        smaller = rw.finish()
        return {"parameters": elements(smaller.tensors().values())}

    def once() -> dict[str, Any]:
        nonlocal smaller
        found = measured(plan)
        start = time.perf_counter()
        smaller.hash()
        hashed = time.perf_counter() - start
        start = time.perf_counter()
        couple(program)
        smaller = program
        return found | {"couple": time.perf_counter() - start, "hash": hashed}

    facts = {
        "capture": captured,
        "canonicalize": canonical,
        "nodes": len(program.graph.nodes),
        "weights": sum(t.numel() * t.element_size() for t in unique(program.tensors().values())),
        "parameters": elements(program.tensors().values()),
    }
    return facts, once


def theirs(name: str) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """The same for Torch-Pruning."""
    import torch_pruning

    module, args, kwargs, heads = build(name)
    names = {id(m): path for path, m in module.named_modules()}

    def once() -> dict[str, Any]:
        own = copy.deepcopy(module)
        ignored = [own.get_submodule(names[id(head)]) for head in heads]

        def step() -> dict[str, Any]:
            pruner = torch_pruning.pruner.MagnitudePruner(
                own,
                kwargs or args[0][:1],
                importance=torch_pruning.importance.MagnitudeImportance(p=1),
                pruning_ratio=RATIO,
                ignored_layers=ignored,
            )
            pruner.step()
            return {"parameters": elements(own.parameters())}

        return measured(step)

    return {}, once


def unique(tensors: Any) -> list[torch.Tensor]:
    """Each tensor once."""
    return list({id(tensor): tensor for tensor in tensors}.values())


def elements(tensors: Any) -> int:
    """Elements of the parameters among tensors."""
    return sum(t.numel() for t in unique(tensors) if isinstance(t, nn.Parameter))


def work(who: str, name: str) -> None:
    """A worker's life: facts, then a measurement for every line."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    facts, once = (ours if who == "ours" else theirs)(name)
    say(facts)
    for _ in sys.stdin:
        say(once())


def say(value: dict[str, Any]) -> None:
    """A line of JSON."""
    print(json.dumps(value), flush=True)


# -- the driver -----------------------------------------------------------------------------


@dataclass
class Worker:
    """A process that measures on demand, ended where it takes too long or too much."""

    who: str
    name: str
    limit: float
    gigabytes: float
    facts: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""
    ended_after: float = float("nan")

    def start(self) -> None:
        """Start the process and read its facts."""
        command = [sys.executable, __file__, "--worker", self.who, self.name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        # Building and capturing has no limit of its own; it is not what is compared.
        self.facts = self._answer(600) or {}

    def measure(self) -> None:
        """One more measurement, where the process still lives."""
        if self.failure:
            return
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        found = self._answer(self.limit)
        if found is not None:
            self.runs.append(found)

    def stop(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def _answer(self, limit: float) -> dict[str, Any] | None:
        """The next line, or None and a failure."""
        import select

        start = time.perf_counter()
        stdout = self._process.stdout
        assert stdout is not None
        while not select.select([stdout], [], [], 0.05)[0]:
            if time.perf_counter() - start > limit:
                return self._end(f"ended after {limit:.0f} s", start)
            if self._resident() > self.gigabytes * 1e9:
                return self._end(f"ended at {self.gigabytes:g} GB", start)
        line = stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        _, errors = self._process.communicate()
        last = (errors.strip().splitlines() or [f"exit {self._process.returncode}"])[-1]
        return self._end(last[:120])

    def _end(self, why: str, start: float = float("nan")) -> None:
        self.failure, self.ended_after = why, time.perf_counter() - start
        self._process.kill()

    def _resident(self) -> float:
        try:
            pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):
            return 0.0
        return int(pages) * resource.getpagesize()

    def median(self, key: str) -> float:
        """The median over the runs; NaN where there are none."""
        return statistics.median(run[key] for run in self.runs) if self.runs else float("nan")


def compare(name: str, rounds: int, limit: float, gigabytes: float) -> tuple[Worker, Worker]:
    """Both tools on one model, in turns; the first round of each warms up and is left out."""
    pair = Worker("ours", name, limit, gigabytes), Worker("peer", name, limit, gigabytes)
    for worker in pair:
        worker.start()
    for _ in range(rounds + 1):
        for worker in pair:
            worker.measure()
    for worker in pair:
        worker.stop()
        worker.runs = worker.runs[1:] or worker.runs
    return pair


def ratio(own: Worker, peer: Worker) -> float:
    """The median over rounds of their time over ours; a lower bound where theirs was ended."""
    if not peer.runs:
        return peer.ended_after / own.median("seconds")
    pairs = zip(own.runs, peer.runs, strict=False)
    ratios = [b["seconds"] / a["seconds"] for a, b in pairs]
    return statistics.median(ratios) if ratios else float("nan")


def report(own: Worker, peer: Worker) -> list[str]:
    """Print the row of a model; returns which bounds it breaks."""
    if own.failure:
        print(f"{own.name:<14} ours: {own.failure}", flush=True)
        return [f"{own.name}: {own.failure}"]
    seconds, share = own.median("seconds"), own.median("bytes") / own.facts["weights"]
    kept = own.runs[-1]["parameters"] / own.facts["parameters"]
    other = (
        peer.failure
        or f"{peer.median('seconds'):7.3f} s, keeps "
        f"{peer.runs[-1]['parameters'] / own.facts['parameters']:4.0%}, "
        f"+{peer.median('bytes') / own.facts['weights']:.2f} x weights"
    )
    found = ratio(own, peer)
    faster = "" if math.isnan(found) else f"{'' if peer.runs else '> '}{found:.1f}x"
    print(
        f"{own.name:<14} {own.facts['nodes']:5d} nodes {own.facts['parameters'] / 1e6:6.1f} M  "
        f"capture {own.facts['capture']:5.2f} s, canonicalize {own.facts['canonicalize']:5.2f} s  "
        f"plan {seconds:7.3f} s (coupling {own.median('couple'):.3f}; hash "
        f"+{own.median('hash'):.3f}), keeps {kept:4.0%}, "
        f"+{share:.2f} x weights  Torch-Pruning {other}  {faster}",
        flush=True,
    )
    return broken(own, seconds, share)


def broken(own: Worker, seconds: float, share: float) -> list[str]:
    """Which bounds a model's figures break."""
    found = []
    bound = DEEP_SECONDS if is_deep(own.name) else SECONDS
    if own.facts["parameters"] < 100e6 and seconds > bound:
        found.append(f"{own.name}: {seconds:.1f} s > {bound:g} s")
    if own.facts["parameters"] < 100e6 and own.median("bytes") > GIGABYTES * 1e9:
        found.append(f"{own.name}: {own.median('bytes') / 1e9:.1f} GB > {GIGABYTES:g} GB")
    # Where weights are small, the graph's own nodes are what memory goes to.
    if own.facts["weights"] > 100e6 and share > SHARE:
        found.append(f"{own.name}: {share:.2f} x the weights > {SHARE:g} x")
    return found


def every(limit: float, gigabytes: float) -> list[str]:
    """Every torchvision model below 100 M parameters, ours alone."""
    import torchvision

    modules = [getattr(torchvision.models, part) for part in ("segmentation", "video")]
    names = torchvision.models.list_models(module=torchvision.models)
    names += [name for part in modules for name in torchvision.models.list_models(module=part)]
    problems, slowest = [], (0.0, "")
    for name in names:
        own = Worker("ours", name, limit, gigabytes)
        own.start()
        own.measure()
        own.stop()
        if own.facts and own.facts["parameters"] >= 100e6:
            print(f"{name:<14} has {own.facts['parameters'] / 1e6:.0f} M parameters: left out")
            continue
        problems += report(own, Worker("peer", name, 0, 0, failure="not asked"))
        slowest = max(slowest, (own.median("seconds") if own.runs else 0.0, name))
    print(f"{len(names)} models; the slowest: {slowest[1]} {slowest[0]:.2f} s")
    return problems


def main() -> None:
    """Print a row a model, and what does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[*COMPARED, "deep10000"])
    parser.add_argument("--all", action="store_true", help="every torchvision model, ours alone")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each; default 5")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a measurement")
    parser.add_argument("--memory", type=float, default=6.0, help="GB of a process")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return
    if arguments.all:
        problems = every(arguments.limit, arguments.memory)
    else:
        problems, ratios = [], []
        for name in arguments.models:
            own, peer = compare(name, arguments.rounds, arguments.limit, arguments.memory)
            problems += report(own, peer)
            if own.runs and own.facts["parameters"] < 100e6 and not math.isnan(ratio(own, peer)):
                ratios.append(ratio(own, peer))
        if ratios:
            median = statistics.median(ratios)
            print(f"median over {len(ratios)} models below 100 M parameters: {median:.1f}x")
            problems += [] if median >= TIMES_FASTER else [f"{median:.1f}x < {TIMES_FASTER:g}x"]
    for problem in problems:
        print(f"does not hold: {problem}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
