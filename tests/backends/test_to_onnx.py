"""ONNX Runtime: verified artifacts, executed precisions, unsupported nodes."""

from __future__ import annotations

from functools import cache

import onnx
import pytest
import torch
from torch import nn

from pruna_ir.backends.to_onnx import ToOnnx
from pruna_ir.capture import capture
from pruna_ir.data import TensorData
from pruna_ir.errors import LoweringError
from pruna_ir.lowering import LoadOptions
from pruna_ir.passes.canonicalize import Canonicalize
from pruna_ir.passes.insert_fake_quant import InsertFakeQuant
from pruna_ir.transform import Context, apply
from tests import networks, quantised
from tests.backends import runtime_cases as cases

conv_net = cache(networks.conv_net)
quantised_net = cache(quantised.quantised_net)


@pytest.mark.parametrize("program", [conv_net, cases.odd, cases.same])
def test_float_programs_are_verified(program, tmp_path):
    cases.built(program(), "onnx", tmp_path / "out")


def test_integer_inputs_and_two_dynamic_dimensions(tmp_path):
    program = cases.lookup()
    artifact = cases.built(program, "onnx", tmp_path / "out")

    def inputs(batch: int, length: int) -> list[torch.Tensor]:
        return [torch.randint(0, 17, (batch, length)), torch.rand(batch, length) > 0.3]

    cases.check_sizes(program, artifact, inputs)
    graph = onnx.load(tmp_path / "out/model.onnx").graph
    assert [value.name for value in graph.input] == ["ids", "mask"]
    assert [value.name for value in graph.output] == ["states", "pooled"]
    assert [d.dim_param for d in graph.input[0].type.tensor_type.shape.dim] == ["batch", "length"]


def test_an_int8_program_runs_on_integers(tmp_path):
    artifact = cases.built(quantised_net(), "onnx", tmp_path / "out")
    summary = artifact.certificate.audit_summary()
    assert summary["conv"] == {"int8": 2}
    assert summary["linear"] == {"int8": 1}
    assert artifact.manifest.facts["disabled_optimizers"] == []


class SelfAttention(nn.Module):
    """Two products with a weight and two of activations, in the spelling of a textbook."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v)


@pytest.mark.parametrize(("quantised", "precision"), [(False, "float32"), (True, "int8")])
def test_products_of_activations_are_told_from_those_with_weights(quantised, precision, tmp_path):
    """An integer product of activations reads constants too: its scales."""
    torch.manual_seed(0)
    x = torch.randn(8, 5, 16)
    program = apply(Canonicalize(), capture(SelfAttention().eval(), (x[:2],))).program
    if quantised:
        insert = InsertFakeQuant(target="onnx", products=True)
        program = apply(insert, program, Context(data=TensorData((x,), batch_size=4))).program
    artifact = cases.built(program, "onnx", tmp_path / "out")
    summary = artifact.certificate.audit_summary()
    assert summary["linear"] == {precision: 2}
    assert summary["matmul"] == {precision: 2}


def test_a_float_program_is_audited_as_float(tmp_path):
    artifact = cases.built(conv_net(), "onnx", tmp_path / "out")
    summary = artifact.certificate.audit_summary()
    assert (summary["conv"], summary["linear"]) == ({"float32": 2}, {"float32": 1})
    assert artifact.manifest.facts["disabled_optimizers"] == []


@pytest.mark.parametrize("network", [conv_net, quantised_net])
def test_wrong_weights_are_told_from_right_ones(network, tmp_path):
    cases.check_faults_fail(network(), "onnx", "head.weight", tmp_path)


class Exotic(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x).relu() + torch.special.bessel_j0(x + 1)


def test_every_unsupported_node_is_named():
    found = ToOnnx().unsupported(capture(Exotic(), (torch.randn(3, 4),)))
    assert [o.operator for o in found] == ["aten.special_bessel_j0.default"] * 2
    assert ToOnnx().unsupported(conv_net()) == []


def test_a_damaged_model_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(LoweringError, match="ONNX Runtime refuses the model"):
        ToOnnx().load(tmp_path, LoadOptions())
