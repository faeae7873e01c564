"""Rewards for tool calls and dual-level advantages at 4,096 trajectories, beside loops of Python.

    python benchmarks/matching.py
    python benchmarks/matching.py --quick
    python benchmarks/matching.py --cpu-time      # where others use the machine too

The peers are loops of our own that take the steps which the authors' code takes (it cannot be
imported without verl and its engines): one trajectory after the other; a call's JSON parsed anew
for every reference; greedy over sorted pairs; transport by scaling in NumPy to the same accuracy or
1,000 turns (POT's default); turns found by a search for separators in the response's tokens;
advantages from lists per group and turn.

Matching alone is timed on scores of six to twelve calls for three to six references with frequent
ties; the path from calls, and from replies, to rewards on the tasks of the tool world. There a call
is the reference's (two of five), another task's, or has a wrong argument; a reply has 128 tokens.

The bar is ten times the speed of the loop, for what the authors' code does: greedy matching,
transport, advantages, rewards of tokens from replies. Without a bar: the best matching, which it
does not look for, beside its greedy loop and beside SciPy problem by problem; and the part of the
path that begins with calls already read, where most of our time goes into touching them.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from _memory import keep_freed_memory
from _timing import compare, print_table
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from normkit.functional.matching import METHODS, match
from normkit.rl.advantage import estimate
from normkit.rl.environments.tools import ToolWorld
from normkit.rl.tool_calls import ToolCall, read_qwen
from normkit.rl.tool_rewards import MatchOptions, Trace, turn_rewards

BAR = 10
REPLY = 128
"""Tokens of a reply."""
START, END, RESULT = [198, 151644, 77091, 198], [151645], 40
"""Tokens that begin and end an assistant's turn, and how many a tool's result has."""


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


def optimal_loop(matrices: list[np.ndarray]) -> list[list[float]]:
    out = []
    for score in matrices:
        paid = [0.0] * len(score)
        for i, j in zip(*linear_sum_assignment(score, maximize=True), strict=True):
            paid[i] = float(score[i, j])
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


@dataclass(frozen=True)
class Play:
    """A dialogue of the tool world.

    Attributes:
        replies: text of each turn.
        ids: tokens of the response.
        ends: place of each turn's last token.
        gold: reference calls.
    """

    replies: list[str]
    ids: list[int]
    ends: list[int]
    gold: list[ToolCall]


def make_plays(size: int) -> list[Play]:
    """Dialogues of six to twelve turns, groups of sixteen by task."""
    dice, world = np.random.default_rng(0), ToolWorld()
    tasks = [world.start(name, 0).reference for name in world.tasks("train")]
    anything = [call for task in tasks for call in task.gold]
    plays = []
    for number in range(size):
        gold = tasks[number // 16 % len(tasks)].gold
        replies, ids, ends = [], [], []
        for turn in range(int(dice.integers(6, 13))):
            call = gold[turn % len(gold)]
            kind = dice.random()
            if kind < 0.3:
                call = anything[int(dice.integers(len(anything)))]
            arguments = dict(call.arguments)
            if kind > 0.7:
                wrong = list(arguments)[int(dice.integers(len(arguments)))]
                arguments[wrong] = f"value {dice.integers(1000)}"
            text = json.dumps({"name": call.name, "arguments": arguments})
            replies.append(f"Next I call a tool.\n<tool_call>\n{text}\n</tool_call>")
            ids += (START if turn else []) + [9] * (REPLY - len(END)) + END
            ends.append(len(ids) - 1)
            ids += [8] * RESULT
        plays.append(Play(replies, ids, ends, gold))
    return plays


def loop_similarity(predicted: dict[str, str], gold: dict[str, Any]) -> float:
    if predicted["name"].lower() != gold["name"].lower():
        return 0.0
    given, wanted = json.loads(predicted["arguments"]), gold["parameters"]
    right = sum(1.0 for k, v in wanted.items() if k in given and given[k] == v)
    return (1.0 + multiset_jaccard(list(wanted), list(given)) + right) / (2.0 + len(wanted))


def multiset_jaccard(a: list[str], b: list[str]) -> float:
    if a == b:
        return 1.0
    if not a or not b:
        return 0.0
    x, y = Counter(a), Counter(b)
    common = sum(min(x[k], y[k]) for k in x.keys() & y.keys())
    return common / (len(a) + len(b) - common)


Written = tuple[list[dict[str, str]], list[dict[str, Any]]]


def calls_loop(written: list[Written], method: str) -> list[list[float]]:
    """Rewards of calls, one dialogue after the other."""
    out = []
    for calls, gold in written:
        score = [[loop_similarity(p, g) for g in gold] for p in calls]
        if method == "ot":
            out += [row.tolist() for row in transport_loop([np.array(score)])]
        else:
            out += greedy_loop([score])
    return out


def find_all(ids: list[int], part: list[int]) -> list[int]:
    return [i for i in range(len(ids) - len(part) + 1) if ids[i : i + len(part)] == part]


def response_loop(
    response: str, ids: list[int], gold: list[dict[str, Any]], method: str
) -> list[float]:
    """Reward of each token of a response."""
    calls, turn_of = [], []
    replies = response.split("\n<|im_start|>assistant\n")
    for turn, reply in enumerate(replies):
        if re.search(r"<answer>(.*?)</answer>", reply, re.DOTALL):
            continue
        for text in re.findall(r"<tool_call>(.*?)</tool_call>", reply, re.DOTALL):
            call = json.loads(text.strip())
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            calls.append({"name": call["name"], "arguments": arguments})
            turn_of.append(turn)
    total, count = [0.0] * len(replies), [0] * len(replies)
    for turn, paid in zip(turn_of, calls_loop([(calls, gold)], method)[0], strict=True):
        total[turn] += paid
        count[turn] += 1
    out = [0.0] * len(ids)
    for turn, start in enumerate([0, *find_all(ids, START)]):
        end = start + find_all(ids[start:], END)[0] + len(END)
        out[end - 1] = total[turn] / max(count[turn], 1)
    return out


def token_rewards(plays: list[Play], method: str) -> list[np.ndarray]:
    """Ours: replies are read, all dialogues paid at once, turns lie where the rollout put them."""
    traces = [Trace([read_qwen(reply) for reply in play.replies], play.gold) for play in plays]
    out = []
    for play, paid in zip(plays, turn_rewards(traces, MatchOptions(method)), strict=True):
        out.append(np.zeros(len(play.ids)))
        out[-1][play.ends] = paid.turns
    return out


def check(got: object, expected: object, what: str, tolerance: float = 1e-6) -> None:
    gap = float(np.abs(np.asarray(got) - np.asarray(expected)).max())
    print(f"{what}: largest difference {gap:.1e}")
    if not gap < tolerance:
        raise SystemExit("the results differ: the times compare different things")


@dataclass(frozen=True)
class Plan:
    """How many trajectories, how often, by which clock."""

    size: int
    repeats: int
    clock: Callable[[], float]


def race(
    what: str,
    ours: Callable[[], object],
    loop: Callable[[], object],
    title: str,
    plan: Plan,
    bar: bool = True,
) -> None:
    """Time ours beside the loop, and say whether it reaches the bar, where there is one."""
    rows = compare({what: ours, "loop": loop}, plan.repeats, warmup=1, clock=plan.clock)
    print_table(rows, title)
    ratio = rows[1].ratio
    faster = f"{ratio.median:.1f} times the speed of the loop ({ratio.low:.1f} .. {ratio.high:.1f})"
    if bar:
        print(f"{'PASS' if ratio.median >= BAR else 'MISS'}: {what} {faster}; the bar is {BAR}\n")
    else:
        print(f"{what} {faster}\n")


def compare_matchings(plan: Plan) -> None:
    size = plan.size
    score, rows, columns = make_scores(size)
    cut = [s[r][:, c] for s, r, c in zip(score, rows, columns, strict=True)]
    lists, arrays = [s.tolist() for s in cut], [s.numpy() for s in cut]
    masks = {"rows": rows, "columns": columns}
    greedy = match(score, "greedy", **masks).reward
    check(greedy[rows], np.concatenate(greedy_loop(lists)), "greedy")
    best = match(score, **masks).reward.sum(1)
    loss = int((best - greedy.sum(1) > 1e-9).sum())
    print(f"greedy loses in {loss} of {size} traces")
    soft = match(score, "ot", **masks).reward[rows]
    # Plain scaling stops at 1,000 turns where scores tie.
    check(soft, np.concatenate(transport_loop(arrays)), "transport", 1e-2)
    check(best[:, None], [[sum(paid)] for paid in optimal_loop(arrays)], "best sums")
    races = (
        ("greedy", "greedy", lambda: greedy_loop(lists)),
        ("ot", "ot", lambda: transport_loop(arrays)),
        ("hungarian", "hungarian beside greedy", lambda: greedy_loop(lists)),
        ("hungarian", "hungarian beside SciPy", lambda: optimal_loop(arrays)),
    )
    for method, what, loop in races:
        race(
            what,
            lambda method=method: match(score, method, **masks),
            loop,
            f"{size} matrices of scores",
            plan,
            bar=method != "hungarian",
        )


def compare_advantages(plan: Plan) -> None:
    size = plan.size
    generator = torch.Generator().manual_seed(0)
    reward = torch.rand(size, 8, generator=generator, dtype=torch.float64)
    lists, groups = reward.tolist(), [i // 16 for i in range(size)]
    dialogue = torch.arange(size).repeat_interleave(8)
    rows = (reward.flatten(), dialogue, torch.arange(8).repeat(size), dialogue // 16)
    check(estimate("matchtir", *rows), np.concatenate(advantage_loop(lists, groups)), "advantages")
    race(
        "advantages",
        lambda: estimate("matchtir", *rows),
        lambda: advantage_loop(lists, groups),
        f"{size} trajectories of 8 turns, groups of 16",
        plan,
    )


def compare_paths(plan: Plan) -> None:
    size = plan.size
    plays = make_plays(size)
    traces = [Trace([read_qwen(reply) for reply in play.replies], play.gold) for play in plays]
    gold = [[{"name": g.name, "parameters": dict(g.arguments)} for g in p.gold] for p in plays]
    written = [
        ([{"name": c.name, "arguments": json.dumps(c.arguments)} for c in trace.calls], references)
        for trace, references in zip(traces, gold, strict=True)
    ]
    separator = "<|im_end|>\n<|im_start|>user\n<tool_response>1</tool_response><|im_end|>"
    responses = [f"{separator}\n<|im_start|>assistant\n".join(p.replies) for p in plays]

    def from_replies(method: str) -> list[list[float]]:
        return [
            response_loop(text, play.ids, references, method)
            for text, play, references in zip(responses, plays, gold, strict=True)
        ]

    paid = [x for r in turn_rewards(traces, MatchOptions("greedy")) for x in r.calls]
    check(paid, np.concatenate(calls_loop(written, "greedy")), "rewards of calls")
    tokens = np.concatenate(token_rewards(plays, "greedy"))
    check(tokens, np.concatenate(from_replies("greedy")), "rewards of tokens")
    for method in METHODS:
        soft = "ot" if method == "ot" else "greedy"
        race(
            f"calls to rewards, {method}",
            lambda method=method: turn_rewards(traces, MatchOptions(method)),
            lambda soft=soft: calls_loop(written, soft),
            f"{size} traces of the tool world",
            plan,
            bar=False,
        )
        race(
            f"replies to rewards of tokens, {method}",
            lambda method=method: token_rewards(plays, method),
            lambda soft=soft: from_replies(soft),
            f"{size} traces of the tool world",
            replace(plan, repeats=min(plan.repeats, 3)),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="512 trajectories, 3 repeats")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--cpu-time", action="store_true", help="of this process, for one thread of a busy machine"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    clock = time.process_time if options.cpu_time else time.perf_counter
    plan = Plan(*((512, 3) if options.quick else (4096, options.repeats)), clock)
    compare_matchings(plan)
    compare_advantages(plan)
    compare_paths(plan)


if __name__ == "__main__":
    main()
