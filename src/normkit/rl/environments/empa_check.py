"""EMPA's published results, in a user's own copy, checked against ours number by number.

``verify_results(DIR)`` replays every result file and compares states, increments, distances, work,
alignments and endings, and EPM-Q with the tables beside the files. Nothing of EMPA (arXiv
2603.00552, CC BY-NC 4.0) is part of normkit.
"""

from __future__ import annotations

import csv
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from normkit.errors import InputError
from normkit.rl.environments.empa_cases import official_cases
from normkit.rl.environments.empa_results import (
    RULES,
    ResultFile,
    read_results,
    recorded,
    replay,
)
from normkit.rl.environments.epm import (
    EPMQ,
    EPMConfig,
    Trajectory,
    epm_q,
    epm_q_case,
    initial_state,
)
from normkit.rl.json_fields import read_text

_INDICES = {
    "Idx_RDI": "rdi",
    "Idx_Etot": "etot",
    "Idx_Snet": "snet",
    "Idx_Rho": "rho",
    "Idx_Sproj": "sproj",
    "Idx_Tau": "tau",
    "Idx_Rpos": "rpos",
    "Idx_Align": "align",
    "Idx_Pen": "pen",
}
_PARTS = {
    "Outcome Quality": "outcome",
    "Process Efficiency": "efficiency",
    "Process Stability": "stability",
    "EPM-Q Score": "score",
}
_HALF_CENT = 0.0051
"""Half of the last of two decimals, and a little for binary fractions."""


@dataclass(frozen=True)
class Mismatch:
    """A recorded value that ours differs from.

    Attributes:
        path: the file.
        field: the value's address in it.
        ours: what normkit computes.
        official: what the file has.
    """

    path: Path
    field: str
    ours: object
    official: object

    def __str__(self) -> str:
        """One line for a report."""
        return f"{self.path}: {self.field} is {self.official}, ours is {self.ours}"


@dataclass
class Verification:
    """What was compared, and how it compares.

    Attributes:
        files: result files that were replayed.
        turns: judged turns in them.
        endings: endings by outcome; "director" where EMPA's director ended the dialogue.
        cases: rows of per-case tables whose nine indices were recomputed.
        models: rows of the table of models that were recomputed from all official cases.
        values: numbers and verdicts that were compared.
        worst: largest absolute difference of each kind of number.
        mismatches: every difference beyond EMPA's rounding.
    """

    files: int = 0
    turns: int = 0
    endings: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    cases: int = 0
    models: int = 0
    values: int = 0
    worst: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    mismatches: list[Mismatch] = field(default_factory=list)

    def compare(
        self, path: Path, where: str, kind: str, ours: object, official: object, off: float = 0.0
    ) -> None:
        """Compare one value; numbers may differ by ``off``."""
        self.values += 1
        equal = ours == official
        if isinstance(ours, float) and isinstance(official, float):
            difference = abs(ours - official)
            self.worst[kind] = max(self.worst[kind], difference)
            equal = difference <= off
        if not equal:
            self.mismatches.append(Mismatch(path, f"{where} {kind}".strip(), ours, official))


def verify_results(path: str | Path, config: EPMConfig | None = None) -> Verification:
    """Compare recorded trajectories, endings and EPM-Q with ours.

    Checked are the initial state against its form, every turn's increment, state and other
    numbers, the turn and the rules of the ending, and, below a folder, EMPA's tables of EPM-Q
    (``descriptive_statistics.csv`` a case, ``epmq_summary.csv`` a model).

    Args:
        path: a result file or a folder.
        config: constants of the model; by default those that each file was made with.

    Raises:
        InputError: for a malformed file.
    """
    path = Path(path)
    results = read_results(path)
    done = Verification()
    for result in results:
        _verify(done, result, config)
    if path.is_dir():
        for table in sorted(path.rglob("descriptive_statistics.csv")):
            _verify_cases(done, table, [r for r in results if r.path.parent == table.parent])
        for table in sorted(path.rglob("epmq_summary.csv")):
            _verify_models(done, table, results, set(official_cases(path)))
    return done


