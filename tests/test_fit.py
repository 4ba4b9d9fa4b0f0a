"""The training loop: schedules, exact resumption, the same result in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruna_ir.data import Batch
from pruna_ir.errors import PassError, UsageError
from pruna_ir.fit import Fitted, Group, Recipe, decay_groups, fit
from pruna_ir.losses import cross_entropy
from pruna_ir.samples import Held

ROOT = Path(__file__).resolve().parent.parent


class Net(nn.Module):
    """A linear layer, dropout and another; tiny, with something random in it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Linear(4, 7), nn.ReLU(), nn.Dropout(dropout), nn.Linear(7, 3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def samples(count: int = 53) -> Held:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, generator=generator)
    return Held((x,), x[:, :3].argmax(1))


def run(net: nn.Module, recipe: Recipe, data: Held | None = None, **options) -> Fitted:
    def loss(batch: Batch) -> torch.Tensor:
        return cross_entropy(net(batch.inputs[0]), batch.labels)

    groups = decay_groups(list(net.parameters()))
    return fit(net, groups, loss, samples() if data is None else data, recipe, **options)


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def trained(recipe: Recipe, dropout: float = 0.0, **options) -> torch.Tensor:
    net = Net(dropout).train()
    run(net, recipe, **options)
    return weights(net)


SMALL = Recipe(epochs=3, batch_size=8, lr=0.1, weight_decay=0.01)


# -- what a recipe says ---------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 50), st.integers(0, 10), st.sampled_from(["cosine", "step", "constant"]))
def test_rates_rise_in_warmup_and_never_after(steps: int, warmup: int, schedule: str) -> None:
    recipe = Recipe(lr=0.5, schedule=schedule, warmup=warmup)
    rates = [recipe.rate(step, steps + warmup) for step in range(steps + warmup)]
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[warmup] == 0.5
    assert min(rates) > 0.0


def test_steps_fall_at_their_shares_of_the_run() -> None:
    recipe = Recipe(lr=1.0, schedule="step", drops=(0.5, 0.75), drop=0.1)
    rates = [recipe.rate(step, 8) for step in range(8)]
    assert rates == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be at least"),
        ({"drops": (1.5,)}, "between 0 and 1"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
    ],
)
def test_refuses_recipes_that_make_no_sense(options: dict[str, object], fact: str) -> None:
    with pytest.raises(UsageError, match=fact):
        Recipe(**options)


