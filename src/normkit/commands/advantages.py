"""``normkit advantages``: what each turn of judged dialogues on disk would be credited with.

Reads EMPA's result files (a user's own copy; a turn earns the distance that it closed) and the
dialogues of normkit's runs (``dialogues.jsonl``, ``before.json``, ``after.json``). Dialogues on the
same case or scenario form a group, whoever spoke in them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from normkit.errors import InputError
from normkit.files import check_file, finite
from normkit.report.plots import figure
from normkit.rl.advantage import diagnose, estimate, get_estimator
from normkit.rl.environments.empa_results import ResultFile, parse_result, read_results
from normkit.rl.environments.epm import Trajectory
from normkit.rl.json_fields import Field, read_json, read_json_lines

_OURS = ("dialogues.jsonl", "before.json", "after.json")
_LABELLED = 60


@dataclass(frozen=True)
class CreditOptions:
    """Options of ``normkit advantages``: what each turn of judged dialogues is credited with.

    Attributes:
        files: result files, files of dialogues, or folders that hold them.
        estimator: name of the estimator.
        compare: other estimators, to correlate their credit with (and to draw beside it).
        gamma: discount per turn; the estimator's own default if not given.
        alpha: weight of the turn-level term, likewise.
        batch_scope: pool of the batch-level term, likewise.
        plot: PNG to draw rewards and advantages to.
        json: print JSON instead of tables.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    estimator: str = "mapo"
    compare: tuple[str, ...] = ()
    gamma: float | None = None
    alpha: float | None = None
    batch_scope: Literal["group", "batch"] | None = None
    plot: Path | None = None
    json: bool = False

    def estimators(self) -> dict[str, dict[str, Any]]:
        """Every estimator asked for, with those of the given options that it has.

        Raises:
            InputError: for an estimator that files do not suffice for, or an option that none has.
        """
        named = {e.name: e for e in map(get_estimator, (self.estimator, *self.compare))}
        for estimator in named.values():
            if estimator.needs:
                raise InputError(f"estimator {estimator.name!r} needs a critic; files have none")
        options = {"gamma": self.gamma, "alpha": self.alpha, "batch_scope": self.batch_scope}
        given = {name: value for name, value in options.items() if value is not None}
        for option in given:
            if not any(option in estimator.options for estimator in named.values()):
                raise InputError(f"{option} is no option of {' or of '.join(named)}")
        return {
            name: {option: given[option] for option in given if option in estimator.options}
            for name, estimator in named.items()
        }


@dataclass(frozen=True)
class JudgedDialogue:
    """The rewards of one dialogue on disk.

    Attributes:
        group: case or scenario.
        name: who spoke, or when.
        rewards: reward of each judged turn; NaN where it is unknown.
    """

    group: str
    name: str
    rewards: tuple[float, ...]


def main(arguments: Sequence[str]) -> None:
    """Run ``normkit advantages``."""
    options = tyro.cli(CreditOptions, args=arguments, prog="normkit advantages")
    estimators = options.estimators()
    if options.plot is not None:
        check_file(options.plot)
    dialogues = [dialogue for path in options.files for dialogue in read_judged(path)]
    if not any(dialogue.rewards for dialogue in dialogues):
        raise InputError("files must hold judged dialogues, got none with a turn")
    rows = turn_rows(dialogues)
    credit = {name: estimate(name, *rows, **given) for name, given in estimators.items()}
    gamma: dict[str, Any] = {} if options.gamma is None else {"gamma": options.gamma}
    names = list(credit)
    found: dict[str, Any] = {"estimator": names[0], **vars(diagnose(*rows, **gamma))}
    if len(names) > 1:
        known = torch.isfinite(rows[0])
        columns = torch.stack([credit[name][known] for name in names])
        found["correlations"] = {"estimators": names, "matrix": torch.corrcoef(columns).tolist()}
    lengths = [len(dialogue.rewards) for dialogue in dialogues]
    found["dialogues"] = [
        {"group": d.group, "dialogue": d.name, "rewards": d.rewards, "advantages": part.tolist()}
        for d, part in zip(dialogues, torch.split(credit[names[0]], lengths), strict=True)
    ]
    if options.plot is not None:
        draw(dialogues, {"reward": rows[0], **credit}, options.plot)
    if options.json:
        print(json.dumps(finite(found), ensure_ascii=False))
    else:
        _print(found)


def read_judged(path: str | Path) -> list[JudgedDialogue]:
    """Read the judged dialogues of a file, or of all files below a folder.

    Raises:
        InputError: names the file and the field that is missing or malformed in it.
    """
    path = Path(path)
    if path.is_dir():
        results = read_results(path) if any(path.rglob("script_*.json")) else []
        logs = [file for name in _OURS for file in sorted(path.rglob(name))]
        return [*map(_empa, results), *(d for file in logs for d in read_judged(file))]
    if path.suffix == ".jsonl":
        return list(_log(path))
    root = read_json(path)
    if root["greedy"] or root["sampled"]:
        return list(_evaluation(root, path.stem))
    return [_empa(parse_result(root, path))]


