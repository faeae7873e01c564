"""EMPA's result files, in a user's own copy: read and replayed.

A result file holds one dialogue on a benchmark case: what was said, the judge's filled form of
every turn, and the trajectory that follows from it. Files of every version of EMPA's code are read:
the published ones, the drafts in Chinese, and those of today's code. Nothing of EMPA (arXiv
2603.00552, CC BY-NC 4.0) is part of normkit.

What the published files show beyond EMPA's description: a turn whose judgement failed stands
without a form and with a zero increment; a level under a misspelt key gave no points; directions
and energies are rounded to 4 and 2 decimals; and a dialogue that got nowhere was ended
(:class:`~normkit.rl.environments.epm.EPMConfig`, ``standstill_window``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from normkit.errors import InputError
from normkit.rl.environments.epm import (
    EPMConfig,
    Outcome,
    State,
    Trajectory,
    increment,
    initial_state,
)
from normkit.rl.environments.scenario import INDICATORS
from normkit.rl.json_fields import Field, read_json
from normkit.rl.rubric import AXES, AxisLevels, Progress

RULES = {
    "direction collapse": r"direction\w* collapse|collapsed|方向崩溃",
    "stagnation": r"stagnant|位置停滞",
    "persistent regression": r"persistent regression|regressing|持续倒退",
    "standstill": r"总变化量过小|距离几乎不变",
    "oscillation": r"oscillation|震荡",
    "geometric": r"geometric|几何胜利",
    "positional": r"positional|位置胜利",
}
"""Rules of an ending, as `Trajectory.reason` names them, and how EMPA's files do."""

_EPM = r"EPM(?: v[\d.]+)?[ _]?"
_OUTCOMES: Mapping[Outcome, str] = {
    "success": rf"{_EPM}(?:success|判定成功|胜利)|success|(?:共情)?轨迹已[抵到]达目标区域",
    "failure": rf"{_EPM}(?:failure|判定失败)|stagnation|(?:对话)?停滞",
    "max_turns": r"max_turns|timeout|reached max turns|达到最大轮次|超时",
}
"""How the reason of an ending begins. Other texts are those of EMPA's director."""

_USER, _MODEL = ("actor", "user"), ("test_model", "assistant")
_RECORDED = {
    "P_norm": "norm",
    "projection": "projection",
    "delta_E": "work",
    "E_total": "total_work",
    "alignment": "alignment",
}


