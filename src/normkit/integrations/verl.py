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
mask, agents come from a trainer of your own or are part of the ``uid``, and "ppo", which needs a
critic, is not registered (verl has "gae" of its own).

Beside them it registers the loss of Turn-PPO (:mod:`normkit.integrations.verl_loss`).

Only :func:`register` imports verl, and that loss when verl calls it.

Shapes: B dialogues, L tokens of a response (padded).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normkit.errors import InputError, MissingDependencyError
from normkit.integrations.verl_loss import TURN_PPO, verl_turn_loss
from normkit.rl.advantage import ESTIMATORS, estimate, get_estimator, to_tokens
from normkit.rl.token_grid import grid_turns


def verl_advantage(
    name: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    config: Any = None,
    turn_ids: Tensor | None = None,
    non_tensor_batch: Mapping[str, Any] | None = None,
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

    Returns:
        Advantages and returns ``[B, L]``, 0 outside the mask. As in verl's own estimators without a
        critic, the returns are the advantages.

    Raises:
        InputError: without ``index``, for shapes that differ, for an estimator that needs a critic,
            or an option that is not there.
    """
    if get_estimator(name).needs:
        raise InputError(f"estimator {name!r} needs a critic, which verl does not hand over")
    if index is None:
        raise InputError("index must name the group of each dialogue (verl's uid), got None")
    turns = grid_turns(token_level_rewards, response_mask, turn_ids)
    size, dialogue = len(token_level_rewards), turns.dialogue
    agent = (non_tensor_batch or {}).get("agent")
    if agent is not None:
        agent = _numbered("agent", agent, size).to(dialogue.device)[dialogue]
    advantage = estimate(
        name,
        turns.reward,
        dialogue,
        turns.turn,
        _numbered("index", index, size).to(dialogue.device)[dialogue],
        agent=agent,
        **_options(name, config),
    )
    tokens = to_tokens(advantage, turns.turn_row).to(token_level_rewards.dtype)
    return tokens, tokens


def verl_name(name: str) -> str:
    """Name of an estimator in verl's registry: ``normkit_reinforce_plus_plus`` and the like."""
    return "normkit_" + name.replace("++", "_plus_plus").replace("-", "_")


REGISTERED: Mapping[str, Callable[..., tuple[Tensor, Tensor]]] = {
    verl_name(name): partial(verl_advantage, name)
    for name, estimator in ESTIMATORS.items()
    if not estimator.needs
}
"""What :func:`register` adds to verl."""


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
