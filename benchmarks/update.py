"""One training step beside the prototype that re-encodes the text every turn.

    python benchmarks/update.py --turns 3 6 --repeats 3      # on a quiet machine
    python benchmarks/update.py --quick                      # checks that it runs, no more

16 dialogues, exactly 32 new tokens a turn, full fine-tuning of SmolLM2-135M-Instruct: the same
weights, the same scripted user, the same number of sampled tokens on every side. The peer is
benchmarks/_prototype.py in float32, and with bfloat16 generation and autocast. Sides take turns
within a repeat and a ratio is taken within it. Peak memory is that of a process of its own per
side, which makes one step.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

from _prototype import Prototype, Script, sampled
from _timing import Row, Spread, print_table

from normkit.rl.models import DtypeName, load_policy
from normkit.rl.rollout import RolloutConfig
from normkit.rl.trainer import Trainer, TrainerConfig

Step = Callable[[], tuple[float, float]]
"""Makes one step; returns the seconds of generation and of update."""

SIDES: dict[str, tuple[str, DtypeName]] = {
    "normkit": ("ours", "auto"),
    "normkit float32": ("ours", "float32"),
    "prototype float32": ("peer", "float32"),
    "prototype bfloat16": ("peer", "bfloat16"),
}
PHASES = ("generation", "update", "whole step")


def ours(dtype: DtypeName, turns: int, dialogues: int, new_tokens: int) -> Step:
    """A step of the trainer."""
    model, tokenizer = load_policy("smollm2")
    rollout = RolloutConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, dtype=dtype)
    config = TrainerConfig(
        steps=1, groups=4, group_size=dialogues // 4, autocast=dtype, learning_rate=1e-6
    )
    trainer = Trainer(model, tokenizer, Script(turns), config, rollout)

    def step() -> tuple[float, float]:
        numbers = trainer.train_step()
        if (numbers["reply_tokens"], numbers["turns"]) != (new_tokens, turns):
            raise SystemExit("normkit's replies end early: the work is not equal")
        return numbers["rollout_seconds"], numbers["update_seconds"]

    return step


def peer(dtype: DtypeName, turns: int, dialogues: int, new_tokens: int) -> Step:
    """A step of the prototype."""
    prototype = Prototype(dtype, new_tokens)

    def step() -> tuple[float, float]:
        started = time.perf_counter()
        passes = prototype.generate(Script(turns), dialogues)
        generated = time.perf_counter()
        prototype.update(passes)
        if sampled(passes) != dialogues * turns * new_tokens:
            raise SystemExit("the prototype's replies end early: the work is not equal")
        return generated - started, time.perf_counter() - generated

    return step


def build(side: str, *work: int) -> Step:
    """Load one side for ``work``: turns, dialogues, new tokens."""
    kind, dtype = SIDES[side]
    return (ours if kind == "ours" else peer)(dtype, *work)


def peak_gigabytes(side: str, *work: int) -> float:
    """Peak resident memory of a process that makes one step."""
    command = [sys.executable, __file__, "--only", side, "--work", *map(str, work)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def table(phase: int, seconds: dict[str, list[tuple[float, float]]]) -> list[Row]:
    """Rows of one phase: the first side is what the others are compared with."""
    taken = {n: [(*t, sum(t))[phase] for t in times] for n, times in seconds.items()}
    base = taken[next(iter(taken))]
    return [
        Row(n, Spread.of(t), Spread.of([a / b for a, b in zip(t, base, strict=True)]))
        for n, t in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--dialogues", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--quick", action="store_true", help="4 dialogues, 2 turns, 4 tokens, once")
    parser.add_argument("--only", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        build(options.only, *options.work)()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return
    if options.quick:
        options.turns, options.dialogues, options.new_tokens, options.repeats = [2], 4, 4, 1
    for turns in options.turns:
        work = turns, options.dialogues, options.new_tokens
        steps = {side: build(side, *work) for side in options.sides}
        for step in steps.values():  # the first step of a process is not the usual one
            step()
        seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in steps}
        order = list(steps)
        for _ in range(options.repeats):
            for side in order:
                seconds[side].append(steps[side]())
            order.reverse()
        del steps
        what = f"{options.dialogues} dialogues, {turns} turns, {options.new_tokens} tokens"
        for phase, name in enumerate(PHASES):
            print_table(table(phase, seconds), f"{name}: {what}")
        for side in options.sides:
            print(f"peak memory of {side}: {peak_gigabytes(side, *work):.2f} GB", flush=True)


if __name__ == "__main__":
    main()
