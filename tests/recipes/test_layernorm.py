"""The recipe of LayerNorm: its claims, its comparison, its run folder."""

from __future__ import annotations

import pytest
import torch

from normkit.errors import InputError
from normkit.recipes import _layernorm_claims as claims
from normkit.recipes._layernorm_digits import (
    EVERY,
    HELD_OUT,
    Comparison,
    Config,
    Reader,
    Trial,
    digits,
    forgotten,
    growth,
    reached,
    read_chain,
    train,
)
from normkit.recipes.layernorm import SYSTEM, run
from normkit.runs import read_json, read_table

TINY = Config(steps=2 * EVERY, seeds=2, hidden=4, batch=8, rates=(0.01, 0.1), chain=3)


def trial(net, rate, seed, steps, chain=(0.9, 0.5), cell=(1.0, 2.0)):
    return Trial(net, rate, seed, [1.0], steps, 0.9, list(chain), list(cell))


@pytest.mark.parametrize(
    "claim", [c for c in SYSTEM.claims if c.kind != "measured"], ids=lambda c: c.name
)
def test_an_identity_holds(claim):
    assert claim.check().verdict == "holds"


def test_the_table_of_invariances_tells_the_methods_apart(monkeypatch):
    assert sum(sum(row) for row in claims.PUBLISHED.values()) == 10
    swapped = dict(claims.PUBLISHED)
    swapped["layer norm"] = claims.PUBLISHED["batch norm"]
    monkeypatch.setattr(claims, "PUBLISHED", swapped)
    found = claims._invariances()
    assert found.verdict == "contradicted"
    assert "layer norm, single case re-scaled" in found.measured


def test_the_digits_are_those_of_scikit_learn():
    images, labels = digits()
    assert images.shape == (1797, 8, 8)
    assert 0 <= images.min() < images.max() == 1
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_nets_are_compared_at_their_best_rates_seed_by_seed():
    found = Comparison(
        [
            trial("LSTM", 0.1, 0, 60),
            trial("LSTM", 0.1, 1, 70),
            trial("LSTM", 0.2, 0, 90),
            trial("LSTM", 0.2, 1, 50),
            trial("LN-LSTM", 0.1, 1, 90),
            trial("LN-LSTM", 0.1, 0, 90),
            trial("LN-LSTM", 0.2, 1, 30),
            trial("LN-LSTM", 0.2, 0, 10),
        ]
    )
    assert found.best == {"LSTM": 0.1, "LN-LSTM": 0.2}
    finding = found.finding(reached, "steps")
    assert finding.verdict == "holds"
    assert "difference +45 [+40, +50], n = 2" in finding.measured
    assert finding.details["LSTM at 0.2"] == [90, 50]
    assert finding.details["LN-LSTM at 0.2 (its best)"] == [10, 30]
    assert found.difference(reached, 0.1).mean == -25


@pytest.mark.parametrize(
    ("ours", "verdict"), [((30, 10), "holds"), ((90, 70), "contradicted"), ((30, 70), "not shown")]
)
def test_a_verdict_is_as_it_falls(ours, verdict):
    found = Comparison(
        [trial("LSTM", 0.1, s, 50) for s in (0, 1)]
        + [trial("LN-LSTM", 0.1, s, n) for s, n in enumerate(ours)]
    )
    assert found.finding(reached, "steps").verdict == verdict


def test_what_a_chain_shows():
    one = trial("LSTM", 0.1, 0, 5, chain=(0.9, 0.7, 0.4, 0.2), cell=(2.0, 3.0, 5.0, 6.0))
    assert forgotten(one) == pytest.approx(0.9 - 0.3)
    assert growth(one) == 3.0


def test_a_chain_carries_the_state_and_reads_held_out_digits():
    torch.manual_seed(0)
    model = Reader("LSTM", 4)
    accuracy, cell = read_chain(model, 2, seed=1)
    images, labels = digits()
    generator = torch.Generator().manual_seed(1)
    rows = [
        len(labels) - HELD_OUT + torch.randperm(HELD_OUT, generator=generator) for _ in range(2)
    ]
    logits, state = model(torch.cat([images[r] for r in rows], 1))
    assert accuracy[1] == pytest.approx(
        float((logits.argmax(-1) == labels[rows[1]]).float().mean())
    )
    assert cell[1] == pytest.approx(float(state[1].detach().square().mean().sqrt()), rel=1e-5)


def test_a_training_is_the_same_when_repeated():
    config = Config(steps=10, seeds=1, hidden=4, batch=8, chain=2)
    assert train(config, "LN-LSTM", 0.01, 3) == train(config, "LN-LSTM", 0.01, 3)
    never = train(config, "LSTM", 1e-6, 3)
    assert never.reached == 10
    assert len(never.losses) == 10 // EVERY


def test_a_run_that_was_cut_short_goes_on(tmp_path):
    whole = run(TINY, tmp_path / "whole")
    assert len(read_table(tmp_path / "whole", "trials")) == 2 * 2 * 2
    assert len(whole["table"]["rows"]) == 4
    assert read_json(tmp_path / "whole", "results.json")["title"] == whole["title"]
    assert len(list((tmp_path / "whole" / "plots").glob("*.png"))) == 2
    assert "<img" in (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    part = tmp_path / "part"
    run(TINY, part)
    lines = (part / "trials.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (part / "trials.jsonl").write_text("".join(lines[:3]), encoding="utf-8")
    again = run(TINY, part)
    assert again["table"] == whole["table"]
    assert len(read_table(part)) == 2


@pytest.mark.parametrize(
    ("flag", "value"),
    [("steps", 4), ("seeds", 0), ("chain", 1), ("rates", ()), ("rates", (-0.1,)), ("loss", 0.0)],
)
def test_bad_flags_are_refused(flag, value):
    with pytest.raises(InputError, match=flag):
        Config(**{flag: value}).validate()
