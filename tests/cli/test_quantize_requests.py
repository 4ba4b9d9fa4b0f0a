"""Bad requests for quantisation end before any work: exit code, one screen, nothing written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Opt

PASSES = "canonicalize,fold-batch-norm,insert-fake-quant"
REQUESTS = {
    "{bits=w1a8}": "'w1a8' asks for 1-bit weights; integer grids have 2 to 8 bits: choose one",
    "{bits=w4}": "'w4' is no width; write w<bits>a<bits>, such as w4a8, or float",
    '{bits=["haed:w4a8"]}': "unknown layer 'haed'; did you mean 'head'?",
    "{exclude=haed}": "unknown layer 'haed'; did you mean 'head'?",
    "{activations=asymmetric,target=tensorrt}": "'tensorrt' takes zero points of 0 only; leave",
    "{samples=100}": "samples=100 were asked for, but the calibration data holds at most 8; give",
    "{samples=0}": "samples must be at least 1, not 0",
    "{percentile=40}": "percentile must be above 50 and at most 100, not 40",
    "{ranges=entropy}": "option ranges must be",
    "{weigths=mse}": "unknown option 'weigths'; did you mean 'weights'?",
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    path = tmp_path / "images.npz"
    generator = np.random.default_rng(0)
    np.savez(path, x=generator.standard_normal((8, 1, 7, 5)).astype(np.float32))
    return path


@pytest.mark.parametrize("options", REQUESTS)
def test_a_bad_request_is_refused(
    options: str, opt: Opt, images: Path, tmp_path: Path
) -> None:
    target = "tensorrt" if "tensorrt" in options else "onnx"
    ran = opt(
        "run", "net.py:make", "-p", f"{PASSES}{options}", "--target", target,
        "--data", str(images), "-o", "out",
    )  # fmt: skip
    assert ran.code in (1, 2)
    said = " ".join(ran.err.split())
    assert REQUESTS[options] in said
    assert len(ran.err.splitlines()) <= 24
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out" / target).exists()


def test_empty_data_is_refused(opt: Opt, tmp_path: Path) -> None:
    np.savez(tmp_path / "empty.npz", x=np.zeros((0, 1, 7, 5), dtype=np.float32))
    ran = opt(
        "run", "net.py:make", "-p", PASSES, "--target", "onnx", "--data", "empty.npz", "-o", "out"
    )
    assert ran.code in (1, 2)
    assert len(ran.err.splitlines()) <= 24
    assert "non-zero first dimension" in " ".join(ran.err.split())
    assert not (tmp_path / "out").exists()
