"""Measured claims of ST-PPO: every seed, mean, interval, verdict as it falls.

Differences are paired by seed; see :mod:`normkit.recipes._st_ppo_comparison` for what is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from normkit.recipes._st_ppo_comparison import (
    CHAIN,
    SEARCH,
    Trial,
    Values,
    chain,
    tuned,
    untuned,
)
from normkit.recipes.base import Claim, Finding, verdict_of
from normkit.statistics import bootstrap_interval

SEED = 1
"""Of the claims; the recipe's default is another."""


def difference(more: Trial, less: Trial, metric: str) -> Finding:
    """The metric of one trial minus another's, paired by seed."""
    a, b = more.values(metric), less.values(metric)
    gain = bootstrap_interval((a - b).tolist())
    details = {f"{t.name} at {t.rate:g}": t.values(metric).tolist() for t in (more, less)}
    measured = f"{a.mean():.3f} against {b.mean():.3f}, difference {gain}"
    return Finding(verdict_of(gain), measured, details)


@dataclass(frozen=True)
class Growth:
    """How well two laws fit the clipping bias while it grows, by seed.

    Attributes:
        until: updates since sampling after which the mean over seeds is at nine tenths of its peak.
        exponential: share of the variance of log |C| that a line in the lag explains, until then.
        power: that a line in the logarithm of the lag explains.
        doubling: updates in which |C| doubles, by the first law.
    """

    until: int
    exponential: Values
    power: Values
    doubling: Values


def growth(trial: Trial) -> Growth:
    """Fit |C| as a function of the updates since sampling, where it is above 0."""
    bias = trial.lag("bias")
    mean = bias.mean(1)
    until = int(np.argmax(mean >= 0.9 * mean.max()))
    rows = []
    for rising in bias[: until + 1].T:
        lag: Values = np.flatnonzero(rising > 0).astype(np.float64)
        log: Values = np.log(rising[rising > 0])
        if len(lag) > 2:
            slope = np.polyfit(lag, log, 1)[0]
            rows.append((_explained(lag, log), _explained(np.log(lag), log), np.log(2) / slope))
    return Growth(until, *np.asarray(rows, dtype=np.float64).reshape(-1, 3).T)


def _explained(x: Values, y: Values) -> float:
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def exponential_growth(trial: Trial) -> Finding:
    """Whether an exponential fits the growth of |C| better than a power of the lag."""
    found = growth(trial)
    if not len(found.power):
        return Finding("not shown", "it grows in too few updates to tell laws apart")
    gain = bootstrap_interval((found.exponential - found.power).tolist())
    measured = (
        f"R2 {found.exponential.mean():.3f} exponential, {found.power.mean():.3f} power, "
        f"difference {gain}; doubles in {np.median(found.doubling):.1f} updates and is flat after "
        f"{found.until}"
    )
    details = {
        "exponential": found.exponential.tolist(),
        "power": found.power.tolist(),
        "doubling": found.doubling.tolist(),
        "until": found.until,
    }
    return Finding(verdict_of(gain), measured, details)


def over_training(trial: Trial) -> Finding:
    """Mean |C| of the last batch of dialogues over that of the first, as a logarithm."""
    batches = np.asarray(trial.by_batch)
    gain = bootstrap_interval(np.log(batches[-1] / batches[0]).tolist())
    means = ", ".join(f"{x:.4f}" for x in batches.mean(1))
    measured = f"mean |C| by batch {means}; log of last over first {gain}"
    return Finding(verdict_of(gain), measured, {"by batch": batches.tolist()})


