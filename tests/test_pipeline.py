"""Pipelines: order, scopes, fixpoints, what is checked, and what an error tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from pruna_ir.bisect import Explain
from pruna_ir.errors import InvalidIRError, PassError, UsageError, VerificationError
from pruna_ir.instruments import DumpIR, Statistics, StopAfter, Timing, Watch
from pruna_ir.pipeline import Pipeline, Scope
from pruna_ir.spec import print_pass
from pruna_ir.transform import Effect, Pass
from tests.networks import DropRelu, Identity, ScaleHead, Typed, aten, conv_net
from tests.planted import registered


@dataclass(frozen=True)
class OneReluLess(Pass):
    """Removes a single relu each time it runs; honest about it only as BOUNDED."""

    name: ClassVar[str] = "one-relu-less"
    effect: ClassVar[Effect] = Effect.BOUNDED
    min_sqnr_db: ClassVar[float] = -1000.0

    def rewrite(self, rw):
        for node in rw.calls(aten.relu.default, aten.relu6.default, aten.hardtanh.default):
            rw.replace(node, rw.call(node).producer("self"))
            return


@pytest.fixture
def typed(tmp_path):
    with registered(tmp_path, {"typed": "tests.networks:Typed"}):
        yield


def test_text_becomes_typed_options_and_text_again(typed):
    text = 'typed{count=3,ratio=1.0,flag=true,word=b,globs=["layer*",head],limit=7}'
    pipeline = Pipeline.parse(text)
    made = Typed(3, 1.0, flag=True, word="b", globs=("layer*", "head"), limit=7)
    assert pipeline.items == (made,)
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert print_pass(Typed()) == "typed"


def test_a_single_value_is_a_list_of_one_and_an_int_a_float(typed):
    (made,) = Pipeline.parse("typed{globs=head,ratio=1}").items
    assert made.globs == ("head",)
    assert isinstance(made.ratio, float)


def test_a_value_from_a_file(typed, tmp_path):
    file = tmp_path / "globs.json"
    file.write_text('["a", "b"]')
    (made,) = Pipeline.parse(f'typed{{globs=@"{file}"}}').items
    assert made.globs == ("a", "b")
    with pytest.raises(UsageError, match="cannot be read as JSON"):
        Pipeline.parse('typed{globs=@"/no/such.json"}')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("typed{cuont=1}", "typed: unknown option 'cuont'; did you mean 'count'?\n"
         "  typed{cuont=1}\n        ^^^^^"),
        ("typed{count=many}", "typed: option count must be int, not many\n"
         "  typed{count=many}\n        ^^^^^"),
        ("typed{count=1.5}", "option count must be int"),
        ("typed{flag=1}", "option flag must be bool"),
        ("tiped", "unknown pass 'tiped'; did you mean 'typed'?\n  tiped\n  ^^^^^"),
        ("fixpiont(typed)", "unknown scope 'fixpiont'; did you mean 'fixpoint'?"),
        ("submodule(typed)", "submodule needs a glob"),
        ("fixpoint<x>(typed)", "fixpoint takes no argument"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_and_pointed_at(typed, text, message):
    with pytest.raises(UsageError) as caught:
        Pipeline.parse(text)
    assert message in str(caught.value)


def test_fixpoint_repeats_until_nothing_changes():
    pipeline = Pipeline((Scope("fixpoint", "", (OneReluLess(),)),))
    result = pipeline.run(conv_net())
    assert [step.modified for step in result.steps] == [True, True, False]
    assert not list(result.program.calls(aten.relu.default, aten.hardtanh.default))


def test_a_fixpoint_that_never_settles_is_an_error():
    class Restless(ScaleHead):
        effect = Effect.BOUNDED
        min_sqnr_db = -1000.0

    pipeline = Pipeline((Scope("fixpoint", "", (Restless(factor=-1.0),)),))
    with pytest.raises(PassError, match="still changes the program after 100 rounds"):
        pipeline.run(conv_net(), check_each=False, verify_each=False)


def test_submodule_scopes_nest():
    inner = Scope("submodule", "stem*", (DropRelu(),))
    pipeline = Pipeline((Scope("submodule", "block*", (inner,)),))
    assert not pipeline.run(conv_net()).steps[0].modified


def test_steps_tell_what_was_verified_and_checked():
    result = Pipeline((Identity(), ScaleHead(factor=1.0 + 1e-12))).run(conv_net())
    idle, scaled = result.steps
    assert (idle.modified, idle.verified, idle.check) == (False, False, None)
    assert not scaled.modified or scaled.check.passed


def test_a_broken_promise_names_pass_node_and_what_ran_before():
    pipeline = Pipeline((Identity(), DropRelu()))
    with pytest.raises(VerificationError) as caught:
        pipeline.run(conv_net(), instruments=[Explain()])
    message = str(caught.value)
    assert message.startswith("drop-relu: its promise does not hold: rounding does not hold")
    assert "after: identity" in message
    assert "first diverging node:" in message
    assert "tests/networks.py:" in message


def test_checks_can_be_turned_off():
    result = Pipeline((DropRelu(),)).run(conv_net(), check_each=False)
    assert result.steps[0].modified
    assert result.steps[0].check is None


def test_a_pass_that_leaves_a_broken_ir_is_caught():
    @dataclass(frozen=True)
    class Lies(Pass):
        name: ClassVar[str] = "lies"
        effect: ClassVar[Effect] = Effect.EXACT

        def rewrite(self, rw):
            node = next(rw.calls(aten.relu.default))
            node.meta["val"] = rw.program.results()[0].meta["val"]
            (linear,) = rw.calls(aten.linear.default)
            rw.update(linear, bias=None)

    with pytest.raises(InvalidIRError, match="relu claims to be"):
        Pipeline((Lies(),)).run(conv_net())


def test_a_crash_inside_a_pass_names_the_pass():
    @dataclass(frozen=True)
    class Crashes(Pass):
        name: ClassVar[str] = "crashes"
        effect: ClassVar[Effect] = Effect.EXACT

        def rewrite(self, rw):
            raise ZeroDivisionError("oops")

    with pytest.raises(PassError, match="crashes failed: ZeroDivisionError: oops"):
        Pipeline((Crashes(),)).run(conv_net())


def test_stop_after_ends_the_run_without_an_error():
    result = Pipeline((Identity(), DropRelu(), DropRelu())).run(
        conv_net(), instruments=[StopAfter(1)]
    )
    assert [step.name for step in result.steps] == ["identity"]


def test_dumps_before_after_and_changes(tmp_path):
    pipeline = Pipeline((Identity(), DropRelu()))
    for when in ("before", "after", "changed"):
        pipeline.run(conv_net(), check_each=False, instruments=[DumpIR(tmp_path / when, when)])
    assert sorted(p.name for p in (tmp_path / "before").iterdir()) == [
        "001-identity.before.txt", "002-drop-relu.before.txt",
    ]  # fmt: skip
    (diff,) = (tmp_path / "changed").iterdir()
    assert diff.name == "002-drop-relu.diff"
    removed = [line for line in diff.read_text().splitlines() if line.startswith("-  ")]
    assert any("aten.relu" in line for line in removed)
    assert "aten.relu(" not in (tmp_path / "after" / "002-drop-relu.after.txt").read_text()


def test_timing_and_statistics_write_a_line_a_pass():
    lines: list[str] = []
    Pipeline((Identity(), DropRelu())).run(
        conv_net(), check_each=False, instruments=[Timing(lines.append), Statistics(lines.append)]
    )
    assert len(lines) == 4
    assert lines[0].endswith("ms  identity")
    assert lines[1] == "identity: same operators"
    assert "-1 aten.relu.default" in lines[3]


def test_instruments_see_every_pass_in_order():
    seen: list[str] = []

    class Spy(Watch):
        def before(self, pass_, program):
            seen.append(f"before {pass_.name}")

        def after(self, step, before, program):
            seen.append(f"after {step.name}")

    Pipeline((Identity(), Identity())).run(conv_net(), instruments=[Spy()])
    assert seen == ["before identity", "after identity"] * 2


def test_the_program_given_still_runs():
    program, x = conv_net(), torch.randn(2, 3, 9, 9)
    expected = program(x)[0]
    Pipeline((DropRelu(),)).run(program, check_each=False)
    assert torch.equal(program(x)[0], expected)
