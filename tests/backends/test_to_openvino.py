"""OpenVINO: names, dynamic sizes, stored integers, executed precisions, unsupported nodes."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from pruna_ir.backends.to_openvino import ToOpenvino, convert
from pruna_ir.build import build
from pruna_ir.capture import capture
from pruna_ir.errors import LoweringError
from pruna_ir.lowering import LoadOptions
from tests import networks, quantised
from tests.backends import runtime_cases as cases

conv_net = cache(networks.conv_net)
quantised_net = cache(quantised.quantised_net)


def test_names_and_open_dimensions_are_the_programs():
    model = convert(cases.lookup())
    assert [(i.get_any_name(), str(i.get_partial_shape())) for i in model.inputs] == [
        ("ids", "[1..,1..]"),
        ("mask", "[1..,1..]"),
    ]
    assert [sorted(o.get_names() & {"states", "pooled"}) for o in model.outputs] == [
        ["states"],
        ["pooled"],
    ]


@pytest.mark.parametrize("program", [conv_net, cases.odd, cases.same])
def test_float_programs_are_verified(program, tmp_path):
    cases.built(program(), "openvino", tmp_path / "out")


def test_integer_inputs_and_two_dynamic_dimensions(tmp_path):
    program = cases.lookup()
    artifact = cases.built(program, "openvino", tmp_path / "out")

    def inputs(batch: int, length: int) -> list[torch.Tensor]:
        return [torch.randint(0, 17, (batch, length)), torch.rand(batch, length) > 0.3]

    cases.check_sizes(program, artifact, inputs)


def test_an_int8_program_runs_on_integers(tmp_path):
    artifact = cases.built(quantised_net(), "openvino", tmp_path / "out")
    rows = {row.layer: row for row in artifact.certificate.audit}
    assert {row.precision for row in rows.values() if row.kind in ("conv", "linear")} == {"int8"}
    kinds = [row.kind for row in rows.values()]
    assert (kinds.count("conv"), kinds.count("linear")) == (2, 1)


def test_a_float_program_is_audited_as_float(tmp_path):
    artifact = cases.built(conv_net(), "openvino", tmp_path / "out")
    assert artifact.certificate.audit_summary()["conv"] == {"float32": 2}


def test_weights_take_one_byte_each(tmp_path):
    program = quantised_net()
    weights = sum(program.tensor(f"{n}.weight").numel() for n in ("first", "second", "head"))
    build(program, "openvino", tmp_path / "out", verify=False)
    stored = convert(program)
    integers = [
        op.data
        for op in stored.get_ordered_ops()
        if op.get_type_name() == "Constant" and op.data.dtype == np.int8
    ]
    assert sum(value.size for value in integers) == weights
    floats = [
        op.data
        for op in stored.get_ordered_ops()
        if op.get_type_name() == "Constant" and op.data.dtype == np.float32
    ]
    assert max(value.size for value in floats) <= 8


@pytest.mark.parametrize("network", [conv_net, quantised_net])
def test_wrong_weights_are_told_from_right_ones(network, tmp_path):
    cases.check_faults_fail(network(), "openvino", "head.weight", tmp_path)


class Exotic(nn.Module):
    def forward(self, x):
        y = torch.special.bessel_j0(x).relu()
        return torch.special.bessel_j0(y) + torch.linalg.svdvals(y).sum()


def test_every_unsupported_node_is_named():
    program = capture(Exotic(), (torch.randn(3, 4),))
    found = ToOpenvino().unsupported(program)
    assert {(o.operator, o.source.split(":")[0]) for o in found} == {
        ("aten.special_bessel_j0.default", "backends/test_to_openvino.py"),
        ("aten.linalg_svdvals.default", "backends/test_to_openvino.py"),
    }
    assert len(found) == 3
    assert ToOpenvino().unsupported(conv_net()) == []


def test_a_damaged_model_is_refused(tmp_path):
    (tmp_path / "model.xml").write_text("<net")
    with pytest.raises(LoweringError, match="OpenVINO refuses the model"):
        ToOpenvino().load(tmp_path, LoadOptions())


def test_telemetry_stays_off():
    script = (
        "import sys\n"
        "from pruna_ir.backends.to_openvino import ToOpenvino\n"
        "assert ToOpenvino().availability().build == ''\n"
        "assert 'openvino' not in sys.modules\n"
        "from pruna_ir.backends import to_openvino\n"
        "to_openvino._import_openvino()\n"
        "import openvino.tools.ovc.telemetry_utils as utils\n"
        "print(utils.tm.__name__)\n"
    )
    done = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert done.strip() == "openvino.tools.ovc.telemetry_stub"
