"""The report is the same data as text, as tables for a terminal, and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pruna_ir.report import (
    OTHER,
    SHOWN_LAYERS,
    ArtifactRow,
    LatencyRow,
    LayerRow,
    Report,
    Size,
    StepRow,
    integers,
    plain_text,
    quantity,
    rich_text,
    tables,
)

STEP = StepRow(
    target="", text="fold-batch-norm", changed=True, nodes=6, size=Size(2_000_000, 11_700, 46_800),
    verdict="rounding holds", check="rounding holds: 1.8e-16", measured=1.8e-16, limit=1e-9,
    seconds=0.031,
)  # fmt: skip
ARTIFACT = ArtifactRow(
    target="onnx", verdict="PASSED", verification="PASSED: output y on 'zeros'", exit_code=0,
    folder="out/onnx", bytes=46_900, original_bytes=47_000, size=STEP.size,
    metric="relative error", measured=1e-7, limit=1e-5, accuracy=0.9725,
    latency=LatencyRow(1.5, 1.75, 2.5, 20, 3.0, 2.0),
    audit={"conv": {"int8": 19, "float32": 1}, "pool": {"float32": 1}},
)  # fmt: skip
REPORT = Report(
    model="net.py:make", pipeline="fold-batch-norm", original=Size(2_000_000, 11_800, 47_200),
    steps=(STEP,), artifacts=(ARTIFACT,), notes=("mind this",), versions={"torch": "2"}, seed=0,
    latency_batch=1, accuracy=0.975,
)  # fmt: skip


def test_plain_text_is_aligned_and_whole() -> None:
    assert plain_text(REPORT) == (
        "passes:\n"
        "  pass             changed  calls  parameters  FLOPs  bytes   accuracy  promise         "
        "measured            seconds\n"
        "  (as captured)                    11.8k       2M     47.2kB  97.50%\n"
        "  fold-batch-norm  yes      6      11.7k       2M     46.8kB            rounding holds  "
        "1.8e-16 (<= 1e-09)  0.03\n"
        "\n"
        "artifacts:\n"
        "  target  size    original  FLOPs  accuracy  p50 ms  p90 ms  p99 ms  original p50  "
        "speed-up  on integers\n"
        "  onnx    46.9kB  47kB      2M     97.25%    1.5     1.75    2.5     3             "
        "2.00x     conv 19/20\n"
        "\n"
        "verification:\n"
        "  target  verdict  what was compared\n"
        "  onnx    PASSED   PASSED: output y on 'zeros'\n"
        "\n"
        "note: mind this\n"
    )


def test_the_terminal_shows_the_same_cells() -> None:
    shown = rich_text(REPORT, 400)
    for _, columns, rows in tables(REPORT):
        for cell in (*columns, *(cell for row in rows for cell in row)):
            assert cell in shown


def test_columns_without_values_are_left_out() -> None:
    bare = replace(REPORT, accuracy=None, artifacts=(replace(ARTIFACT, latency=None),))
    columns = [column for _, names, _ in tables(bare) for column in names]
    assert "p50 ms" not in columns
    assert "target" not in tables(bare)[0][1]
    assert "accuracy" not in tables(bare)[0][1]


def test_json_holds_everything_and_no_infinity() -> None:
    odd = replace(ARTIFACT, measured=math.inf, limit=-math.inf)
    plain = json.loads(json.dumps(replace(REPORT, artifacts=(odd,)).to_json(), allow_nan=False))
    assert plain["artifacts"][0]["measured"] == "inf"
    assert plain["artifacts"][0]["latency"]["speedup"] == 2.0
    assert plain["steps"][0]["size"] == {"flops": 2000000, "parameters": 11700, "bytes": 46800}


LAYERS = tuple(
    LayerRow(f"layer{i}", "conv2d", 4_000_000, 1_000_000, time=4.0, new_time=2.0 + i)
    for i in range(SHOWN_LAYERS + 1)
)


def test_layers_show_flops_against_time_and_name_the_slow() -> None:
    rows = (*LAYERS[:2], replace(LAYERS[2], new_time=3.75), LayerRow(OTHER, "", 0, 0, 0.5, 0.75))
    report = replace(REPORT, artifacts=(replace(ARTIFACT, layers=rows),))
    assert (
        "layers in onnx (3):\n"
        "  layer              operator  FLOPs  after  ms     after  speed-up  remark\n"
        "  layer2             conv2d    4M     1M     4.000  3.750  1.07x     did not speed up\n"
        "  layer1             conv2d    4M     1M     4.000  3.000  1.33x\n"
        "  layer0             conv2d    4M     1M     4.000  2.000  2.00x\n"
        "  (everything else)                          0.500  0.750  0.67x\n"
    ) in plain_text(report)
    said = "note: onnx: of 3 layers with fewer FLOPs, 1 did not speed up: layer2\n"
    assert plain_text(report).endswith(said)
    assert said.removeprefix("note: ").strip() in rich_text(report, 400)
    plain = report.to_json()["artifacts"][0]
    assert plain["slow_layers"] == ["layer2"]
    assert [layer["slow"] for layer in plain["layers"]] == [False, False, True, False]
    assert plain["layers"][0] == {
        "layer": "layer0", "operator": "conv2d", "flops": 4_000_000, "new_flops": 1_000_000,
        "time": 4.0, "new_time": 2.0, "speedup": 2.0, "slow": False,
    }  # fmt: skip


def test_text_leaves_fast_layers_out_but_never_a_slow_one() -> None:
    # All but layer0 and layer1 are slow; layer0 takes least.
    shown = plain_text(replace(REPORT, artifacts=(replace(ARTIFACT, layers=LAYERS),)))
    assert f"layers in onnx ({SHOWN_LAYERS + 1}; report.json has 1 more):" in shown
    assert [row.slow for row in LAYERS[:3]] == [False, False, True]
    assert " layer0 " not in shown
    assert all(f" {row.layer} " in shown for row in LAYERS[1:])
    quick = replace(LAYERS[0], layer="quick", new_time=0.1, time=0.1)
    shown = plain_text(replace(REPORT, artifacts=(replace(ARTIFACT, layers=(*LAYERS, quick)),)))
    assert " quick " in shown


def test_integers_counts_what_computes() -> None:
    audit = {"linear": {"int8": 2}, "conv": {"bfloat16": 3}, "concat": {"int8": 5}}
    assert integers(audit) == "conv 0/3, linear 2/2"
    assert integers({}) == ""


@given(st.integers(0, 10**15))
def test_quantities_keep_three_digits(value: int) -> None:
    text = quantity(value)
    factor = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1], 1)
    number = float(text.rstrip("kMGT"))
    assert math.isclose(number * factor, value, rel_tol=0.005)
