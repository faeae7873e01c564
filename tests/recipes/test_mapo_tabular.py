"""The comparison in the tabular world: its run folder, its pairing, its claims' verdicts."""

from __future__ import annotations

import numpy as np
import pytest

from normkit.recipes import _mapo_measured as measured
from normkit.recipes._mapo_comparison import NAMES, Facts, Plan, Trial, compare
from normkit.recipes._mapo_tabular import run_tabular
from normkit.recipes.mapo import Config
from normkit.rl.advantage import ESTIMATORS
from normkit.runs import read_json, read_table

TINY = Plan(
    names=("mapo", "grpo", "ppo"),
    horizons=(2, 3),
    group_sizes=(4, 8),
    seeds=3,
    tuning_seeds=2,
    updates=3,
    rates=(0.2, 0.4),
)


def trials(plan, options=None, seed=0):
    found = compare(plan, options or {}, seed)
    return [trial for trial in found if isinstance(trial, Trial)]


def test_all_estimators_are_compared():
    assert set(NAMES) <= set(ESTIMATORS)


def test_a_run_leaves_tables_plots_and_report_and_can_be_repeated(tmp_path):
    results = run_tabular(Config(seed=3), tmp_path, TINY)
    # Own and equal rates at the first group size, own rates at the second.
    assert len(results["table"]["rows"]) == 3 * 2 * 3
    assert read_json(tmp_path, "results.json")["title"] == results["title"]
    assert read_json(tmp_path, "config.json")["seed"] == 3
    plots = sorted(tmp_path.glob("plots/*.png"))
    assert [p.name[0] for p in plots] == ["1", "2", "3"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in plots)
    assert (tmp_path / "report.html").exists()
    metrics, every = read_table(tmp_path), read_table(tmp_path, "trials")
    assert [row["step"] for row in metrics] == list(range(1, 19))
    for row, trial in zip(metrics, every, strict=True):
        assert len(trial["final"]) == 3
        assert row["final"] == pytest.approx(np.mean(trial["final"]))
        assert row["spread"] == pytest.approx(np.std(trial["final"]))
    run_tabular(Config(seed=3), tmp_path, TINY)
    assert read_table(tmp_path) == metrics
    assert read_table(tmp_path, "trials") == every


def test_the_configuration_is_mapos(tmp_path):
    """With alpha 1 MAPO is turn-level normalization, run for run: seeds are paired."""
    plan = Plan(3, 2, 4, (0.2, 0.4), ("mapo", "turn"), (3,), (4,))
    run_tabular(Config(alpha=1.0, gamma=0.85), tmp_path, plan)
    mapo, _, turn, _ = read_table(tmp_path, "trials")
    assert (mapo["name"], turn["name"]) == ("mapo", "turn")
    for field in ("rate", "final", "curve", "grad_norm", "correlation", "cosine"):
        np.testing.assert_allclose(mapo[field], turn[field], atol=1e-9)


def test_facts_come_before_their_trials():
    kinds = [type(item) for item in compare(TINY, {})]
    assert kinds == [Facts, *[Trial] * 9] * 2
    assert kinds.count(Trial) == TINY.trials


def test_the_own_rate_is_the_better_one():
    plan = Plan(2, 2, 5, (1e-9, 0.4), ("mapo",), (3,), (4,), equal_rate=1e-9)
    own, equal = trials(plan)
    assert (own.choice, own.rate, equal.choice, equal.rate) == ("own", 0.4, "equal", 1e-9)
    assert min(own.final) > max(equal.final)


def made(name, horizon, final, choice="own", grad_norm=1.0):
    final = list(final)
    norms = [grad_norm + 0.01 * i for i in range(len(final))]
    return Trial(name, horizon, 4, choice, 0.4, final, final, final, norms, [final], final, final)


@pytest.fixture
def invented(monkeypatch):
    """Let the claims judge invented trials: mapo leads by `lead`, times the horizon's place."""

    def invent(lead, scatter=0.01, norm=2.0):
        rng = np.random.default_rng(0)
        found = []
        for choice in ("own", "equal"):
            for i, horizon in enumerate(measured.PLAN.horizons):
                noise = rng.normal(0, 0.01, 32)
                for name in measured.PLAN.names:
                    ahead = lead * (i + 1) if name == "mapo" else 0.0
                    width = scatter if name == "grpo" else 0.01
                    final = 0.5 + ahead + noise * width / 0.01 + rng.normal(0, 1e-3, 32)
                    size = norm if name == "batch-returns" else 1.0
                    found.append(made(name, horizon, final, choice, size))
        monkeypatch.setattr(measured, "_trials", lambda: tuple(found))

    return invent


def verdicts():
    found = {c.name: c.check() for c in measured.MEASURED if "hyperbolic" not in c.name}
    return {name.removeprefix("tabular-"): f.verdict for name, f in found.items()}


def test_verdicts_follow_the_intervals(invented):
    invented(0.02, scatter=0.05)
    found = verdicts()
    assert found["mapo-over-grpo"] == found["mapo-over-batch"] == "holds"
    assert found["turn-over-grpo"] == "not shown"
    assert found["gap-grows"] == found["seed-spread"] == found["gradient-norm"] == "holds"
    invented(-0.02, scatter=0.001, norm=0.5)
    found = verdicts()
    assert set(found.values()) == {"contradicted", "not shown"}
    assert found["turn-over-grpo"] == "not shown"


def test_findings_show_every_seed(invented):
    invented(0.0)
    finding = measured.MEASURED[0].check()
    assert finding.verdict == "not shown"
    for choice in ("own", "equal"):
        for horizon in measured.PLAN.horizons:
            line = finding.details[f"{choice}, {horizon} turns"]
            assert len(line["mapo"]["seeds"]) == len(line["grpo"]["seeds"]) == 32


def test_unscaled_mapo_is_quasi_hyperbolic():
    finding = next(c for c in measured.MEASURED if "hyperbolic" in c.name).check()
    assert finding.verdict == "holds"
    assert all(line["plain return"] > 2 for line in finding.details.values())
