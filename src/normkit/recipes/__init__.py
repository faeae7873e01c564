"""One recipe per published system, and the visible list of all 33.

A system is *built* when its module exists here; modules are loaded when they are asked for.
A module whose name begins with an underscore is part of the recipe it is named after.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

from normkit.errors import InputError, meant
from normkit.recipes.base import System


@dataclass(frozen=True)
class Entry:
    """A line of the catalogue.

    Attributes:
        slug: name on the command line.
        title: title of the paper, shortened where it is long.
        arxiv: arXiv number; empty where none is known to us.
        area: what the system normalizes.
        aliases: other names of the same system.
    """

    slug: str
    title: str
    arxiv: str
    area: str
    aliases: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """Import path of the recipe."""
        return f"{__name__}.{self.slug.replace('-', '_')}"

    @property
    def built(self) -> bool:
        """Whether the recipe exists."""
        return importlib.util.find_spec(self.module) is not None


CATALOGUE: tuple[Entry, ...] = (
    Entry("mapo", "Mixed Advantage Policy Optimization", "2603.06194", "advantages", ("mica",)),
    Entry("mars", "Self-Play in Strategic Games", "2510.15414", "advantages", ("marshal",)),
    Entry("matchtir", "Tool Use by Bipartite Matching", "2601.10712", "advantages"),
    Entry("st-ppo", "Stabilized Off-Policy PPO", "2511.20718", "advantages", ("so-ppo",)),
    Entry("layernorm", "Layer Normalization", "1607.06450", "activations"),
    Entry("pre-rmsnorm", "Pre-RMSNorm and Pre-CRMSNorm", "2305.14858", "activations"),
    Entry("peri-ln", "Peri-LN", "2502.02732", "activations"),
    Entry("unified-norm", "Unified Normalization", "2208.01313", "activations"),
    Entry("powernorm", "PowerNorm", "2003.07845", "activations"),
    Entry("evonorm", "Evolving Normalization-Activation Layers", "2004.02967", "activations"),
    Entry("region-norm", "Region Normalization for Inpainting", "1911.10375", "activations"),
    Entry("adab2n", "Adaptive Balance of BatchNorm", "2310.08855", "activations"),
    Entry("bn-only", "Training BatchNorm and Only BatchNorm", "2003.00152", "activations"),
    Entry("snn", "Self-Normalizing Neural Networks", "1706.02515", "activations"),
    Entry("ela", "Efficient Local Attention", "2403.01123", "activations"),
    Entry("shiftquant", "Sub-8-bit Integer Training", "2411.10948", "activations"),
    Entry("adamp", "AdamP and SGDP", "2006.08217", "weights"),
    Entry("nap", "Normalize-and-Project", "2407.01800", "weights"),
    Entry("swan", "SWAN: SGD with Normalization and Whitening", "2412.13148", "weights"),
    Entry("bo-rep", "Bilevel Optimization under Unbounded Smoothness", "2401.09587", "weights"),
    Entry("residual-depth", "On Residual Network Depth", "2510.03470", "weights"),
    Entry("wide-net", "Go Wider Instead of Deeper", "2107.11817", "weights"),
    Entry("soft", "Softmax-free Linear Transformers", "2207.03341", "attention"),
    Entry("lina", "Linear Autoregressive Image Generation", "2601.22630", "attention"),
    Entry("graph-transformer", "Transformer Networks on Graphs", "2012.09699", "attention"),
    Entry("starflow-v", "Video Generation with Normalizing Flows", "2511.20462", "densities"),
    Entry("tinvnn", "Transformation Invariant Deep Learning", "2112.12345", "geometry"),
    Entry("shs-net", "Signed Hyper Surfaces for Normals", "2305.05873", "geometry"),
    Entry("poincare-resnet", "Poincare ResNet", "2303.14027", "geometry"),
    Entry("ifblend", "Ambient Lighting Normalization", "2403.18730", "images"),
    Entry("costg", "Curvilinear Object Segmentation Datasets", "2407.08209", "images"),
    Entry("gend", "Deepfake Detection that Generalizes", "2508.06248", "images"),
    Entry("instseg-robustness", "Robustness of Instance Segmentation", "2109.01123", "images"),
)


def entry(name: str) -> Entry:
    """Return the catalogue's line of a slug or alias.

    Raises:
        InputError: for a name that is not in the catalogue.
    """
    for line in CATALOGUE:
        if name == line.slug or name in line.aliases:
            return line
    names = [known for line in CATALOGUE for known in (line.slug, *line.aliases)]
    raise InputError(f"there is no system {name!r}{meant(name, names)}; see: normkit list")


def load(name: str) -> System:
    """Load the system of a slug or alias.

    Raises:
        InputError: for an unknown name, or a system that is not built yet.
    """
    line = entry(name)
    if not line.built:
        raise InputError(f"{line.slug} is not built yet; `normkit list` shows which systems are")
    system: System = importlib.import_module(line.module).SYSTEM
    return system


def built() -> list[Entry]:
    """The systems whose recipe exists, in order."""
    return [line for line in CATALOGUE if line.built]
