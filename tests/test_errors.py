"""What the errors say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from normkit.errors import InputError, check_least, meant


def test_numbers_that_are_too_small_are_named():
    options = SimpleNamespace(seeds=2, steps=0, rate=float("nan"))
    check_least(options, 2, "seeds")
    with pytest.raises(InputError, match="steps must be at least 1, got 0"):
        check_least(options, 1, "seeds", "steps")
    with pytest.raises(InputError, match="rate must be at least 0, got nan"):
        check_least(options, 0, "rate")


def test_close_names_are_suggested():
    assert meant("st_pp", ["st-ppo", "mapo"]) == " (did you mean st-ppo?)"
    assert meant("layers", ["st-ppo", "mapo"]) == ""
