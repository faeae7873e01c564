"""The small language model of unified-norm and powernorm: its trials, findings and run folder."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from normkit.errors import InputError
from normkit.recipes import _lm_report as report
from normkit.recipes import powernorm, unified_norm
from normkit.recipes._lm import (
    NORMS,
    LanguageModel,
    TokenBatchNorm,
    Training,
    Trial,
    _distance,
    _running,
    best,
    train,
)
from normkit.runs import read_json, read_table

TINY = Training(steps=4, seeds=1, dim=8, layers=1, heads=2, batch=2, length=8, every=2)


def trial(norm, loss, seed=0, rate=0.003, distance=(0.1,) * 10, train=(1.0,) * 10):
    return Trial(norm, rate, seed, [5.0, loss], loss, list(train), [1.0], list(distance))


def seeds(norm, losses, **options):
    return [trial(norm, loss, i, **options) for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    "claim",
    [
        c
        for system in (unified_norm.SYSTEM, powernorm.SYSTEM)
        for c in system.claims
        if c.kind != "measured"
    ],
    ids=lambda c: c.name,
)
def test_what_is_exact_or_counted_holds(claim):
    assert claim.check().verdict == "holds"


def test_a_norm_is_judged_at_its_own_best_rate():
    found = [trial("layer", 3.0, rate=0.1), trial("layer", 2.0, rate=0.01)]
    assert [t.rate for t in best(found, "layer")] == [0.01]


def test_findings_fall_either_way():
    low, high = seeds("power", (2.0, 2.1, 2.0)), seeds("layer", (2.2, 2.4, 2.3))
    assert report.lower_loss(low + high, "power", "layer").verdict == "holds"
    assert report.lower_loss(low + high, "layer", "power").verdict == "contradicted"
    mixed = low + seeds("layer", (2.1, 2.0, 2.05))
    assert report.lower_loss(mixed, "power", "layer").verdict == "not shown"
    assert report.on_par(low + high, "power", "layer").verdict == "holds"
    assert report.on_par(low + high, "layer", "power").verdict == "contradicted"


def test_a_collapse_is_counted_per_training():
    sound = seeds("layer", (2.0, 2.0))
    assert report.collapses(sound + seeds("batch", (5.0, math.nan)), "batch", "layer").verdict == (
        "holds"
    )
    assert report.collapses(sound + seeds("batch", (2.0, 5.0)), "batch", "layer").verdict == (
        "not shown"
    )
    assert report.collapses(sound + seeds("batch", (2.1, 2.2)), "batch", "layer").verdict == (
        "contradicted"
    )


def test_calm_is_a_ratio_of_distances():
    found = [*seeds("power", (2, 2), distance=(0.1,) * 10), *seeds("batch", (2, 2))]
    assert report.calmer(found, "power", "batch").verdict == "not shown"
    found = [*seeds("power", (2, 2), distance=(0.01,) * 10), *seeds("batch", (2, 2))]
    assert report.calmer(found, "power", "batch").verdict == "holds"
    assert report.calmer(found, "batch", "power").verdict == "contradicted"


def test_a_training_that_diverged_counts_as_guessing():
    assert trial("batch", math.nan).loss == math.log(256)
    assert trial("batch", 1e9).loss == math.log(256)


def test_jumps_of_the_loss_are_counted():
    assert trial("batch", 2.0, train=[3, 3, 3, 3.6, 3.2, 3]).spikes == pytest.approx(1 / 5)


@pytest.mark.parametrize("norm", ["batch", "power", "unified"])
def test_the_distance_of_statistics_is_that_of_the_batch(norm):
    torch.manual_seed(0)
    layer = TINY.norm(norm)(8)
    if norm == "power":
        layer.groups = None
    for step in range(1, 6):
        x = torch.randn(4, 5, 8) * step
        before = _running(nn.Sequential(layer))
        layer(x)
        found = _distance(before, _running(nn.Sequential(layer)), norm, step, TINY.warmup)
        rows = x.flatten(0, 1)
        batch = rows.var(0) if norm == "batch" else rows.square().mean(0)
        running = before[0]["running_var"]
        expected = (batch - running).norm() / running.norm()
        assert found == pytest.approx(float(expected), rel=1e-4)


def test_batch_norm_of_tokens_is_torch_s_over_channels():
    x = torch.randn(4, 5, 8)
    expected = nn.BatchNorm1d(8)(x.mT).mT
    torch.testing.assert_close(TokenBatchNorm(8)(x), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_trainings_repeat_and_start_from_the_same_weights(norm):
    a, b = (train(TINY, norm, 0.003, 0) for _ in range(2))
    assert (a.held_out, a.train, a.by_batch) == (b.held_out, b.train, b.by_batch)
    torch.manual_seed(0)
    first = LanguageModel(TINY, TINY.norm(norm))
    torch.manual_seed(0)
    second = LanguageModel(TINY, TINY.norm("layer"))
    assert torch.equal(first.head.weight, second.head.weight)


def test_layer_norm_has_no_running_statistics_to_pay_for():
    found = train(TINY, "layer", 0.003, 0)
    assert found.distance == []
    assert found.gap == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("recipe", [unified_norm, powernorm], ids=lambda r: r.SYSTEM.slug)
def test_a_run_leaves_a_report_and_trains_only_what_is_missing(recipe, tmp_path):
    results = recipe.run(TINY, tmp_path)
    assert len(read_table(tmp_path, "trials")) == 3
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"1_loss.png", "2_stability.png"}
    assert (tmp_path / "report.html").exists()
    before = (tmp_path / "trials.jsonl").read_text()
    again = recipe.run(TINY, tmp_path)
    assert (tmp_path / "trials.jsonl").read_text() == before
    assert again["table"] == results["table"]
    assert read_json(tmp_path, "results.json")["claims"].keys() == recipe.FINDINGS.keys()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"seeds": 0}, "seeds"),
        ({"steps": 1}, "every"),
        ({"rates": ()}, "rates"),
    ],
)
def test_bad_flags_are_named(options, name):
    with pytest.raises(InputError, match=name):
        Training(**options).validate()
