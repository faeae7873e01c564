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

Shapes: ``*`` any batch dimensions; B problems; m rows; n columns.
"""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from normkit.errors import InputError, MissingDependencyError

Method = Literal["hungarian", "greedy", "ot"]
METHODS: tuple[Method, ...] = ("hungarian", "greedy", "ot")
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
    rows, columns = _check(score, rows, columns)
    if method == "ot":
        plan = sinkhorn(score, reg, rows, columns)
        paid = (plan * score.masked_fill(~_pairs(rows, columns), 0)).sum(-1)
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

    Problems in which the best columns of all rows differ, or the best rows of all columns, are
    solved at once: no matching can have a larger sum. The others go to SciPy one by one. Of several
    optima any may be returned.

    Args:
        score: ``[*, m, n]``, finite, not negative.
        rows: False where a row is padding ``[*, m]``.
        columns: False where a column is padding ``[*, n]``.

    Returns:
        Column of each row ``[*, m]``, int64; -1 where it has none, or only one of score zero.

    Raises:
        InputError: see :func:`match`.
    """
    flat, shape = _flat(score, rows, columns)
    by_row, row_solved = _best_of_rows(flat)
    best_rows, column_solved = _best_of_rows(flat.mT)
    assignment = torch.where(row_solved[:, None], by_row, _invert(best_rows, flat.shape[1]))
    hard = (~(row_solved | column_solved)).nonzero().squeeze(1)
    if len(hard):
        try:
            from scipy.optimize import linear_sum_assignment
        except ImportError:
            raise MissingDependencyError("scipy", "rl") from None
        solved = torch.full((len(hard), flat.shape[1]), -1)
        found = solved.numpy()
        for place, matrix in zip(found, flat[hard].double().cpu().numpy(), strict=True):
            i, j = linear_sum_assignment(matrix, maximize=True)
            place[i] = j
        assignment[hard] = solved.to(assignment.device)
    return _without_zeros(flat, assignment).reshape(shape)


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
    flat, shape = _flat(score, rows, columns)
    size, m, n = flat.shape
    assignment = flat.new_full((size, m), -1, dtype=torch.int64)
    row, column = (torch.arange(k, device=flat.device) for k in (m, n))
    for _ in range(min(m, n)):
        largest, place = flat.view(size, m * n).max(1, keepdim=True)
        of_row, of_column = place // n == row, place % n == column
        assignment = torch.where(of_row & (largest > 0), place % n, assignment)
        flat = flat.masked_fill(of_row.unsqueeze(2) | of_column.unsqueeze(1), 0)
    return assignment.reshape(shape)


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
    rows, columns = _check(score, rows, columns, signed=True)
    if not score.numel():
        return torch.zeros_like(score)
    pairs = _pairs(rows, columns).reshape(-1, *score.shape[-2:])
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
        plan, error = _plan(logits, g, masses)
        g = g + _newton(plan.detach(), error, masses)
    return _plan(logits, g, masses)[0].reshape(score.shape).to(score.dtype)


def _potentials(
    logits: Tensor, masses: tuple[Tensor, Tensor], tolerance: float, iterations: int
) -> tuple[Tensor, bool]:
    """Potentials of the columns ``[B, n]``, and whether all problems settled."""
    out = torch.zeros_like(masses[1])
    live = torch.arange(len(out), device=out.device)
    for _ in range(iterations):
        part, mass, g = logits[live], (masses[0][live], masses[1][live]), out[live]
        f = _row_potential(part, g, mass)
        g = _finite(mass[1].log() - torch.logsumexp(part + f.unsqueeze(2), 1))
        plan, error = _plan(part, g, mass)
        trial = g + _newton(plan, error, mass)
        better = _dual(part, trial, mass) > _dual(part, g, mass)
        settled = (_over(error.abs(), mass[1])).amax(1) < tolerance
        out[live] = torch.where((better & ~settled).unsqueeze(1), trial, g)
        live = live[~settled]
        if not len(live):
            break
    return out, not len(live)