def falls(trial: Trial, name: str, sign: int = 1) -> Finding:
    """The first lags' value minus the last's, a sixteenth of the lags each; negated by ``sign``."""
    lags = trial.lag(name)
    part = max(1, len(lags) // 16)
    first, last = lags[:part].mean(0), lags[-part:].mean(0)
    gain = bootstrap_interval((sign * (first - last)).tolist())
    measured = f"{first.mean():.4f} at first, {last.mean():.4f} at last, change {gain}"
    return Finding(verdict_of(gain), measured, {"first": first.tolist(), "last": last.tolist()})


def tracks(trial: Trial) -> Finding:
    """Correlation over lags of |C| with the critic's part of the gradient's error, by seed."""
    pairs = zip(trial.lag("bias").T, trial.lag("critic").T, strict=True)
    found = [float(np.corrcoef(bias, critic)[0, 1]) for bias, critic in pairs]
    gain = bootstrap_interval(found)
    return Finding(verdict_of(gain), f"correlation {gain}", {"correlation": found})


def same_at_one(trials: Mapping[str, Trial]) -> Finding:
    """On-policy the corrections change nothing: differences at the same rate must be zero."""
    pairs = [("S-PPO", "PPO"), ("ST-PPO", "Turn-PPO")]
    gaps = {
        f"{a} and {b}": float(np.abs(np.subtract(trials[a].curve, trials[b].curve)).max())
        for a, b in pairs
        if trials[a].rate == trials[b].rate
    }
    measured = "; ".join(f"{pair} differ by {gap:.3f}" for pair, gap in gaps.items())
    holds = len(gaps) == len(pairs) and max(gaps.values()) == 0
    return Finding("holds" if holds else "contradicted", measured, gaps)


def robust(trials: Mapping[str, Trial], more: str, less: str) -> Finding:
    """Success at the end in the mean over all rates that were tried, by tuning seed."""
    a, b = (np.mean(list(trials[name].tuning.values()), 0) for name in (more, less))
    gain = bootstrap_interval((a - b).tolist())
    measured = f"{a.mean():.3f} against {b.mean():.3f}, difference {gain}"
    return Finding(verdict_of(gain), measured, {more: a.tolist(), less: b.tolist()})


@cache
def _chain() -> dict[str, Trial]:
    return {trial.name: trial for trial in chain(CHAIN, SEED)}


@cache
def _search(staleness: int, hot: bool = False) -> dict[str, Trial]:
    if hot and SEARCH.hot is not None:
        trials = untuned(SEARCH, staleness, SEARCH.hot, SEED)
    else:
        trials = tuned(SEARCH, staleness, SEED)
    return {trial.name: trial for trial in trials}


def _in_chain(more: str, less: str, metric: str) -> Finding:
    return difference(_chain()[more], _chain()[less], metric)


def _stale(more: str, less: str, metric: str, staleness: int = 64, hot: bool = False) -> Finding:
    found = _search(staleness, hot)
    return difference(found[more], found[less], metric)


def _measured(
    name: str, statement: str, check: Callable[[], Finding], published: str = "expected (ours)"
) -> Claim:
    return Claim(name, statement, published, "measured", check)


def _claims() -> Iterator[Claim]:
    yield _measured(
        "bias-grows",
        "the clipping bias grows with the updates since sampling (PPO, chain)",
        lambda: falls(_chain()["PPO"], "bias", -1),
        "grows before collapse",
    )
    yield _measured(
        "bias-grows-exponentially",
        "an exponential fits that growth better than a power of the updates",
        lambda: exponential_growth(_chain()["PPO"]),
        "roughly exponential",
    )
    yield _measured(
        "bias-grows-in-training",
        "it also grows from the first batch to the last (PPO, search, staleness 64, a rate too "
        "large)",
        lambda: over_training(_search(64, hot=True)["PPO"]),
        "grows before collapse",
    )
    yield _measured(
        "critic-error-grows",
        "so does the critic's part of the gradient's error",
        lambda: falls(_chain()["PPO"], "critic", -1),
        "grows before collapse",
    )
    yield _measured(
        "bias-tracks-critic-error",
        "clipping bias and critic's error rise together over the updates since sampling",
        lambda: tracks(_chain()["PPO"]),
        "tracks it",
    )
    yield _measured(
        "direction-is-lost",
        "the gradient points less and less along the exact one, the updates since sampling growing",
        lambda: falls(_chain()["PPO"], "cosine"),
    )
    for name, base in (("S-PPO", "PPO"), ("ST-PPO", "Turn-PPO")):
        yield _measured(
            f"chain-{name.lower()}",
            f"in the chain {name} is above {base} in the mean over the course",
            partial(_in_chain, name, base, "mean"),
        )
    yield _measured(
        "same-on-policy",
        "at staleness 1 corrected and uncorrected methods are the same",
        lambda: same_at_one(_search(1)),
    )
    for name in ("S-PPO", "ST-PPO"):
        for staleness in (4, 16, 64):
            yield _measured(
                f"{name.lower()}-final-{staleness}",
                f"at staleness {staleness}, own best rates, {name} ends higher than PPO",
                partial(_stale, name, "PPO", "final", staleness),
                "ends higher",
            )
        yield _measured(
            f"{name.lower()}-mean-64",
            f"at staleness 64, own best rates, {name} is above PPO in the mean over the course",
            partial(_stale, name, "PPO", "mean"),
            "ends higher",
        )
        for hot, words in ((False, "own best rates"), (True, "a rate too large")):
            yield _measured(
                f"{name.lower()}-drop-{'hot' if hot else 'own'}",
                f"at staleness 64, {words}, PPO falls deeper below its best than {name}",
                partial(_stale, "PPO", name, "drop", hot=hot),
                "prevents collapse",
            )
        yield _measured(
            f"{name.lower()}-clip",
            f"at staleness 64, a rate too large, PPO clips a larger share of tokens than {name}",
            partial(_stale, "PPO", name, "clipped", hot=True),
            "lower clip ratios throughout",
        )
        yield _measured(
            f"{name.lower()}-tail",
            f"at staleness 64, a rate too large, PPO has larger gradients (99th percentile) than "
            f"{name}",
            partial(_stale, "PPO", name, "tail", hot=True),
        )
    yield _measured(
        "st-ppo-over-all-rates",
        "at staleness 64, in the mean over all rates, ST-PPO ends higher than PPO (8 tuning seeds)",
        lambda: robust(_search(64), "ST-PPO", "PPO"),
    )
    for more, less, words in (
        ("Turn-PPO", "PPO", "barely (reviews)"),
        ("ST-PPO", "S-PPO", "no gap (reviews)"),
        ("ST-PPO", "Turn-PPO", "the correction is the active part (reviews)"),
        ("ST-PPO", "ST-PPO (8)", "not stated"),
        ("ST-PPO", "GRPO", "not shown in the paper"),
        ("ST-PPO", "GSPO", "not shown in the paper"),
    ):
        yield _measured(
            f"{more.lower()}-over-{less.lower().replace(' (', '-').rstrip(')')}",
            f"at staleness 64, own best rates, {more} ends higher than {less}",
            partial(_stale, more, less, "final"),
            words,
        )


MEASURED: tuple[Claim, ...] = tuple(_claims())
