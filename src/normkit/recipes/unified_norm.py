"""Unified Normalization: a norm per channel that goes into the next linear layer at inference.

Unified Normalization for Accelerating and Stabilizing Transformers (Yang et al., 2022),
arXiv 2208.01313.

``y = x / sqrt(var + eps) * weight + bias``, ``var`` the geometric mean of recent mean squares.

Run it::

    normkit run unified-norm                   # LayerNorm, BatchNorm and UnifiedNorm on real text
    normkit verify unified-norm                # fused = unfused, window of one, and more
    normkit verify unified-norm --measured     # the experiments' claims too

Differences from the authors' code: see :mod:`normkit.nn.unified_norm` and
docs/papers/unified-norm.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from normkit.recipes._lm import Training
from normkit.recipes._lm_report import collapses, lower_loss, on_par, run_comparison
from normkit.recipes._unified_norm_claims import CLAIMS
from normkit.recipes.base import System

NORMS = ("layer", "batch", "unified")
FINDINGS = {
    "on par with LayerNorm": partial(on_par, norm="unified", peer="layer"),
    "better than BatchNorm": partial(lower_loss, better="unified", worse="batch"),
    "BatchNorm collapses": partial(collapses, norm="batch", peer="layer"),
}


def run(config: Training, folder: Path) -> Mapping[str, Any]:
    """Train the language model with each norm and compare them."""
    return run_comparison(config, folder, "unified-norm", NORMS, FINDINGS)


SYSTEM = System(
    slug="unified-norm",
    title="Unified Normalization for Accelerating and Stabilizing Transformers",
    arxiv="2208.01313",
    year=2022,
    tags=("activations", "transformers", "inference"),
    symbols=("normkit.nn.UnifiedNorm",),
    Config=Training,
    run=run,
    claims=tuple(CLAIMS),
)
