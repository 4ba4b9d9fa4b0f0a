"""Small networks of matrix products that the tests of weight quantisation share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.data import TensorData
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.program import Program
from pruna_ir.transform import apply


class Conv1D(nn.Module):
    """Hugging Face's layer: a weight [inputs, outputs] and an addmm between two views."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs) / 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], y.size(-1))


class Products(nn.Module):
    """linear, addmm and a linear without bias; 64, 52 and 48 inputs; float32[batch, 3, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(64, 52)
        self.turned = Conv1D(52, 48)
        self.head = nn.Linear(48, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.turned(torch.relu(self.wide(x)))))


class Tied(nn.Module):
    """An embedding whose table is the head's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 32)
        self.body = nn.Linear(32, 32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.body(self.table(ids)))
        return nn.functional.linear(x, self.table.weight)


def captured(module: nn.Module, *inputs: torch.Tensor) -> Program:
    return apply(Canonicalize(), capture(module.eval(), inputs)).program


def products() -> Program:
    torch.manual_seed(0)
    return captured(Products(), torch.randn(2, 3, 64))


def tied() -> Program:
    torch.manual_seed(0)
    return captured(Tied(), torch.randint(0, 20, (2, 5)))


def correlated(rows: int = 24, width: int = 64) -> TensorData:
    """Inputs with a few large channels, all of which depend on a few hidden ones."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, 3, 10, generator=generator)
    mixing = torch.randn(10, width, generator=generator)
    mixing[:, : width // 16] *= 8
    noise = 0.1 * torch.randn(rows, 3, width, generator=generator)
    return TensorData((hidden @ mixing / 3 + noise,), batch_size=8)


def gpt2(**options: Any) -> Program:
    """A Hugging Face GPT-2 of two layers with random weights."""
    import transformers

    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=61, n_positions=16, use_cache=False, **options
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    program = capture(model, (), {"input_ids": torch.randint(0, 61, (2, 8))})
    return apply(Canonicalize(), program).program
