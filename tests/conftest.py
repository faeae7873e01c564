"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def empa_dir() -> Path:
    """The user's copy of EMPA files, where there is one (CC BY-NC: never part of normkit)."""
    named = os.environ.get("NORMKIT_EMPA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "empa"
    if not folder.is_dir():
        pytest.skip("no EMPA files here; set NORMKIT_EMPA to a copy")
    return folder
