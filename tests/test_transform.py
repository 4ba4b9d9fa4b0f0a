"""Running one pass: what it changed, its history, and promises that must be stated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from pruna_ir import transform
from pruna_ir.errors import PassError
from pruna_ir.transform import Effect, Pass, apply
from tests.networks import Identity, aten, conv_net


def test_a_pass_that_changes_nothing_returns_the_program_itself():
    program = conv_net()
    result = apply(Identity(), program)
    assert not result.modified
    assert result.program is program


def test_history_tells_what_ran_with_which_options():
    @dataclass(frozen=True)
    class DropBias(Pass):
        name: ClassVar[str] = "drop-bias"
        effect: ClassVar[Effect] = Effect.BOUNDED
        layer: str = "head"
        times: int = 1

        def rewrite(self, rw):
            for node in rw.calls(aten.linear.default):
                rw.update(node, bias=None)

    program = conv_net()
    after = apply(DropBias(times=2), program).program
    (entry,) = after.history
    assert entry.text == "drop-bias{times=2}"
    assert (entry.before, entry.after) == (program.hash(), after.hash())


def test_an_oracle_pass_that_promises_nothing_is_refused():
    @dataclass(frozen=True)
    class Silent(Pass):
        name: ClassVar[str] = "silent"
        effect: ClassVar[Effect] = Effect.ORACLE

        def rewrite(self, rw):
            for node in rw.calls(aten.linear.default):
                rw.update(node, bias=None)

    with pytest.raises(PassError, match="silent changed the function without stating"):
        apply(Silent(), conv_net())


def test_all_that_a_pass_needs_comes_from_here():
    for name in transform.__all__:
        assert hasattr(transform, name)
