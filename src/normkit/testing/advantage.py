"""The contract of an advantage estimator, as checks that anyone can run on one of their own.

::

    from normkit.testing import check_advantage

    check_advantage("mapo")
    check_advantage(my_estimator, skip={"groups": "it whitens over the batch"})

An estimator is called as ``estimator(reward, dialogue, turn, group, mask=mask)`` on flat rows, one
per turn (:func:`normkit.rl.advantage.estimate`), also with ``agent=`` and ``batch=`` where its
signature has them. It keeps the contract when it is finite on every batch, credits nothing to rows
that are masked or unknown or compared with their equals only, and lets no row speak for another
group, batch or agent. :data:`ADVANTAGE_CHECKS` lists the checks by name.

Shapes: N turns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from normkit.errors import InputError
from normkit.rl.advantage import Estimator, get_estimator
from normkit.testing.contract import run_checks

Rows: TypeAlias = dict[str, Tensor]
_COLUMNS = ("reward", "dialogue", "turn", "group")
_NAN, _INF = float("nan"), float("inf")


def _no_options(rows: Rows) -> Mapping[str, Any]:
    """Call the estimator with its defaults."""
    return {}


@dataclass(frozen=True)
class AdvantageCase:
    """An estimator and what it needs to be checked.

    Attributes:
        estimator: the estimator.
        options: keyword arguments for a batch of rows, by the names that the estimator has.
        skip: reasons by name of check.
    """

    estimator: Callable[..., Tensor]
    options: Callable[[Rows], Mapping[str, Any]] = _no_options
    skip: Mapping[str, str] = field(default_factory=dict)

    def applies(self, check: str) -> bool:
        """Whether a check is meant for this estimator and not skipped."""
        keyword = {"agents": "agent", "batches": "batch"}.get(check)
        return check not in self.skip and (keyword is None or self._takes(keyword))

    def credit(self, rows: Rows) -> Tensor:
        """Advantages of the rows."""
        columns = [rows[name] for name in _COLUMNS]
        others = {name: x for name, x in rows.items() if name not in _COLUMNS}
        return self.estimator(*columns, **others, **self.options(rows))

    def _takes(self, keyword: str) -> bool:
        parameters = inspect.signature(self.estimator).parameters
        return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def check_advantage(
    estimator: str | Callable[..., Tensor],
    *,
    options: Callable[[Rows], Mapping[str, Any]] = _no_options,
    skip: Mapping[str, str] | None = None,
) -> None:
    """Run every check of the contract of advantage estimators that applies.

    Args:
        estimator: a registered name, or a function of flat rows; a function of
            :class:`~normkit.rl.turns.Turns` becomes one as ``Estimator("mine", function, "")``.
        options: makes further keyword arguments from the rows, which come by the names of the
            arguments: ``lambda rows: {"value": critic(rows["turn"])}``.
        skip: reasons by name of check (the keys of :data:`ADVANTAGE_CHECKS`), beside those of
            the registry.

    Raises:
        AssertionError: names each check that failed, and why.
        InputError: for an unknown estimator, or the name of a check that does not exist.
    """
    if isinstance(estimator, str):
        estimator = get_estimator(estimator)
    known = estimator.skip if isinstance(estimator, Estimator) else {}
    case = AdvantageCase(estimator, options, {**known, **(skip or {})})
    run_checks("estimator", ADVANTAGE_CHECKS, case)


# ---------------------------------------------------------------------- form


def check_form(case: AdvantageCase) -> None:
    """One finite number per row in the dtype of the rewards; the input is left alone."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rows = _batch(dtype=dtype)
        before = {name: x.clone() for name, x in rows.items()}
        got = case.credit(rows)
        assert got.shape == rows["reward"].shape, f"{tuple(got.shape)} from rows (N,)"
        assert got.dtype == dtype, f"rewards in {dtype} gave advantages in {got.dtype}"
        assert got.isfinite().all(), "not finite"
        assert torch.equal(case.credit(rows), got), "a second call gave something else"
        for name, x in rows.items():
            assert torch.equal(x, before[name]), f"{name} was changed in place"


