"""Certificates: right artifacts pass, planted faults fail, and nothing passes vacuously."""

from __future__ import annotations

import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from pruna_ir.backends.eager import ReferenceRunner
from pruna_ir.capture import capture
from pruna_ir.certify import (
    FLOAT_FACTOR,
    FLOOR_EPS,
    MARGIN_DB,
    Certificate,
    audit_summary,
    certify,
    not_run,
)
from pruna_ir.data import TensorData
from pruna_ir.lowering import KernelRow, Verdict
from pruna_ir.noise import run_noisy
from pruna_ir.program import Program
from pruna_ir.transform import Context, Rewrite, apply
from tests import networks, quantised
from tests.networks import DropRelu

EPS = float(np.finfo(np.float32).eps)
# Programs are values: one capture serves every test.
conv_net = cache(networks.conv_net)
quantised_net = cache(quantised.quantised_net)


def runner(program: Program) -> ReferenceRunner:
    return ReferenceRunner(program, threads=0)


def with_weight(program: Program, name: str, change) -> Program:
    """The program with one tensor changed."""
    rw = Rewrite(program, "test", Context())
    rw.set_tensor(name, change(program.tensor(name).detach()))
    return rw.finish()


def one_weight_off(weight: torch.Tensor) -> torch.Tensor:
    """One weight of the last output channel moved by a fifth of that channel's largest."""
    changed = weight.clone()
    row = changed.view(len(changed), -1)[-1]
    row[0] += 0.2 * float(row.abs().max())
    return changed


class Changed:
    """A runner whose outputs are changed after the fact."""

    def __init__(self, program: Program, change) -> None:
        self._runner, self._change = runner(program), change

    def run(self, inputs):
        return self._change(self._runner.run(inputs))

    def audit(self):
        return []


FAULTS = {
    "zeroed": torch.zeros_like,
    "doubled": lambda w: w * 2,
    "permuted": lambda w: w.flip(0),
    "one weight off": one_weight_off,
}


# -- float programs ----------------------------------------------------------------------------


def test_the_program_itself_passes_on_every_stimulus():
    certificate = certify(conv_net(), runner(conv_net()))
    assert certificate.verdict is Verdict.PASSED
    assert certificate.level == "executed"
    kinds = [c.stimulus for c in certificate.comparisons]
    assert kinds == ["example", "normal", "large", "zeros"]
    assert [c.sizes[0][0] for c in certificate.comparisons] == [2, 1, 3, 1]


def test_the_float_tolerance_is_a_factor_of_the_programs_own_error():
    for c in certify(conv_net(), runner(conv_net())).comparisons:
        assert c.limit == FLOAT_FACTOR * max(c.reference, FLOOR_EPS * EPS)
        assert c.measured == c.reference


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["stem.weight", "block.0.weight", "head.weight"])
def test_a_wrong_weight_fails(name: str, fault: str):
    program = conv_net()
    certificate = certify(program, runner(with_weight(program, name, FAULTS[fault])))
    assert certificate.verdict is Verdict.FAILED
    assert "output output on '" in certificate.reason


def test_a_relative_change_of_1e_5_fails():
    program = conv_net()
    wrong = with_weight(program, "head.weight", lambda w: w * (1 + 1e-5))
    assert certify(program, runner(wrong)).verdict is Verdict.FAILED


def test_a_dropped_relu_fails():
    program = conv_net()
    wrong = apply(DropRelu(), program).program
    assert certify(program, runner(wrong)).verdict is Verdict.FAILED


def with_nan(outputs):
    outputs[0].flat[0] = math.nan
    return outputs


OUTPUT_FAULTS = {
    "NaN": with_nan,
    "no output": lambda _: [],
    "wrong shape": lambda outputs: [outputs[0].T],
    "wrong dtype": lambda outputs: [outputs[0].astype(np.float64)],
    "infinite": lambda outputs: [outputs[0] * np.float32(math.inf)],
}


@pytest.mark.parametrize("fault", OUTPUT_FAULTS)
@pytest.mark.parametrize("network", [conv_net, quantised_net])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_wrong_outputs_fail(network, fault: str):
    program = network()
    assert certify(program, Changed(program, OUTPUT_FAULTS[fault])).verdict is Verdict.FAILED


class Shifted(nn.Module):
    """Loses every digit of its input in float32."""

    def forward(self, x):
        return (x + 1e9) - 1e9


def test_an_ill_conditioned_program_is_not_certified():
    program = capture(Shifted(), (torch.randn(2, 5),))
    certificate = certify(program, runner(program))
    assert certificate.verdict is Verdict.NOT_RUN
    assert certificate.reason.startswith("output output could not be judged")
    assert {c.outcome for c in certificate.comparisons} <= {"inconclusive", "passed"}


def test_an_ill_conditioned_program_still_fails_on_nan():
    program = capture(Shifted(), (torch.randn(2, 5),))
    assert certify(program, Changed(program, with_nan)).verdict is Verdict.FAILED


