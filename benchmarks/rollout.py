"""Speed of rollouts beside the obvious way: generate on the whole re-encoded dialogue every turn.

    python benchmarks/rollout.py --turns 3 6 --dtypes bfloat16 float32 --repeats 3
    python benchmarks/rollout.py --quick                     # checks that it runs

Both play the same scripted dialogues with SmolLM2-135M-Instruct and sample exactly ``--new-tokens``
tokens a reply (the end token is banned in both), in the same dtype, so that the work is equal. The
peer (benchmarks/_prototype.py) keeps no log-probabilities; ours keeps them. For the whole training
step and memory see benchmarks/update.py.
"""

from __future__ import annotations

import argparse
from functools import partial

from _prototype import OPENINGS, Prototype, Script, sampled
from _timing import compare, print_table

from normkit.rl.models import load_policy
from normkit.rl.rollout import Rollout, RolloutConfig


def ours(rollout: Rollout, turns: int, count: int) -> None:
    """Play ``count`` dialogues with :class:`Rollout`."""
    groups = [i * len(OPENINGS) // count for i in range(count)]
    tasks = [(OPENINGS[group], group, i) for i, group in enumerate(groups)]
    dialogues = rollout.run(Script(turns), tasks)
    found = sum(len(turn.token_ids) for dialogue in dialogues for turn in dialogue.turns)
    check("normkit", found, count * turns * rollout.config.max_new_tokens)


def peer(prototype: Prototype, turns: int, count: int) -> None:
    """Play ``count`` dialogues with the prototype."""
    found = sampled(prototype.generate(Script(turns), count))
    check("the prototype", found, count * turns * prototype.settings.max_new_tokens)


def check(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise SystemExit(f"{name} sampled {found} tokens, expected {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dialogues", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="4 dialogues, 2 turns, 4 tokens, once")
    options = parser.parse_args()
    if options.quick:
        options.turns, options.dialogues, options.new_tokens, options.repeats = [2], 4, 4, 1
    for dtype in options.dtypes:
        length = options.new_tokens
        config = RolloutConfig(max_new_tokens=length, min_new_tokens=length, dtype=dtype)
        rollout = Rollout(*load_policy("smollm2"), config)
        prototype = Prototype(dtype, length)
        for turns in options.turns:
            rows = compare(
                {
                    "normkit": partial(ours, rollout, turns, options.dialogues),
                    "prototype": partial(peer, prototype, turns, options.dialogues),
                },
                repeats=options.repeats,
                warmup=1,
            )
            print_table(
                rows, f"{dtype}, {options.dialogues} dialogues, {turns} turns, {length} tokens"
            )


if __name__ == "__main__":
    main()
