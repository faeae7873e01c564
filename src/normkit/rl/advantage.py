r"""Advantage estimators: what each turn of a dialogue is credited with.

Every estimator is a pure function of flat tensors with one row per turn,
``(reward, dialogue, turn, group) -> advantage``, registered by name in :data:`ESTIMATORS`. The
trainer and the integrations all call :func:`estimate`.

Shared conventions, tested for every estimator:

- a row whose reward is masked or not finite gets advantage 0 and stays out of all statistics; for
  returns its reward is imputed by the mean of its dialogue, so that later credit passes through;
- a group of one and a constant group get 0, never NaN;
- dialogues may end at different turns; order of rows does not matter.

Shapes: N turns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from normkit.errors import InputError
from normkit.functional.moments import segment_moments, segment_normalize
from normkit.rl.returns import impute_rewards, monte_carlo_returns, turn_gae

Scope = Literal["group", "batch"]


@dataclass(frozen=True)
class Turns:
    """Flat rows of a batch, one per turn.

    Attributes:
        reward: ``[N]``, floating point, in float32 or float64.
        dialogue: dialogue of the row ``[N]``.
        turn: index of the turn in its dialogue ``[N]``.
        group: group of the dialogue ``[N]``.
        mask: True where the row counts ``[N]``.
    """

    reward: Tensor
    dialogue: Tensor
    turn: Tensor
    group: Tensor
    mask: Tensor

    @property
    def turn_cell(self) -> tuple[Tensor, int]:
        """Segment of rows with the same group and turn index, and how many there are."""
        width = _size(self.turn)
        return self.group * width + self.turn, _size(self.group) * width

    def returns(self, gamma: float) -> Tensor:
        """Monte-Carlo returns ``[N]``."""
        return monte_carlo_returns(self.reward, self.dialogue, self.turn, gamma, self.mask)

    def known_rewards(self) -> Tensor:
        """Rewards with unknown ones set to zero ``[N]``."""
        return torch.where(self.mask, self.reward, 0)

    def dialogue_totals(self) -> tuple[Tensor, Tensor]:
        """Sum of the known rewards and group of each dialogue ``[D]``."""
        size = _size(self.dialogue)
        total = self.reward.new_zeros(size).scatter_add(0, self.dialogue, self.known_rewards())
        group = self.group.new_zeros(size).scatter(0, self.dialogue, self.group)
        return total, group

    def present(self) -> Tensor:
        """True for the dialogues that have a row that counts ``[D]``."""
        rows = self.reward.new_zeros(_size(self.dialogue))
        return rows.scatter_add(0, self.dialogue, self.mask.to(rows.dtype)) > 0


def turn_normalize(
    value: Tensor, turns: Turns, ddof: int = 0, eps: float = 1e-8, baseline: str = "mean"
) -> Tensor:
    r"""Compare each turn with the same turn of the dialogues of its group.

    ``(x_{i,t} - mean_j x_{j,t}) / (std_j x_{j,t} + eps)``, j over the dialogues of the group that
    reached turn t. A turn that one dialogue alone reached gets 0.

    Args:
        value: ``[N]``, usually returns.
        turns: the rows.
        ddof: subtracted from the count in the variance.
        eps: added to the deviation.
        baseline: "mean", or "loo" for the mean of the others (``n / (n - 1)`` times the
            difference), which does not shrink small groups.

    Returns:
        ``[N]``.
    """
    if baseline not in ("mean", "loo"):
        raise InputError(f"baseline must be mean or loo, got {baseline!r}")
    cell, size = turns.turn_cell
    out = segment_normalize(value, cell, size, turns.mask, ddof=ddof, eps=eps)
    if baseline == "loo":
        n = segment_moments(value, cell, size, turns.mask).n[cell]
        out = out * torch.where(n > 1, n / (n - 1).clamp(min=1), 0)
    return out


def batch_normalize(
    value: Tensor, turns: Turns, scope: Scope = "group", ddof: int = 0, eps: float = 1e-8
) -> Tensor:
    """Compare each turn with all turns of its group (or of the whole batch), at any index.

    Args:
        value: ``[N]``, immediate rewards for MAPO.
        turns: the rows.
        scope: pool over the "group" or over the "batch".
        ddof: subtracted from the count in the variance.
        eps: added to the deviation.

    Returns:
        ``[N]``.
    """
    if scope not in ("group", "batch"):
        raise InputError(f"batch_scope must be group or batch, got {scope!r}")
    ids = turns.group if scope == "group" else torch.zeros_like(turns.group)
    return segment_normalize(value, ids, _size(ids), turns.mask, ddof=ddof, eps=eps)


def mapo(
    turns: Turns,
    *,
    gamma: float = 0.85,
    alpha: float = 0.5,
    beta: float | None = None,
    batch_scope: Scope = "group",
    baseline: str = "mean",
    ddof: int = 0,
    eps: float = 1e-8,
) -> Tensor:
    r"""Mixed advantage of MAPO (arXiv 2603.06194; later named MICA).

    ``A = alpha A_turn + beta A_batch``: A_turn is the z-score of the *returns* over the dialogues
    of the group at the same turn index, A_batch the z-score of the *immediate rewards* over all
    turns of the pool.

    Before scaling, with ``beta = 1 - alpha``, this is the return
    ``r_t + alpha sum_{s>t} gamma^(s-t) r_s``: quasi-hyperbolic discounting, alpha being a dial
    between the myopic and the long-horizon gradient.

    Args:
        turns: the rows.
        gamma: discount per turn; the published launch scripts use 0.85.
        alpha: weight of A_turn.
        beta: weight of A_batch; ``1 - alpha`` if None.
        batch_scope: pool of A_batch: the rollout "group" (v3 of the paper) or the "batch" (v1).
        baseline: see :func:`turn_normalize`.
        ddof: subtracted from the count in both variances.
        eps: added to both deviations.

    Returns:
        Advantages ``[N]``.
    """
    by_turn = turn_normalize(turns.returns(gamma), turns, ddof, eps, baseline)
    by_batch = batch_normalize(turns.reward, turns, batch_scope, ddof, eps)
    return alpha * by_turn + (1 - alpha if beta is None else beta) * by_batch


def turn(turns: Turns, *, gamma: float = 0.85, ddof: int = 0, eps: float = 1e-8) -> Tensor:
    """Turn-level normalization alone: MAPO with ``alpha = 1``."""
    return turn_normalize(turns.returns(gamma), turns, ddof, eps)


def batch(
    turns: Turns, *, batch_scope: Scope = "group", ddof: int = 0, eps: float = 1e-8
) -> Tensor:
    """Batch-level normalization of the immediate rewards alone: MAPO with ``alpha = 0``."""
    return batch_normalize(turns.reward, turns, batch_scope, ddof, eps)


def batch_returns(
    turns: Turns,
    *,
    gamma: float = 0.85,
    batch_scope: Scope = "group",
    ddof: int = 0,
    eps: float = 1e-8,
) -> Tensor:
    """Batch-level normalization of the returns: what MAPO reports as unstable."""
    return batch_normalize(turns.returns(gamma), turns, batch_scope, ddof, eps)


def grpo(turns: Turns, *, ddof: int = 1, eps: float = 1e-6) -> Tensor:
    """Outcome-only GRPO (arXiv 2402.03300): the z-score of a dialogue's total over its group.

    Every turn of a dialogue gets the same advantage. ``ddof`` and ``eps`` default to the values
    in common use.
    """
    total, group = turns.dialogue_totals()
    score = segment_normalize(total, group, _size(turns.group), turns.present(), ddof=ddof, eps=eps)
    return torch.where(turns.mask, score[turns.dialogue], 0)


def rloo(turns: Turns) -> Tensor:
    """REINFORCE leave-one-out (arXiv 2402.14740): total minus the mean of the group's others."""
    total, group = turns.dialogue_totals()
    center, _, n = segment_moments(total, group, _size(turns.group), turns.present())
    n = n[group]
    score = torch.where(n > 1, (total - center[group]) * n / (n - 1).clamp(min=1), 0)
    return torch.where(turns.mask, score[turns.dialogue], 0)


