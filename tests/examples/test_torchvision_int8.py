"""The torchvision script quantises a network, and what it wrote was verified."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "torchvision_int8.sh"


def test_squeezenet_becomes_a_verified_int8_artifact(tmp_path):
    # pruna-opt stands beside the interpreter that runs the tests.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # On a busy machine torch's threads wait for each other: minutes instead of seconds.
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [SCRIPT, "squeezenet1_1", tmp_path / "out", "onnx"],
        capture_output=True, text=True, timeout=280, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "random inputs" in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (artifact,) = report["artifacts"]
    assert (artifact["target"], artifact["verdict"]) == ("onnx", "PASSED")
    assert artifact["audit"]["conv"] == {"int8": 26}