def _row_potential(logits: Tensor, g: Tensor, masses: tuple[Tensor, Tensor]) -> Tensor:
    return _finite(masses[0].log() - torch.logsumexp(logits + g.unsqueeze(1), 2))


def _plan(logits: Tensor, g: Tensor, masses: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Plan whose row sums are exact ``[B, m, n]``, and what its column sums lack ``[B, n]``."""
    f = _row_potential(logits, g, masses)
    plan = torch.exp(logits + f.unsqueeze(2) + g.unsqueeze(1))
    return plan, masses[1] - plan.sum(1)


def _dual(logits: Tensor, g: Tensor, masses: tuple[Tensor, Tensor]) -> Tensor:
    """The concave function of g that the solution maximizes ``[B]``."""
    f = _row_potential(logits, g, masses)
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


def _check(
    score: Tensor, rows: Tensor | None, columns: Tensor | None, signed: bool = False
) -> tuple[Tensor, Tensor]:
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
    if score.numel():
        low, high = torch.aminmax(score.detach().masked_fill(~_pairs(*masks), 0))
        if not (bool(low.isfinite() & high.isfinite()) and (signed or bool(low >= 0))):
            expected = "finite" if signed else "finite and not negative"
            raise InputError(f"score must be {expected} where it is not masked")
    return masks[0], masks[1]


def _pairs(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.unsqueeze(-1) & columns.unsqueeze(-2)


def _flat(score: Tensor, rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor, torch.Size]:
    """Scores ``[B, m, n]`` without gradient, 0 where masked, and the shape of their assignment."""
    masks = _check(score, rows, columns)
    flat = score.detach().masked_fill(~_pairs(*masks), 0)
    size = flat.shape[:-2].numel()
    return flat.reshape(size, *flat.shape[-2:]), score.shape[:-1]


def _best_of_rows(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Best column of each row ``[B, m]``, -1 for none, and where no column is taken twice ``[B]``.

    The sum of the rows' best scores bounds that of any matching.
    """
    size, m, n = flat.shape
    if not m or not n:
        empty = torch.full((size, m), -1, dtype=torch.int64, device=flat.device)
        return empty, torch.ones(size, dtype=torch.bool, device=flat.device)
    largest, best = flat.max(-1)
    wanted = largest > 0
    times = flat.new_zeros(size, n).scatter_add_(1, best, wanted.to(flat.dtype))
    return best.masked_fill(~wanted, -1), times.amax(1) <= 1


def _invert(rows: Tensor, m: int) -> Tensor:
    """Columns of rows ``[B, m]`` from rows of columns ``[B, n]``; -1 for none."""
    size, n = rows.shape
    column = torch.arange(n, device=rows.device).expand(size, n)
    # Columns without a row write to a place of their own, which is cut off.
    place = torch.where(rows >= 0, rows, m)
    out = torch.full((size, m + 1), -1, dtype=torch.int64, device=rows.device)
    return out.scatter_(1, place, column)[:, :m]


def _without_zeros(flat: Tensor, assignment: Tensor) -> Tensor:
    if not flat.shape[-1]:
        return assignment
    picked = flat.gather(2, assignment.clamp(min=0).unsqueeze(2)).squeeze(2)
    return assignment.masked_fill(picked <= 0, -1)


def _uniform(mask: Tensor) -> Tensor:
    """Uniform mass of a mask, in float64; 0 where it is False."""
    return mask.double() / mask.sum(-1, keepdim=True).clamp(min=1)


def _over(x: Tensor, mass: Tensor) -> Tensor:
    """Share of a mass; 0 where there is none."""
    return torch.where(mass > 0, x / mass, 0)


def _finite(potential: Tensor) -> Tensor:
    """Potentials, those of padding set to zero."""
    return torch.where(potential.isfinite(), potential, 0)
