"""Advantage estimators: all of ours on flat turns, and GRPO beside verl's on its token layout.

    python benchmarks/advantages.py
    python benchmarks/advantages.py --verl-python VERL_ENV/bin/python

verl pins older versions of what normkit uses, so it lives in an environment of its own, which needs
what ``verl.trainer.ppo.core_algos`` imports: torch, transformers, ray, tensordict, hydra-core,
codetiming, pandas (``pip install --no-deps verl`` leaves out the rest). Its Python is given by
``--verl-python`` or by the variable NORMKIT_VERL_PYTHON.

Both sides run in turns within one run, with the same threads, allocator settings and batch:
``token_level_rewards`` and ``response_mask`` ``[B, L]`` and a NumPy array of B strings that say
which rows are a group. Our time includes everything from there to advantages ``[B, L]``: summing
tokens, numbering the strings, checking the rows, estimating, spreading over tokens. The time of
verl's functions is taken inside its process, without the exchange between the two.

Without verl the peer is a loop of our own that does what the loop of verl does, and is labelled so.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import torch
from _memory import keep_freed_memory
from _timing import Seconds, compare, print_table
from _worker import Worker
from torch import Tensor

from normkit.rl.advantage import ESTIMATORS, estimate

MOST_MS = 5.0
"""What an estimator may take on 4,096 dialogues of 8 turns."""

TIMES_FASTER = 20.0
"""How many times faster than verl's loop GRPO shall be."""

LEAST = 0.05
"""Seconds of one measurement beside verl: what one call of its loop lasts; shorter calls are
repeated in it, so that none pays for the caches that the other side's process has emptied."""


def verdict(reached: bool) -> str:
    """Of a bar."""
    return "PASS" if reached else "MISS"


def flat_turns(dialogues: int, turns: int, group_size: int) -> dict[str, Tensor]:
    """Rows of dialogues of equal length, in order."""
    n = dialogues * turns
    dialogue = torch.arange(dialogues).repeat_interleave(turns)
    return {
        "reward": torch.randn(n, generator=torch.Generator().manual_seed(0)),
        "dialogue": dialogue,
        "turn": torch.arange(turns).repeat(dialogues),
        "group": dialogue // group_size,
    }


def token_batch(rows: int, length: int, group_size: int) -> dict[str, np.ndarray]:
    """Verl's layout: a reward at the last token of each response, responses of random length."""
    generator = np.random.default_rng(0)
    last = generator.integers(length // 8, length, rows)
    rewards = np.zeros((rows, length), dtype=np.float32)
    rewards[np.arange(rows), last] = generator.normal(size=rows)
    mask = (np.arange(length) <= last[:, None]).astype(np.int64)
    names = [str(uuid.UUID(bytes=generator.bytes(16))) for _ in range(rows // group_size)]
    uid = generator.permutation(np.repeat(names, group_size))
    return {"rewards": rewards, "mask": mask, "uid": uid}


def ours(rewards: Tensor, mask: Tensor, uid: np.ndarray) -> Tensor:
    """GRPO from verl's layout to verl's layout."""
    numbers: defaultdict[str, int] = defaultdict(count().__next__)
    names = np.fromiter(map(numbers.__getitem__, uid), np.int64, len(uid))
    dialogue = torch.arange(len(uid))
    rows = (rewards.sum(-1), dialogue, torch.zeros_like(dialogue), torch.from_numpy(names))
    return mask.to(rewards.dtype).mul_(estimate("grpo", *rows).unsqueeze(-1))


def reference_loop(rewards: Tensor, mask: Tensor, uid: np.ndarray) -> Tensor:
    """The published loop in our words: lists per group, then statistics, then row by row."""
    scores = rewards.sum(-1)
    groups: dict[str, list[Tensor]] = defaultdict(list)
    for score, name in zip(scores, uid, strict=True):
        groups[name].append(score)
    center, spread = {}, {}
    for name, members in groups.items():
        stacked = torch.stack(members)
        center[name], spread[name] = stacked.mean(), stacked.std()
    for i, name in enumerate(uid):
        scores[i] = (scores[i] - center[name]) / (spread[name] + 1e-6)
    return scores.unsqueeze(-1) * mask


class Peer:
    """The estimators of verl, in the environment of their Python."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        self._worker, self._folder = worker, folder

    def time(self, name: str) -> Seconds:
        """Seconds of one call."""
        return Seconds(self._worker.ask(name))

    def result(self, name: str) -> Tensor:
        """What it computes."""
        path = self._folder / "advantage.npy"
        self._worker.ask(f"save {name} {path}")
        return torch.from_numpy(np.load(path))


@contextmanager
def verl(python: str, batch: dict[str, np.ndarray], threads: int) -> Iterator[Peer]:
    """Start verl on a batch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "batch.npz", **batch)
        script = Path(__file__).with_name("_verl_peer.py")
        command = [python, str(script), str(folder / "batch.npz"), str(threads)]
        with Worker("verl", command) as worker:
            yield Peer(worker, folder)


def compare_turns(repeats: int, threads: int) -> None:
    """Every estimator on 4,096 dialogues of 8 turns."""
    rows = flat_turns(4096, 8, 8)
    extra = {"ppo": {"value": torch.zeros_like(rows["reward"])}}

    def call(name: str) -> Callable[[], Tensor]:
        return lambda: estimate(name, **rows, **extra.get(name, {}))

    table = compare({name: call(name) for name in ESTIMATORS}, repeats)
    print_table(table, f"4096 dialogues of 8 turns, {threads} threads")
    slowest = max(1e3 * row.seconds.median for row in table)
    print(f"slowest: {slowest:.2f} ms, bar {MOST_MS} ms: {verdict(slowest < MOST_MS)}")


def compare_tokens(repeats: int, threads: int, python: str | None) -> None:
    """GRPO on 4096 responses of up to 512 tokens, beside verl."""
    batch = token_batch(4096, 512, 8)
    rewards, mask = torch.from_numpy(batch["rewards"]), torch.from_numpy(batch["mask"])
    arguments = (rewards, mask, batch["uid"].astype(object))
    calls: dict[str, Callable[[], object]] = {"normkit": lambda: ours(*arguments)}
    title = f"GRPO, 4096 x 512 tokens, {threads} threads"
    if python is None:
        name = "reference loop of ours (verl is not installed)"
        gaps = {name: reference_loop(*arguments) - ours(*arguments)}
        calls[name] = lambda: reference_loop(*arguments)
        rows = compare(calls, repeats, least=LEAST)
    else:
        with verl(python, batch, threads) as peer:
            names = ("grpo", "grpo_vectorized")
            gaps = {f"verl {n}": peer.result(n) - ours(*arguments) for n in names}
            calls.update({f"verl {n}": lambda n=n: peer.time(n) for n in names})
            rows = compare(calls, repeats, least=LEAST)
    print_table(rows, title)
    ratio = rows[1].ratio
    print(
        f"normkit is {ratio.median:.1f} times faster ({ratio.low:.1f} .. {ratio.high:.1f}) than "
        f"{rows[1].name}, bar {TIMES_FASTER}: {verdict(ratio.median >= TIMES_FASTER)}"
    )
    for name, gap in gaps.items():
        largest = float(gap.abs().max())
        print(f"largest difference to {name}: {largest:.1e}")
        if largest > 1e-5:
            sys.exit("the results differ by more than 1e-5: the times compare different things")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--verl-python", default=os.environ.get("NORMKIT_VERL_PYTHON"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    compare_turns(options.repeats, options.threads)
    compare_tokens(options.repeats, options.threads, options.verl_python)


if __name__ == "__main__":
    main()
