"""Comparison of two artifacts with each other, without the program.

Where both were certified against the same program, the triangle inequality says how far apart
they may be on the same kind of inputs:

    float:      |a - b| / max|b|  <=  limit_a + limit_b
    quantised:  noise amplitudes add: SQNR(a, b) >= -20 log10(10^(-limit_a/20) + 10^(-limit_b/20))

Artifacts of different programs (float32 against int8, say) have no such bound; then the caller
states the lowest acceptable SQNR.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pruna_ir.build import Artifact
from pruna_ir.certify import Certificate
from pruna_ir.data import DataSource
from pruna_ir.equivalence import relative_error, sqnr_db
from pruna_ir.errors import UsageError
from pruna_ir.lowering import LoadOptions, Verdict

BATCH = "batch"
Arrays = Sequence[np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Difference:
    """How far apart two artifacts are on one output, on one set of inputs.

    Attributes:
        output: the output's name.
        sizes: the shapes of the inputs.
        relative_error: max|a - b| / max|b|.
        sqnr_db: of ``a`` against ``b``.
        limit: what the rule's metric was compared with.
        passed: the verdict.
    """

    output: str
    sizes: tuple[tuple[int, ...], ...]
    relative_error: float
    sqnr_db: float
    limit: float
    passed: bool


@dataclass(frozen=True)
class ArtifactComparison:
    """Two artifacts on the same inputs.

    Attributes:
        verdict: ``PASSED`` or ``FAILED``.
        rule: how the limit was derived, in words.
        metric: ``relative error`` or ``sqnr dB``.
        differences: every output on every set of inputs.
    """

    verdict: Verdict
    rule: str
    metric: str
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        if self.metric == "sqnr dB":
            worst = min(self.differences, key=lambda d: d.sqnr_db - d.limit)
            figure, sign = worst.sqnr_db, ">="
        else:
            worst = max(self.differences, key=lambda d: d.relative_error - d.limit)
            figure, sign = worst.relative_error, "<="
        return (
            f"{self.verdict.value}: output {worst.output}: {self.metric} {figure:.3g} "
            f"(must be {sign} {worst.limit:.3g})"
        )


@dataclass(frozen=True)
class _Rule:
    text: str
    metric: str
    limits: Mapping[str, float]


def compare_artifacts(
    a: Artifact,
    b: Artifact,
    *,
    data: DataSource | None = None,
    seed: int = 0,
    min_sqnr_db: float | None = None,
    options: LoadOptions | None = None,
) -> ArtifactComparison:
    """Run two artifacts on the same inputs and compare their outputs.

    Args:
        a: one artifact.
        b: the other one, which is the reference.
        data: real inputs; the first batch is used. Drawn ones otherwise.
        seed: of the drawn inputs.
        min_sqnr_db: the lowest SQNR of any output that passes; without it the limit follows from
            the two certificates.
        options: how both are loaded.

    Raises:
        UsageError: their inputs or outputs differ, or no limit follows and none is given.
        ToolchainError: one of them cannot be executed here.
    """
    _check_interfaces(a, b)
    rule = _given_rule(a, min_sqnr_db) if min_sqnr_db is not None else _derived_rule(a, b)
    runners = [artifact.load(options) for artifact in (a, b)]
    found: list[Difference] = []
    for inputs in _input_sets(a, b, data, seed):
        first, second = (runner.run(inputs) for runner in runners)
        found += _differences(b, inputs, first, second, rule)
    verdict = Verdict.PASSED if all(d.passed for d in found) else Verdict.FAILED
    return ArtifactComparison(verdict, rule.text, rule.metric, tuple(found))


def _check_interfaces(a: Artifact, b: Artifact) -> None:
    for kind, ours, theirs in (
        ("inputs", a.manifest.inputs, b.manifest.inputs),
        ("outputs", a.manifest.outputs, b.manifest.outputs),
    ):
        if _signature(ours) != _signature(theirs):
            raise UsageError(
                f"{a.folder} and {b.folder} differ in their {kind}: {_signature(ours)} against "
                f"{_signature(theirs)}"
            )


def _signature(specs: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(f"{s['name']}: {s['dtype']} of rank {len(s['shape'])}" for s in specs)


def _given_rule(a: Artifact, min_sqnr_db: float) -> _Rule:
    limits = {output["name"]: min_sqnr_db for output in a.manifest.outputs}
    return _Rule(f"SQNR of at least {min_sqnr_db:g} dB, as given", "sqnr dB", limits)


def _derived_rule(a: Artifact, b: Artifact) -> _Rule:
    if a.manifest.program_hash != b.manifest.program_hash:
        raise UsageError(
            f"{a.folder} and {b.folder} were made from different programs, so nothing says how "
            "far apart they may be; give the lowest acceptable SQNR in dB"
        )
    (metric_a, limits_a), (metric_b, limits_b) = _limits(a.certificate), _limits(b.certificate)
    names = [output["name"] for output in a.manifest.outputs]
    if metric_a != metric_b or any(n not in limits_a or n not in limits_b for n in names):
        raise UsageError(
            f"{a.folder} or {b.folder} was never verified, so nothing says how far apart they "
            "may be; give the lowest acceptable SQNR in dB"
        )
    add = _added_noise if metric_a == "sqnr dB" else lambda x, y: x + y
    return _Rule(
        "the sum of both certificates' tolerances",
        metric_a,
        {name: add(limits_a[name], limits_b[name]) for name in names},
    )


def _added_noise(a: float, b: float) -> float:
    return float(-20 * math.log10(10 ** (-a / 20) + 10 ** (-b / 20)))


def _limits(certificate: Certificate) -> tuple[str, dict[str, float]]:
    """The widest conclusive limit of each output, and the metric that it is in.

    Integer outputs, which must be equal, get the limit 0 (relative) or infinity (dB).
    """
    conclusive = [c for c in certificate.comparisons if c.outcome == "passed"]
    metrics = {c.metric for c in conclusive} - {"differing elements"}
    metric = next(iter(metrics), "relative error")
    widest = min if metric == "sqnr dB" else max
    limits: dict[str, float] = {}
    for c in conclusive:
        exact = math.inf if metric == "sqnr dB" else 0.0
        limit = exact if c.metric == "differing elements" else c.limit
        limits[c.output] = widest(limit, limits.get(c.output, limit))
    return metric, limits


def _input_sets(
    a: Artifact, b: Artifact, data: DataSource | None, seed: int
) -> list[list[np.ndarray[Any, Any]]]:
    if data is not None:
        return [[value.numpy() for value in next(iter(data)).inputs]]
    generator = np.random.default_rng(seed)
    sizes = _fixed_sizes(a, b)
    sets = [sizes]
    if BATCH in a.manifest.dims and BATCH not in sizes:
        sets = [sizes | {BATCH: n} for n in (1, 3)]
    return [
        [_draw(spec, chosen, generator) for spec in a.manifest.inputs] for chosen in sets
    ]


def _fixed_sizes(a: Artifact, b: Artifact) -> dict[str, int]:
    """Sizes of dimensions that one artifact leaves open and the other does not."""
    fixed: dict[str, int] = {}
    for ours, theirs in zip(a.manifest.inputs, b.manifest.inputs, strict=True):
        for x, y in zip(ours["shape"], theirs["shape"], strict=True):
            if isinstance(x, str) and isinstance(y, int):
                fixed[x] = y
            elif isinstance(x, int) and isinstance(y, int) and x != y:
                raise UsageError(f"{a.folder} takes size {x} where {b.folder} takes {y}")
    return fixed


def _draw(
    spec: Mapping[str, Any], sizes: Mapping[str, int], generator: np.random.Generator
) -> np.ndarray[Any, Any]:
    shape = [
        size if isinstance(size, int) else sizes.get(size, example)
        for size, example in zip(spec["shape"], spec["example"], strict=True)
    ]
    if "range" in spec:
        low, high = spec["range"]
        return generator.integers(low, high, shape, endpoint=True).astype(spec["dtype"])
    return generator.standard_normal(shape).astype(spec["dtype"])


def _differences(
    b: Artifact, inputs: Arrays, first: Arrays, second: Arrays, rule: _Rule
) -> list[Difference]:
    found = []
    for spec, x, y in zip(b.manifest.outputs, first, second, strict=True):
        one, other = torch.from_numpy(np.array(x)), torch.from_numpy(np.array(y))
        error, sqnr = relative_error(one, other), sqnr_db(one, other)
        limit = rule.limits[spec["name"]]
        passed = sqnr >= limit if rule.metric == "sqnr dB" else error <= limit
        shapes = tuple(value.shape for value in inputs)
        found.append(Difference(spec["name"], shapes, error, sqnr, limit, passed))
    return found
