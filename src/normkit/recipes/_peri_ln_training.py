"""Deep language models that differ in the placement of their norms (part of the recipe peri-ln).

A causal transformer reads the bytes of :mod:`normkit.data.text`. All placements have the same
width, depth, data in the same order, optimizer and number of steps, and are trained at each of the
same learning rates; each is judged at the rate that serves it best, and all at the highest one.

Shapes: L blocks, R records (before training and every few steps), S steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.data.text import VOCABULARY, corpus, windows
from normkit.diagnostics import Monitor, gradient_norms, spikes
from normkit.errors import InputError
from normkit.nn.residual import PLACEMENTS, Placement
from normkit.recipes._lm import LanguageModel, Training, check_model
from normkit.recipes.base import Finding, verdict_of
from normkit.statistics import Interval, bootstrap_interval


@dataclass(frozen=True)
class Config:
    """Flags of ``normkit run peri-ln``.

    Attributes:
        placements: which to train.
        rates: peak learning rates that all are trained with.
        seeds: trainings of each placement at each rate.
        steps: of AdamW; the first tenth warms the rate up.
        layers: blocks L.
        dim: width of the stream.
        heads: of attention.
        batch: stretches of text per step.
        length: bytes of each.
        every: steps between records of activations and gradients.
        seed: of the first training.
        embedding_norm: whether embeddings are normalized, in every placement; None: peri's are.
    """

    placements: tuple[Placement, ...] = PLACEMENTS
    rates: tuple[float, ...] = (0.004, 0.016)
    seeds: int = 1
    steps: int = 200
    layers: int = 12
    dim: int = 48
    heads: int = 4
    batch: int = 8
    length: int = 64
    every: int = 20
    seed: int = 0
    embedding_norm: bool | None = None

    def validate(self) -> None:
        """Check what the types cannot say.

        Raises:
            InputError: names the flag.
        """
        check_model(self)
        if not self.placements or len(set(self.placements)) < len(self.placements):
            raise InputError(f"placements must be one or more, each once, got {self.placements}")

    def trainings(self) -> list[tuple[Placement, float, int]]:
        """Placement, rate and seed of every training."""
        seeds = range(self.seed, self.seed + self.seeds)
        return [(p, rate, seed) for seed in seeds for rate in self.rates for p in self.placements]

    def model(self, placement: Placement) -> LanguageModel:
        """A new model."""
        sizes = Training(
            placement=placement,
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            length=self.length,
        )
        model = LanguageModel(sizes, nn.LayerNorm)
        if self.embedding_norm is not None:
            model.body.embedding_norm = nn.LayerNorm(self.dim) if self.embedding_norm else None
        return model

    def share(self, step: int) -> float:
        """Share of the peak rate at a step: linear warm-up, then a cosine to a tenth."""
        warmup = max(self.steps // 10, 1)
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(self.steps - warmup, 1))


@dataclass(frozen=True)
class Trial:
    """One training and what was recorded of it.

    Attributes:
        placement: of the norms.
        rate: peak learning rate.
        seed: of weights and data.
        losses: training loss by step ``[S]``, in nats a byte.
        grad_norms: norm of the whole gradient by step ``[S]``, before it is clipped to 1.
        held_out: final loss on held-out text, in nats a byte.
        variance: of the stream after each block, by record ``[R][L]``.
        ratio: largest over median absolute value after each block ``[R][L]``.
        gradients: norm of each block's gradient ``[R][L]``.
    """

    placement: str
    rate: float
    seed: int
    losses: list[float]
    grad_norms: list[float]
    held_out: float
    variance: list[list[float]]
    ratio: list[list[float]]
    gradients: list[list[float]]

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Trial:
        """A trial from its row of ``trials.jsonl``, where what was not finite is null."""
        return cls(**{name: _revived(value) for name, value in row.items()})

    @property
    def name(self) -> tuple[str, float, int]:
        """Placement, rate and seed."""
        return self.placement, self.rate, self.seed


def train(config: Config, placement: Placement, rate: float, seed: int) -> Trial:
    """Train one model, and record the stream and the gradients of its blocks on the way."""
    torch.manual_seed(seed)
    text, rest = corpus()
    order = torch.Generator().manual_seed(seed)
    model = config.model(placement)
    blocks = [f"body.blocks.{i}" for i in range(config.layers)]
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, config.share)
    probe = windows(rest, 32, config.length, torch.Generator().manual_seed(1234))
    trial = Trial(placement, rate, seed, [], [], math.nan, [], [], [])
    for step in range(config.steps + 1):
        loss = _loss(model, windows(text, config.batch, config.length, order))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if step % config.every == 0 or step == config.steps:
            _record(trial, model, blocks, probe[0][: config.batch])
        if step == config.steps:  # its gradient was recorded; nothing is learnt from it
            break
        trial.losses.append(float(loss.detach()))
        trial.grad_norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        final = float(_loss(model, probe))
    return Trial(**{**trial.__dict__, "held_out": final})


def _record(trial: Trial, model: nn.Module, blocks: Sequence[str], tokens: Tensor) -> None:
    with torch.no_grad(), Monitor(model, blocks) as monitor:
        model(tokens)
    trial.variance.append([monitor[block].variance for block in blocks])
    trial.ratio.append([monitor[block].ratio for block in blocks])
    trial.gradients.append(list(gradient_norms(model, blocks).values()))


def _loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(pair[0]).flatten(0, 1), pair[1].flatten())


def _revived(value: Any) -> Any:
    if isinstance(value, list):
        return [_revived(item) for item in value]
    return math.nan if value is None else value


MEASURED = Config(
    placements=("post", "pre", "peri"), rates=(0.001, 0.004, 0.016), seeds=3, steps=100
)
"""What the measured claims are measured on."""


@cache
def guess() -> float:
    """Loss of guessing held-out bytes by how often the training text has them, in nats."""
    text, rest = corpus()
    counts = torch.bincount(text, minlength=VOCABULARY) + 1.0
    return float(-(counts / counts.sum()).log()[rest].mean())


# ---------------------------------------------------------------------- what is compared


def loss(trial: Trial) -> float:
    """Final held-out loss; one that is not finite counts as that of even guessing."""
    even = math.log(VOCABULARY)
    return min(trial.held_out, even) if math.isfinite(trial.held_out) else even


def diverged(trial: Trial) -> float:
    """1 where the model ends no better than guessing bytes by their frequency, else 0."""
    return float(loss(trial) >= guess())


def leaps(trial: Trial) -> float:
    """Steps at which the gradient is over twice, or the loss over 1.2 times, its recent median."""
    return float(len({*spikes(trial.grad_norms, 2.0), *spikes(trial.losses, 1.2)}))


def growth(trial: Trial) -> float:
    """Powers of ten by which training raises the stream's variance after the last block."""
    return _log10(trial.variance[-1][-1]) - _log10(trial.variance[0][-1])


