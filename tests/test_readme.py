"""The Python blocks of the README and of the guides run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_RUN = {"cluster": "its blocks are parts of programs for several machines"}
GUIDES = sorted(p for p in (ROOT / "docs" / "guides").glob("*.md") if p.stem not in NOT_RUN)
PAGES = [ROOT / "README.md", *GUIDES]
BLOCKS = [
    pytest.param(page, block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    )
]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_block_runs(page, block, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(page), "exec"), {})
    assert page.name != "README.md" or capsys.readouterr().out.strip()
