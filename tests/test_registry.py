"""The list of systems is the list of files, docs pages and README rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from normkit import recipes
from normkit.errors import InputError
from normkit.recipes.base import Verdict

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


MEASURED = {
    entry.slug: {c.name: c for c in recipes.load(entry.slug).claims if c.kind == "measured"}
    for entry in recipes.built()
}


@pytest.mark.parametrize("slug", [s for s in MEASURED if MEASURED[s]])
def test_every_measured_claim_has_its_latest_result(slug):
    claims, file = MEASURED[slug], ROOT / "docs" / "results" / f"{slug}.json"
    rows = {r["claim"]: r for r in json.loads(file.read_text(encoding="utf-8"))}
    measured = {name for name, row in rows.items() if row["kind"] == "measured"}
    assert measured == set(claims)
    for name, claim in claims.items():
        row = rows[name]
        assert (row["system"], row["statement"], row["published"]) == (
            slug,
            claim.statement,
            claim.published,
        )
        assert row["measured"]
        assert row["verdict"] in get_args(Verdict)


def test_unknown_names_say_where_to_look():
    with pytest.raises(InputError, match="normkit list"):
        recipes.entry("nope")
    assert recipes.load("mica") is recipes.load("mapo")