def reinforce_plus_plus(turns: Turns, *, gamma: float = 1.0, eps: float = 1e-8) -> Tensor:
    """REINFORCE++ (arXiv 2501.03262): discounted returns, whitened over the whole batch.

    Credit crosses the user's turns, unlike in implementations whose running sum is multiplied by
    the response mask.
    """
    return batch_normalize(turns.returns(gamma), turns, "batch", 0, eps)


def gigpo(
    turns: Turns,
    *,
    anchor: Tensor | None = None,
    gamma: float = 0.95,
    weight: float = 1.0,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """Group-in-group policy optimization (arXiv 2505.10978): episode plus anchor-state advantage.

    ``A = A_episode + weight A_step``: the step term compares returns of turns that started from the
    same anchor state within the group.

    Args:
        turns: the rows.
        anchor: state that each turn started from ``[N]``, as integers; the turn index if None,
            since free text hardly ever repeats.
        gamma: discount per turn of the step returns.
        weight: weight of the step term.
        ddof: subtracted from the count in the variances.
        eps: added to the deviations.

    Returns:
        Advantages ``[N]``.
    """
    state = turns.turn if anchor is None else anchor
    if state.shape != turns.turn.shape or state.dtype != torch.int64:
        raise InputError(f"anchor must be int64 of shape {tuple(turns.turn.shape)}")
    cells = Turns(turns.reward, turns.dialogue, state, turns.group, turns.mask)
    step = turn_normalize(turns.returns(gamma), cells, ddof, eps)
    return grpo(turns, ddof=ddof, eps=eps) + weight * step


def ppo(
    turns: Turns,
    *,
    value: Tensor | None = None,
    gamma: float = 0.99,
    lam: float = 0.95,
    whiten: bool = True,
) -> Tensor:
    """Turn-level GAE with a critic (arXiv 1506.02438), whitened over the batch.

    Args:
        turns: the rows.
        value: the critic's value before each turn ``[N]``; required.
        gamma: discount per turn.
        lam: weight of longer returns.
        whiten: center and scale over the batch.

    Returns:
        Advantages ``[N]``.
    """
    if value is None or value.shape != turns.reward.shape:
        raise InputError("value: ppo needs the critic's value of each turn, one per row")
    advantage = turn_gae(turns.reward, value, turns.dialogue, turns.turn, gamma, lam, turns.mask)
    if whiten:
        return batch_normalize(advantage, turns, "batch")
    return torch.where(turns.mask, advantage, 0)


def grpo_turn(turns: Turns, *, ddof: int = 1, eps: float = 1e-6) -> Tensor:
    """Z-score of the turn's own reward over its group and turn (MAPO notes: grpo_multiturn)."""
    return turn_normalize(turns.reward, turns, ddof, eps)


def turn_baseline(turns: Turns, *, gamma: float = 0.85, eps: float = 1e-8) -> Tensor:
    """Return minus its turn's mean, whitened over the batch (MAPO notes: multiturn_baseline)."""
    value = turns.returns(gamma)
    cell, size = turns.turn_cell
    center = segment_moments(value, cell, size, turns.mask).center.to(value.dtype)
    return batch_normalize(value - center[cell], turns, "batch", 0, eps)


@dataclass(frozen=True)
class Estimator:
    """A registered estimator.

    Attributes:
        name: its name on the command line.
        function: ``function(turns, **options) -> advantage [N]``.
        description: one line for people.
        needs: options that must be given.
    """

    name: str
    function: Callable[..., Tensor]
    description: str
    needs: tuple[str, ...] = ()


ESTIMATORS: dict[str, Estimator] = {
    e.name: e
    for e in (
        Estimator("mapo", mapo, "mixed turn-level returns and batch-level rewards"),
        Estimator("grpo", grpo, "outcome only: the dialogue's total over its group"),
        Estimator("turn", turn, "returns over the group at the same turn"),
        Estimator("batch", batch, "immediate rewards over all turns of the group"),
        Estimator("batch-returns", batch_returns, "returns over all turns of the group"),
        Estimator("reinforce++", reinforce_plus_plus, "returns whitened over the batch"),
        Estimator("rloo", rloo, "total minus the mean of the group's others"),
        Estimator("gigpo", gigpo, "outcome plus anchor-state advantage"),
        Estimator("grpo-turn", grpo_turn, "the turn's own reward over its group and turn"),
        Estimator("turn-baseline", turn_baseline, "turn-centered returns, whitened"),
        Estimator("ppo", ppo, "turn-level GAE with a critic", needs=("value",)),
    )
}
ALIASES: Mapping[str, str] = {"mica": "mapo"}


def get_estimator(name: str) -> Estimator:
    """Return the estimator of that name or alias.

    Raises:
        InputError: for an unknown name; the message lists the known ones.
    """
    found = ESTIMATORS.get(ALIASES.get(name, name))
    if found is None:
        known = ", ".join([*ESTIMATORS, *ALIASES])
        raise InputError(f"estimator must be one of {known}; got {name!r}")
    return found


def estimate(
    name: str,
    reward: Tensor,
    dialogue: Tensor,
    turn: Tensor,
    group: Tensor,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Advantage of every turn by the estimator of that name.

    Args:
        name: a key of :data:`ESTIMATORS` or an alias.
        reward: reward of each turn ``[N]``, floating point; NaN or infinite means unknown.
        dialogue: dialogue of each turn ``[N]``, int64.
        turn: index of the turn in its dialogue ``[N]``, int64; each (dialogue, turn) stands once.
        group: group of each turn's dialogue ``[N]``, int64; one group per dialogue.
        mask: False where the row must not count ``[N]``, bool.
        options: the estimator's own options.

    Returns:
        Advantages ``[N]`` in the dtype of ``reward``; 0 where masked or unknown.

    Raises:
        InputError: for an unknown name or option, wrong shapes or dtypes, negative indices, a turn
            given twice, a dialogue in two groups.
    """
    estimator = get_estimator(name)
    missing = [need for need in estimator.needs if options.get(need) is None]
    if missing:
        raise InputError(f"{estimator.name} needs {', '.join(missing)}")
    turns = _rows(reward, dialogue, turn, group, mask)
    try:
        advantage = estimator.function(turns, **options)
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise InputError(f"{estimator.name}: {error}") from None
        raise
    return advantage.to(reward.dtype)


def to_tokens(advantage: Tensor, turn_row: Tensor) -> Tensor:
    """Give every token the advantage of its turn.

    Args:
        advantage: ``[N]``.
        turn_row: row of each token's turn, -1 for tokens the policy did not sample; any shape.

    Returns:
        Tensor shaped like ``turn_row``; 0 where it is -1.
    """
    inside = turn_row >= 0
    return torch.where(inside, advantage[turn_row.clamp(min=0)], 0)


@dataclass(frozen=True)
class Diagnosis:
    """What the two halves of the mixed advantage look like on a batch.

    Attributes:
        survivors: mean number of dialogues of a group alive at each turn index ``[T]``.
        zero_variance: share of (group, turn) cells whose returns are all equal, singletons
            included.
        ratio: mean ``|A_turn|`` over mean ``|A_batch|``.
        correlation: Pearson correlation of A_turn and A_batch; 0 where one is constant.
    """

    survivors: list[float]
    zero_variance: float
    ratio: float
    correlation: float


def diagnose(
    reward: Tensor,
    dialogue: Tensor,
    turn: Tensor,
    group: Tensor,
    mask: Tensor | None = None,
    gamma: float = 0.85,
) -> Diagnosis:
    """Describe how far a batch supports turn-level normalization (arguments: :func:`estimate`)."""
    turns = _rows(reward, dialogue, turn, group, mask)
    cell, size = turns.turn_cell
    returns = turns.returns(gamma)
    _, scale, n = segment_moments(returns, cell, size, turns.mask)
    width = _size(turns.turn)
    grid = n.reshape(-1, width)
    filled = n > 0
    a = turn_normalize(returns, turns)[turns.mask]
    b = batch_normalize(turns.reward, turns)[turns.mask]
    groups = max(int((grid.sum(1) > 0).sum()), 1)
    spread = a.std(correction=0) * b.std(correction=0) if a.numel() else a.sum()
    both = ((a - a.mean()) * (b - b.mean())).mean() if a.numel() else a.sum()
    return Diagnosis(
        survivors=(grid.sum(0) / groups).tolist(),
        zero_variance=float((scale[filled] == 0).double().mean()) if filled.any() else 0.0,
        ratio=float(a.abs().mean() / b.abs().mean()) if b.abs().sum() > 0 else 0.0,
        correlation=float(both / spread) if spread > 0 else 0.0,
    )


def _rows(
    reward: Tensor, dialogue: Tensor, turn: Tensor, group: Tensor, mask: Tensor | None
) -> Turns:
    if reward.dim() != 1 or not reward.is_floating_point():
        raise InputError(
            f"reward must be floating point of shape (N,), got {reward.dtype} {tuple(reward.shape)}"
        )
    for name, index in (("dialogue", dialogue), ("turn", turn), ("group", group)):
        if index.shape != reward.shape or index.dtype != torch.int64:
            raise InputError(
                f"{name} must be int64 of shape {tuple(reward.shape)}, got {index.dtype} "
                f"{tuple(index.shape)}"
            )
        if index.numel() and int(index.min()) < 0:
            raise InputError(f"{name} must not be negative, got {int(index.min())}")
    if mask is not None and (mask.shape != reward.shape or mask.dtype != torch.bool):
        raise InputError(f"mask must be bool of shape {tuple(reward.shape)}")
    if reward.numel():
        cells = dialogue * _size(turn) + turn
        seen = torch.bincount(cells)
        if int(seen.max()) > 1:
            raise InputError("each (dialogue, turn) must stand once; one is given twice")
        first = group.new_zeros(_size(dialogue)).scatter(0, dialogue, group)
        if not torch.equal(first[dialogue], group):
            raise InputError("group: a dialogue stands in two groups")
    if reward.dtype in (torch.float16, torch.bfloat16):
        reward = reward.float()
    known = torch.isfinite(reward)
    mask = known if mask is None else known & mask
    return Turns(impute_rewards(reward, dialogue, mask), dialogue, turn, group, mask)


def _size(ids: Tensor) -> int:
    return int(ids.max()) + 1 if ids.numel() else 0