def _empa(result: ResultFile) -> JudgedDialogue:
    trajectory = Trajectory(result.initial, result.config())
    rewards = []
    for turn in result.turns:
        trajectory.advance(turn.progress or turn.increment, turn.turn)
        rewards.append(trajectory.reward() if turn.progress else math.nan)
    return JudgedDialogue(result.script_id, result.model, tuple(rewards))


def _log(path: Path) -> Iterator[JudgedDialogue]:
    for row in read_json_lines(path):
        yield _own(row, f"step {row['step'].integer(0)}")


def _evaluation(root: Field, when: str) -> Iterator[JudgedDialogue]:
    for mode in root.mapping():
        for row in root[mode]:
            yield _own(row, f"{when}, {mode}")


def _own(row: Field, name: str) -> JudgedDialogue:
    rewards = [turn["reward"] for turn in row["turns"]]
    known = tuple(reward.number() if reward else math.nan for reward in rewards)
    return JudgedDialogue(row["task"].text(), name, known)


def turn_rows(dialogues: Sequence[JudgedDialogue]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lay out the turns of dialogues as the flat rows ``(reward, dialogue, turn, group)``."""
    groups = {name: i for i, name in enumerate(dict.fromkeys(d.group for d in dialogues))}
    rows = [
        (r, i, t, groups[d.group]) for i, d in enumerate(dialogues) for t, r in enumerate(d.rewards)
    ]
    reward = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    dialogue, turn, group = torch.tensor([row[1:] for row in rows]).unbind(1)
    return reward, dialogue, turn, group


def draw(dialogues: Sequence[JudgedDialogue], panels: Mapping[str, Tensor], path: Path) -> None:
    """Draw values of turns: a panel for each kind, a row for each dialogue, group by group.

    Args:
        dialogues: in the order of the rows of the values.
        panels: title and values ``[N]``.
        path: the PNG to write.
    """
    order = sorted(range(len(dialogues)), key=lambda i: dialogues[i].group)
    lengths = [len(dialogue.rewards) for dialogue in dialogues]
    turns = max(lengths)
    sizes = Counter(dialogues[i].group for i in order)
    ends = [end - 0.5 for end in accumulate(sizes.values())]
    with figure(path, columns=len(panels), width=max(3.5, 0.06 * turns + 1.5)) as axes:
        axes[0].figure.set_figheight(min(max(3.8, 0.22 * len(dialogues)), 40.0))
        for ax, (title, values) in zip(axes, panels.items(), strict=True):
            parts = torch.split(values, lengths)
            grid = pad_sequence([parts[i] for i in order], batch_first=True, padding_value=math.nan)
            known = values[torch.isfinite(values)].abs()
            # One dialogue far from all others must not leave them without colour.
            limit = float(known.quantile(0.98)) if bool(known.any()) else 1.0
            image = ax.imshow(grid, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
            ax.hlines(ends[:-1], -0.5, turns - 0.5, color="black", linewidth=0.6)
            ax.set(title=title, xlabel="turn", yticks=[], facecolor="lightgrey")
            ax.set_xticks(range(0, turns, 5), range(1, turns + 1, 5))
            ax.grid(visible=False)
            ax.figure.colorbar(image, extend="both", aspect=40)
        if len(dialogues) <= _LABELLED:
            names = [f"{dialogues[i].group} {dialogues[i].name}" for i in order]
            axes[0].set_yticks(range(len(names)), names, fontsize=7)
        else:
            middles = [end - size / 2 for end, size in zip(ends, sizes.values(), strict=True)]
            axes[0].set_yticks(middles, list(sizes), fontsize=8)


def _print(found: Mapping[str, Any]) -> None:
    console = Console()
    table = Table("group", "dialogue", "advantage of each turn")
    for row in found["dialogues"]:
        values = " ".join(f"{a:+.2f}" for a in row["advantages"])
        table.add_row(*map(escape, (row["group"], row["dialogue"], values)))
    console.print(table)
    survivors = " ".join(f"{n:.1f}" for n in found["survivors"])
    console.print(f"survivors per turn and group: {survivors}")
    console.print(f"turns without variance: {100 * found['zero_variance']:.0f}%")
    console.print(
        f"|A_turn| / |A_batch| {found['ratio']:.2f}, correlation {found['correlation']:.2f}"
    )
    if compared := found.get("correlations"):
        table = Table("correlation of credit", *compared["estimators"])
        for name, values in zip(compared["estimators"], compared["matrix"], strict=True):
            table.add_row(name, *(f"{value:+.2f}" for value in values))
        console.print(table)
