r"""Matching rows to columns by their scores: one to one, or softly by entropic transport.

MatchTIR (arXiv 2601.10712) pays every predicted tool call, a row, by the reference call, a column,
that it is matched with. With scores ``S`` in [0, 1]:

- *hungarian*: the one-to-one matching with the largest sum of scores; a matched row earns its
  score, any other ``unmatched``. A score of zero is no match.
- *greedy*: the largest remaining score first, ties by the first row, then the first column.
- *ot*: ``T = argmax sum T S + reg H(T)`` over plans with row sums 1/m and column sums 1/n; a row
  earns ``sum_j T_ij S_ij``, which is at most 1/m.

Differences from the authors' code: what they name Hungarian is the greedy matching, which can lose
(``[[1, .5], [.6, 0]]``: 1.0, the optimum is 1.1), so both are here. Their transport divides by the
scores' kernel and underflows for small ``reg``; here potentials are kept as logarithms.

Hard matchings are found by NumPy and SciPy, on the CPU; transport runs where the scores are.

Shapes: ``*`` any batch dimensions; B problems; m rows; n columns.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from normkit.errors import InputError, MissingDependencyError

Method = Literal["hungarian", "greedy", "ot"]
METHODS: tuple[Method, ...] = ("hungarian", "greedy", "ot")
_Array = npt.NDArray[Any]
_RIDGE = 1e-15
"""Keeps Newton's equations solvable where rows and columns hardly touch."""


class Matching(NamedTuple):
    """What :func:`match` found.

    Attributes:
        reward: what each row earns ``[*, m]``; 0 in masked rows.
        assignment: column of each row ``[*, m]``, int64, -1 for none; None for "ot".
        plan: mass between rows and columns ``[*, m, n]``; None but for "ot".
    """

    reward: Tensor
    assignment: Tensor | None
    plan: Tensor | None


