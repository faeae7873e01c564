"""verl: every estimator of normkit under a name that verl's configuration takes.

``register()`` adds them to verl's registry as ``normkit_mapo``, ``normkit_grpo`` and so on; the
module :mod:`normkit.integrations.verl_plugin` does so when it is imported, which verl can be told
to do in each of its processes::

    VERL_USE_EXTERNAL_MODULES=normkit.integrations.verl_plugin \
        python -m verl.trainer.main_ppo algorithm.adv_estimator=normkit_mapo \
            algorithm.gamma=0.85 +algorithm.normkit.alpha=0.6 ...

The discount is verl's ``algorithm.gamma``; ``algorithm.normkit`` holds the estimator's other
options. Written against verl 0.9.1, which hands an estimator rewards and mask per token and the
group (``uid``) of each dialogue, but no turn numbers, agents or values: turns are the runs of the
mask, and agents come from a trainer of your own or are part of the ``uid``.

The values of verl's critic reach one function alone, that of ``algorithm.adv_estimator=gae``. The
module :mod:`normkit.integrations.verl_turn_gae`, named in place of the plugin, puts "ppo" there:
GAE by turns instead of tokens (:func:`turn_gae_advantage`).

Beside them it registers the loss of Turn-PPO (:mod:`normkit.integrations.verl_loss`).

Only :func:`register` and :func:`credit_turns_by_gae` import verl, and that loss when verl calls it.

Shapes: B dialogues, L tokens of a response (padded).
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normkit.errors import InputError, MissingDependencyError, NormkitError
from normkit.integrations.verl_loss import TURN_PPO, verl_turn_loss
from normkit.rl.advantage import ESTIMATORS, estimate, get_estimator, to_tokens
from normkit.rl.token_grid import GridTurns, grid_turns


def verl_advantage(
    name: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    config: Any = None,
    turn_ids: Tensor | None = None,
    non_tensor_batch: Mapping[str, Any] | None = None,
    values: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Advantage of every token of a batch in verl's layout.

    Args:
        name: an estimator of :data:`normkit.rl.advantage.ESTIMATORS`.
        token_level_rewards: reward at each token ``[B, L]``; a turn earns the sum over its tokens
            and those up to the next turn (:func:`normkit.rl.token_grid.grid_turns`).
        response_mask: 1 on the policy's tokens ``[B, L]``. A token that rejection sampling took out
            splits its turn, unless ``turn_ids`` are given.
        index: group of each dialogue ``[B]``: verl's ``uid``, of any hashable kind.
        config: verl's ``algorithm``: ``gamma``, and ``normkit`` with further options.
        turn_ids: turn of each token ``[B, L]``; runs of the mask if None. verl 0.9.1 does not pass
            it; a trainer of your own may.
        non_tensor_batch: its ``agent`` says who spoke in each dialogue ``[B]``, of any hashable
            kind: a seat in a game. verl 0.9.1 passes it to an estimator of its own alone.
        values: value of the state before each token ``[B, L]``, for an estimator that needs a
            critic; that before a turn's first token is the turn's. verl 0.9.1 passes it to its GAE
            alone.

    Returns:
        Advantages and returns ``[B, L]``, 0 outside the mask. With a critic, the return of a turn
        is what the values before all its tokens are drawn to; a turn without a verdict leaves them
        as they are. As in verl's own estimators, without one the returns are the advantages.

    Raises:
        InputError: without ``index``, for shapes that differ, for an estimator that needs a critic
            without ``values``, or an option that is not there.
    """
    critic = bool(get_estimator(name).needs)
    if critic and values is None:
        raise InputError(
            f"estimator {name!r} needs a critic's values, which verl hands to its own GAE alone: "
            "set algorithm.adv_estimator=gae and VERL_USE_EXTERNAL_MODULES="
            "normkit.integrations.verl_turn_gae"
        )
    if index is None:
        raise InputError("index must name the group of each dialogue (verl's uid), got None")
    turns = grid_turns(token_level_rewards, response_mask, turn_ids)
    size, dialogue = len(token_level_rewards), turns.dialogue
    group = _numbered("index", index, size).to(dialogue.device)[dialogue]
    agent = (non_tensor_batch or {}).get("agent")
    if agent is not None:
        agent = _numbered("agent", agent, size).to(dialogue.device)[dialogue]
    rows = (turns.reward, dialogue, turns.turn, group)
    credit = partial(estimate, name, *rows, agent=agent, **_options(name, config))

    def spread(x: Tensor) -> Tensor:
        return to_tokens(x, turns.turn_row).to(token_level_rewards.dtype)

    if not critic or values is None:
        tokens = spread(credit())
        return tokens, tokens
    before = _before_turns(values, turns)
    target = spread(before + credit(value=before, whiten=False))
    judged = spread(torch.isfinite(turns.reward).double()) > 0
    kept = values.masked_fill(turns.turn_row < 0, 0)
    return spread(credit(value=before)), torch.where(judged, target, kept)


