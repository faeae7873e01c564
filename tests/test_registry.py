"""The list of systems is the list of files, docs pages and README rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from normkit import recipes
from normkit.errors import InputError

ROOT = Path(__file__).parents[1]


def test_the_catalogue_has_every_system_once():
    names = [n for e in recipes.CATALOGUE for n in (e.slug, *e.aliases)]
    assert len(recipes.CATALOGUE) == 33
    assert len(set(names)) == len(names)


def test_every_recipe_file_is_in_the_catalogue():
    files = {p.stem for p in Path(recipes.__file__).parent.glob("[a-z]*.py")} - {"base"}
    assert files == {e.slug.replace("-", "_") for e in recipes.built()}


@pytest.mark.parametrize("entry", recipes.built(), ids=lambda e: e.slug)
def test_a_built_system_is_complete(entry):
    system = recipes.load(entry.slug)
    assert (system.slug, system.arxiv, system.aliases) == (entry.slug, entry.arxiv, entry.aliases)
    assert {c.kind for c in system.claims} >= {"exact"}
    assert len({c.name for c in system.claims}) == len(system.claims)
    for symbol in system.symbols:
        module, _, name = symbol.rpartition(".")
        assert hasattr(__import__(module, fromlist=[name]), name)
    page = (ROOT / "docs" / "papers" / f"{entry.slug}.md").read_text(encoding="utf-8")
    assert entry.arxiv in page
    assert f"normkit run {entry.slug}" in page
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"docs/papers/{entry.slug}.md" in readme


def test_unknown_names_say_where_to_look():
    with pytest.raises(InputError, match="normkit list"):
        recipes.entry("nope")
    assert recipes.load("mica") is recipes.load("mapo")
