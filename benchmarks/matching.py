"""Matching and dual-level advantages at 4,096 trajectories, beside loops of Python.

    python benchmarks/matching.py
    python benchmarks/matching.py --quick

The peers are loops of our own that do what the authors' loops do (their training code cannot be
imported without verl and its engines): one trajectory after the other, greedy over sorted pairs,
transport by scaling in NumPy to the same accuracy or 1,000 turns (POT's default), advantages from
lists per group and turn. Scores are those of traces with six to twelve calls for three to six
references; ties are frequent, as they are among tool calls.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from _memory import keep_freed_memory
from _timing import compare, print_table
from torch import Tensor

from normkit.functional.matching import match
from normkit.rl.advantage import estimate
from normkit.rl.tool_calls import Parsed, ToolCall
from normkit.rl.tool_rewards import MatchOptions, Trace, turn_rewards
from normkit.rl.tool_similarity import tool_similarity

GREEDY = MatchOptions("greedy")


def make_scores(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``[size, 12, 6]``, half of them 0, and the masks of calls and references."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([0, 0, 0, 0.4, 0.6, 1], dtype=torch.float64)
    score = values[torch.randint(6, (size, 12, 6), generator=generator)]
    calls = torch.randint(6, 13, (size, 1), generator=generator)
    references = torch.randint(3, 7, (size, 1), generator=generator)
    return score, torch.arange(12) < calls, torch.arange(6) < references


def greedy_loop(matrices: list[list[list[float]]]) -> list[list[float]]:
    out = []
    for score in matrices:
        pairs = [(s, i, j) for i, row in enumerate(score) for j, s in enumerate(row)]
        pairs.sort(key=lambda pair: pair[0], reverse=True)
        paid, rows, columns = [0.0] * len(score), set(), set()
        for s, i, j in pairs:
            if s > 0 and i not in rows and j not in columns:
                rows.add(i)
                columns.add(j)
                paid[i] = s
        out.append(paid)
    return out


def transport_loop(matrices: list[np.ndarray], reg: float = 0.1) -> list[np.ndarray]:
    out = []
    for score in matrices:
        kernel = np.exp(score / reg)
        m, n = kernel.shape
        u = np.ones(m)
        for turn in range(1000):
            v = 1 / n / (kernel.T @ u)
            u = 1 / m / (kernel @ v)
            if turn % 10 == 0 and np.abs((kernel.T @ u) * v - 1 / n).max() < 1e-9 / n:
                break
        out.append((u[:, None] * kernel * v * score).sum(1))
    return out


def advantage_loop(
    rewards: list[list[float]], groups: list[int], gamma: float = 0.9
) -> list[list[float]]:
    """Dual-level advantages from lists per group and per turn of a group."""
    returns, sums = [], defaultdict(list)
    cells = defaultdict(list)
    for row, group in zip(rewards, groups, strict=True):
        running, back = 0.0, []
        for reward in reversed(row):
            running = reward + gamma * running
            back.append(running)
        returns.append(back[::-1])
        sums[group].append(sum(row))
        for t, value in enumerate(returns[-1]):
            cells[group, t].append(value)
    whole = {k: (np.mean(x), np.std(x, ddof=1)) for k, x in sums.items()}
    parts = {k: (np.mean(x), np.std(x, ddof=1)) for k, x in cells.items()}
    out = []
    for row, gains, group in zip(rewards, returns, groups, strict=True):
        center, spread = whole[group]
        outcome = (sum(row) - center) / (spread + 1e-6)
        turns = [
            (g - parts[group, t][0]) / (parts[group, t][1] + 1e-6) for t, g in enumerate(gains)
        ]
        out.append([(outcome + turn) / 2 for turn in turns])
    return out


def make_traces(size: int) -> list[Trace]:
    """Traces of eight turns of one call, for four references."""
    generator = np.random.default_rng(0)

    def call() -> ToolCall:
        name, x, y = generator.integers(0, (4, 3, 3)).tolist()
        return ToolCall(f"tool{name}", {"x": x, "y": y})

    gold = [[call() for _ in range(4)] for _ in range(size // 8)]
    return [Trace([Parsed([call()], []) for _ in range(8)], gold[i // 8]) for i in range(size)]


def trace_loop(traces: list[Trace]) -> list[list[float]]:
    return [
        greedy_loop([[[tool_similarity(p, g) for g in trace.gold] for p in trace.calls]])[0]
        for trace in traces
    ]


def check(got: object, expected: object, what: str, tolerance: float = 1e-6) -> None:
    gap = float(np.abs(np.asarray(got) - np.asarray(expected)).max())
    print(f"{what}: largest difference {gap:.1e}")
    if not gap < tolerance:
        raise SystemExit("the results differ: the times compare different things")


def compare_matchings(size: int, repeats: int) -> None:
    score, rows, columns = make_scores(size)
    cut = [s[r][:, c] for s, r, c in zip(score, rows, columns, strict=True)]
    lists, arrays = [s.tolist() for s in cut], [s.numpy() for s in cut]
    masks = {"rows": rows, "columns": columns}
    greedy = match(score, "greedy", **masks).reward[rows]
    check(greedy, np.concatenate(greedy_loop(lists)), "greedy")
    best = match(score, **masks).reward.sum(1)
    loss = int((best - match(score, "greedy", **masks).reward.sum(1) > 1e-9).sum())
    print(f"greedy loses in {loss} of {size} traces")
    soft = match(score, "ot", **masks).reward[rows]
    # Plain scaling stops at 1,000 turns where scores tie.
    check(soft, np.concatenate(transport_loop(arrays)), "transport", 1e-2)
    title = f"{size} traces, {torch.get_num_threads()} threads"
    for ours, loop in (
        (("greedy", "hungarian"), ("loop, greedy", lambda: greedy_loop(lists))),
        (("ot",), ("loop, transport", lambda: transport_loop(arrays))),
    ):
        calls: dict[str, Callable[[], object]] = {
            name: lambda n=name: match(score, n, **masks) for name in ours
        }
        print_table(compare({**calls, loop[0]: loop[1]}, repeats, warmup=1), title)


def compare_advantages(size: int, repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    reward = torch.rand(size, 8, generator=generator, dtype=torch.float64)
    lists, groups = reward.tolist(), [i // 16 for i in range(size)]
    dialogue = torch.arange(size).repeat_interleave(8)
    rows = (reward.flatten(), dialogue, torch.arange(8).repeat(size), dialogue // 16)
    check(estimate("matchtir", *rows), np.concatenate(advantage_loop(lists, groups)), "advantages")
    calls = {
        "matchtir": lambda: estimate("matchtir", *rows),
        "loop, advantages": lambda: advantage_loop(lists, groups),
    }
    print_table(compare(calls, repeats, warmup=1), f"{size} trajectories of 8 turns, groups of 16")


def compare_traces(size: int, repeats: int) -> None:
    traces = make_traces(size)
    got = [paid.turns for paid in turn_rewards(traces, GREEDY)]
    check(got, trace_loop(traces), "turn rewards")
    calls = {
        "turn_rewards": lambda: turn_rewards(traces, GREEDY),
        "loop, similarities and greedy": lambda: trace_loop(traces),
    }
    print_table(
        compare(calls, repeats, warmup=1), f"{size} traces of 8 calls, from calls to rewards"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="512 trajectories, 3 repeats")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    size, repeats = (512, 3) if options.quick else (4096, options.repeats)
    compare_matchings(size, repeats)
    compare_advantages(size, repeats)
    compare_traces(size, repeats)


if __name__ == "__main__":
    main()