def _verify(done: Verification, result: ResultFile, config: EPMConfig | None) -> None:
    done.files += 1
    done.turns += len(result.turns)
    done.endings[result.outcome or "director"] += 1
    at = result.path
    if result.levels:
        done.compare(at, "epj", "initial state", initial_state(result.levels), result.initial)
    whole = replay(result, config)
    # Two decimals of a state's projection on a direction with four.
    size = max(math.hypot(*state) for state in (result.initial, *(t.state for t in whole.turns)))
    along = _HALF_CENT + 2e-4 * size
    within = {"distance": 1e-4, "work": 0.0055, "alignment": 0.0002}
    partial = Trajectory(result.initial, whole.config)
    for turn, ours in zip(result.turns, whole.turns, strict=True):
        ended = bool(partial.turns) and partial.outcome()
        done.compare(at, turn.where, "goes on", bool(ended), False)
        partial.advance(turn.progress or turn.increment, turn.turn)
        done.compare(at, turn.where, "increment", ours.increment, turn.increment)
        if turn.state is not None:
            done.compare(at, turn.where, "state", ours.state, turn.state)
        for name, value in turn.numbers.items():
            done.compare(at, turn.where, name, getattr(ours, name), value, within.get(name, along))
    if result.final_state is not None:
        done.compare(at, "epj", "final state", whole.state, result.final_state)
    done.compare(at, "", "total_turns", whole.length, result.total_turns)
    done.compare(at, "", "outcome", whole.outcome(), result.outcome)
    if result.rules:
        ours_named = {rule for rule in RULES if rule in whole.reason}
        done.compare(at, "", "rules", ours_named, set(result.rules))


def _verify_cases(done: Verification, table: Path, results: Sequence[ResultFile]) -> None:
    """The nine indices of every case that has a result file."""
    held = {result.script_id: result for result in results}
    for row in _rows(table, ("Case_ID", *_INDICES)):
        if result := held.get(row["Case_ID"]):
            done.cases += 1
            ours = epm_q_case(recorded(result)).to_json()
            for key, name in _INDICES.items():
                official = _number(row, key, table)
                done.compare(
                    table, result.script_id, f"{name} of a case", ours[name], official, 1e-9
                )


def _verify_models(
    done: Verification, table: Path, results: Sequence[ResultFile], official: set[str]
) -> None:
    """The arithmetic of each row, and its means where all official cases of the model are there."""
    folders: dict[Path, list[ResultFile]] = defaultdict(list)
    for result in results:
        folders[result.path.parent].append(result)
    complete = [
        (_words(folder.name), [recorded(result) for result in held])
        for folder, held in folders.items()
        if {result.script_id for result in held} == official
    ]
    for model, published in read_epmq_table(table).items():
        combined = EPMQ(*(published[each.name] for each in fields(EPMQ))).to_json()
        named = [held for words, held in complete if _words(model) <= words]
        ours = epm_q(named[0]).to_json() if len(named) == 1 else {}
        done.models += bool(ours)
        for name in _PARTS.values():
            # The indices are rounded themselves, which moves their means by half a unit more.
            off = 2 * _HALF_CENT
            done.compare(table, model, f"{name} of a row", combined[name], published[name], off)
        for name, value in ours.items():
            done.compare(table, model, f"{name} of a model", value, published[name], _HALF_CENT)


def read_epmq_table(path: str | Path) -> dict[str, dict[str, float]]:
    """Read EMPA's table of EPM-Q by model (``epmq_summary.csv``).

    Returns:
        For each model the nine indices, the three parts and the score, by the names of
        :meth:`~normkit.rl.environments.epm.EPMQ.to_json`.

    Raises:
        InputError: names the file and the column that is missing or malformed.
    """
    path = Path(path)
    columns = _INDICES | _PARTS
    return {
        row["Model"]: {name: _number(row, key, path) for key, name in columns.items()}
        for row in _rows(path, ("Model", *columns))
    }


def _words(name: str) -> set[str]:
    """Words and numbers of a model's name: ``Qwen 3 8B`` is among those of ``qwen3-8b``."""
    return set(re.findall(r"[a-z]+|\d+", name.lower()))


def _rows(table: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    rows = list(csv.DictReader(read_text(table).splitlines()))
    for column in columns:
        if not rows or rows[0].get(column) is None:
            given = ", ".join(rows[0]) if rows else "no row"
            raise InputError(f"{table} must have rows with a column {column!r}, got {given}")
    return rows


def _number(row: Mapping[str, str], column: str, table: Path) -> float:
    try:
        value = float(row[column])
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{table}: {column} must be a finite number, got {row[column]!r}")
    return value
