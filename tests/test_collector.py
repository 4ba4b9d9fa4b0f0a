"""Pausing the collector ends with the state that was there before, whatever happens inside."""

from __future__ import annotations

import gc

import pytest

from pruna_ir.collector import paused_collector


def test_it_is_off_inside_and_on_again_after_an_error():
    with pytest.raises(ValueError, match="inside"), paused_collector():
        assert not gc.isenabled()
        raise ValueError("inside")
    assert gc.isenabled()


def test_who_has_it_off_keeps_it_off():
    gc.disable()
    try:
        with paused_collector(), paused_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
