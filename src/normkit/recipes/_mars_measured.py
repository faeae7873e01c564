"""Measured claims of mars: every seed, mean, interval, verdict as it falls.

All arms play the same number of games from the same start with the same luck. Each trains at its
own best learning rate, chosen on seeds that the comparison does not use, by what the comparison is
about: exploitability of the average policy, or points in Mini Hanabi. Differences are paired by
seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normkit.recipes import _mars_board, _mars_hanabi, _mars_selfplay
from normkit.recipes._mars_gradient import ARMS, Arm, Quality, Setting, study
from normkit.recipes._mars_tree import GAMES, Game
from normkit.recipes._trials import TUNING, ComparisonPlan, best_rate, check_rates
from normkit.recipes.base import Claim, Finding, verdict_of
from normkit.statistics import bootstrap_interval

SEED = 1
"""Of the claims; the recipe's default is another."""
SETTINGS = tuple(
    Setting(game, policy, games)
    for game in ("kuhn", "loaded")
    for policy in ("uniform", "mixed")
    for games in (8, 32)
)
HANABI: dict[str, tuple[Arm, bool]] = {
    "mars": ("mars", False),
    "trajectory": ("trajectory", False),
    "spiral": ("spiral", False),
    "spiral, zero-sum": ("spiral", True),
}
"""Arms of Mini Hanabi: how turns are credited, and whether the second seat's points are negated."""

