"""Time calls beside each other: interleaved repeats, median ratio, interquartile range.

Machines drift, so what is compared is measured in turns: every repeat times each call once, in an
order that reverses from repeat to repeat, and the ratio is taken within the repeat.

    rows = compare({"ours": ours, "peer": peer}, repeats=30)
    print_table(rows, title="4096 x 512")
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table


class Seconds(float):
    """What a call returns that ran and timed itself elsewhere, in another process for example."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        if len(sample) == 1:
            return cls(sample[0], sample[0], sample[0])
        low, median, high = statistics.quantiles(sample, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Row:
    """Timing of one call.

    Attributes:
        name: what was called.
        seconds: of one call.
        ratio: its time over that of the first call in the same repeat; above 1 is slower.
    """

    name: str
    seconds: Spread
    ratio: Spread


def compare(
    calls: Mapping[str, Callable[[], object]],
    repeats: int = 30,
    warmup: int = 3,
    least: float = 0.002,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Time calls in turns.

    Args:
        calls: what to time, by name; the first is what the others are compared with.
        repeats: number of times that each is measured.
        warmup: calls of each before measuring (compilation, caches, allocator).
        least: seconds that a measurement lasts at least; short calls are repeated within it.
        clock: what tells the time; ``time.process_time`` counts this process's alone, which on one
            thread is fair on a machine that is shared.

    Returns:
        One row per call, in the order given.
    """
    number = {name: _calls_within(call, warmup, least, clock) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    gc.freeze()  # so that what is collected between repeats is theirs alone
    try:
        for _ in range(repeats):
            for name in order:
                seconds[name].append(_measure(calls[name], number[name], clock))
            order.reverse()
            gc.collect()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    base = seconds[next(iter(calls))]
    return [
        Row(name, Spread.of(taken), Spread.of([a / b for a, b in zip(taken, base, strict=True)]))
        for name, taken in seconds.items()
    ]


def print_table(rows: Sequence[Row], title: str = "") -> None:
    """Print time and ratio of each call, with interquartile ranges."""
    table = Table(title=title or None, title_justify="left")
    table.add_column("call")
    table.add_column("ms per call", justify="right")
    table.add_column("quartiles", justify="right")
    table.add_column(f"times {rows[0].name}", justify="right")
    table.add_column("quartiles", justify="right")
    for row in rows:
        seconds, ratio = row.seconds, row.ratio
        table.add_row(
            row.name,
            f"{1e3 * seconds.median:.3f}",
            f"{1e3 * seconds.low:.3f} .. {1e3 * seconds.high:.3f}",
            f"{ratio.median:.2f}",
            f"{ratio.low:.2f} .. {ratio.high:.2f}",
        )
    Console(width=100).print(table)


def _calls_within(
    call: Callable[[], object], warmup: int, least: float, clock: Callable[[], float]
) -> int:
    for _ in range(warmup):
        call()
    taken = _measure(call, 1, clock)
    return max(1, math.ceil(least / max(taken, 1e-9)))


def _measure(call: Callable[[], object], number: int, clock: Callable[[], float]) -> float:
    """Seconds of one call: the mean over ``number`` of them, or of what they timed themselves."""
    own = []
    _finish()
    start = clock()
    for _ in range(number):
        result = call()
        if isinstance(result, Seconds):
            own.append(result)
        del result  # its memory is free for the next call, as in a loop that uses it up
    _finish()
    taken = (clock() - start) / number
    return statistics.fmean(own) if own else taken


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
