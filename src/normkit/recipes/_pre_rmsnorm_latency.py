"""Latency of a model and its recentered forms: prompt, one more token, images; and the plot."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from normkit.report.plots import figure
from normkit.surgery.reads import run
from normkit.surgery.timing import in_turns


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def whole_pass(model: Any, inputs: Mapping[str, Any]) -> Callable[[], object]:
    """Return a call that runs the model on a whole prompt or on images."""
    return lambda: run(model, inputs)


def one_token(model: Any, inputs: Mapping[str, Any]) -> Callable[[], object]:
    """Return a call that decodes one token after the prompt, whose keys and values are kept."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    ids = inputs["input_ids"]
    with torch.no_grad():
        past = getattr(model(input_ids=ids, use_cache=True), name)

    def decode() -> None:
        with torch.no_grad():
            model(input_ids=ids[:, -1:], use_cache=True, **{name: past})
        past.crop(-1)

    return decode


def training_step(model: Any, inputs: Mapping[str, Any]) -> Callable[[], object]:
    """Return a call that runs forward and backward of the summed outputs."""

    def step() -> None:
        model.zero_grad()
        model(**inputs).logits.float().square().mean().backward()

    return step


def latency(
    models: Mapping[str, Any],
    make: Callable[[Any, Mapping[str, Any]], Callable[[], object]],
    inputs: Mapping[str, Any],
    repeats: int,
) -> dict[str, dict[str, Any]]:
    """Time the same call on each model, in turns; ratios are to the first model's.

    Returns:
        For each model the median of seconds, and the ratios of all repeats with their quartiles.
    """
    calls = {name: make(model, inputs) for name, model in models.items()}
    seconds = in_turns(calls, repeats)
    base = seconds[next(iter(models))]
    found = {}
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, base, strict=True)]
        low, median, high = quartiles(ratios)
        found[name] = {
            "seconds": statistics.median(taken),
            "ratio": median,
            "low": low,
            "high": high,
            "ratios": ratios,
        }
    return found


def draw(
    timings: Mapping[str, Mapping[str, Any]],
    means: Mapping[str, Mapping[str, Mapping[str, float]]],
    path: Path,
) -> None:
    """Plot ratios with quartiles, and the mean of the stream by depth.

    Args:
        timings: by what was timed, the result of :func:`latency`.
        means: by model, and by form of it, what each norm reads: mean over root mean square.
        path: the PNG to write.
    """
    with figure(path, columns=2, width=6.5) as (bars, depth):
        forms = [name for name in next(iter(timings.values())) if name != "original"]
        for i, form in enumerate(forms):
            places = [j + 0.38 * (i - (len(forms) - 1) / 2) for j in range(len(timings))]
            rows = [timing[form] for timing in timings.values()]
            spread = [[r["ratio"] - r["low"] for r in rows], [r["high"] - r["ratio"] for r in rows]]
            bars.bar(places, [r["ratio"] for r in rows], 0.36, yerr=spread, label=form, alpha=0.85)
        bars.axhline(1.0, color="grey", linewidth=1)
        bars.set_xticks(range(len(timings)), timings, rotation=20, ha="right", fontsize=8)
        bars.set(title="time over that of the original", ylabel="ratio, with quartiles")
        bars.legend(fontsize=8)
        for model, sides in means.items():
            for form, values in sides.items():
                shown = [max(v, 1e-18) for v in values.values()]
                depth.semilogy(range(len(shown)), shown, label=f"{model}, {form}", marker=".")
        depth.set(
            title="mean of what each norm reads", xlabel="norm, by depth", ylabel="|mean|/rms"
        )
        depth.legend(fontsize=8)
