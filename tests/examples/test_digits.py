"""The digits example: its data, its trained weights, and the scripts that use them."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pruna_ir import load_data

DIGITS = Path(__file__).parents[2] / "examples" / "digits"


@pytest.fixture(scope="module")
def digits():
    """The module ``model.py``, imported from its place."""
    sys.path.insert(0, str(DIGITS))
    try:
        import model

        yield model
    finally:
        sys.path.remove(str(DIGITS))
        sys.modules.pop("model", None)


def run(script, *arguments, timeout=280):
    """A script's standard output; its error output where it fails."""
    done = subprocess.run(
        [sys.executable, DIGITS / script, *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_three_parts_are_all_images_and_share_none(digits):
    parts = [digits.training_set(), digits.validation_set(), digits.test_set()]
    assert [len(part.inputs[0]) for part in parts] == [1097, 300, 400]
    images = torch.cat([part.inputs[0] for part in parts])
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert len(images.flatten(1).unique(dim=0)) == 1797


def test_calibration_takes_training_images_only(digits):
    training = {bytes(image.numpy()) for image in digits.training_set().inputs[0]}
    assert all(bytes(image.numpy()) in training for image in digits.calibration().inputs[0])


def test_the_committed_weights_reach_the_stated_accuracy(digits):
    model, inputs = digits.factory()
    assert not model.training
    assert model(*inputs).shape == (8, 10)
    assert sum(p.numel() for p in model.parameters()) == 114_282
    # 397 of 400; another machine's rounding may move an image on the border.
    assert digits.accuracy(model, digits.test_set()) == pytest.approx(0.9925, abs=0.0051)


def test_accuracy_tells_a_broken_network(digits):
    model, _ = digits.factory()
    torch.nn.init.zeros_(model.classifier.weight)
    assert digits.accuracy(model, digits.test_set()) < 0.2


def test_the_data_files_hold_the_same_batches(digits, tmp_path):
    printed = run("model.py", tmp_path / "data").splitlines()
    assert [Path(line).name for line in printed] == ["calibration.npz", "test.npz"]
    for path, expected in zip(printed, [digits.calibration(), digits.test_set()], strict=True):
        read = load_data(Path(path), ("image",))
        assert torch.equal(read.inputs[0], expected.inputs[0])
        assert torch.equal(read.labels, expected.labels)
        with np.load(path) as file:
            assert sorted(file) == ["image", "labels"]


def test_a_few_epochs_of_training_learn_the_digits(tmp_path):
    printed = run("train.py", "--epochs", 4, "--output", tmp_path / "weights.safetensors")
    assert percent(r"test accuracy: ([\d.]+)%", printed) > 85


def test_training_repeats_itself_bit_for_bit(tmp_path):
    for name in ("a", "b"):
        run("train.py", "--epochs", 1, "--output", tmp_path / name)
    run("train.py", "--epochs", 1, "--seed", 1, "--output", tmp_path / "c")
    first, second, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == second
    assert first != other


def percent(pattern, text):
    """The one percentage that a pattern finds."""
    (found,) = re.findall(pattern, text)
    return float(found)


def test_compile_prunes_recovers_quantises_and_verifies(tmp_path):
    out = run("compile.py", "--out", tmp_path, "--target", "onnx", "--epochs", 3)
    assert percent(r"captured .* accuracy ([\d.]+)%", out) >= 98.5
    parameters = [int(n) for n in re.findall(r"(\d+) parameters", out)]
    assert parameters[-1] < 0.45 * parameters[0]
    recovered = percent(r"recovered .* accuracy ([\d.]+)%", out)
    assert recovered >= 96
    assert "does not hold" not in out
    assert out.count(" holds: ") >= 5
    _, artifact = out.split("\nonnx: ")
    assert "PASSED: " in artifact
    assert percent(r"accuracy ([\d.]+)%", artifact) >= recovered - 1
    assert re.search(r"ms \(p90 .*, p99 .*\), [\d.]+x", artifact)
    assert (tmp_path / "onnx" / "certificate.json").is_file()
    assert (tmp_path / "onnx-original" / "certificate.json").is_file()