def check_empty(case: AdvantageCase) -> None:
    """No rows give no advantages."""
    got = case.credit(_rows([]))
    assert got.shape == (0,), f"{tuple(got.shape)} from no rows"


def check_refusals(case: AdvantageCase) -> None:
    """Rows that have no meaning are refused with InputError."""
    rows = _batch()
    wrong = {
        "integer rewards": {"reward": rows["reward"].long()},
        "a dialogue index that is too short": {"dialogue": rows["dialogue"][1:]},
        "a negative group": {"group": rows["group"] - 1},
        "a turn given twice": {"turn": torch.zeros_like(rows["turn"])},
        "a dialogue in two groups": {"group": rows["turn"]},
        "a mask of numbers": {"mask": rows["reward"]},
    }
    for what, change in wrong.items():
        try:
            case.credit({**rows, **change})
        except InputError:
            continue
        raise AssertionError(f"{what} was not refused with InputError")


# ---------------------------------------------------------------------- hard batches


def check_finite(case: AdvantageCase) -> None:
    """Advantages are finite whatever the batch looks like."""
    hard: dict[str, Sequence[Sequence[float]]] = {
        "a dialogue of 1 turn beside one of 12": [[1.0], [float(t) for t in range(12)]],
        "dialogues of equal rewards": [[1.0, 1, 1], [1, 1, 1], [1]],
        "unknown rewards": [[_NAN, 1], [2, _NAN], [3, 4]],
        "infinite rewards": [[_INF, 1], [2, -_INF], [3, 4]],
        "nothing but unknown rewards": [[_NAN, _NAN], [_NAN]],
        "large rewards that hardly differ": [[1e6, 1e6], [1e6, 1e6 + 1]],
    }
    for what, rewards in hard.items():
        for dtype in (torch.float64, torch.float32):
            got = case.credit(_rows(rewards, dtype=dtype))
            assert got.isfinite().all(), f"{what} gave {got.tolist()}"


def check_zero(case: AdvantageCase) -> None:
    """What is compared with nothing, or only with its equals, gets exactly zero."""
    for what, rewards in {
        "one dialogue of one turn": [[3.0]],
        "dialogues of one turn and equal rewards": [[1e4 + 0.1]] * 7,
    }.items():
        for dtype in (torch.float64, torch.float32):
            got = case.credit(_rows(rewards, dtype=dtype))
            assert (got == 0).all(), f"{what} got {got.tolist()}"


def check_unknown(case: AdvantageCase) -> None:
    """A turn whose reward is not finite gets zero, and it does not matter in which way."""
    rows = _batch()
    lost = torch.zeros_like(rows["reward"], dtype=torch.bool)
    lost[[0, 4, 5]] = True
    first = case.credit({**rows, "reward": rows["reward"].masked_fill(lost, _NAN)})
    assert (first[lost] == 0).all(), f"unknown rewards were credited {first[lost].tolist()}"
    for value in (_INF, -_INF):
        other = case.credit({**rows, "reward": rows["reward"].masked_fill(lost, value)})
        _close(other, first, f"{value} gave something else than nan")


def check_mask(case: AdvantageCase) -> None:
    """Masked rows are as if they were not there, whatever they hold."""
    rows = _batch()
    n = len(rows["reward"])
    mask = torch.rand(n, generator=torch.Generator().manual_seed(2)) > 0.3
    alone = case.credit({name: x[mask] for name, x in rows.items()})
    nowhere = {n: x.masked_fill(~mask, -1) for n, x in rows.items() if n != "reward"}
    for index in ({}, nowhere):
        for value in (0.0, 1e9, _NAN):
            reward = rows["reward"].masked_fill(~mask, value)
            got = case.credit({**rows, **index, "reward": reward, "mask": mask})
            assert (got[~mask] == 0).all(), f"masked rows were credited {got[~mask].tolist()}"
            _close(got[mask], alone, f"masked rows that hold {value} changed the others")
    got = case.credit({**rows, "mask": torch.zeros_like(mask)})
    assert (got == 0).all(), "rows were credited though all are masked"