class Classes(nn.Module):
    def forward(self, x):
        return x.argmax(-1), x > 0


def test_integer_and_bool_outputs_must_be_equal():
    program = capture(Classes(), (torch.randn(3, 7),))
    assert certify(program, runner(program)).verdict is Verdict.PASSED
    for position in range(2):

        def flip(outputs, position=position):
            outputs[position].flat[0] = not outputs[position].flat[0]
            return outputs

        assert certify(program, Changed(program, flip)).verdict is Verdict.FAILED


def test_an_artifact_of_one_size_is_compared_at_that_size():
    program = conv_net()
    certificate = certify(program, runner(program), fixed={"batch": 5})
    assert {c.sizes[0][0] for c in certificate.comparisons} == {5}


def test_real_data_is_a_stimulus_too():
    program = conv_net()
    data = TensorData((torch.randn(6, 3, 9, 9),), batch_size=4)
    certificate = certify(program, runner(program), data=data)
    assert (certificate.comparisons[0].stimulus, certificate.comparisons[0].sizes) == (
        "data",
        ((4, 3, 9, 9),),
    )


# -- quantised programs ------------------------------------------------------------------------


def test_a_quantised_program_passes_on_data_alone():
    program = quantised_net()
    data = TensorData((torch.randn(8, 3, 9, 9),), batch_size=4)
    certificate = certify(program, runner(program), data=data)
    assert certificate.verdict is Verdict.PASSED
    assert [(c.stimulus, c.sizes[0][0]) for c in certificate.comparisons] == [
        ("data", 4),
        ("data", 1),
        ("data", 3),
    ]
    assert {c.metric for c in certificate.comparisons} == {"sqnr dB"}


def test_the_quantised_tolerance_is_the_programs_own_noise():
    program = quantised_net()
    for c in certify(program, runner(program)).comparisons:
        assert math.isfinite(c.reference)
        assert c.limit == pytest.approx(c.reference - MARGIN_DB)
        assert c.measured > c.reference


def test_an_independent_noisy_program_passes():
    program = quantised_net()

    class Noisy(ReferenceRunner):
        def run(self, inputs):
            tensors = [torch.from_numpy(value) for value in inputs]
            return [y.float().numpy() for y in run_noisy(program, tensors, seed=99)]

    assert certify(program, Noisy(program, 0)).verdict is Verdict.PASSED


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["first.weight", "second.weight", "head.weight"])
def test_a_wrong_weight_fails_in_a_quantised_program(name: str, fault: str):
    program = quantised_net()
    wrong = with_weight(program, name, FAULTS[fault])
    assert certify(program, runner(wrong)).verdict is Verdict.FAILED


@pytest.mark.parametrize("name", ["x_scale", "a_scale", "b_scale"])
def test_a_scale_off_by_one_percent_fails(name: str):
    program = quantised_net()
    wrong = with_weight(program, name, lambda s: s * 1.01)
    assert certify(program, runner(wrong)).verdict is Verdict.FAILED


def test_truncation_instead_of_rounding_fails():
    program = quantised_net()

    class Truncating(ReferenceRunner):
        """Sees every input half a step lower, as a kernel that truncates would."""

        def run(self, inputs):
            half = float(program.tensor("x_scale")) / 2
            return super().run([value - np.float32(half) for value in inputs])

    assert certify(program, Truncating(program, 0)).verdict is Verdict.FAILED


# -- the certificate as a value ----------------------------------------------------------------


def test_json_and_back():
    program = quantised_net()
    for certificate in (
        certify(program, runner(program)),
        certify(program, Changed(program, with_nan)),
        not_run(program, "no device"),
    ):
        text = json.dumps(certificate.to_json(), allow_nan=False)
        assert Certificate.from_json(json.loads(text)) == certificate


def test_the_summary_says_what_was_measured():
    program = conv_net()
    certificate = certify(program, runner(program))
    worst = certificate.worst()
    assert certificate.summary() == f"PASSED: {worst}"
    assert "relative error" in str(worst)
    assert not_run(program, "no CUDA device").summary() == "NOT_RUN(no CUDA device)"


def test_the_audit_is_counted_by_kind():
    rows = [KernelRow("a", "conv", "int8"), KernelRow("b", "conv", "float32")]
    assert audit_summary(rows * 2) == {"conv": {"int8": 2, "float32": 2}}


def test_equal_seeds_give_equal_certificates():
    program = quantised_net()
    first, second = (certify(program, runner(program), seed=3) for _ in range(2))
    assert first == second


def test_an_output_of_nothing_but_zeros_proves_nothing():
    class Zero(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(3, 2)
            torch.nn.init.zeros_(self.head.weight)
            torch.nn.init.zeros_(self.head.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x)

    program = capture(Zero(), (torch.randn(2, 3),))
    certificate = certify(program, runner(program))
    assert certificate.verdict is Verdict.NOT_RUN
    assert "all zeros" in certificate.reason
