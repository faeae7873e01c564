"""Labelled replies: what a careful reader gave them, for fitting judges and for judging judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from normkit.errors import InputError, MissingDependencyError
from normkit.rl.environments.scenario import Scenario, builtin_scenarios
from normkit.rl.judge import JudgeRequest
from normkit.rl.rubric import AXES, AxisLevels, Progress


@dataclass(frozen=True)
class Labelled:
    """A reply and the rubric that a reader filled for it."""

    request: JudgeRequest
    label: Progress


def load_labelled(path: str | Path | None = None) -> list[Labelled]:
    """Read labelled replies.

    Args:
        path: a YAML file with a list of replies: ``scenario`` (one of those that normkit ships),
            ``reply``, ``[progress, setback]`` of each axis, and where they are not the opening of a
            dialogue ``message``, ``history`` (pairs) and ``truncated``. The replies that normkit
            ships for calibration if None.

    Raises:
        InputError: where a reply names a scenario that is not there, or a level is out of range.
        MissingDependencyError: where PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError:
        raise MissingDependencyError("pyyaml", "rl") from None
    if path is None:
        file = resources.files("normkit.data.labelled").joinpath("calibration.yaml")
        text = file.read_text("utf-8")
    else:
        text = Path(path).read_text("utf-8")
    splits = (builtin_scenarios("train"), builtin_scenarios("heldout"))
    scenarios = {scenario.id: scenario for split in splits for scenario in split}
    rows: Sequence[Mapping[str, Any]] = yaml.safe_load(text)
    return [_labelled(row, scenarios) for row in rows]


def _labelled(row: Mapping[str, Any], scenarios: Mapping[str, Scenario]) -> Labelled:
    scenario = scenarios.get(row["scenario"])
    if scenario is None:
        raise InputError(f"scenario must be one that normkit ships, got {row['scenario']!r}")
    request = JudgeRequest(
        scenario=scenario,
        history=tuple((said, reply) for said, reply in row.get("history", ())),
        message=row.get("message", scenario.opening),
        reply=row["reply"],
        truncated=row.get("truncated", False),
    )
    return Labelled(request, Progress(*(AxisLevels(*row[axis]) for axis in AXES)))