def massive(trial: Trial) -> float:
    """Logarithm (base 10) of the largest ratio of any block after training."""
    return _log10(max(trial.ratio[-1]))


def unevenness(trial: Trial) -> float:
    """Powers of ten between the largest and the smallest gradient of the blocks, at the end."""
    return _log10(max(trial.gradients[-1])) - _log10(min(trial.gradients[-1]))


def _log10(value: float) -> float:
    """Logarithm, of values that are held within 1e-12 and 1e12; of none, the largest."""
    return math.log10(min(max(value, 1e-12), 1e12)) if not math.isnan(value) else 12.0


class Comparison:
    """Trials of all placements, seed by seed, each at its own best rate.

    Args:
        trials: every training of a configuration.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.trials = trials
        self.placements = tuple(dict.fromkeys(t.placement for t in trials))
        self.rates = tuple(sorted({t.rate for t in trials}))
        self.best = {
            p: min(self.rates, key=lambda rate: sum(map(loss, self.of(p, rate))))
            for p in self.placements
        }

    def of(self, placement: str, rate: float | None = None) -> list[Trial]:
        """The trials of a placement at one rate (its best), by seed."""
        rate = self.best[placement] if rate is None else rate
        chosen = [t for t in self.trials if t.placement == placement and t.rate == rate]
        return sorted(chosen, key=lambda t: t.seed)

    def difference(
        self, value: Callable[[Trial], float], other: str, rate: float | None = None
    ) -> Interval:
        """``other`` minus peri, paired by seed; each at its best rate, or both at one rate."""
        pairs = zip(self.of(other, rate), self.of("peri", rate), strict=True)
        return bootstrap_interval([value(a) - value(b) for a, b in pairs])

    def finding(
        self,
        value: Callable[[Trial], float],
        other: str,
        unit: str,
        rate: float | None = None,
    ) -> Finding:
        """A verdict on "peri's value is the smaller one", with every rate in the details."""
        gain = self.difference(value, other, rate)
        details: dict[str, Any] = {"best rates": self.best}
        for each in self.rates:
            details[f"at {each:g}"] = {
                **{p: [value(t) for t in self.of(p, each)] for p in self.placements},
                f"{other} minus peri": str(self.difference(value, other, each)),
            }
        means = [self.mean(value, p, rate) for p in (other, "peri")]
        where = f"at {rate:g}" if rate else "each at its best rate"
        text = f"{other} {means[0]:.3g}, peri {means[1]:.3g} {unit} {where}; difference {gain}"
        return Finding(verdict_of(gain), text, details)

    def mean(
        self, value: Callable[[Trial], float], placement: str, rate: float | None = None
    ) -> float:
        """Mean of a value over the seeds."""
        found = [value(t) for t in self.of(placement, rate)]
        return sum(found) / len(found)
