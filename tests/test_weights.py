"""Weight files hold tensors, whole and finite, and fit the model; all else is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pruna_ir.errors import CaptureError
from pruna_ir.weights import load_weights, put_weights


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_a_state_dict_comes_back(tmp_path: Path, name: str) -> None:
    source, target = net(), net()
    state = source.state_dict()
    save = save_file if name.endswith("safetensors") else torch.save
    save(state, tmp_path / name)
    put_weights(target, load_weights(tmp_path / name), name)
    for key, value in target.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_a_checkpoint_is_unwrapped(tmp_path: Path, wrapper: str) -> None:
    torch.save({"epoch": 3, wrapper: net().state_dict()}, tmp_path / "w.pt")
    assert set(load_weights(tmp_path / "w.pt")) == set(net().state_dict())


def test_the_prefix_of_data_parallel_training_is_dropped() -> None:
    state = {f"module.{name}": value for name, value in net().state_dict().items()}
    put_weights(net(), state, "w.pt")


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    torch.save({"w": Touch(tmp_path / "ran")}, tmp_path / "w.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    for name in ("w.pt", "raw.pt"):
        with pytest.raises(CaptureError, match="refused: it is a pickle"):
            load_weights(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_the_pickle_control_runs_when_trusted(tmp_path: Path) -> None:
    torch.save({"w": Touch(tmp_path / "ran")}, tmp_path / "w.pt")
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "w.pt")
    with pytest.raises(CaptureError, match="refused: it is a pickle"):
        load_weights(tmp_path / "w.pt")


def test_nan_is_named(tmp_path: Path) -> None:
    state = net().state_dict()
    state["2.bias"][1] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CaptureError, match=r"w\.safetensors: 2\.bias holds NaN"):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_truncated_files_are_refused(tmp_path: Path, name: str) -> None:
    save = save_file if name.endswith("safetensors") else torch.save
    save(net().state_dict(), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    for kept in (0, 7, len(content) // 2, len(content) - 3):
        (tmp_path / name).write_bytes(content[:kept])
        with pytest.raises(CaptureError):
            load_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CaptureError, match="cannot be read: No such file"):
        load_weights(tmp_path / name)


def test_something_other_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "lr": 0.1}, tmp_path / "w.pt")
    with pytest.raises(CaptureError, match="'lr' is a float, not a tensor"):
        load_weights(tmp_path / "w.pt")
    torch.save([torch.ones(2)], tmp_path / "w.pt")
    with pytest.raises(CaptureError, match=r"the file's content.* is a list"):
        load_weights(tmp_path / "w.pt")


def test_a_misfit_lists_what_differs_and_changes_nothing() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = net().state_dict()
    state["3.weight"] = state.pop("0.weight")
    state["2.weight"] = torch.zeros(2, 5)
    with pytest.raises(CaptureError) as caught:
        put_weights(model, state, "w.pt")
    assert str(caught.value) == (
        "w.pt does not fit Sequential: 1 missing: 0.weight; 1 unexpected: 3.weight; "
        "1 of another shape: 2.weight is [2, 5], the model's [2, 4]"
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_tied_tensor_needs_one_of_its_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.table.weight

    model = Tied()
    put_weights(model, {"table.weight": torch.ones(5, 3)}, "w.safetensors")
    assert torch.equal(model.head.weight, torch.ones(5, 3))


def test_long_lists_are_cut() -> None:
    with pytest.raises(CaptureError, match=r"8 missing: 0\.weight, .* and 3 more"):
        put_weights(net(), {}, "w.pt")
