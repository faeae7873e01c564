"""LN-LSTM beside torch's LSTM on digits that are read row by row (part of the recipe layernorm).

The 8 x 8 digits of scikit-learn are sequences of eight rows of eight pixels; the last state tells
the digit. Both nets have the same size, data, order of batches, optimizer and number of steps, and
each is judged at the learning rate of the same grid that serves it best. Afterwards each net reads
digit after digit without its state being set back, which it was never trained for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.errors import InputError, MissingDependencyError, check_least
from normkit.nn import LNLSTM
from normkit.recipes._trials import check_rates
from normkit.recipes.base import Claim, Finding, check_numbers, verdict_of
from normkit.statistics import Interval, bootstrap_interval

NETS = ("LSTM", "LN-LSTM")
HELD_OUT = 397  # of 1797
EVERY = 5  # steps between evaluations


@dataclass(frozen=True)
class Config:
    """Flags of ``normkit run layernorm``.

    Attributes:
        steps: optimizer steps of each training.
        seeds: trainings of each net at each learning rate.
        hidden: size of the state.
        batch: digits per step.
        rates: learning rates that both nets are trained with.
        loss: held-out cross-entropy (nats) that is to be reached.
        chain: digits that are read without setting the state back.
        seed: of the first training.
    """

    steps: int = 150
    seeds: int = 5
    hidden: int = 64
    batch: int = 64
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    loss: float = 0.5
    chain: int = 32
    seed: int = 0

    def validate(self) -> None:
        """Check what the types cannot say.

        Raises:
            InputError: names the flag.
        """
        check_least(self, 1, "seeds", "hidden", "batch")
        check_least(self, 2, "chain")
        check_least(self, EVERY, "steps")
        check_rates("rates", self.rates)
        if not self.loss > 0:
            raise InputError(f"loss must be positive, got {self.loss}")
        check_numbers(self)

    def trainings(self) -> list[tuple[str, float, int]]:
        """Net, rate and seed of every training."""
        seeds = range(self.seed, self.seed + self.seeds)
        return [(net, rate, seed) for seed in seeds for rate in self.rates for net in NETS]


@dataclass(frozen=True)
class Trial:
    """One training and what came of it.

    Attributes:
        net: "LSTM" or "LN-LSTM".
        rate: learning rate.
        seed: of weights and batches.
        losses: held-out cross-entropy (nats) after every :data:`EVERY` steps.
        reached: steps until the loss was first reached; the budget where it never was.
        accuracy: held-out accuracy at the end.
        chain_accuracy: accuracy on the k-th digit of a chain.
        chain_cell: root mean square of the cell after the k-th digit of a chain.
    """

    net: str
    rate: float
    seed: int
    losses: list[float]
    reached: int
    accuracy: float
    chain_accuracy: list[float]
    chain_cell: list[float]


class Reader(nn.Module):
    """A recurrent net whose last output is read by a linear layer.

    Args:
        net: "LSTM" or "LN-LSTM".
        hidden: size of the state.
    """

    def __init__(self, net: str, hidden: int) -> None:
        super().__init__()
        kind: Any = LNLSTM if net == "LN-LSTM" else nn.LSTM
        self.reader = kind(8, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits ``[B, 10]`` after the rows ``[B, 8, 8]``, and the state."""
        out, state = self.reader(x, state)
        return self.head(out[:, -1]), state


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images ``[1797, 8, 8]`` in [0, 1] and labels, in a fixed random order.

    Raises:
        MissingDependencyError: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingDependencyError("scikit-learn", "data") from None
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(data.images, dtype=torch.float32) / 16
    return images[order], torch.as_tensor(data.target)[order]