def match(
    score: Tensor,
    method: Method = "hungarian",
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    reg: float = 0.1,
    unmatched: float = 0.0,
    rescale: bool = False,
) -> Matching:
    """Match rows to columns and pay the rows.

    Rewards are differentiable in the scores: through the matched scores where the matching is hard,
    through the iterations where it is soft.

    Args:
        score: scores ``[*, m, n]``, finite, not negative.
        method: "hungarian", "greedy" or "ot".
        rows: False where a row is padding ``[*, m]``, bool.
        columns: False where a column is padding ``[*, n]``, bool.
        reg: weight of the entropy, "ot" only; the published 0.1.
        unmatched: what a row without a column earns, hard matching only.
        rescale: multiply the rewards of "ot" by the number of rows, so that a perfect call earns 1
            as in hard matching.

    Returns:
        The :class:`Matching`. Without rows or columns nothing is matched.

    Raises:
        InputError: for an unknown method, scores that are negative or not finite, masks that do not
            fit, or a ``reg`` that is not above 0.
    """
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    rows, columns = _masks(score, rows, columns)
    if method == "ot":
        filled = score.masked_fill(~(rows.unsqueeze(-1) & columns.unsqueeze(-2)), 0)
        _check_range(filled.detach())
        plan = sinkhorn(score, reg, rows, columns)
        paid = (plan * filled).sum(-1)
        return Matching(paid * rows.sum(-1, keepdim=True) if rescale else paid, None, plan)
    solve = hungarian if method == "hungarian" else greedy
    assignment = solve(score, rows, columns)
    if not score.shape[-1]:
        reward = score.new_full(rows.shape, unmatched)
    else:
        picked = score.gather(-1, assignment.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        reward = torch.where(assignment >= 0, picked, unmatched)
    return Matching(reward.masked_fill(~rows, 0), assignment, None)


def hungarian(score: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """One-to-one matching with the largest sum of scores (Kuhn-Munkres).

    Problems in which every column can have one of its best rows for itself (every row one of its
    best columns, where there are fewer rows) are solved at once: no matching can have a larger sum.
    The others go to SciPy one by one. Of several optima any may be returned.

    Args:
        score: ``[*, m, n]``, finite, not negative.
        rows: False where a row is padding ``[*, m]``.
        columns: False where a column is padding ``[*, n]``.

    Returns:
        Column of each row ``[*, m]``, int64; -1 where it has none, or only one of score zero.

    Raises:
        InputError: see :func:`match`.
    """
    return _assigned(score, rows, columns, _hungarian)


def greedy(score: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """One-to-one matching of the largest remaining score, again and again (the authors' code).

    Args:
        score: ``[*, m, n]``, finite, not negative.
        rows: False where a row is padding ``[*, m]``.
        columns: False where a column is padding ``[*, n]``.

    Returns:
        Column of each row ``[*, m]``, int64; -1 where it has none. Ties fall to the first row, then
        to the first column.

    Raises:
        InputError: see :func:`match`.
    """
    return _assigned(score, rows, columns, _greedy)


def sinkhorn(
    score: Tensor,
    reg: float = 0.1,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    *,
    tolerance: float = 1e-9,
    iterations: int = 1000,
) -> Tensor:
    r"""Entropic optimal transport between uniform marginals (Cuturi, arXiv 1306.0895).

    ``T_ij = exp(f_i + S_ij / reg + g_j)`` with row sums 1/m and column sums 1/n. Rows and columns
    are fitted in turns, by logarithms of sums in float64, and after each turn a Newton step of the
    dual is taken where it helps: turns alone need thousands where scores tie. A constant added to
    the scores does not change the plan. Its derivative is that of the solution, not of the steps.

    Args:
        score: ``[*, m, n]``, finite; the cost of transport is ``-score``.
        reg: weight of the entropy.
        rows: False where a row is padding ``[*, m]``.
        columns: False where a column is padding ``[*, n]``.
        tolerance: largest error of a column sum, as a share of it, at which the turns end.
        iterations: the most turns there are; a warning says that they did not suffice.

    Returns:
        The plan ``[*, m, n]`` in the dtype of ``score``, 0 in masked rows and columns and in
        problems without rows or columns. Row sums are exact, column sums to the tolerance.

    Raises:
        InputError: for a ``reg`` that is not above 0, and as :func:`match`.
    """
    if not reg > 0:
        raise InputError(f"reg must be above 0, got {reg}")
    rows, columns = _masks(score, rows, columns)
    if not score.numel():
        return torch.zeros_like(score)
    pairs = (rows.unsqueeze(-1) & columns.unsqueeze(-2)).reshape(-1, *score.shape[-2:])
    _check_range(score.detach().reshape(pairs.shape).masked_fill(~pairs, 0), signed=True)
    logits = (score.double() / reg).reshape(pairs.shape).masked_fill(~pairs, -torch.inf)
    masses = _uniform(pairs.any(2)), _uniform(pairs.any(1))
    g, settled = _potentials(logits.detach(), masses, tolerance, iterations)
    if not settled:
        warnings.warn(
            f"transport at reg {reg} had not settled after {iterations} iterations",
            RuntimeWarning,
            stacklevel=2,
        )
    if score.requires_grad:
        # At the solution a Newton step changes nothing but the derivative.
        plan, lack, _ = _plan(logits, g, masses)
        g = g + _newton(plan.detach(), lack, masses)
    return _plan(logits, g, masses)[0].reshape(score.shape).to(score.dtype)


def _potentials(
    logits: Tensor, masses: tuple[Tensor, Tensor], tolerance: float, iterations: int
) -> tuple[Tensor, bool]:
    """Potentials of the columns ``[B, n]``, and whether all problems settled."""
    out = torch.zeros_like(masses[1])
    of_rows = _row_potential(logits, out, masses)
    live = torch.arange(len(out), device=out.device)
    for _ in range(iterations):
        part, mass = logits[live], (masses[0][live], masses[1][live])
        g = _finite(mass[1].log() - torch.logsumexp(part + of_rows[live].unsqueeze(2), 1))
        plan, lack, f = _plan(part, g, mass)
        trial = g + _newton(plan, lack, mass)
        trial_f = _row_potential(part, trial, mass)
        settled = (_over(lack.abs(), mass[1])).amax(1) < tolerance
        better = (_dual(trial_f, trial, mass) > _dual(f, g, mass)) & ~settled
        out[live] = torch.where(better.unsqueeze(1), trial, g)
        of_rows[live] = torch.where(better.unsqueeze(1), trial_f, f)
        live = live[~settled]
        if not len(live):
            break
    return out, not len(live)


def _row_potential(logits: Tensor, g: Tensor, masses: tuple[Tensor, Tensor]) -> Tensor:
    return _finite(masses[0].log() - torch.logsumexp(logits + g.unsqueeze(1), 2))


def _plan(logits: Tensor, g: Tensor, masses: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Plan with exact row sums ``[B, m, n]``, what columns lack ``[B, n]``, row potentials."""
    f = _row_potential(logits, g, masses)
    plan = torch.exp(logits + f.unsqueeze(2) + g.unsqueeze(1))
    return plan, masses[1] - plan.sum(1), f


def _dual(f: Tensor, g: Tensor, masses: tuple[Tensor, Tensor]) -> Tensor:
    """The concave function of the potentials that the solution maximizes ``[B]``."""
    return (masses[1] * g).sum(1) + (masses[0] * f).sum(1)


def _newton(plan: Tensor, lack: Tensor, masses: tuple[Tensor, Tensor]) -> Tensor:
    """Newton step of the dual: what to add to g so that the columns get what they lack."""
    curvature = torch.diag_embed(plan.sum(1)) - plan.mT @ _over(plan, masses[0].unsqueeze(2))
    # A constant in g does nothing, and padding has no curvature: both are given some.
    mass = masses[1]
    curvature = curvature + mass.unsqueeze(2) * mass.unsqueeze(1)
    curvature = curvature + torch.diag_embed((mass == 0).to(mass.dtype) + _RIDGE)
    step: Tensor = torch.linalg.solve(curvature, lack)
    return step


def _assigned(
    score: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    solve: Callable[[_Array, _Array, _Array], _Array],
) -> Tensor:
    """Column of each row ``[*, m]``, by a solver of problems ``[B, m, n]`` with their masks."""
    *batch, m, n = score.shape
    row, column = (mask.cpu().numpy() for mask in _masks(score, rows, columns))
    if not score.numel():
        return torch.full((*batch, m), -1, device=score.device)
    values = score.detach().double().cpu().numpy().reshape(-1, m, n)
    found = solve(values, row.reshape(-1, m), column.reshape(-1, n))
    return torch.from_numpy(found).to(score.device).reshape(*batch, m)


def _hungarian(score: _Array, row: _Array, column: _Array) -> _Array:
    size, m, n = score.shape
    filled = _problems_last(score, row, column)
    if m < n:
        return _partners(filled).T
    out, b = np.full((size, m + 1), -1), np.arange(size)
    for j, i in enumerate(_partners(filled.swapaxes(0, 1))):
        out[b, i] = j  # where there is no row, in the column beyond the last
    return out[:, :m]


def _problems_last(score: _Array, row: _Array, column: _Array) -> _Array:
    """Scores ``[m, n, B]``, 0 in padding: an operation on numbers of all problems is quick."""
    out = np.array(score.transpose(1, 2, 0), order="C")
    kept = column.T.astype(np.float64)
    with np.errstate(invalid="ignore"):
        for i, wanted in enumerate(row.T):
            out[i] *= kept * wanted
    if np.isnan(out.min()):  # 0 times infinity, and padding may hold anything
        out = np.where(row.T[:, None] & column.T, score.transpose(1, 2, 0), 0.0)
    _check_range(out)
    return out


def _partners(score: _Array) -> _Array:
    """Best matching of seekers with places that are no fewer, for problems ``[s, p, B]``.

    Returns:
        Place of each seeker ``[s, B]``, -1 for none.
    """
    seekers, places, size = score.shape
    found, solved = np.full((seekers, size), -1), np.zeros(size, bool)
    # The quick way does not pay for few problems, and a number has bits for so many places only.
    if size > 2 * seekers**2 and places < np.iinfo(np.int64).bits:
        found, solved = _best_places(score)
    left = np.flatnonzero(~solved)
    if len(left):
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError:
            raise MissingDependencyError("scipy", "rl") from None
        cost = -score.take(left, 2).transpose(2, 0, 1)
        place = np.array([linear_sum_assignment(one)[1] for one in cost])
        earned = -np.take_along_axis(cost, place[:, :, None], 2)[:, :, 0]
        found[:, left] = np.where(earned > 0, place, -1).T
    return found


def _best_places(score: _Array) -> tuple[_Array, _Array]:
    """Give each seeker in turn one of its best places, moving one that came before if need be.

    Sets of places are the bits of numbers: a step is one operation on the numbers of all problems.

    Returns:
        Place of each seeker ``[s, B]``, -1 for none, and where none had to go without ``[B]``: the
        sum of the seekers' best scores bounds that of any matching.
    """
    seekers, places, size = score.shape
    kind = next(kind for kind in (np.int16, np.int32, np.int64) if places < np.iinfo(kind).bits)
    top = score.max(1)
    best = np.zeros((seekers, size), kind)
    for i in range(places):
        best |= (score[:, i] == top).astype(kind) << i
    best *= top > 0
    free: _Array = np.full(size, (1 << places) - 1, kind)
    own: _Array = np.zeros((seekers, size), kind)
    for one in range(seekers):
        choice = best[one] & free
        own[one] = choice & -choice
        free &= ~own[one]
        without = (own[one] == 0) & (best[one] != 0)
        for other in range(one):
            choice = best[other] & free
            moves = without & (best[one] & own[other] != 0) & (choice != 0)
            choice = (choice & -choice) * moves
            own[one] |= own[other] * moves
            own[other] = np.where(moves, choice, own[other])
            free &= ~choice
            without &= ~moves
    solved = ((own != 0) | (best == 0)).all(0)
    # The exponent of 2^place, as a fraction below one times a power, is place + 1; that of 0 is 0.
    return np.frexp(own.astype(np.float64))[1].astype(np.int64) - 1, solved


def _greedy(score: _Array, row: _Array, column: _Array) -> _Array:
    size, m, n = score.shape
    paired = np.repeat(row, n, 1) & np.tile(column, (1, m))
    pairs, b = np.where(paired, score.reshape(size, m * n), 0.0), np.arange(size)
    _check_range(pairs)
    left = pairs.reshape(size, m, n)
    out = np.full((size, m + 1), -1)
    for _ in range(min(m, n)):
        place = pairs.argmax(1)
        taken = pairs[b, place] > 0
        if not taken.any():
            break
        i = place // n
        j = place - i * n
        out[b, np.where(taken, i, m)] = j  # where there is no pair, in the column beyond the last
        left[b, i] = 0
        left[b, :, j] = 0
    return out[:, :m]


def _masks(score: Tensor, rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the masks, full where none is given."""
    if score.dim() < 2 or not score.is_floating_point():
        raise InputError(
            f"score must be floating point of shape (*, m, n), got {score.dtype} "
            f"{tuple(score.shape)}"
        )
    masks = []
    for name, mask, shape in (
        ("rows", rows, score.shape[:-1]),
        ("columns", columns, score.shape[:-2] + score.shape[-1:]),
    ):
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=score.device)  # noqa: PLW2901
        if mask.shape != shape or mask.dtype != torch.bool:
            raise InputError(
                f"{name} must be bool of shape {tuple(shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        masks.append(mask)
    return masks[0], masks[1]


def _check_range(filled: Tensor | _Array, signed: bool = False) -> None:
    """Refuse scores that are not finite, or negative ones; padding has been filled."""
    if 0 in filled.shape:
        return
    low, high = float(filled.min()), float(filled.max())
    if not (math.isfinite(low) and math.isfinite(high) and (signed or low >= 0)):
        expected = "finite" if signed else "finite and not negative"
        raise InputError(f"score must be {expected} where it is not masked")


def _uniform(mask: Tensor) -> Tensor:
    """Uniform mass of a mask, in float64; 0 where it is False."""
    return mask.double() / mask.sum(-1, keepdim=True).clamp(min=1)


def _over(x: Tensor, mass: Tensor) -> Tensor:
    """Share of a mass; 0 where there is none."""
    return torch.where(mass > 0, x / mass, 0)


def _finite(potential: Tensor) -> Tensor:
    """Potentials, those of padding set to zero."""
    return torch.where(potential.isfinite(), potential, 0)
