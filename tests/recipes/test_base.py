"""How a run ends."""

from __future__ import annotations

import io

from rich.console import Console

from normkit.recipes.base import finish
from normkit.runs import RunLogger, read_json


def test_a_run_ends_with_its_results_page_and_summary(tmp_path):
    logger = RunLogger(tmp_path, tensorboard=False)
    logger.config({"seed": 3})
    said = io.StringIO()
    results = {"title": "a run", "summary": ["gain +1.5 [+1.0, +2.0]", "x" * 200]}
    assert finish(logger, results, Console(file=said, width=80)) is results
    assert read_json(tmp_path, "results.json") == results
    assert "gain +1.5 [+1.0, +2.0]" in (tmp_path / "report.html").read_text()
    lines = said.getvalue().splitlines()
    assert lines[:2] == results["summary"]
    assert lines[2].startswith("report: ")
