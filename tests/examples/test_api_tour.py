"""The tour of the Python interface prints what it promises."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_tour_rewrites_reports_and_catches_the_wrong_pass():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "api_tour.py"],
        capture_output=True, text=True, check=True, timeout=240,
    )  # fmt: skip
    _, after = done.stdout.split("after pool-before-relu:")
    assert re.search(r"aten\.relu\(%max_pool2d\w*\) : float32\[batch, 8, 8, 8\]", after)
    assert "pool-before-relu: applied: max_pool2d " in after
    assert "missed: max_pool2d_1 (examples/api_tour.py:" in after
    assert "relu_1 has other readers" in after
    assert "promise: exact holds: 0 " in after
    assert "same bits: True" in after
    assert "VerificationError: drop-relu: its promise does not hold" in after
