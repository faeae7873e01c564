"""A small language model whose norm is exchanged: what the recipes of batch-wise norms share.

A causal transformer reads the bytes of :mod:`normkit.data.text`. Every norm is trained with the
same data in the same order, from the same weights, at the same learning rates; each is judged at
its own best rate. Batch-wise norms see the whole batch in training, later tokens too.

Shapes: B batch, N tokens, D dim; L norm layers; S steps.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.data.text import VOCABULARY, corpus, windows
from normkit.errors import InputError, check_least
from normkit.nn import LayerNorm, PowerNorm, UnifiedNorm
from normkit.nn.residual import Placement, Transformer
from normkit.recipes._trials import check_rates
from normkit.recipes.base import check_numbers

NORMS = ("layer", "batch", "power", "unified")
COLORS = dict(zip(NORMS, ("tab:grey", "tab:red", "tab:green", "tab:blue"), strict=True))


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm over all tokens of a batch: ``[B, N, D]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each channel over batch and tokens."""
        return super().forward(x.flatten(0, -2)).reshape(x.shape)


@dataclass(frozen=True)
class Training:
    """How each model is trained.

    Attributes:
        steps: of AdamW; the first tenth warms the rate and the statistics up.
        seeds: trainings per norm and rate.
        rates: peak learning rates; each norm is judged at its best.
        placement: where the norm sits.
        dim: width D.
        layers: blocks.
        heads: of attention.
        batch: stretches of text per step.
        length: tokens of each.
        every: steps between evaluations on held-out text.
    """

    steps: int = 300
    seeds: int = 3
    rates: tuple[float, ...] = (3e-3,)
    placement: Placement = "pre"
    dim: int = 64
    layers: int = 3
    heads: int = 4
    batch: int = 16
    length: int = 64
    every: int = 20

    def validate(self) -> None:
        """Check what the types cannot say.

        Raises:
            InputError: names the flag.
        """
        check_model(self)
        if self.steps < self.every:
            raise InputError(f"steps must be at least every = {self.every}, got {self.steps}")

    def trainings(self, norms: Sequence[str]) -> list[tuple[str, float, int]]:
        """Norm, rate and seed of every training."""
        seeds = range(self.seeds)
        return [(norm, rate, seed) for seed in seeds for rate in self.rates for norm in norms]

    @property
    def warmup(self) -> int:
        """Steps of the warm-up."""
        return self.steps // 10

    def norm(self, name: str) -> Callable[..., nn.Module]:
        """Factory of a norm."""
        made: dict[str, Callable[..., nn.Module]] = {
            "layer": LayerNorm,
            "batch": TokenBatchNorm,
            "power": partial(PowerNorm, warmup=self.warmup, groups=self.heads),
            "unified": partial(UnifiedNorm, warmup=self.warmup),
        }
        return made[name]


def check_model(config: Any) -> None:
    """Check the sizes and trainings of a recipe that trains :class:`LanguageModel`.

    Raises:
        InputError: names the flag.
    """
    counts = ("seeds", "steps", "layers", "dim", "heads", "batch", "length", "every")
    check_least(config, 1, *counts)
    if config.dim % config.heads:
        raise InputError(f"heads must divide dim {config.dim}, got {config.heads}")
    if config.length >= (held_out := len(corpus()[1])):
        raise InputError(f"length must be below {held_out}, the text's, got {config.length}")
    check_rates("rates", config.rates)
    check_numbers(config)


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        norm: name of the norm.
        rate: peak learning rate.
        seed: of weights and data.
        held_out: loss on held-out text by evaluation, nats a byte, in evaluation mode.
        by_batch: the last of them with the statistics of the batch, in training mode.
        train: training loss by step.
        grad_norm: norm of the gradient by step.
        distance: by step, how far a batch's statistics are from the running ones, relative to
            these, mean over the norm layers; empty for LayerNorm.
        seconds: of the training.
    """

    norm: str
    rate: float
    seed: int
    held_out: list[float]
    by_batch: float
    train: list[float]
    grad_norm: list[float]
    distance: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Final held-out loss; a training that diverged counts as guessing among all bytes."""
        last = self.held_out[-1]
        return min(last, math.log(VOCABULARY)) if math.isfinite(last) else math.log(VOCABULARY)

    @property
    def gap(self) -> float:
        """What running statistics cost beside the batch's own, in nats a byte."""
        return self.loss - self.by_batch if math.isfinite(self.by_batch) else math.nan

    @property
    def spikes(self) -> float:
        """Share of steps, after the first tenth, at which the loss jumps up by over half a nat."""
        tail = self.train[len(self.train) // 10 :]
        jumps = [b - a > 0.5 or not math.isfinite(b) for a, b in pairwise(tail)]
        return sum(jumps) / max(len(jumps), 1)


class LanguageModel(nn.Module):
    """Bytes to logits of the next byte.

    Args:
        setting: sizes and placement.
        norm: makes the norms.
    """

    def __init__(self, setting: Training, norm: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, setting.dim)
        self.places = nn.Embedding(setting.length, setting.dim)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.1)
        self.body = Transformer(
            setting.dim, setting.heads, setting.layers, setting.placement, norm, causal=True
        )
        self.head = nn.Linear(setting.dim, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, N, 256]`` of tokens ``[B, N]``."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.body(x))  # type: ignore[no-any-return]


