"""The recipe runs at a tiny size, and its claims hold."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from normkit.errors import InputError
from normkit.recipes import pre_rmsnorm
from normkit.recipes._pre_rmsnorm_latency import quartiles

TINY = pre_rmsnorm.Config(
    layers=2, width=16, heads=2, vocab=50, tokens=8, image=16, patch=8, images=1, repeats=2,
    compiled=False,
)  # fmt: skip


@pytest.mark.parametrize(
    "claim", [c for c in pre_rmsnorm.CLAIMS if c.kind != "measured"], ids=lambda c: c.name
)
def test_claims_that_must_hold(claim):
    finding = claim.check()
    assert finding.verdict == "holds", finding


def test_a_run_leaves_its_numbers_its_plot_and_its_report(tmp_path):
    results = pre_rmsnorm.run(TINY, tmp_path)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert set(kept["timings"]) == {"GPT-2 prompt", "GPT-2 one token", "ViT images"}
    for found in results["exactness"].values():
        assert max(found["pre-rmsnorm"], found["pre-crmsnorm"]) < 1e-5
    for sides in results["means"].values():
        assert max(sides["original"].values()) > 1e-2
        assert max(sides["pre-rmsnorm"].values()) < 1e-5
    assert (tmp_path / "report.html").exists()
    assert list((tmp_path / "plots").glob("*.png"))
    row = results["timings"]["GPT-2 prompt"]["original"]
    assert row["ratios"] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"layers": 0}, "layers must be at least 1"),
        ({"width": 15}, "width must be a multiple of heads"),
        ({"image": 17}, "image must be a multiple of patch"),
    ],
)
def test_bad_flags(flags, reason):
    with pytest.raises(InputError, match=reason):
        pre_rmsnorm.Config(**flags).validate()


def test_quartiles():
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
