"""The eager backend: the program, saved and run by torch."""

from __future__ import annotations

import torch
from torch import nn

from pruna_ir.backends.eager import Eager
from pruna_ir.build import build
from pruna_ir.capture import capture
from pruna_ir.lowering import LoadOptions, Verdict
from tests.networks import conv_net
from tests.quantised import quantised_net


def test_it_is_always_available():
    assert Eager().availability().build == Eager().availability().execute == ""


def test_float_and_quantised_programs_compute_the_same_bits(tmp_path):
    for program in (conv_net(), quantised_net()):
        artifact = build(program, "eager", tmp_path / "out")
        assert artifact.certificate.verdict is Verdict.PASSED
        for batch in (1, 3):
            x = torch.randn(batch, 3, 9, 9)
            (y,) = artifact.load(LoadOptions(threads=1)).run([x.numpy()])
            with torch.no_grad():
                assert torch.equal(torch.from_numpy(y), program(x)[0])


def test_threads_are_given_back(tmp_path):
    program = conv_net()
    before = torch.get_num_threads()
    Eager().lower(program, tmp_path, context=None)
    Eager().load(tmp_path, LoadOptions(threads=1)).run([program.examples[0].numpy()])
    assert torch.get_num_threads() == before


def test_the_audit_names_the_users_modules(tmp_path):
    rows = build(conv_net(), "eager", tmp_path / "out").certificate.audit
    assert [(r.layer, r.kind) for r in rows if r.kind in ("conv", "linear")] == [
        ("stem", "conv"),
        ("block.0", "conv"),
        ("head", "linear"),
    ]
    assert {r.precision for r in rows} == {"float32"}


class Half(nn.Module):
    def forward(self, x):
        return x.to(torch.bfloat16)


def test_bfloat16_outputs_are_refused():
    (offender,) = Eager().unsupported(capture(Half(), (torch.randn(2, 3),)))
    assert offender.reason.startswith("numpy has no bfloat16")