def test_refuses_no_samples_and_nothing_to_train() -> None:
    with pytest.raises(UsageError, match="no sample"):
        run(Net(), SMALL, Held((torch.zeros(0, 4),), torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(UsageError, match="nothing to train"):
        fit(Net(), [], lambda batch: batch.inputs[0], samples(), SMALL)
    with pytest.raises(UsageError, match="batch_size"):
        run(Net(), Recipe())


# -- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_loss_falls(optimizer: str) -> None:
    net = Net()
    done = run(net, Recipe(epochs=8, batch_size=8, lr=0.05, optimizer=optimizer))
    assert done.steps == 8 * 7
    assert len(done.losses) == 8
    assert done.losses[-1] < 0.7 * done.losses[0]


def test_the_mean_of_an_epoch_weighs_samples_alike() -> None:
    """53 samples in batches of 8 end with one of 5; the learning rate is too small to matter."""
    net = Net()
    done = run(net, Recipe(batch_size=8, lr=1e-12))
    x, labels = samples().inputs[0], samples().labels
    assert done.losses[0] == pytest.approx(cross_entropy(net(x), labels).mean().item(), rel=1e-6)


def test_one_step_is_that_of_the_optimiser() -> None:
    net, other = Net(), Net()
    run(net, Recipe(steps=1, batch_size=53, lr=0.1, schedule="constant"))
    loss = nn.functional.cross_entropy(other(samples().inputs[0]), samples().labels)
    loss.backward()
    expected = torch.cat([(p - 0.1 * p.grad).detach().reshape(-1) for p in other.parameters()])
    torch.testing.assert_close(weights(net), expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_together() -> None:
    before = weights(Net())
    after = trained(Recipe(steps=1, batch_size=53, lr=1.0, clip=1e-3, schedule="constant"))
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_groups_have_rates_and_decay_of_their_own() -> None:
    net = Net()
    still, moving = list(net.parameters())[:2], list(net.parameters())[2:]
    before = [p.detach().clone() for p in still]
    groups = [Group(tuple(still), lr=0.0, decay=True), Group(tuple(moving))]
    fit(net, groups, lambda b: cross_entropy(net(*b.inputs), b.labels), samples(), SMALL)
    assert all(torch.equal(a, b) for a, b in zip(before, still, strict=True))


def test_the_seed_alone_decides() -> None:
    torch.manual_seed(1)
    first = trained(SMALL, 0.5, seed=4)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, trained(SMALL, 0.5, seed=4))
    assert not torch.equal(first, trained(SMALL, 0.5, seed=5))
    torch.manual_seed(1)
    Net(0.5)
    assert state.shape == torch.random.get_rng_state().shape


def test_what_others_draw_is_left_alone() -> None:
    net = Net(0.5).train()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run(net, SMALL)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("parts", [2, 3, 100])
def test_accumulation_changes_rounding_alone(parts: int) -> None:
    whole = trained(SMALL)
    torch.testing.assert_close(
        trained(Recipe(**{**vars(SMALL), "accumulate": parts})), whole, rtol=1e-4, atol=1e-5
    )


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    recipe = Recipe(epochs=4, batch_size=8, lr=1e30, checkpoint=str(file), checkpoint_every=1)
    with pytest.raises(PassError, match=r"in step \d+ of 28, at learning rate .* clip=1\.0") as e:
        trained(recipe)
    assert str(file) in str(e.value)


# -- checkpoints ----------------------------------------------------------------------------------


class KilledError(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("every", "at"), [(1, 4), (3, 11), (0, 15)])
def test_a_run_that_was_killed_continues_to_the_same_bits(
    tmp_path: Path, optimizer: str, every: int, at: int
) -> None:
    options = {**vars(SMALL), "lr": 0.02, "optimizer": optimizer}
    whole = Net(0.5).train()
    expected = run(whole, Recipe(**options))

    def killer(what: str, done: int, total: int) -> None:
        if done == at:
            raise KilledError

    file = str(tmp_path / "run.pt")
    recipe = Recipe(**options | {"checkpoint": file, "checkpoint_every": every})
    with pytest.raises(KilledError):
        run(Net(0.5).train(), recipe, progress=killer)
    seen: list[int] = []
    net = Net(0.5).train()
    done = run(net, recipe, progress=lambda _, now, __: seen.append(now))
    assert 1 < seen[0] <= at
    assert torch.equal(weights(net), weights(whole))
    assert done == expected
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_that_is_through_is_not_run_again(tmp_path: Path) -> None:
    recipe = Recipe(**vars(SMALL) | {"checkpoint": str(tmp_path / "run.pt")})
    first = trained(recipe)
    calls: list[int] = []
    again = trained(recipe, progress=lambda _, now, __: calls.append(now))
    assert torch.equal(first, again)
    assert not calls


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "run.pt")
    trained(Recipe(**vars(SMALL) | {"checkpoint": file}))
    with pytest.raises(UsageError, match=r"another run: its lr is 0\.1, here it is 0\.2"):
        trained(Recipe(**vars(SMALL) | {"checkpoint": file, "lr": 0.2}))
    with pytest.raises(UsageError, match="seed"):
        trained(Recipe(**vars(SMALL) | {"checkpoint": file}), seed=9)
    with pytest.raises(UsageError, match="program"):
        trained(Recipe(**vars(SMALL) | {"checkpoint": file}), identity="another")


class Executed:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


def test_checkpoints_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Executed(), tmp_path / "run.pt")
    with pytest.raises(UsageError, match="no checkpoint"):
        trained(Recipe(**vars(SMALL) | {"checkpoint": "run.pt"}))
    assert not (tmp_path / "executed").exists()
    (tmp_path / "run.pt").write_bytes(b"half a file")
    with pytest.raises(UsageError, match="no checkpoint"):
        trained(Recipe(**vars(SMALL) | {"checkpoint": "run.pt"}))


def test_a_checkpoint_is_whole_or_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it writes: what stands there is still the last whole one."""
    recipe = Recipe(
        **vars(SMALL) | {"checkpoint": str(tmp_path / "run.pt"), "checkpoint_every": 2}
    )
    save, calls = torch.save, []

    def dies(value: object, path: Path) -> None:
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"half a file")
            raise KilledError
        save(value, path)

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KilledError):
        trained(recipe)
    monkeypatch.undo()
    assert torch.load(tmp_path / "run.pt", weights_only=True)["position"]["step"] == 4
    assert torch.equal(trained(recipe), trained(SMALL))


# -- several processes ----------------------------------------------------------------------------

SCRIPT = """
    import sys, torch
    sys.path.insert(0, {root!r})
    from tests.test_fit import Net, Recipe, run, weights
    from pruna_ir.errors import UsageError
    from pruna_ir.processes import processes
    torch.set_num_threads(1)
    recipe = Recipe(epochs=2, batch_size=9, lr=0.1, clip=1.0, accumulate=2, checkpoint="run.pt")
    net = Net()
    if processes().rank:
        with torch.no_grad():
            next(net.parameters()).zero_()  # the first process's values count
    done = run(net, recipe)
    torch.save({{"weights": weights(net), "losses": done.losses}}, f"{{processes().rank}}.pt")
    norm = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    try:
        run(norm, recipe)
    except UsageError as error:
        print(error)
"""


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    """53 samples in batches of 9: odd shares, and a last batch of 8; one file is written."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT.format(root=str(ROOT))), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", str(script)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150,
        check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    net = Net()
    alone = run(net, Recipe(epochs=2, batch_size=9, lr=0.1, clip=1.0, accumulate=2))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first["weights"], second["weights"])
    torch.testing.assert_close(first["weights"], weights(net), rtol=1e-5, atol=1e-6)
    assert first["losses"] == pytest.approx(alone.losses, rel=1e-6)
    assert "batch norm in training mode" in found.stdout
    kept = torch.load(tmp_path / "run.pt", weights_only=True)
    assert kept["position"]["step"] == 12
