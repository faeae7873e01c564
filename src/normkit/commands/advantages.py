"""``normkit advantages``: what each turn of judged dialogues on disk would be credited with.

Reads EMPA result files (a user's own copy; the turn's reward is the distance closed) and the
``dialogues.jsonl`` of normkit's runs. Dialogues on the same case or scenario form a group.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from normkit.errors import InputError
from normkit.report.plots import figure
from normkit.rl.advantage import diagnose, estimate, get_estimator


@dataclass(frozen=True)
class CreditOptions:
    """Options of ``normkit advantages``.

    Attributes:
        files: result files, ``dialogues.jsonl`` files, or folders that hold them.
        estimator: name of the estimator.
        plot: PNG to draw the advantages to.
        json: print JSON instead of a table.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    estimator: str = "mapo"
    plot: Path | None = None
    json: bool = False


@dataclass(frozen=True)
class JudgedDialogue:
    """The rewards of one dialogue on disk.

    Attributes:
        group: case or scenario.
        name: who spoke.
        rewards: reward of each turn; NaN where it is unknown.
    """

    group: str
    name: str
    rewards: tuple[float, ...]


def main(arguments: Sequence[str]) -> None:
    """Run ``normkit advantages``."""
    options = tyro.cli(CreditOptions, args=arguments, prog="normkit advantages")
    if get_estimator(options.estimator).needs:
        raise InputError(f"estimator {options.estimator!r} needs a critic; files have none")
    dialogues = [d for path in options.files for d in read_judged(path)]
    if not dialogues:
        raise InputError("files: no judged dialogue found in them")
    credit, diagnosis = credit_dialogues(dialogues, options.estimator)
    if options.plot is not None:
        draw(dialogues, credit, options.plot, options.estimator)
    if options.json:
        rows = [
            {"group": d.group, "dialogue": d.name, "rewards": d.rewards, "advantages": a}
            for d, a in zip(dialogues, credit, strict=True)
        ]
        print(json.dumps({"estimator": options.estimator, **diagnosis, "dialogues": rows}))
        return
    table = Table("group", "dialogue", "advantage of each turn")
    for d, values in zip(dialogues, credit, strict=True):
        table.add_row(d.group, d.name, " ".join(f"{a:+.2f}" for a in values))
    console = Console()
    console.print(table)
    survivors = " ".join(f"{n:.1f}" for n in diagnosis["survivors"])
    console.print(f"survivors per turn and group: {survivors}")
    console.print(f"turns without variance: {100 * diagnosis['zero_variance']:.0f}%")
    console.print(
        f"|A_turn| / |A_batch| {diagnosis['ratio']:.2f}, correlation {diagnosis['correlation']:.2f}"
    )


def read_judged(path: str | Path) -> list[JudgedDialogue]:
    """Read the judged dialogues of a file or of all files below a folder.

    Raises:
        InputError: names the file and what is missing in it.
    """
    path = Path(path)
    if path.is_dir():
        found = [*path.rglob("*_result.json"), *path.rglob("dialogues.jsonl")]
        return [d for file in sorted(found) for d in read_judged(file)]
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [_own(json.loads(line)) for line in text.splitlines() if line.strip()]
        return [_empa(json.loads(text))]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {error.lineno} is not JSON: {error.msg}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a result file or a dialogue log: {error!r}") from None


def _own(row: dict[str, Any]) -> JudgedDialogue:
    rewards = [t["reward"] for t in row["turns"]]
    known = tuple(float("nan") if r is None else float(r) for r in rewards)
    return JudgedDialogue(str(row["task"]), f"step {row.get('step', '')}", known)


def _empa(data: dict[str, Any]) -> JudgedDialogue:
    distances = [float(point["distance"]) for point in data["epj"]["trajectory"]]
    closed = tuple(a - b for a, b in itertools.pairwise(distances))
    return JudgedDialogue(str(data["script_id"]), str(data["test_model_name"]), closed)


def credit_dialogues(
    dialogues: Sequence[JudgedDialogue], estimator: str
) -> tuple[list[list[float]], dict[str, Any]]:
    """Advantages of every turn, and the diagnosis of the batch."""
    groups = {name: i for i, name in enumerate(dict.fromkeys(d.group for d in dialogues))}
    rows = [
        (r, i, t, groups[d.group]) for i, d in enumerate(dialogues) for t, r in enumerate(d.rewards)
    ]
    reward = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    dialogue, turn, group = torch.tensor([row[1:] for row in rows]).reshape(-1, 3).unbind(1)
    advantage = estimate(estimator, reward, dialogue, turn, group)
    parts = torch.split(advantage, [len(d.rewards) for d in dialogues])
    found = diagnose(reward, dialogue, turn, group)
    return [part.tolist() for part in parts], vars(found)


def draw(
    dialogues: Sequence[JudgedDialogue],
    credit: Sequence[Sequence[float]],
    path: Path,
    estimator: str,
) -> None:
    """Draw advantages as one row per dialogue, one column per turn."""
    width = max(len(values) for values in credit)
    grid = torch.full((len(credit), width), float("nan"))
    for i, values in enumerate(credit):
        grid[i, : len(values)] = torch.tensor(values)
    limit = float(grid.nan_to_num().abs().max()) or 1.0
    with figure(path, width=max(6.0, 0.3 * width + 4)) as (ax,):
        image = ax.imshow(grid, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        names = [f"{d.group} {d.name}" for d in dialogues]
        ax.set_yticks(range(len(names)), names, fontsize=7)
        ax.set(title=f"advantage by {estimator}", xlabel="turn")
        ax.grid(visible=False)
        ax.figure.colorbar(image)
