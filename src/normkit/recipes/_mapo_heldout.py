"""Measured claims of MAPO with a language model: full runs of the recipe, three seeds an estimator.

Each run is kept below ``runs/claims/mapo`` and taken from there the next time; one that was
interrupted goes on. The seeds were not used in choosing the recipe's defaults.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from normkit.recipes.base import Claim, Finding, Verdict, verdict_of
from normkit.runs import read_json, read_table
from normkit.statistics import Interval, bootstrap_interval

SEEDS = (1, 2, 3)
FOLDER = Path("runs", "claims", "mapo")


def _heldout(baseline: str) -> dict[int, Mapping[str, Any]]:
    """Per seed: scores of the held-out scenarios before and after, and the tokens sampled."""
    from normkit.recipes.mapo import Config, run

    found: dict[int, Mapping[str, Any]] = {}
    for seed in SEEDS:
        config = Config(baseline=baseline, seed=seed)
        given = json.dumps(asdict(config), sort_keys=True, default=str)
        mark = hashlib.sha256(given.encode()).hexdigest()[:8]
        folder = FOLDER / f"{config.estimator}-seed-{seed}-{mark}"
        if not (folder / "results.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            run(config, folder)
        found[seed] = {
            "tokens": round(sum(row["sampled_tokens"] for row in read_table(folder))),
            **{when: _scores(read_json(folder, f"{when}.json")) for when in ("before", "after")},
        }
    return found


def _scores(sides: Mapping[str, Sequence[Any]]) -> dict[str, list[float]]:
    return {mode: [d["scores"]["score"] for d in dialogues] for mode, dialogues in sides.items()}


def _paired(better: Sequence[Any], worse: Sequence[Any]) -> Interval:
    """Interval over scenarios of the difference of scores, averaged over seeds."""
    return bootstrap_interval(np.subtract(better, worse).mean(0).tolist())


def _of(runs: Mapping[int, Mapping[str, Any]], when: str, mode: str) -> list[list[float]]:
    return [run[when][mode] for run in runs.values()]


def _gain() -> Finding:
    runs = _heldout("")
    details: dict[str, Any] = {}
    every_seed = True
    for mode in ("sampled", "greedy"):
        before, after = _of(runs, "before", mode), _of(runs, "after", mode)
        seeds = {s: _paired([a], [b]) for s, a, b in zip(runs, after, before, strict=True)}
        details[mode] = {
            "all seeds": str(_paired(after, before)),
            **{f"seed {seed}": str(gain) for seed, gain in seeds.items()},
            "before": np.mean(before, 1).tolist(),
            "after": np.mean(after, 1).tolist(),
        }
        if mode == "sampled":
            every_seed = all(gain.low > 0 for gain in seeds.values())
    verdict: Verdict = "holds" if every_seed else "not shown"
    sampled = details["sampled"]
    means = ", ".join(
        f"{b:.1f} to {a:.1f}" for b, a in zip(sampled["before"], sampled["after"], strict=True)
    )
    return Finding(verdict, f"EPM-Q {means}; paired gain {sampled['all seeds']}", details)


def _over_grpo() -> Finding:
    mapo, grpo = _heldout(""), _heldout("grpo")
    details: dict[str, Any] = {}
    for mode in ("sampled", "greedy"):
        ours, theirs = _of(mapo, "after", mode), _of(grpo, "after", mode)
        details[mode] = {
            "all seeds": str(_paired(ours, theirs)),
            "mapo": np.mean(ours, 1).tolist(),
            "grpo": np.mean(theirs, 1).tolist(),
        }
    for name, runs in (("mapo", mapo), ("grpo", grpo)):
        details[f"tokens sampled by {name}"] = [run["tokens"] for run in runs.values()]
    gain = _paired(_of(mapo, "after", "sampled"), _of(grpo, "after", "sampled"))
    return Finding(verdict_of(gain), f"EPM-Q after training: MAPO minus GRPO {gain}", details)


MEASURED_LANGUAGE: tuple[Claim, ...] = (
    Claim(
        "heldout-gain",
        "training raises the score of dialogues in scenarios that were held out, on every seed",
        "+15 to +43 points of EPM-Q for 7B to 32B models",
        "measured",
        _gain,
    ),
    Claim(
        "language-over-grpo",
        "at an equal number of dialogues MAPO ends above outcome-only GRPO",
        "MAPO above GRPO at every model size",
        "measured",
        _over_grpo,
    ),
)
