"""A program trains in copies of its tensors, and trained values come back as a new program."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.errors import InvalidIRError, UsageError
from pruna_ir.program import Program
from pruna_ir.training import switched, trainable, with_state


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(self.drop(y))


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    return capture(Net(), (torch.randn(2, 1, 7, 5),))


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose class is the third of the columns that is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (33,), generator=generator)
    x = torch.randn(33, 1, 7, 5, generator=generator) * 0.3
    x += (labels - 1.0)[:, None, None, None]
    return x, labels


def train(module: nn.Module, steps: int) -> list[float]:
    optimiser = torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for step in range(steps):
        x, labels = batch(step)
        loss = nn.functional.cross_entropy(module(x)[0], labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_sgd_lowers_the_loss_and_moves_the_statistics(program: Program) -> None:
    before = program.hash()
    module = trainable(program)
    losses = train(module, 40)
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert not torch.allclose(
        module.get_buffer("norm.running_mean"), program.tensor("norm.running_mean")
    )
    assert program.hash() == before


def test_trained_values_come_back_as_a_program(program: Program) -> None:
    module = trainable(program)
    train(module, 40)
    trained = with_state(program, module)
    x, labels = batch(99)
    accuracy = [(p(x)[0].argmax(1) == labels).float().mean().item() for p in (program, trained)]
    assert accuracy[1] > 0.9 > accuracy[0]
    assert trained.hash() != program.hash()
    frozen = trained.hash()
    train(module, 2)
    assert trained.hash() == frozen


def test_evaluation_in_the_trained_module_equals_the_program(program: Program) -> None:
    x, _ = batch(1)
    assert torch.equal(trainable(program, train=False)(x)[0], program(x)[0])
    assert not torch.equal(trainable(program, train=True)(x)[0], program(x)[0])


def test_every_parameter_gets_a_gradient(program: Program) -> None:
    module = trainable(program)
    module(batch(0)[0])[0].square().sum().backward()
    assert set(dict(module.named_parameters())) == {
        "conv.weight", "conv.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"
    }  # fmt: skip
    assert all(p.grad is not None for p in module.parameters())


def test_the_switch_goes_there_and_back(program: Program) -> None:
    there = switched(program, train=True)
    assert there.hash() != program.hash()
    assert switched(there, train=False).hash() == program.hash()


def test_the_switch_equals_capture_in_training_mode() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh())
    x = torch.randn(2, 4)
    captured = capture(net, (x,), train=True)
    ours = switched(capture(net, (x,)), train=True)
    results = []
    for one in (captured, ours):
        torch.manual_seed(3)
        results.append(one(x)[0])
    assert torch.equal(*results)


def test_statistics_of_the_batch_alone_stay_in_use() -> None:
    net = nn.BatchNorm1d(4, track_running_stats=False)
    program = capture(net, (torch.randn(3, 4),))
    assert switched(program, train=False).hash() == program.hash()


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).relu())

    program = capture(Tied(), (torch.randn(2, 3),))
    module = trainable(program)
    assert len(list(module.parameters())) == len({id(t) for t in program.tensors().values()})
    train_step = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.ones(2, 3))[0].sum().backward()
    train_step.step()
    trained = with_state(program, module)
    assert torch.equal(trained(torch.ones(2, 3))[0], module(torch.ones(2, 3))[0])


def test_a_state_dict_serves_too(program: Program) -> None:
    state = {name: tensor * 2 for name, tensor in program.tensors().items()}
    assert torch.equal(
        with_state(program, state).tensor("conv.bias"), program.tensor("conv.bias") * 2
    )


def test_misfits_are_refused(program: Program) -> None:
    state = dict(program.tensors())
    with pytest.raises(UsageError, match=r"no tensor named 'head\.bias'"):
        with_state(program, {k: v for k, v in state.items() if k != "head.bias"})
    with pytest.raises(UsageError, match=r"head\.bias is torch\.float32\[4\] in the state, but"):
        with_state(program, state | {"head.bias": torch.zeros(4)})
    with pytest.raises(UsageError, match=r"head\.bias is torch\.float64"):
        with_state(program, state | {"head.bias": torch.zeros(3).double()})
    with pytest.raises(InvalidIRError, match=r"head\.bias holds NaN"):
        with_state(program, state | {"head.bias": torch.full((3,), torch.nan)})
