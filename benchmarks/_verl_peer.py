"""Run verl's GRPO estimators in a Python of their own, on demand (see ``advantages.py``).

Reads the name of an estimator from a line of its standard input, runs it once on the batch in the
file given, and answers with the seconds that it took; ``save NAME PATH`` keeps its result instead.
Needs torch, numpy and verl, nothing of normkit: verl pins older versions of what normkit uses.

    python benchmarks/_verl_peer.py BATCH.npz THREADS
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from _memory import keep_freed_memory


def main(batch: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    keep_freed_memory()
    answers, sys.stdout = sys.stdout, sys.stderr  # verl's own messages are no answers
    from verl.trainer.ppo import core_algos

    functions = {
        "grpo": core_algos.compute_grpo_outcome_advantage,
        "grpo_vectorized": core_algos.compute_grpo_vectorized_outcome_advantage,
    }
    with np.load(batch) as data:
        rewards, mask = torch.from_numpy(data["rewards"]), torch.from_numpy(data["mask"])
        uid = data["uid"].astype(object)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        *save, name = line.split()[:2] if line.startswith("save") else line.split()
        start = time.perf_counter()
        advantage, _ = functions[name](rewards, mask, uid)
        taken = time.perf_counter() - start
        if save:
            np.save(line.split()[2], advantage.numpy())
        print(taken, file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
