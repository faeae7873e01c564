"""A chat model in the tool world: ``normkit run matchtir --world language``.

SmolLM2-135M calls no tool of its own accord, so that no reward would ever tell its dialogues apart.
It is first shown reference dialogues of training tasks (``warm_start`` updates of supervised
learning); what is measured of the credit begins after that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normkit.recipes._language import Study, conduct, open_trainer, play_heldout, teach
from normkit.rl.environments.tools import ToolSession, ToolWorld

if TYPE_CHECKING:
    from normkit.recipes.matchtir import Config

SCORE = "solve-F1"
METRICS = ("score", "answer", "calls", "repeated", "wrong", "unreadable")


def run_language(config: Config, folder: Path) -> Mapping[str, Any]:
    """Train a chat model on questions that need tools, scored on held-out ones before and after."""
    world = ToolWorld(config.tools)
    trainer, console = open_trainer(config, folder, world, SCORE, config.training)
    study = Study(
        title=f"normkit run matchtir: {config.estimator}, {config.matching}",
        about=f"{config.estimator} on {config.model}",
        score=SCORE,
        metrics=METRICS,
        play=partial(play_heldout, count=config.heldout),
    )
    known = world.tasks("train")
    study = teach(trainer, folder, study, console, known, _reference, config.warm_start)
    return conduct(trainer, folder, study, console)


def _reference(session: ToolSession) -> str:
    """The next reply of the reference trace: a call, or the answer."""
    task, made = session.reference, len(session.calls)
    if made < len(task.gold):
        return f"<tool_call>{json.dumps(task.gold[made].to_json())}</tool_call>"
    return f"<answer>{task.answer}</answer>"
