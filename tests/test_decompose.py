"""Decomposition into operators that backends know."""

from __future__ import annotations

from pruna_ir.decompose import decompose
from tests.networks import conv_net


def test_decomposing_a_program_without_fused_operators_changes_nothing():
    program = conv_net()
    assert decompose(program).hash() == program.hash()
