"""Time calls in turns, so that a machine that drifts drifts for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def in_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Time each call ``repeats`` times, one after the other within a repeat, after one warm-up.

    Args:
        calls: what to time, by name.
        repeats: how often.

    Returns:
        Seconds of each call in each repeat; the order within a repeat alternates.
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(repeats):
        for name in order:
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
        order.reverse()
    return seconds
