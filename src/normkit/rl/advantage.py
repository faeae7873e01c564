r"""Advantage estimators: what each turn of a dialogue is credited with.

An estimator is a pure function of flat tensors with one row per turn,
``(reward, dialogue, turn, group, mask) -> advantage``, registered by name in :data:`ESTIMATORS`.
The trainer and the integrations all call :func:`estimate`. What all of them keep to, and
:func:`normkit.testing.check_advantage` checks of any:

- a masked row is as if it were not there; it gets 0;
- a row whose reward is not finite happened but was not judged: it stays out of all statistics and
  gets 0, and for the returns of earlier turns it counts as the mean of its dialogue;
- rows that are compared with nothing, or with their equals only, get 0, never NaN ("reinforce" and
  an unwhitened "ppo" do not compare);
- dialogues may end at different turns; the order of rows does not matter;
- agents, where given, share nothing: each is credited as if the others' rows were not there.

Shapes: N turns (flat rows).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from normkit.errors import InputError
from normkit.functional.moments import segment_moments
from normkit.rl.estimators import (
    batch,
    batch_returns,
    gigpo,
    grpo,
    grpo_turn,
    mapo,
    mars,
    matchtir,
    ppo,
    reinforce,
    reinforce_plus_plus,
    rloo,
    turn,
    turn_baseline,
)
from normkit.rl.turns import Turns, batch_normalize, turn_normalize

__all__ = [
    "ALIASES",
    "ESTIMATORS",
    "Diagnosis",
    "Estimator",
    "Turns",
    "batch_normalize",
    "diagnose",
    "estimate",
    "get_estimator",
    "mapo",
    "mars",
    "matchtir",
    "to_tokens",
    "turn_normalize",
]


@dataclass(frozen=True)
class Estimator:
    """A registered estimator; call it on flat rows as :func:`estimate` without the name.

    Attributes:
        name: its name on the command line.
        function: ``function(turns, **options) -> advantage [N]``.
        description: one line for people.
        needs: options that must be given.
        skip: checks of the contract that it does not meet, each with the reason.
    """

    name: str
    function: Callable[..., Tensor]
    description: str
    needs: tuple[str, ...] = ()
    skip: Mapping[str, str] = field(default_factory=dict)

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that :attr:`function` takes."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)

    def __call__(
        self,
        reward: Tensor,
        dialogue: Tensor,
        turn: Tensor,
        group: Tensor,
        mask: Tensor | None = None,
        *,
        agent: Tensor | None = None,
        batch: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Advantage of every turn (arguments, returns and errors: :func:`estimate`)."""
        missing = [need for need in self.needs if options.get(need) is None]
        if missing:
            raise InputError(f"{self.name} needs {', '.join(missing)}")
        unknown = [name for name in options if name not in self.options]
        if unknown:
            known = ", ".join(self.options) or "none"
            raise InputError(f"{self.name} has no option {unknown[0]!r}; it has {known}")
        rows = {"reward": reward, "dialogue": dialogue, "turn": turn, "group": group}
        rows.update({n: x for n, x in (("agent", agent), ("batch", batch)) if x is not None})
        if mask is not None:
            _check_mask(mask, {**rows, **options})
            if not bool(mask.all()):
                there = {
                    name: x[mask] if isinstance(x, Tensor) else x
                    for name, x in {**rows, **options}.items()
                }
                return torch.zeros_like(reward).masked_scatter(mask, self(**there))
        turns = Turns.from_rows(**rows)
        advantage = self.function(turns, **options)
        if turns.known is not None:
            advantage = advantage.masked_fill(~turns.known, 0)
        return advantage.to(reward.dtype)