# ---------------------------------------------------------------------- symmetries


def check_order(case: AdvantageCase) -> None:
    """The order of the rows does not matter."""
    rows = _batch()
    whole = case.credit(rows)
    for order in (torch.randperm(len(whole), generator=_seed(3)), torch.arange(len(whole)).flip(0)):
        got = case.credit({name: x[order] for name, x in rows.items()})
        _close(got, whole[order], "rows in another order were credited otherwise")


def check_names(case: AdvantageCase) -> None:
    """Numbers of dialogues and groups are names: any others, however large, give the same."""
    rows = _batch()
    renamed = {
        **rows,
        "dialogue": 2**40 - 977 * rows["dialogue"],
        "group": 10**9 * (rows["group"] + 1),
    }
    _close(case.credit(renamed), case.credit(rows), "other numbers of dialogues gave others")


def check_groups(case: AdvantageCase) -> None:
    """What happens in a group is of no concern to the others."""
    _check_apart(case, "group")


def check_batches(case: AdvantageCase) -> None:
    """Batches that are stacked are credited as they are alone."""
    _check_apart(case, "batch")


def check_agents(case: AdvantageCase) -> None:
    """Agents are credited as if the others' rows were not there."""
    _check_apart(case, "agent")


ADVANTAGE_CHECKS: dict[str, Callable[[AdvantageCase], None]] = {
    "form": check_form,
    "empty": check_empty,
    "refusals": check_refusals,
    "finite": check_finite,
    "zero": check_zero,
    "unknown": check_unknown,
    "mask": check_mask,
    "order": check_order,
    "names": check_names,
    "groups": check_groups,
    "batches": check_batches,
    "agents": check_agents,
}


# ---------------------------------------------------------------------- helpers


def _check_apart(case: AdvantageCase, kind: str) -> None:
    """Credit a batch at once, then each group, batch or agent alone."""
    rows = _batch()
    if kind == "batch":
        rows["batch"] = (rows["group"] > 0).long()
    if kind == "agent":
        rows["agent"] = rows["turn"] % 2
    whole = case.credit(rows)
    for part in torch.unique(rows[kind]).tolist():
        chosen = rows[kind] == part
        alone = case.credit({name: x[chosen] for name, x in rows.items() if name != "agent"})
        _close(whole[chosen], alone, f"rows of another {kind} changed the advantages")


def _batch(dtype: torch.dtype = torch.float64) -> Rows:
    """Three groups of ragged dialogues; their rewards have levels and spreads of their own."""
    lengths = ((3, 1, 4, 2), (5, 5, 2), (1, 6, 3, 3, 2))
    generator = _seed(1)
    rewards, groups = [], []
    for group, turns in enumerate(lengths):
        for n in turns:
            noise = torch.randn(n, generator=generator, dtype=torch.float64)
            rewards.append((10 * group + (1 + group) * noise).tolist())
            groups.append(group)
    return _rows(rewards, groups, dtype)


def _rows(
    rewards: Sequence[Sequence[float]],
    groups: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Rows:
    """Flat rows of ragged lists; one group if none are given."""

    def flat() -> Iterator[tuple[float, int, int, int]]:
        for i, dialogue in enumerate(rewards):
            for t, reward in enumerate(dialogue):
                yield reward, i, t, 0 if groups is None else groups[i]

    rows = list(flat())
    index = torch.tensor([row[1:] for row in rows], dtype=torch.int64).reshape(len(rows), 3)
    reward = torch.tensor([row[0] for row in rows], dtype=dtype)
    return {"reward": reward, "dialogue": index[:, 0], "turn": index[:, 1], "group": index[:, 2]}


def _seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def _close(got: Tensor, expected: Tensor, message: str) -> None:
    gap = float((got - expected).abs().max()) if got.numel() else 0.0
    assert gap <= 1e-9, f"{message} (by {gap:.2g})"
