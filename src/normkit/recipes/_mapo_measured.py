"""Measured claims of MAPO, in the tabular world: every seed, mean, interval, verdict as it falls.

Differences are paired by seed and averaged over the horizons 2, 5, 10 and 20; each estimator runs
at its own best learning rate. Details hold every horizon and the comparison at one rate for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from normkit.recipes._mapo_comparison import Choice, Plan, Trial, compare
from normkit.recipes.base import Claim, Finding, verdict_of
from normkit.rl.environments.tabular import TabularWorld
from normkit.rl.tabular import ascend, credit, policy_gradient, roll_out
from normkit.statistics import bootstrap_interval

PLAN = Plan(
    names=("mapo", "turn", "batch", "batch-returns", "grpo", "reinforce++", "turn-baseline"),
    group_sizes=(4,),
)
SEED = 1
"""Not the seed by which the plan was made."""

Values = NDArray[np.float64]


@cache
def _trials() -> tuple[Trial, ...]:
    found = compare(PLAN, {}, SEED)
    return tuple(trial for trial in found if isinstance(trial, Trial))


def _table(field: str, name: str, choice: Choice) -> Values:
    """A field of one estimator's trials ``[horizon, seed]``."""
    rows = [getattr(t, field) for t in _trials() if t.name == name and t.choice == choice]
    return np.asarray(rows, dtype=np.float64)


def _details(field: str, names: Sequence[str], difference: Callable[..., Values]) -> dict[str, Any]:
    """Per choice of rate and horizon: every seed, and the interval of the difference."""
    details: dict[str, Any] = {}
    for choice in ("own", "equal"):
        tables = [_table(field, name, choice) for name in names]
        gaps = difference(*tables)
        for i, horizon in enumerate(PLAN.horizons):
            details[f"{choice}, {horizon} turns"] = {
                "difference": str(bootstrap_interval(gaps[i].tolist())),
                **{
                    name: {
                        "mean": table[i].mean(),
                        "std": table[i].std(),
                        "seeds": table[i].tolist(),
                    }
                    for name, table in zip(names, tables, strict=True)
                },
            }
        details[f"{choice}, all"] = str(bootstrap_interval(gaps.mean(0).tolist()))
    return details


def _final_return(better: str, worse: str) -> Finding:
    names = (better, worse)
    gap = np.subtract(*(_table("final", name, "own") for name in names))
    gain = bootstrap_interval(gap.mean(0).tolist())
    measured = f"{gain} of the optimal return"
    return Finding(verdict_of(gain), measured, _details("final", names, np.subtract))


def _less_scatter(mapo: Values, grpo: Values) -> Values:
    """Squared deviations per seed: their means are variances, and they can be paired."""
    a, b = ((x - x.mean(1, keepdims=True)) ** 2 for x in (mapo, grpo))
    return np.asarray(b - a)


def _seed_spread() -> Finding:
    names = ("mapo", "grpo")
    mapo, grpo = (_table("final", name, "own") for name in names)
    gain = bootstrap_interval(_less_scatter(mapo, grpo).mean(0).tolist())
    spreads = [f"{np.sqrt(x.var(1).mean()):.4f}" for x in (mapo, grpo)]
    measured = f"std over seeds {spreads[0]} against {spreads[1]}; variance {gain} smaller"
    return Finding(verdict_of(gain), measured, _details("final", names, _less_scatter))


def _gradient_norm() -> Finding:
    """Against the largest of the other estimators in units of deviations, at the longest horizon.

    Those in points of reward (RLOO, REINFORCE) are left out: their size is that of the rewards.
    """
    norms = {name: _table("grad_norm", name, "own")[-1] for name in PLAN.names}
    returns = norms["batch-returns"]
    rival = max((name for name in norms if name != "batch-returns"), key=lambda n: norms[n].mean())
    gain = bootstrap_interval((returns - norms[rival]).tolist())
    means = ", ".join(f"{name} {x.mean():.4f}" for name, x in norms.items())
    measured = f"batch-returns minus {rival}, the largest other, {gain}; {means}"
    seeds = {name: x.tolist() for name, x in norms.items()}
    return Finding(verdict_of(gain), measured, {"horizon": PLAN.horizons[-1], **seeds})