_WHITENED = {"groups": "it whitens over the whole batch"}
ESTIMATORS: dict[str, Estimator] = {
    e.name: e
    for e in (
        Estimator("mapo", mapo, "mixed turn-level returns and batch-level rewards"),
        Estimator("grpo", grpo, "outcome only: the dialogue's total over its group"),
        Estimator("turn", turn, "returns over the group at the same turn"),
        Estimator("batch", batch, "immediate rewards over all turns of the group"),
        Estimator("batch-returns", batch_returns, "returns over all turns of the group"),
        Estimator(
            "reinforce", reinforce, "returns as they are", skip={"zero": "it compares nothing"}
        ),
        Estimator(
            "reinforce++", reinforce_plus_plus, "returns whitened over the batch", skip=_WHITENED
        ),
        Estimator("rloo", rloo, "total minus the mean of the group's others"),
        Estimator("gigpo", gigpo, "outcome plus anchor-state advantage"),
        Estimator("grpo-turn", grpo_turn, "the turn's own reward over its group and turn"),
        Estimator(
            "turn-baseline", turn_baseline, "turn-centered returns, whitened", skip=_WHITENED
        ),
        Estimator("mars", mars, "returns less the mean of their game and seat"),
        Estimator("matchtir", matchtir, "outcome plus returns over the group at the same turn"),
        Estimator("ppo", ppo, "turn-level GAE with a critic", needs=("value",), skip=_WHITENED),
    )
}
ALIASES: Mapping[str, str] = {"marshal": "mars", "mica": "mapo"}


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
        mask: False on padding ``[N]``, bool; what stands there is not looked at.
        options: the estimator's own options, and for all of them: ``agent``, who speaks in each
            turn ``[N]``, int64; ``batch``, the batch of each group ``[N]``, int64, where
            independent batches are stacked. Options that are tensors have one element per row.

    Returns:
        Advantages ``[N]`` in the dtype of ``reward``; 0 where masked or unknown.

    Raises:
        InputError: for an unknown name or option, wrong shapes or dtypes, negative indices, a turn
            given twice, a dialogue in two groups, a group in two batches.
    """
    return get_estimator(name)(reward, dialogue, turn, group, mask, **options)


def to_tokens(advantage: Tensor, turn_row: Tensor) -> Tensor:
    """Give every token the advantage of its turn.

    Args:
        advantage: ``[N]``.
        turn_row: row of each token's turn, -1 for tokens the policy did not sample; any shape.

    Returns:
        Tensor shaped like ``turn_row``; 0 where it is -1.

    Raises:
        InputError: for a row that is not there.
    """
    if turn_row.numel() and not -1 <= int(turn_row.min()) <= int(turn_row.max()) < len(advantage):
        raise InputError(
            f"turn_row must be in -1..{len(advantage) - 1}, got "
            f"{int(turn_row.min())}..{int(turn_row.max())}"
        )
    return torch.cat([advantage, advantage.new_zeros(1)])[turn_row]


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
    """Describe how far a batch supports turn-level normalization.

    Args:
        reward: reward of each turn ``[N]``, NaN where unknown.
        dialogue: its dialogue ``[N]``.
        turn: its place in the dialogue ``[N]``.
        group: its group ``[N]``.
        mask: turns to look at ``[N]``; None for all.
        gamma: discount per turn.

    Returns:
        The figures; all 0 where no reward is known.

    Raises:
        InputError: as :func:`estimate`.
    """
    rows = (reward, dialogue, turn, group)
    turns = Turns.from_rows(*(rows if mask is None else (x[mask] for x in rows)))
    known = torch.isfinite(turns.reward) if turns.known is None else turns.known
    if not bool(known.any()):
        return Diagnosis([], 0.0, 0.0, 0.0)
    returns = turns.returns(gamma)
    center, spread, n = segment_moments(returns, *turns.cell, known)
    # Equal returns that were summed in another order may differ in their last bits.
    constant = spread <= 1e-12 * center.abs().clamp(min=1)
    a = turn_normalize(returns, turns)[known]
    b = batch_normalize(turns.reward, turns)[known]
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1] if len(a) > 1 else a.sum()
    groups = torch.unique(turns.group[known]).numel()
    return Diagnosis(
        survivors=(turns.turn[known].bincount() / groups).tolist(),
        zero_variance=float(constant[n > 0].double().mean()),
        ratio=float(a.abs().mean() / b.abs().mean()) if bool(b.any()) else 0.0,
        correlation=float(correlation.nan_to_num()),
    )


def _check_mask(mask: Tensor, rows: Mapping[str, Any]) -> None:
    if mask.dtype != torch.bool:
        raise InputError(f"mask must be bool, got {mask.dtype}")
    for name, x in rows.items():
        if isinstance(x, Tensor) and (x.shape != mask.shape or mask.dim() != 1):
            raise InputError(
                f"mask and {name} must have the same shape (N,), got {tuple(mask.shape)} and "
                f"{tuple(x.shape)}"
            )
