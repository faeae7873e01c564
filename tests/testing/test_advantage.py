"""Every registered estimator keeps the contract, and each check finds what breaks it."""

from __future__ import annotations

import pytest
import torch

from normkit.errors import InputError
from normkit.rl.advantage import ALIASES, ESTIMATORS, Estimator, estimate, turn_normalize
from normkit.testing import ADVANTAGE_CHECKS, AdvantageCase, check_advantage

NEEDED = {"ppo": lambda rows: {"value": 0.3 * rows["turn"].double()}}


@pytest.mark.parametrize("name", [*ESTIMATORS, *ALIASES])
def test_every_registered_estimator_keeps_the_contract(name):
    options = {"options": NEEDED[name]} if name in NEEDED else {}
    check_advantage(name, **options)


def test_an_unwhitened_critic_keeps_it_too_but_for_rows_without_peers():
    check_advantage(
        "ppo",
        options=lambda rows: {**NEEDED["ppo"](rows), "whiten": False},
        skip={"zero": "it compares with the critic"},
    )


def good(reward, dialogue, turn, group, mask=None, agent=None, batch=None):
    return estimate("grpo-turn", reward, dialogue, turn, group, mask, agent=agent, batch=batch)


def widens(reward, *index, mask=None):
    return good(reward, *index, mask=mask).double()


def writes_to_its_input(reward, *index, mask=None):
    out = good(reward, *index, mask=mask)
    reward.zero_()
    return out


def keeps_nothing_of_nothing(reward, *index, mask=None):
    return good(reward, *index, mask=mask) if len(reward) else torch.zeros(1)


def takes_anything(reward, dialogue, turn, group, mask=None):
    return torch.zeros(len(reward))


def divides_by_zero(reward, dialogue, turn, group, mask=None):
    out = good(reward, dialogue, turn, group, mask=mask)
    lone = torch.bincount(group)[group] < 2
    return torch.where(lone, out / 0, out)


def is_noise_on_constants(reward, dialogue, turn, group, mask=None):
    """Verl's convention for a group of one: its reward is its advantage."""
    lone = torch.bincount(group)[group] < 2
    return torch.where(lone, reward, good(reward, dialogue, turn, group, mask=mask))


def spreads_nan(reward, dialogue, turn, group, mask=None):
    out = good(reward, dialogue, turn, group, mask=mask)
    return out + 0 * reward if mask is None else out


def credits_the_unknown(reward, *index, mask=None):
    return good(reward, *index, mask=mask).masked_fill(~reward.isfinite(), 1.0)


def credits_the_masked(reward, *index, mask=None):
    out = good(reward, *index, mask=mask)
    return out if mask is None else out.masked_fill(~mask, 1.0)


def looks_at_the_masked(reward, dialogue, turn, group, mask=None):
    out = good(reward, dialogue, turn, group, mask=mask)
    shift = reward.nan_to_num().mean() * 1e-6
    return out + shift if mask is None else (out + shift).masked_fill(~mask, 0)


def depends_on_order(reward, *index, mask=None):
    return good(reward, *index, mask=mask) * (1 + 1e-6 * torch.arange(len(reward)))


def counts_with_names(reward, dialogue, turn, group, mask=None):
    return good(reward, dialogue, turn, group, mask=mask) * (1 + group)


def leaks_across_groups(reward, dialogue, turn, group, mask=None):
    return good(reward, dialogue, turn, torch.zeros_like(group), mask=mask)


def leaks_across_batches(reward, *index, mask=None, batch=None):
    return estimate("reinforce++", reward, *index, mask)


def leaks_across_agents(reward, *index, mask=None, agent=None):
    return estimate("batch", reward, *index, mask)


@pytest.mark.parametrize(
    ("check", "estimator"),
    [
        ("form", widens),
        ("form", writes_to_its_input),
        ("empty", keeps_nothing_of_nothing),
        ("refusals", takes_anything),
        ("finite", spreads_nan),
        ("zero", divides_by_zero),
        ("zero", is_noise_on_constants),
        ("unknown", credits_the_unknown),
        ("mask", credits_the_masked),
        ("mask", looks_at_the_masked),
        ("order", depends_on_order),
        ("names", counts_with_names),
        ("groups", leaks_across_groups),
        ("batches", leaks_across_batches),
        ("agents", leaks_across_agents),
    ],
)
def test_a_check_finds_the_estimator_that_breaks_it(check, estimator):
    case = AdvantageCase(estimator)
    assert case.applies(check)
    ADVANTAGE_CHECKS[check](AdvantageCase(good))
    with pytest.raises(AssertionError):
        ADVANTAGE_CHECKS[check](case)


def test_a_function_of_flat_rows_may_be_checked():
    check_advantage(good)


def test_all_that_fails_is_named_at_once():
    with pytest.raises(AssertionError) as caught:
        check_advantage(depends_on_order, skip={"refusals": "not here"})
    lines = str(caught.value).splitlines()[1:]
    assert [line.partition(":")[0] for line in lines] == ["form", "mask", "order", "groups"]


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="unknown checks colour"):
        check_advantage("mapo", skip={"colour": "blind"})
    with pytest.raises(InputError, match="estimator must be one of"):
        check_advantage("nope")


def test_keywords_that_an_estimator_does_not_take_are_not_checked():
    case = AdvantageCase(depends_on_order)
    assert not case.applies("agents")
    assert not case.applies("batches")
    assert AdvantageCase(good).applies("agents")


def test_a_function_of_turns_may_be_checked_and_used_without_being_registered():
    def mine(turns, *, gamma=0.5):
        return turn_normalize(turns.returns(gamma), turns)

    check_advantage(Estimator("mine", mine, "returns by turn, halved each time"))
