r"""How far each estimator's policy gradient is from the exact one, at policies that do not learn.

Kuhn poker has 30 terminal histories, so the gradient is a sum. What is estimated is the mean over
the two seats of each seat's gradient of its own payoff. The expectation of an estimate is exact
too: a mean over a batch of M games depends on the other M - 1 only through two sums, whose
distribution is a power of a generating function. Variance and cosine are measured over batches.

Shapes: R batches (or runs); M games; H histories; K turns of a seat; I information sets; A actions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from normkit.recipes._mars_tree import Game, Tree, policy_gradient, tree
from normkit.rl.advantage import estimate

Arm = Literal["trajectory", "pooled", "mars", "normalize-then-sum", "spiral"]
ARMS: tuple[Arm, ...] = ("trajectory", "pooled", "mars", "normalize-then-sum", "spiral")
KEEP = 0.95
"""Share of the running baseline that a game leaves."""
_SETTLE = 100
"""Games that a running baseline has seen before it is studied."""

Rows = dict[str, Tensor]


def _normalize_then_sum(rows: Rows) -> Tensor:
    """The other order: rewards less the mean of their seat, summed from each turn on."""
    centered = estimate("batch", **rows, scale=False)
    return estimate("reinforce", **{**rows, "reward": centered})


def _without_seats(rows: Rows) -> Rows:
    return {name: x for name, x in rows.items() if name != "agent"}


_ESTIMATES: Mapping[Arm, Callable[[Rows], Tensor]] = {
    "trajectory": lambda rows: estimate("grpo", **_without_seats(rows), scale=False),
    "pooled": lambda rows: estimate("mars", **_without_seats(rows)),
    "mars": lambda rows: estimate("mars", **rows),
    "normalize-then-sum": _normalize_then_sum,
}


def credit(arm: Arm, reward: Tensor, live: Tensor, baseline: Tensor) -> tuple[Tensor, Tensor]:
    """Advantage of every turn of self-play games; runs know nothing of each other.

    All arms center and none scales: Adam, which follows, would undo it.

    Args:
        arm: "trajectory" (GRPO on totals) and "pooled" (returns) over both seats, "mars" by seat,
            "normalize-then-sum" by seat, "spiral" with a running baseline by seat.
        reward: of each turn ``[R, M, 2, K]``.
        live: whether the turn happened ``[R, M, 2, K]``.
        baseline: running mean of each seat's total ``[R, 2]``; "spiral" alone looks at it.

    Returns:
        Advantages ``[R, M, 2, K]`` and the baseline after these games.
    """
    if arm == "spiral":
        total = reward.sum(3)
        before, after = running_means(total, baseline)
        return (total - before)[..., None] * live, after
    run, game, seat, turn = live.nonzero(as_tuple=True)
    rows = {
        "reward": reward[live],
        "dialogue": (run * live.shape[1] + game) * 2 + seat,
        "turn": turn,
        "group": run,
        "agent": seat,
        "batch": run,
    }
    return torch.zeros_like(reward).masked_scatter(live, _ESTIMATES[arm](rows)), baseline


def running_means(total: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """SPIRAL's baseline (arXiv 2506.24119): a running mean, looked at before it takes a game in.

    Args:
        total: of each game and seat ``[R, M, 2]``, in order.
        start: what the mean was before ``[R, 2]``.

    Returns:
        The mean before each game ``[R, M, 2]`` and after all of them ``[R, 2]``.
    """
    steps = torch.arange(total.shape[1] + 1, dtype=total.dtype)
    age = steps[:, None] - 1 - steps[None, :-1]
    weight = torch.where(age >= 0, (1 - KEEP) * KEEP ** age.clamp(min=0), 0)
    fade = (KEEP**steps)[:, None]
    means = torch.einsum("nm,rms->rns", weight, total) + fade * start[:, None]
    return means[:, :-1], means[:, -1]


# ---------------------------------------------------------------------- exact expectations


def mean_of_pool(total: Tensor, count: Tensor, probability: Tensor, games: int) -> Tensor:
    """Expected mean of a pool, given what one of its games brings.

    ``E[(S_h + S') / (N_h + N')]``, S' and N' the sums over ``games - 1`` other games.

    Args:
        total: what each history adds to the sum ``[H]``, whole numbers.
        count: what each history adds to the number of values ``[H]``, whole numbers, at least 1.
        probability: of each history ``[H]``.
        games: in the pool.

    Returns:
        ``[H]``.
    """
    others = games - 1
    low = total.min()
    s, n = (total - low).long(), count.long()
    shape = (others * int(s.max()) + 1, others * int(n.max()) + 1)
    one = torch.zeros(int(s.max()) + 1, int(n.max()) + 1, dtype=torch.float64)
    one = one.index_put((s, n), probability, accumulate=True)
    spectrum = torch.fft.rfft2(one, s=shape) if others else None
    weight = one.new_ones(1, 1) if spectrum is None else torch.fft.irfft2(spectrum**others, s=shape)
    sums = torch.arange(shape[0], dtype=torch.float64)[:, None] + others * low
    counts = torch.arange(shape[1], dtype=torch.float64)
    cases, case = torch.unique(torch.stack([total, count], 1), dim=0, return_inverse=True)
    means = [(weight * (a + sums) / (b + counts)).sum() for a, b in cases.tolist()]
    return torch.stack(means)[case]


def expected_credit(arm: Arm, table: Tree, policy: Tensor, games: int | None) -> Tensor:
    """Expected advantage of every turn of a history, over what the batch's other games may be.

    Args:
        arm: which estimator.
        table: the game.
        policy: ``[1, I, A]``.
        games: in the batch; None for the limit of many.

    Returns:
        ``[H, 2, K]``, of no meaning where no turn is.
    """
    live = table.live.double()
    turns, own = live.sum(2), table.payoff
    probability = table.reach(policy)[0]

    def mean(total: Tensor, count: Tensor) -> Tensor:
        if games is None:
            return ((probability @ total) / (probability @ count)).expand(len(total))
        return mean_of_pool(total, count, probability, games)

    if arm == "trajectory":
        seats = mean(own.sum(1), torch.full_like(own[:, 0], 2))[:, None].expand(-1, 2)
    elif arm == "pooled":
        seats = mean((turns * own).sum(1), turns.sum(1))[:, None].expand(-1, 2)
    elif arm == "spiral":  # the mean of games that are over is independent of this one
        seats = (probability @ own).expand(len(own), -1)
    else:
        earned = own if arm == "normalize-then-sum" else turns * own
        seats = torch.stack([mean(earned[:, p], turns[:, p]) for p in (0, 1)], 1)
    baseline = seats[..., None].expand(live.shape)
    if arm == "normalize-then-sum":
        baseline = baseline * live.flip(2).cumsum(2).flip(2)
    return own[..., None] - baseline


def bias(arm: Arm, table: Tree, policy: Tensor, games: int | None) -> Tensor:
    """Exact bias of the estimated gradient ``[I, A]``."""
    expected = table.expected_gradient(expected_credit(arm, table, policy, games), policy)
    return (expected - table.true_gradient(policy))[0]


# ---------------------------------------------------------------------- what batches look like


def mixed(game: Game) -> Tensor:
    """Half-way from uniform play to an equilibrium of Kuhn poker (Kuhn, 1950) ``[1, I, A]``."""
    table = tree(game)
    return (table.uniform() + equilibrium()) / 2


def equilibrium(alpha: float = 1 / 3) -> Tensor:
    """Kuhn poker's equilibrium whose first seat bets a king with ``3 alpha`` ``[1, I, A]``.

    Cards are 0, 1, 2; the information sets are those of :func:`tree`, in its order.
    """
    bets = {
        **{"0": alpha, "1": 0.0, "2": 3 * alpha, "0pb": 0.0, "1pb": alpha + 1 / 3, "2pb": 1.0},
        **{"0p": 1 / 3, "1p": 0.0, "2p": 1.0, "0b": 0.0, "1b": 1 / 3, "2b": 1.0},
    }
    chosen = torch.tensor([bets[name] for name in tree("kuhn").names], dtype=torch.float64)
    return torch.stack([1 - chosen, chosen], 1)[None]


@dataclass(frozen=True)
class Setting:
    """Where gradients are estimated.

    Attributes:
        game: "kuhn" or "loaded".
        policy: "uniform" or "mixed".
        games: of a batch.
    """

    game: Game
    policy: Literal["uniform", "mixed"]
    games: int

    @property
    def probabilities(self) -> Tensor:
        """The policy ``[1, I, A]``."""
        return tree(self.game).uniform() if self.policy == "uniform" else mixed(self.game)


@dataclass(frozen=True)
class Quality:
    """An estimator in a setting; lengths are shares of the true gradient's.

    Attributes:
        bias: length of the exact bias.
        limit: length of the bias that more games do not remove.
        error: squared distance of the mean of all batches from the exact expectation, over what it
            is on average if that is right: about 1.
        variance: squared distance of each batch's estimate from its expectation ``[R]``.
        cosine: of each batch's estimate with the true gradient ``[R]``.
    """

    bias: float
    limit: float
    error: float
    variance: Tensor
    cosine: Tensor


def study(setting: Setting, batches: int, seed: int) -> dict[Arm, Quality]:
    """Bias, variance and cosine of every estimator; all see the same batches."""
    table, policy = tree(setting.game), setting.probabilities
    truth = table.true_gradient(policy)[0]
    size = truth.norm()
    generator = torch.Generator().manual_seed(seed)
    runs = policy.expand(batches, -1, -1)
    played = table.play(runs, setting.games, generator)
    earlier = table.play(runs, _SETTLE, generator).reward.sum(3)
    value = table.value(policy)
    baseline = running_means(earlier, torch.stack([value, -value], 1).expand(batches, -1))[1]
    out: dict[Arm, Quality] = {}
    for arm in ARMS:
        advantage, _ = credit(arm, played.reward, played.live, baseline)
        found = policy_gradient(advantage, played.cell, runs) / (2 * setting.games)
        off = bias(arm, table, policy, setting.games)
        scatter = (found - truth - off).flatten(1).square().sum(1)
        away = (found.mean(0) - truth - off).square().sum()
        out[arm] = Quality(
            float(off.norm() / size),
            float(bias(arm, table, policy, None).norm() / size),
            float(away * batches / scatter.mean()),
            scatter / size**2,
            torch.cosine_similarity(found.flatten(1), truth.flatten()[None]),
        )
    return out