def _gap_grows() -> Finding:
    gaps = _table("final", "mapo", "own") - _table("final", "grpo", "own")
    gain = bootstrap_interval((gaps[-1] - gaps[0]).tolist())
    per_length = {
        f"{horizon} turns": {"gap": str(bootstrap_interval(gap.tolist())), "seeds": gap.tolist()}
        for horizon, gap in zip(PLAN.horizons, gaps, strict=True)
    }
    means = ", ".join(f"{h}: {g.mean():+.3f}" for h, g in zip(PLAN.horizons, gaps, strict=True))
    return Finding(verdict_of(gain), f"gap by length {means}; last minus first {gain}", per_length)


def _quasi_hyperbolic() -> Finding:
    """Mean unscaled estimate of 32 x 8,192 dialogues against two exact gradients.

    The squared distance is given in units of what the scatter of the batches alone would leave,
    so that 1 is a perfect prediction.
    """
    runs, dialogues, group_size, gamma = 32, 8192, 256, 0.85
    world = TabularWorld(5)
    policy = ascend(world, PLAN.share)
    every = policy.expand(runs, -1, -1)
    generator = torch.Generator().manual_seed(SEED)
    rows = roll_out(world, every, dialogues // group_size, group_size, generator)
    per_dialogue = torch.bincount(rows.run)[:, None, None] / dialogues
    true = world.exact(policy).gradient
    details: dict[str, Any] = {}
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        advantage = credit("mapo", rows, alpha=alpha, gamma=gamma, baseline="loo", scale=False)
        got = policy_gradient(world, rows, advantage.double(), every) * per_dialogue
        noise = got.var(0).sum() / runs
        predicted = world.exact(policy, gamma, alpha).gradient
        details[f"alpha {alpha}"] = {
            name: float((got.mean(0) - gradient).square().sum() / noise)
            for name, gradient in (("predicted", predicted), ("plain return", true))
        }
    worst = max(line["predicted"] for line in details.values())
    closest = min(line["plain return"] for line in details.values())
    measured = (
        f"squared distance in units of noise at most {worst:.2f} from the prediction, at least "
        f"{closest:.0f} from the gradient of the plain return"
    )
    return Finding("holds" if worst < 1.5 else "contradicted", measured, details)


_LEVELS = "beats single-level normalization"
_PAIRS = (
    ("mapo", "grpo", "beats outcome-only GRPO"),
    ("mapo", "turn", _LEVELS),
    ("mapo", "batch", _LEVELS),
    ("mapo", "batch-returns", _LEVELS),
    ("turn", "grpo", "expected (ours)"),
)

MEASURED: tuple[Claim, ...] = (
    *(
        Claim(
            f"tabular-{better}-over-{worse}",
            f"{better} ends with a larger return than {worse} (tabular world)",
            published,
            "measured",
            partial(_final_return, better, worse),
        )
        for better, worse, published in _PAIRS
    ),
    Claim(
        "tabular-seed-spread",
        "mapo's final returns scatter less over the seeds than grpo's (tabular world)",
        "expected (ours)",
        "measured",
        _seed_spread,
    ),
    Claim(
        "tabular-gradient-norm",
        "batch-level normalization of returns has the largest gradients in long dialogues",
        "the gradient norm blows up",
        "measured",
        _gradient_norm,
    ),
    Claim(
        "tabular-gap-grows",
        "mapo's lead over grpo grows with the length of the dialogue (tabular world)",
        "expected (ours)",
        "measured",
        _gap_grows,
    ),
    Claim(
        "tabular-quasi-hyperbolic",
        "unscaled mapo estimates the gradient of r_t + alpha sum gamma^(s-t) r_s",
        "identity in expectation (ours)",
        "measured",
        _quasi_hyperbolic,
    ),
)