BOARD: tuple[Arm, ...] = ("mars", "trajectory", "pooled", "spiral")
"""Arms of tic-tac-toe."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Plan(ComparisonPlan):
    """What is compared.

    With 8 tuning seeds the choice of rates was a matter of luck: neighbouring rates ended alike.

    Attributes:
        games: of an update; the paper's 64 give 128 trajectories.
        batches: of the study of gradients.
        hanabi_seeds: runs of each arm in Mini Hanabi; a third of them choose the rate.
        hanabi_updates: of each run in Mini Hanabi, of half as many games.
        hanabi_rates: learning rates to choose from in Mini Hanabi.
        board_seeds: runs of each arm in tic-tac-toe; a third of them choose the rate.
        board_rates: learning rates to choose from in tic-tac-toe.
    """

    seeds: int = 24
    tuning_seeds: int = 24
    updates: int = 300
    rates: tuple[float, ...] = (0.02, 0.03, 0.05, 0.1, 0.2)
    games: int = 64
    batches: int = 4000
    hanabi_seeds: int = 12
    hanabi_updates: int = 150
    hanabi_rates: tuple[float, ...] = (0.001, 0.002, 0.004)
    board_seeds: int = 12
    board_rates: tuple[float, ...] = (0.05, 0.1, 0.2)

    LEAST: ClassVar[Mapping[str, int]] = {
        **ComparisonPlan.LEAST,
        "updates": 15,
        "games": 2,
        "batches": 2,
        "hanabi_seeds": 3,
        "hanabi_updates": 10,
        "board_seeds": 3,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hanabi_rates", "board_rates"):
            check_rates(name, getattr(self, name))


@dataclass(frozen=True)
class Trial:
    """One arm's runs in one game at its best rate, JSON-ready; lower scores are better in poker.

    Attributes:
        game: what was played.
        name: of the arm.
        rate: the best learning rate.
        games: played before each evaluation.
        curve: what is compared, by evaluation and seed: exploitability of the average policy, or
            points.
        last: exploitability of the policy of the moment, by evaluation and seed; empty in Hanabi.
        wins: share of the games that the first seat won, by seed; empty in Hanabi.
    """

    game: str
    name: str
    rate: float
    games: list[int]
    curve: list[list[float]]
    last: list[list[float]]
    wins: list[float]

    @property
    def final(self) -> Values:
        """What is compared, at the end, by seed."""
        return np.asarray(self.curve[-1])

    @property
    def final_last(self) -> Values:
        """Exploitability of the last policy, by seed."""
        return np.asarray(self.last[-1])


def compare(plan: Plan, game: Game, seed: int) -> Iterator[Trial]:
    """Train every arm in a poker game; yields them one by one."""
    for arm in ARMS:
        learn = partial(_mars_selfplay.train, arm, game, updates=plan.updates, games=plan.games)
        rates = torch.tensor(plan.rates).repeat_interleave(plan.tuning_seeds)
        tuned = learn(rates=rates, seed=seed + TUNING, evaluations=1).average[-1]
        best = best_rate(plan.rates, -tuned)
        done = learn(rates=torch.full((plan.seeds,), best), seed=seed)
        curves = done.average.tolist(), done.last.tolist(), done.wins.tolist()
        yield Trial(game, arm, best, done.games, *curves)


def compare_hanabi(plan: Plan, seed: int) -> Iterator[Trial]:
    """Train every arm in Mini Hanabi; yields them one by one."""
    games = max(plan.games // 2, 1)
    for name, (arm, zero_sum) in HANABI.items():
        learn = partial(_mars_hanabi.train, arm, updates=plan.hanabi_updates, games=games)
        rates = torch.tensor(plan.hanabi_rates).repeat_interleave(plan.hanabi_seeds // 3)
        tuned = _tenths(learn(rates=rates, seed=seed + TUNING, zero_sum=zero_sum))[-1]
        best = best_rate(plan.hanabi_rates, tuned)
        chosen = torch.full((plan.hanabi_seeds,), best)
        scores = _tenths(learn(rates=chosen, seed=seed, zero_sum=zero_sum))
        played = [round(plan.hanabi_updates * (k + 1) / 10) * games for k in range(10)]
        yield Trial("hanabi", name, best, played, scores.tolist(), [], [])


@dataclass(frozen=True)
class BoardTrial:
    """One arm's runs in tic-tac-toe at its best rate.

    Attributes:
        name: of the arm.
        rate: the best learning rate.
        minimax: chance not to lose to best play, by seat and run ``[2, R]``.
        search: share of 10 games not lost to tree search of 100 simulations ``[2, R]``.
    """

    name: str
    rate: float
    minimax: Values
    search: Values


def compare_board(plan: Plan, seed: int) -> Iterator[BoardTrial]:
    """Train arms in tic-tac-toe; yields them one by one."""
    for arm in BOARD:
        learn = partial(_mars_board.train, arm, updates=plan.updates, games=plan.games)
        rates = torch.tensor(plan.board_rates).repeat_interleave(plan.board_seeds // 3)
        tuned = learn(rates=rates, seed=seed + TUNING)
        best = best_rate(plan.board_rates, tuned.minimax.mean(0))
        done = learn(rates=torch.full((plan.board_seeds,), best), seed=seed)
        search = [
            [_mars_board.unbeaten_by_search(policy, seat, 10) for policy in done.policy]
            for seat in (0, 1)
        ]
        yield BoardTrial(arm, best, done.minimax.numpy(), np.asarray(search))


def board_gain(trials: dict[str, BoardTrial], over: str) -> Finding:
    """How much oftener mars does not lose to best play than another arm, paired by seed."""
    ours, theirs = trials["mars"], trials[over]
    found = bootstrap_interval((ours.minimax - theirs.minimax).mean(0).tolist())
    text = f"{ours.minimax.mean():.3f} against {theirs.minimax.mean():.3f}, gain {found}"
    details = {f"{t.name} at {t.rate}": t.minimax.tolist() for t in (ours, theirs)}
    return Finding(verdict_of(found), text, details)


def board_learned(trials: dict[str, BoardTrial]) -> Finding:
    """What mars gains over uniform play against best play; and its results by seat."""
    ours, table = trials["mars"], _mars_board.board()
    uniform = (table.legal / table.legal.sum(1, keepdim=True)).double()[None]
    start = [float(table.unbeaten(uniform, seat)) for seat in (0, 1)]
    gains = [bootstrap_interval((ours.minimax[p] - start[p]).tolist()) for p in (0, 1)]
    verdicts = [verdict_of(found) for found in gains]
    text = "; ".join(
        f"{seat} seat: best play {ours.minimax[p].mean():.3f} (uniform {start[p]:.3f}), search "
        f"{ours.search[p].mean():.3f}, gain {gains[p]}"
        for p, seat in enumerate(("first", "second"))
    )
    details = {"best play": ours.minimax.tolist(), "search": ours.search.tolist()}
    return Finding(verdicts[0] if len(set(verdicts)) == 1 else "not shown", text, details)


def _tenths(scores: Tensor) -> Tensor:
    """Means over tenths of the updates ``[10, R]``."""
    return torch.stack([part.mean(0) for part in scores.tensor_split(10)])


def gain(trials: dict[str, Trial], over: str) -> Finding:
    """How much better mars ends than another arm, paired by seed."""
    ours, theirs = trials["mars"], trials[over]
    better = ours.final - theirs.final if ours.game == "hanabi" else theirs.final - ours.final
    found = bootstrap_interval(better.tolist())
    details = {f"{t.name} at {t.rate}": t.final.tolist() for t in (ours, theirs)}
    if ours.game == "hanabi":
        text = f"{ours.final.mean():.2f} against {theirs.final.mean():.2f} of 4, gain {found}"
        return Finding(verdict_of(found), text, details)
    last = bootstrap_interval((theirs.final_last - ours.final_last).tolist())
    details |= {f"{t.name}, last policy": t.final_last.tolist() for t in (ours, theirs)}
    text = (
        f"{ours.final.mean():.3f} against {theirs.final.mean():.3f}, gain {found} chips; "
        f"last policy {ours.final_last.mean():.3f} against {theirs.final_last.mean():.3f}, "
        f"gain {last}"
    )
    return Finding(verdict_of(found), text, details)


def last_is_worse(trials: dict[str, Trial]) -> Finding:
    """Exploitability of the last policy less that of the average one, for mars."""
    ours = trials["mars"]
    found = bootstrap_interval((ours.final_last - ours.final).tolist())
    text = f"{ours.final_last.mean():.3f} against {ours.final.mean():.3f}, difference {found}"
    details = {"last": ours.final_last.tolist(), "average": ours.final.tolist()}
    return Finding(verdict_of(found), text, details)


def quality_gain(found: dict[Arm, Quality], over: Arm, metric: str) -> Finding:
    """Variance that mars saves, or cosine that it gains, paired by batch."""
    ours, theirs = (getattr(found[arm], metric) for arm in ("mars", over))
    better = bootstrap_interval(
        ((theirs - ours) if metric == "variance" else ours - theirs).tolist(), draws=1000
    )
    text = f"{ours.mean():.3f} against {theirs.mean():.3f}, gain {better}"
    details = {f"{arm}": float(getattr(found[arm], metric).mean()) for arm in ARMS}
    return Finding(verdict_of(better), text, details)


@cache
def _trials(game: Game) -> dict[str, Trial]:
    return {trial.name: trial for trial in compare(Plan(), game, SEED)}


@cache
def _hanabi() -> dict[str, Trial]:
    return {trial.name: trial for trial in compare_hanabi(Plan(), SEED)}


@cache
def _board() -> dict[str, BoardTrial]:
    return {trial.name: trial for trial in compare_board(Plan(), SEED)}


@cache
def _quality(setting: Setting) -> dict[Arm, Quality]:
    return study(setting, Plan().batches, SEED)


def _seats_alike() -> Finding:
    """Variance of pooled over that of mars in plain Kuhn poker: within a tenth of 1."""
    found = _quality(Setting("kuhn", "uniform", 32))
    ours, pooled = found["mars"].variance, found["pooled"].variance
    excess = bootstrap_interval(((pooled - ours) / ours.mean()).tolist(), draws=1000)
    alike = max(abs(excess.low), abs(excess.high)) < 0.1
    return Finding(
        "holds" if alike else "contradicted",
        f"pooled over by seat, less 1: {excess}",
        {"mars": float(ours.mean()), "pooled": float(pooled.mean())},
    )


def _measured(
    name: str, statement: str, check: Callable[[], Finding], published: str = "expected (ours)"
) -> Claim:
    return Claim(name, statement, published, "measured", check)


_IN_WORDS: dict[str, str] = {
    "trajectory": "GRPO on trajectories, seats pooled",
    "pooled": "turn-level returns, seats pooled",
    "normalize-then-sum": "rewards centered before they are summed",
    "spiral": "SPIRAL's running baseline",
    "spiral, zero-sum": "SPIRAL's baseline with the points made zero-sum",
}
_PLACES = {
    "kuhn": "Kuhn poker",
    "leduc": "Leduc poker",
    "loaded": "Kuhn poker with a loaded deck",
}


def _claims() -> Iterator[Claim]:
    loaded = Setting("loaded", "uniform", 32)

    def of_quality(over: Arm, metric: str) -> Finding:
        return quality_gain(_quality(loaded), over, metric)

    for over in ("trajectory", "pooled", "spiral"):
        for metric, better in (("variance", "a smaller variance"), ("cosine", "a larger cosine")):
            yield _measured(
                f"{metric}-below-{over}" if metric == "variance" else f"{metric}-above-{over}",
                f"where a seat mostly wins, gradients by seat have {better} than {_IN_WORDS[over]}",
                partial(of_quality, over, metric),
            )
    yield _measured(
        "variance-of-like-seats",
        "where the seats hardly differ, gradients by seat and pooled have the same variance",
        _seats_alike,
    )

    def in_poker(game: Game, over: str) -> Finding:
        return gain(_trials(game), over)

    for game in GAMES:
        for over in ARMS:
            if over != "mars":
                yield _measured(
                    f"{game}-over-{over}",
                    f"in {_PLACES[game]} the average policy ends less exploitable than with "
                    f"{_IN_WORDS[over]}",
                    partial(in_poker, game, over),
                )
    yield _measured(
        "last-policy-cycles",
        "in Kuhn poker the last policy is more exploitable than the average one",
        lambda: last_is_worse(_trials("kuhn")),
    )

    def in_hanabi(over: str) -> Finding:
        return gain(_hanabi(), over)

    for over in HANABI:
        if over != "mars":
            yield _measured(
                f"hanabi-over-{over.replace(', ', '-')}",
                f"in Mini Hanabi self-play ends with more points than {_IN_WORDS[over]}",
                partial(in_hanabi, over),
                "54.33% against 24.93%" if over == "spiral, zero-sum" else "expected (ours)",
            )

    def on_board(over: str) -> Finding:
        return board_gain(_board(), over)

    for over in BOARD:
        if over != "mars":
            yield _measured(
                f"tic-tac-toe-over-{over}",
                f"in tic-tac-toe policies lose less often to best play than with {_IN_WORDS[over]}",
                partial(on_board, over),
            )
    yield _measured(
        "tic-tac-toe-learns",
        "from both seats self-play loses less often to best play than uniform play does",
        lambda: board_learned(_board()),
    )


MEASURED: Sequence[Claim] = tuple(_claims())
