"""What the paper of LayerNorm states exactly, as checks (part of the recipe layernorm)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from normkit.functional.moments import normalize
from normkit.functional.norms import layer_norm
from normkit.nn import LNLSTM, LayerNorm
from normkit.recipes.base import Claim, Finding, Verdict, within

METHODS = ("batch norm", "weight norm", "layer norm")
CHANGES = (
    "weight matrix re-scaled",
    "weight matrix re-centered",
    "weight vector re-scaled",
    "dataset re-scaled",
    "dataset re-centered",
    "single case re-scaled",
)
PUBLISHED = {
    "batch norm": (True, False, True, True, True, False),
    "weight norm": (True, False, True, False, False, False),
    "layer norm": (True, True, False, True, False, True),
}
"""Table 1 of the paper: whether the output stays as it is."""

INVARIANT, CHANGED = 1e-10, 1e-2  # what is taken for "the same" and for "different"


def batch_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Units normalized over the cases, without eps."""
    return normalize(x @ weight.T, 0, eps=0.0)


def weight_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Weight vectors of length one."""
    length: Tensor = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    return x @ (weight / length).T


def layer_norm_units(x: Tensor, weight: Tensor) -> Tensor:
    """Cases normalized over the units, without eps."""
    return layer_norm(x @ weight.T, (len(weight),), eps=0.0)


_UNITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = dict(
    zip(METHODS, (batch_norm, weight_norm, layer_norm_units), strict=True)
)


def invariance_table() -> dict[str, tuple[float, ...]]:
    """How much each method's output moves under each change: the largest difference, float64."""
    generator = torch.Generator().manual_seed(0)
    x, weight, shift = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((16, 12), (10, 12), (12,))
    )
    vector, case = torch.ones(10, 1).double(), torch.ones(16, 1).double()
    vector[3], case[5] = 3.0, 3.0
    changes = (
        (x, 3 * weight),
        (x, weight + shift),  # the same vector is added to each unit's weights
        (x, vector * weight),
        (3 * x, weight),
        (x + shift, weight),
        (case * x, weight),
    )
    return {
        name: tuple(float((unit(*c) - unit(x, weight)).abs().max()) for c in changes)
        for name, unit in _UNITS.items()
    }


def _invariances() -> Finding:
    table = invariance_table()
    wrong = [
        f"{name}, {change}"
        for name, row in table.items()
        for change, moved, stays in zip(CHANGES, row, PUBLISHED[name], strict=True)
        if not (moved <= INVARIANT if stays else moved >= CHANGED)
    ]
    cells = sum(map(len, PUBLISHED.values()))
    return Finding(
        "contradicted" if wrong else "holds",
        f"{cells - len(wrong)} of {cells} cells" + "".join(f"; not: {cell}" for cell in wrong),
        {name: dict(zip(CHANGES, row, strict=True)) for name, row in table.items()},
    )


def _train_is_eval() -> Finding:
    torch.manual_seed(0)
    norm, x = LayerNorm(12).double(), torch.randn(16, 12, dtype=torch.float64)
    with torch.no_grad():
        trained, evaluated, alone = norm.train()(x), norm.eval()(x), norm(x[3:4])
    error = max(
        float((a - b).abs().max()) for a, b in ((trained, evaluated), (trained[3:4], alone))
    )
    return within(error, 1e-14)


def _learning_rate() -> Finding:
    torch.manual_seed(0)
    x, weight = torch.randn(16, 12).double(), torch.randn(10, 12).double()
    target = torch.randn(16, 10).double()

    def gradient(scale: float) -> Tensor:
        scaled = (scale * weight).requires_grad_()
        loss = (layer_norm_units(x, scaled) - target).square().sum()
        return torch.autograd.grad(loss, scaled)[0]

    return within(float((gradient(3.0) * 3.0 - gradient(1.0)).abs().max()), 1e-10)


def _recurrent_scale() -> Finding:
    torch.manual_seed(0)
    layer = LNLSTM(6, 8, dtype=torch.float64, eps=0.0)
    x = torch.randn(100, 4, 6, dtype=torch.float64)
    h = torch.randn(2, 1, 4, 8, dtype=torch.float64)
    with torch.no_grad():
        before = layer(x, (h[0], h[1]))[0]
        for name, p in layer.named_parameters():
            if "weight" in name:
                p.mul_(3.0)
        after = layer(x, (h[0], h[1]))[0]
    return within(float((after - before).abs().max()), 1e-10)


def _parameters() -> Finding:
    sizes = [(5, 8), (64, 128)]
    extra = [
        sum(p.numel() for p in LNLSTM(i, h).parameters())
        - sum(p.numel() for p in torch.nn.LSTM(i, h).parameters())
        for i, h in sizes
    ]
    holds = all(n == 10 * h for n, (_, h) in zip(extra, sizes, strict=True))
    verdict: Verdict = "holds" if holds else "contradicted"
    return Finding(verdict, f"{extra[0]} more at H = 8, {extra[1]} more at H = 128")


CLAIMS: list[Claim] = [
    Claim(
        "invariances",
        "what leaves the output of batch, weight and layer norm as it is: the table of the paper",
        "table 1: 18 cells, 10 of them invariant",
        "exact",
        _invariances,
    ),
    Claim(
        "train-is-eval",
        "a case's output is the same in training, in evaluation and alone",
        "identity",
        "exact",
        _train_is_eval,
    ),
    Claim(
        "learning-rate",
        "weights that are d times larger have a gradient d times smaller: growth slows learning",
        "identity (section 5.2)",
        "exact",
        _learning_rate,
    ),
    Claim(
        "recurrent-scale",
        "over 100 steps the states of LN-LSTM do not depend on the scale of its weight matrices",
        "identity (section 3.1)",
        "exact",
        _recurrent_scale,
    ),
    Claim(
        "parameters",
        "LN-LSTM has ten more numbers per unit than torch's LSTM: gains of two norms over four "
        "gates, gain and shift of the cell's",
        "10 H",
        "structural",
        _parameters,
    ),
]
