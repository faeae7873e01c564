"""The recipe of Peri-LN: its claims, its comparison, its run folder."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from normkit.data.text import VOCABULARY, corpus
from normkit.errors import InputError
from normkit.recipes import _peri_ln_claims as claims
from normkit.recipes._peri_ln_training import (
    Comparison,
    Config,
    Trial,
    diverged,
    growth,
    guess,
    leaps,
    loss,
    massive,
    train,
    unevenness,
)
from normkit.recipes.peri_ln import SYSTEM, run
from normkit.runs import read_json, read_table

TINY = Config(
    placements=("pre", "peri"), steps=5, layers=2, dim=8, heads=2, batch=2, length=8, every=2
)


def trial(placement="peri", rate=0.1, seed=0, held_out=2.0, **fields):
    one = Trial(placement, rate, seed, [3.0, 2.0], [1.0, 1.0], held_out, [[1.0]], [[9.0]], [[1.0]])
    return replace(one, **fields)


@pytest.mark.parametrize(
    "claim", [c for c in SYSTEM.claims if c.kind != "measured"], ids=lambda c: c.name
)
def test_an_identity_holds(claim):
    assert claim.check().verdict == "holds"


def test_the_checks_tell_the_placements_apart():
    assert claims._scale("pre", 0).verdict == "contradicted"
    assert claims._scale("peri", 1).verdict == "contradicted"
    assert claims._scale("output", 0).verdict == "holds"


def test_a_massive_activation_reaches_the_gradient_of_pre_only():
    ratio = claims.gradient_share(1e6, "peri") / claims.gradient_share(1e3, "peri")
    assert ratio == pytest.approx(1.0, rel=0.05)
    assert claims.gradient_share(1e6, "pre") == pytest.approx(1.0)


def test_guessing_is_the_cross_entropy_of_frequencies():
    text, rest = corpus()
    counts = [float((text == b).sum()) + 1 for b in range(VOCABULARY)]
    want = sum(math.log(sum(counts) / counts[b]) for b in rest.tolist()) / len(rest)
    assert guess() == pytest.approx(want, rel=1e-5)
    assert 2.5 < guess() < math.log(VOCABULARY)


def test_what_is_compared():
    one = trial(
        variance=[[1.0, 10.0], [5.0, 1e4]],
        ratio=[[2.0, 3.0], [100.0, 10.0]],
        gradients=[[1.0, 1.0], [0.01, 1.0]],
    )
    assert growth(one) == pytest.approx(3.0)
    assert massive(one) == pytest.approx(2.0)
    assert unevenness(one) == pytest.approx(2.0)
    assert loss(trial(held_out=math.inf)) == loss(trial(held_out=math.nan)) == math.log(256)
    assert (diverged(trial(held_out=2.0)), diverged(trial(held_out=5.0))) == (0.0, 1.0)
    assert growth(trial(variance=[[1.0], [math.nan]])) == 12.0


def test_a_step_with_two_leaps_counts_once():
    flat = [1.0] * 20
    one = trial(losses=[*flat, 1.3, 1.0, 1.3], grad_norms=[*flat, 3.0, 1.0, 1.0])
    assert leaps(one) == 2.0


def test_placements_are_compared_at_their_best_rates_seed_by_seed():
    found = Comparison(
        [
            trial("pre", 0.1, 0, 2.5),
            trial("pre", 0.1, 1, 2.7),
            trial("pre", 0.2, 0, 9.0),
            trial("pre", 0.2, 1, 2.0),
            trial("peri", 0.1, 1, 2.9),
            trial("peri", 0.1, 0, 2.9),
            trial("peri", 0.2, 1, 2.2),
            trial("peri", 0.2, 0, 2.1),
        ]
    )
    assert found.best == {"pre": 0.1, "peri": 0.2}
    finding = found.finding(loss, "pre", "nats")
    assert finding.verdict == "holds"
    assert "pre 2.6, peri 2.15 nats each at its best rate" in finding.measured
    assert finding.details["at 0.2"]["peri"] == [2.1, 2.2]
    assert found.difference(loss, "pre", 0.1).mean == pytest.approx(-0.3)
    assert found.finding(loss, "pre", "nats", 0.1).verdict == "contradicted"
    assert found.finding(loss, "pre", "nats", 0.2).verdict == "not shown"


def test_a_training_records_the_blocks_and_repeats_itself():
    one = train(TINY, "peri", 0.01, 3)
    assert one == train(TINY, "peri", 0.01, 3)
    assert len(one.losses) == len(one.grad_norms) == 5
    for records in (one.variance, one.ratio, one.gradients):
        assert [len(row) for row in records] == [2] * 4  # before steps 0, 2, 4 and at the end
    assert one.losses[0] == train(TINY, "peri", 0.02, 3).losses[0]
    assert one.variance[0] != one.variance[-1]


def test_placements_begin_with_the_same_weights():
    models = []
    for placement in ("pre", "sandwich"):
        torch.manual_seed(0)
        models.append(dict(TINY.model(placement).named_parameters()))
    shared = models[0].keys() & models[1].keys()
    assert len(shared) > 20
    assert all(torch.equal(models[0][name], models[1][name]) for name in shared)


def test_embeddings_are_normalized_in_all_placements_or_none():
    for flag in (True, False):
        for placement in ("pre", "peri"):
            body = replace(TINY, embedding_norm=flag).model(placement).body
            assert (body.embedding_norm is not None) == flag
    assert TINY.model("pre").body.embedding_norm is None
    assert TINY.model("peri").body.embedding_norm is not None
    both = replace(TINY, embedding_norm=True)
    assert train(both, "peri", 0.01, 0) == train(TINY, "peri", 0.01, 0)
    assert train(both, "pre", 0.01, 0) != train(TINY, "pre", 0.01, 0)


def test_the_rate_warms_up_and_falls_to_a_tenth():
    config = Config(steps=100)
    shares = [config.share(step) for step in range(101)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == shares[9] == shares[10] == 1.0
    assert shares[100] == pytest.approx(0.1)
    assert shares[10:] == sorted(shares[10:], reverse=True)


def test_a_run_that_was_cut_short_goes_on(tmp_path):
    whole = run(TINY, tmp_path / "whole")
    assert len(read_table(tmp_path / "whole", "trials")) == 2 * 2
    assert len(whole["table"]["rows"]) == 4
    assert read_json(tmp_path / "whole", "results.json")["title"] == whole["title"]
    assert len(list((tmp_path / "whole" / "plots").glob("*.png"))) == 5
    assert "<img" in (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    part = tmp_path / "part"
    run(TINY, part)
    lines = (part / "trials.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (part / "trials.jsonl").write_text("".join(lines[:3]), encoding="utf-8")
    assert run(TINY, part)["table"] == whole["table"]


def test_a_run_takes_placements_without_peri(tmp_path):
    results = run(replace(TINY, placements=("post",), rates=(0.01,)), tmp_path)
    assert [row[0] for row in results["table"]["rows"]] == ["post"]


def test_what_was_not_finite_is_read_back():
    row = json.loads('{"held_out": null, "losses": [1.0, null]}')
    rest = {name: [] for name in ("grad_norms", "variance", "ratio", "gradients")}
    one = Trial.read({"placement": "pre", "rate": 0.1, "seed": 0, **rest, **row})
    assert math.isnan(one.held_out)
    assert math.isnan(one.losses[1])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("steps", 0),
        ("seeds", 0),
        ("every", 0),
        ("heads", 5),
        ("rates", ()),
        ("rates", (-0.1,)),
        ("placements", ()),
        ("placements", ("pre", "pre")),
    ],
)
def test_bad_flags_are_refused(flag, value):
    with pytest.raises(InputError, match=flag):
        Config(**{flag: value}).validate()