def turn_gae_advantage(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """GAE by turns, with the arguments of verl's GAE by tokens.

    ``A_k = sum_l (gamma lam)^l delta_{k+l}``, ``delta_k = r_k + gamma V_{k+1} - V_k``, V_k the
    value before the first token of turn k (:func:`normkit.rl.returns.turn_gae`); advantages are
    whitened over the turns of the batch.

    Args:
        token_level_rewards: ``[B, L]``.
        values: the critic's, before each token ``[B, L]``.
        response_mask: 1 on the policy's tokens ``[B, L]``.
        gamma: discount per turn (verl's ``algorithm.gamma``).
        lam: weight of longer returns (verl's ``algorithm.lam``).

    Returns:
        Advantages and returns, as :func:`verl_advantage` with a critic.
    """
    config = {"gamma": gamma, "normkit": {"lam": lam}}
    index = np.zeros(len(response_mask), dtype=int)  # GAE compares no groups
    return verl_advantage("ppo", token_level_rewards, response_mask, index, config, values=values)


def verl_name(name: str) -> str:
    """Name of an estimator in verl's registry: ``normkit_reinforce_plus_plus`` and the like."""
    return "normkit_" + name.replace("++", "_plus_plus").replace("-", "_")


REGISTERED: Mapping[str, Callable[..., tuple[Tensor, Tensor]]] = {
    verl_name(name): partial(verl_advantage, name) for name in ESTIMATORS
}
"""What :func:`register` adds to verl. "normkit_ppo" only says what to use instead."""


def register() -> tuple[str, ...]:
    """Add estimators and loss to verl's registries, in this process; again changes nothing.

    Returns:
        The names of the estimators, for ``algorithm.adv_estimator``.

    Raises:
        MissingDependencyError: when verl is not installed.
    """
    if importlib.util.find_spec("verl") is None:
        raise MissingDependencyError("verl", "verl")
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

    for name, function in REGISTERED.items():
        register_adv_est(name)(function)
    register_policy_loss(TURN_PPO)(verl_turn_loss)
    return tuple(REGISTERED)


def credit_turns_by_gae() -> None:
    """Let ``algorithm.adv_estimator=gae`` credit turns, in this process: its function is replaced.

    All trainers of verl 0.9.1 call it by its name in ``core_algos``, with the critic's values.

    Raises:
        MissingDependencyError: when verl is not installed.
        NormkitError: when verl's function takes other arguments than that of verl 0.9.1.
    """
    register()
    from verl.trainer.ppo import core_algos

    name = "compute_gae_advantage_return"
    theirs, ours = (
        list(inspect.signature(function).parameters)
        for function in (getattr(core_algos, name), turn_gae_advantage)
    )
    if theirs != ours:
        raise NormkitError(f"verl: its {name} must take {', '.join(ours)}, as in verl 0.9.1")
    setattr(core_algos, name, turn_gae_advantage)


def _before_turns(values: Tensor, turns: GridTurns) -> Tensor:
    """Value before the first token of each turn ``[N]``."""
    if values.shape != turns.turn_row.shape:
        raise InputError(
            f"values must have the shape of the mask {tuple(turns.turn_row.shape)}, got "
            f"{tuple(values.shape)}"
        )
    ours = turns.turn_row >= 0
    row = turns.turn_row[ours]  # it rises where a turn begins
    return values[ours][torch.cat([row[:1] >= 0, row[1:] > row[:-1]])].to(turns.reward)


def _numbered(name: str, labels: Any, size: int) -> Tensor:
    """Number labels of dialogues, equal ones alike ``[B]``."""
    numbers = torch.from_numpy(np.unique(np.asarray(labels), return_inverse=True)[1])
    if numbers.shape != (size,):
        raise InputError(
            f"{name} must have one element per dialogue ({size}), got shape {tuple(numbers.shape)}"
        )
    return numbers


def _options(name: str, config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    options = dict(config.get("normkit") or {})
    gamma = config.get("gamma")
    if gamma is not None and "gamma" in get_estimator(name).options:
        options.setdefault("gamma", float(gamma))
    return options