@dataclass(frozen=True)
class ResultTurn:
    """One judged turn of a result file.

    Attributes:
        turn: number of the turn in the dialogue, from 1.
        progress: the judge's filled form; None where its judgement failed.
        increment: v_t as recorded, or as the form gives it where it is not recorded.
        state: P_t as recorded; None where it is not.
        numbers: what else the file has of the turn, by the names of `EPMTurn`'s attributes.
        where: address of the turn in the file.
    """

    turn: int
    progress: Progress | None
    increment: State
    state: State | None
    numbers: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class ResultFile:
    """One dialogue of EMPA's benchmark.

    Attributes:
        path: the file.
        model: who replied.
        script_id: the case.
        history: ``(user message, reply)`` of each turn; a reply that is not there is empty.
        initial: P_0.
        levels: the filled initial-deficit form; empty where the file has none.
        turns: the judged turns.
        total_turns: turns of the dialogue.
        judged_every: a judgement covers this many turns (K).
        epsilon: tolerance per axis.
        alpha: share of ``|P_0|`` within which a user counts as relieved.
        reason: why the dialogue ended, in EMPA's words.
        type: the same as a keyword; empty before today's code.
        final_state: P_T as recorded; None where it is not.
    """

    path: Path
    model: str
    script_id: str
    history: tuple[tuple[str, str], ...]
    initial: State
    levels: Mapping[str, int]
    turns: tuple[ResultTurn, ...]
    total_turns: int
    judged_every: int
    epsilon: float
    alpha: float
    reason: str
    type: str
    final_state: State | None

    @property
    def outcome(self) -> Outcome | None:
        """How the file says the dialogue ended; None where EMPA's director ended it."""
        said = self.type or self.reason
        matching = (name for name, p in _OUTCOMES.items() if re.match(p, said, re.IGNORECASE))
        return next(matching, None)

    @property
    def rules(self) -> frozenset[str]:
        """Rules that the file names for the ending (:data:`RULES`)."""
        said = self.reason if self.outcome else ""
        return frozenset(rule for rule, p in RULES.items() if re.search(p, said, re.IGNORECASE))

    def config(self) -> EPMConfig:
        """The constants that this dialogue was held with."""
        defaults = EPMConfig()
        # Today's code, which alone names a type, has no rule against standing still.
        today = bool(self.type) and self.type != "STAGNATION"
        most = max(defaults.max_turns, self.total_turns + 1)
        # Drafts of EMPA declared success and failure at any turn.
        early = self.outcome in ("success", "failure") and self.total_turns < defaults.min_turns
        return EPMConfig(
            max_turns=max(1, self.total_turns) if self.outcome == "max_turns" else most,
            min_turns=1 if early else defaults.min_turns,
            epsilon=self.epsilon,
            alpha=self.alpha,
            standstill_window=0 if today else max(10, 12 // self.judged_every),
        )


def read_results(path: str | Path) -> list[ResultFile]:
    """Read one result file, or all below a folder (``script_*.json``), ordered by path.

    Runs that ended in an error hold no dialogue; in a folder they are passed over.

    Raises:
        InputError: names the file and the field, or the folder that has no result file.
    """
    path = Path(path)
    if not path.is_dir():
        return [parse_result(read_json(path), path)]
    read = [(read_json(file), file) for file in sorted(path.rglob("script_*.json"))]
    found = [parse_result(root, file) for root, file in read if not _error(root)]
    if not found:
        raise InputError(f"{path} must hold EMPA result files (script_*.json), got none")
    return found


def parse_result(root: Field, path: Path) -> ResultFile:
    """Read the JSON value of one result file; see :func:`read_results`."""
    if _error(root):
        raise InputError(f"{path} must hold a dialogue, got a run that failed: {_error(root)}")
    epj = root["epj"]
    points = list(epj["trajectory"])
    form = epj["iedr_details"].get("filled_iedr")
    levels = read_levels(form) if form else {}
    starts = bool(points) and points[0]["turn"].value == 0
    start = epj["P_0_initial_deficit"] or (points[0]["P_t"] if starts else None)
    if not start and not levels:
        raise epj["P_0_initial_deficit"].wrong("a list of 3 numbers")
    turns = _turns(points[1:] if starts else points)
    alpha = epj["epm_params"].get("alpha") or form.get("epm").get("alpha")
    final = epj["P_final_position"]
    script_id, model = root["script_id"], root["test_model_name"]
    total = root["total_turns"]
    return ResultFile(
        path=path,
        model=model.text() if model else path.parent.name,
        script_id=script_id.text() if script_id else path.stem.removesuffix("_result"),
        history=_history(root["history"]) if root["history"] else (),
        initial=_state(start) if start else initial_state(levels),
        levels=levels,
        turns=turns,
        total_turns=total.integer(0) if total else (turns[-1].turn if turns else 0),
        judged_every=epj["K"].integer(1) if epj["K"] else 1,
        epsilon=epj["epsilon"].number() if epj["epsilon"] else EPMConfig.epsilon,
        alpha=alpha.number() if alpha else EPMConfig.alpha,
        reason=root["termination_reason"].text(empty=True),
        type=root["termination_type"].text(empty=True),
        final_state=_state(final) if final else None,
    )


def read_levels(form: Field) -> dict[str, int]:
    """Read a filled initial-deficit form: the level 0..3 of each indicator."""
    return {name: form.first(name, f"{name}_level").integer(0, 3) for name in INDICATORS}


def replay(result: ResultFile, config: EPMConfig | None = None) -> Trajectory:
    """Our trajectory of a recorded dialogue: its filled forms, put through our model.

    A turn whose judgement failed is applied with its recorded increment.

    Args:
        result: the dialogue.
        config: constants of the model; by default those that the file was made with.
    """
    trajectory = Trajectory(result.initial, config or result.config())
    for turn in result.turns:
        trajectory.advance(turn.progress or turn.increment, turn.turn)
    trajectory.total_turns = result.total_turns
    return trajectory


def recorded(result: ResultFile) -> Trajectory:
    """The trajectory with the file's own, rounded numbers where it has them.

    Its EPM-Q is that of EMPA's tables to the last digit; ours of :func:`replay` differs from it by
    what was rounded (up to 0.2 in ``sproj`` of a case, 0.01 in the mean over cases).
    """
    trajectory = replay(result)
    pairs = zip(trajectory.turns, result.turns, strict=True)
    trajectory.turns = [
        replace(ours, state=turn.state or ours.state, **turn.numbers) for ours, turn in pairs
    ]
    return trajectory


def _error(root: Field) -> str:
    """What a run failed of; empty for one that did not."""
    failed = root["status"].value in ("error", "failed") or (root["error"] and not root["epj"])
    return str(root["error"].value or "for an unknown reason") if failed else ""


def _history(messages: Field) -> tuple[tuple[str, str], ...]:
    """User messages with the replies to them; messages of one speaker in a row are joined."""
    said: list[tuple[list[str], list[str]]] = []
    for message in messages:
        role = message["role"].text()
        if role not in _USER + _MODEL:
            raise message["role"].wrong(f"one of {', '.join(_USER + _MODEL)}")
        if not said or (role in _USER and said[-1][1]):
            said.append(([], []))
        said[-1][role in _MODEL].append(message["content"].text(empty=True))
    return tuple(("\n".join(user), "\n".join(model)) for user, model in said)


def _turns(points: Sequence[Field]) -> tuple[ResultTurn, ...]:
    turns: list[ResultTurn] = []
    for point in points:
        least = turns[-1].turn + 1 if turns else 1
        number = point["turn"].integer(least) if point["turn"] else least
        progress = _progress(point["mdep_analysis"]) if point["mdep_analysis"] else None
        v = increment(progress) if progress and not point["v_t"] else _state(point["v_t"])
        fields = {name: point["epm"].get(key) for key, name in _RECORDED.items()}
        fields["distance"] = point["distance"]
        numbers = {name: field.number() for name, field in fields.items() if field}
        state = _state(point["P_t"]) if point["P_t"] else None
        turns.append(ResultTurn(number, progress, v, state, numbers, point.name))
    return tuple(turns)


def _progress(form: Field) -> Progress:
    """The levels of a filled form; like EMPA, one that is missing or out of range counts as 0."""
    axes = []
    for axis in AXES:
        letter = axis[0].upper()
        fields = [form.first(f"{letter}_{p}_level", f"{letter}.{p}") for p in ("Prog", "Neg")]
        progress, setback = (field.integer() if field else 0 for field in fields)
        said = [form[f"{letter}_{part}_evidence"].value for part in ("Prog", "Neg")]
        axes.append(
            AxisLevels(
                progress if progress in (0, 1, 2) else 0,
                setback if setback in (0, -1, -2) else 0,
                " / ".join(
                    text for text in said if isinstance(text, str) and text not in ("", "0")
                ),
            )
        )
    return Progress(*axes)


def _state(field: Field) -> State:
    c, a, p = field.numbers(3)
    return (c, a, p)
