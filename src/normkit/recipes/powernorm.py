"""PowerNorm: running quadratic means instead of a batch's own mean and variance.

PowerNorm: Rethinking Batch Normalization in Transformers (Shen et al., 2020), arXiv 2003.07845.

``y = x / psi * weight + bias``, ``psi^2`` the running mean square, with a derivative that follows
a recurrence of its own.

Run it::

    normkit run powernorm                   # LayerNorm, BatchNorm and PowerNorm on real text
    normkit verify powernorm                # the recurrences, the bounded gradient, and more
    normkit verify powernorm --measured     # the experiments' claims too

Differences from the authors' code: see :mod:`normkit.nn.power_norm` and docs/papers/powernorm.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from normkit.recipes._lm import Training
from normkit.recipes._lm_report import calmer, lower_loss, run_comparison
from normkit.recipes._powernorm_claims import CLAIMS
from normkit.recipes.base import System

NORMS = ("layer", "batch", "power")
FINDINGS = {
    "better than LayerNorm": partial(lower_loss, better="power", worse="layer"),
    "better than BatchNorm": partial(lower_loss, better="power", worse="batch"),
    "calmer statistics than BatchNorm": partial(calmer, calm="power", wild="batch"),
}


def run(config: Training, folder: Path) -> Mapping[str, Any]:
    """Train the language model with each norm and compare them."""
    return run_comparison(config, folder, "powernorm", NORMS, FINDINGS)


SYSTEM = System(
    slug="powernorm",
    title="PowerNorm: Rethinking Batch Normalization in Transformers",
    arxiv="2003.07845",
    year=2020,
    tags=("activations", "transformers", "language models"),
    symbols=("normkit.nn.PowerNorm",),
    Config=Training,
    run=run,
    claims=tuple(CLAIMS),
)