def train(config: Config, net: str, rate: float, seed: int) -> Trial:
    """Train one net, then let it read chains of digits."""
    images, labels = digits()
    split = len(labels) - HELD_OUT
    torch.manual_seed(seed)
    model = Reader(net, config.hidden)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    batches = torch.Generator().manual_seed(seed)
    losses = []
    accuracy = 0.0
    for step in range(1, config.steps + 1):
        rows = torch.randint(split, (config.batch,), generator=batches)
        loss = F.cross_entropy(model(images[rows])[0], labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % EVERY == 0:
            with torch.no_grad():
                logits = model(images[split:])[0]
            losses.append(float(F.cross_entropy(logits, labels[split:])))
            accuracy = float((logits.argmax(-1) == labels[split:]).float().mean())
    met = (EVERY * (i + 1) for i, value in enumerate(losses) if value <= config.loss)
    chain_accuracy, chain_cell = read_chain(model, config.chain, seed)
    return Trial(
        net, rate, seed, losses, next(met, config.steps), accuracy, chain_accuracy, chain_cell
    )


@torch.no_grad()
def read_chain(model: Reader, length: int, seed: int) -> tuple[list[float], list[float]]:
    """Accuracy and size of the cell after each of ``length`` held-out digits, state carried on."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    state, accuracy, cell = None, [], []
    for _ in range(length):
        rows = len(labels) - HELD_OUT + torch.randperm(HELD_OUT, generator=generator)
        logits, state = model(images[rows], state)
        accuracy.append(float((logits.argmax(-1) == labels[rows]).float().mean()))
        cell.append(float(state[1].square().mean().sqrt()))
    return accuracy, cell


class Comparison:
    """Trials of both nets, seed by seed, each net at its own best rate.

    Args:
        trials: every training of a configuration.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.trials = trials
        self.best = {net: self._best(net) for net in NETS}

    def _best(self, net: str) -> float:
        rates = sorted({t.rate for t in self.trials if t.net == net})
        return min(rates, key=lambda rate: sum(t.reached for t in self.of(net, rate)))

    def of(self, net: str, rate: float | None = None) -> list[Trial]:
        """The trials of a net at one rate (its best), by seed."""
        rate = self.best[net] if rate is None else rate
        chosen = [t for t in self.trials if t.net == net and t.rate == rate]
        return sorted(chosen, key=lambda t: t.seed)

    def difference(self, value: Callable[[Trial], float], rate: float | None = None) -> Interval:
        """LSTM minus LN-LSTM, paired by seed; at each one's best rate, or both at one rate."""
        pairs = zip(self.of("LSTM", rate), self.of("LN-LSTM", rate), strict=True)
        return bootstrap_interval([value(a) - value(b) for a, b in pairs])

    def finding(self, value: Callable[[Trial], float], unit: str) -> Finding:
        """A verdict on "LN-LSTM's value is the smaller one"."""
        gain = self.difference(value)
        details: dict[str, Any] = {
            f"{net} at {rate:g}{' (its best)' if rate == self.best[net] else ''}": [
                value(t) for t in self.of(net, rate)
            ]
            for net in NETS
            for rate in sorted({t.rate for t in self.trials})
        }
        for rate in sorted({t.rate for t in self.trials}):
            details[f"difference, both at {rate:g}"] = str(self.difference(value, rate))
        means = [sum(value(t) for t in self.of(net)) / len(self.of(net)) for net in NETS]
        text = f"LSTM {means[0]:.3g}, LN-LSTM {means[1]:.3g} {unit}; difference {gain}"
        return Finding(verdict_of(gain), text, details)


def reached(trial: Trial) -> float:
    """Steps until the loss was reached."""
    return float(trial.reached)


def forgotten(trial: Trial) -> float:
    """Accuracy lost from the first digit of a chain to the mean of its second half."""
    late = trial.chain_accuracy[len(trial.chain_accuracy) // 2 :]
    return trial.chain_accuracy[0] - sum(late) / len(late)


def growth(trial: Trial) -> float:
    """How many times the cell is larger at the end of a chain than after its first digit."""
    return trial.chain_cell[-1] / trial.chain_cell[0]


@cache
def _measured() -> Comparison:
    config = Config()
    return Comparison([train(config, *training) for training in config.trainings()])


CLAIMS: list[Claim] = [
    Claim(
        "steps-to-a-loss",
        "LN-LSTM reaches a held-out loss of 0.5 nats in fewer steps than LSTM, each at the best of "
        "the same learning rates",
        "faster convergence on all six tasks of the paper (its figures 1 to 6)",
        "measured",
        lambda: _measured().finding(reached, "steps"),
    ),
    Claim(
        "long-sequences-accuracy",
        "reading on without a reset, LN-LSTM loses less accuracy than LSTM",
        "hidden-to-hidden dynamics are much more stable (section 3.1)",
        "measured",
        lambda: _measured().finding(forgotten, "of accuracy lost"),
    ),
    Claim(
        "long-sequences-state",
        "reading on without a reset, the cell of LN-LSTM grows less than that of LSTM",
        "hidden-to-hidden dynamics are much more stable (section 3.1)",
        "measured",
        lambda: _measured().finding(growth, "times the cell after the first digit"),
    ),
]
