"""One training step beside the prototype that re-encodes the text every turn.

    python benchmarks/update.py --turns 3 --repeats 2        # on a quiet machine, some 5 minutes
    python benchmarks/update.py --turns 6 --repeats 2        # some 12 minutes
    python benchmarks/update.py --quick                      # checks that it runs, no more

16 dialogues, exactly 32 new tokens a turn, full fine-tuning of SmolLM2-135M-Instruct: the same
weights, the same scripted user, the same number of sampled tokens on every side. The peer is
benchmarks/_prototype.py: in float32, as transformers loads the weights, and with bfloat16
generation and autocast. Every side is a process of its own, beside ours one at a time, and warms up
with a step of one turn. Sides take turns within a repeat and a ratio is taken within it. Peak
memory is that of the side's process over all of its steps.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable

from _prototype import Prototype, Script, sampled
from _timing import Spread
from _worker import Worker
from rich.console import Console
from rich.table import Table

from normkit.rl.models import DtypeName, load_policy
from normkit.rl.rollout import RolloutConfig
from normkit.rl.trainer import Trainer, TrainerConfig

Step = Callable[[int], tuple[float, float]]
"""Makes one step of dialogues of so many turns; returns the seconds of generation and update."""

SIDES: dict[str, tuple[str, DtypeName]] = {
    "normkit": ("ours", "auto"),
    "normkit-float32": ("ours", "float32"),
    "prototype-float32": ("peer", "float32"),
    "prototype-bfloat16": ("peer", "bfloat16"),
}
PHASES = ("generation", "update", "whole step")
WORK = 16, 32
"""Dialogues, and new tokens of a turn."""
QUICK = 4, 4

BARS = {(3, "whole step"): 2.5, (6, "generation"): 2.0, (6, "update"): 3.0}
"""How many times faster than the prototype a phase shall be, by turns."""


def ours(dtype: DtypeName, dialogues: int, new_tokens: int) -> Step:
    """A step of the trainer."""
    model, tokenizer = load_policy("smollm2")
    rollout = RolloutConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, dtype=dtype)
    config = TrainerConfig(
        steps=1, groups=4, group_size=dialogues // 4, autocast=dtype, learning_rate=1e-6
    )
    trainer = Trainer(model, tokenizer, Script(1), config, rollout)

    def step(turns: int) -> tuple[float, float]:
        trainer.environment = Script(turns)
        numbers = trainer.train_step()
        if (numbers["reply_tokens"], numbers["turns"]) != (new_tokens, turns):
            raise SystemExit("normkit's replies end early: the work is not equal")
        return numbers["rollout_seconds"], numbers["update_seconds"]

    return step


def peer(dtype: DtypeName, dialogues: int, new_tokens: int) -> Step:
    """A step of the prototype."""
    prototype = Prototype(dtype, new_tokens)

    def step(turns: int) -> tuple[float, float]:
        started = time.perf_counter()
        passes = prototype.generate(Script(turns), dialogues)
        generated = time.perf_counter()
        prototype.update(passes)
        finished = time.perf_counter()
        if sampled(passes) != dialogues * turns * new_tokens:
            raise SystemExit("the prototype's replies end early: the work is not equal")
        return generated - started, finished - generated

    return step


def serve(side: str, work: tuple[int, int]) -> None:
    """Answer every number of turns with a step's seconds, and the peak memory so far in GB."""
    kind, dtype = SIDES[side]
    step = (ours if kind == "ours" else peer)(dtype, *work)
    step(1)
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = step(int(line))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(*seconds, peak, flush=True)


def start(side: str, quick: bool) -> Worker:
    """A process that serves a side."""
    command = [sys.executable, __file__, "--serve", side, *(["--quick"] if quick else [])]
    return Worker(side, command)


def measure(base: Worker, other: Worker, turns: int, repeats: int) -> dict[str, list[list[float]]]:
    """Generation, update, whole step and peak memory of each side, repeat by repeat."""
    found: dict[str, list[list[float]]] = {base.name: [], other.name: []}
    order = [base, other]
    for _ in range(repeats):
        for worker in order:
            generation, update, peak = map(float, worker.ask(str(turns)).split())
            found[worker.name].append([generation, update, generation + update, peak])
        order.reverse()
    return found


def table(found: dict[str, list[list[float]]], turns: int, judged: bool) -> Table:
    """Seconds of both sides, how many times faster the first is, and its bars."""
    (base, first), (name, second) = found.items()
    shown = Table(title=f"{base} beside {name}, {turns} turns", title_justify="left")
    shown.add_column("phase")
    for column in (f"{base} s", f"{name} s", "times faster", "quartiles", "bar"):
        shown.add_column(column, justify="right")
    for phase, title in enumerate(PHASES):
        pairs = [(a[phase], b[phase]) for a, b in zip(first, second, strict=True)]
        ratio = Spread.of([b / a for a, b in pairs])
        bar = BARS.get((turns, title)) if judged else None
        verdict = "" if bar is None else f"{bar} {'PASS' if ratio.median >= bar else 'MISS'}"
        seconds = (f"{statistics.median(side):.2f}" for side in zip(*pairs, strict=True))
        spread = f"{ratio.low:.2f} .. {ratio.high:.2f}"
        shown.add_row(title, *seconds, f"{ratio.median:.2f}", spread, verdict)
    peaks = (f"{side[-1][-1]:.2f} GB" for side in (first, second))
    shown.add_row("peak memory", *peaks)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=SIDES,
        default=["normkit", "prototype-float32", "prototype-bfloat16"],
        help="the first is what the others are compared with",
    )
    parser.add_argument("--quick", action="store_true", help="4 dialogues, 2 turns, 4 tokens, once")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, QUICK if options.quick else WORK)
        return
    if options.quick:
        options.turns, options.repeats = [2], 1
    base, *others = options.sides
    for other in others:
        with start(base, options.quick) as first, start(other, options.quick) as second:
            for turns in options.turns:
                found = measure(first, second, turns, options.repeats)
                judged = base == "normkit" and other.startswith("prototype") and not options.quick
                Console(width=100).print(table(found, turns, judged))


if __name__ == "__main__":
    main()