def train(setting: Training, norm: str, rate: float, seed: int) -> Trial:
    """Train one model.

    Args:
        setting: how.
        norm: name of the norm.
        rate: peak learning rate.
        seed: of weights and data.

    Returns:
        The curves.
    """
    started = time.perf_counter()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    text, rest = corpus()
    model = LanguageModel(setting, setting.norm(norm))
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_share, setting))
    trial = Trial(norm, rate, seed, [], math.nan, [], [])
    for step in range(1, setting.steps + 1):
        before = _running(model)
        loss = _loss(model, windows(text, setting.batch, setting.length, generator))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        length = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        trial.train.append(float(loss.detach()))
        trial.grad_norm.append(float(length))
        if before:
            trial.distance.append(_distance(before, _running(model), norm, step, setting.warmup))
        if step % setting.every == 0:
            trial.held_out.append(_held_out(setting, model, rest))
    return Trial(
        **{
            **trial.__dict__,
            "by_batch": _held_out(setting, copy.deepcopy(model), rest, by_batch=True),
            "seconds": time.perf_counter() - started,
        }
    )


def best(found: Sequence[Trial], norm: str) -> list[Trial]:
    """The trials of a norm at the rate with the lowest mean loss, by seed."""
    by_rate: dict[float, list[Trial]] = {}
    for t in found:
        if t.norm == norm:
            by_rate.setdefault(t.rate, []).append(t)
    chosen = min(by_rate.values(), key=lambda ts: sum(t.loss for t in ts) / len(ts))
    return sorted(chosen, key=lambda t: t.seed)


def _share(setting: Training, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < setting.warmup:
        return (step + 1) / setting.warmup
    done = (step - setting.warmup) / max(setting.steps - setting.warmup, 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def _loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = pair
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def _held_out(setting: Training, model: nn.Module, text: Tensor, by_batch: bool = False) -> float:
    """Mean loss on the same 8 batches of held-out text; a model by batch moves: give a copy."""
    generator = torch.Generator().manual_seed(1234)
    model.train(by_batch)
    pairs = [windows(text, setting.batch, setting.length, generator) for _ in range(8)]
    loss = sum(float(_loss(model, pair)) for pair in pairs) / len(pairs)
    model.train()
    return loss


def _running(model: nn.Module) -> list[Mapping[str, Tensor]]:
    """Copies of the running statistics of every norm layer that keeps some."""
    return [
        {name: t.detach().clone() for name, t in layer.named_buffers(recurse=False)}
        for layer in model.modules()
        if "running_var" in dict(layer.named_buffers(recurse=False))
    ]


def _distance(
    before: Sequence[Mapping[str, Tensor]],
    after: Sequence[Mapping[str, Tensor]],
    norm: str,
    step: int,
    warmup: int,
) -> float:
    """Mean over layers of ``|batch - running| / |running|`` of the statistic that is smoothed.

    A running value moves by a known share of its distance to the batch's, which gives the distance.
    The shares are 0.1, and more in PowerNorm's warm-up; of UnifiedNorm the window is read.
    """
    share = 0.1
    if norm == "power" and step < warmup:
        share = 1 - 0.9 * (step - 1) / step
    found = []
    for old, new in zip(before, after, strict=True):
        running = old["running_var"]
        if "window" in new:
            moved = new["window"][step % len(new["window"])] - running
        else:
            moved = (new["running_var"] - running) / share
        found.append(float(moved.norm() / running.norm()))
    return sum(found) / len(found)
