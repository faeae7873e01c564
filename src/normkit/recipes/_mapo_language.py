"""A chat model in emotional-support dialogues: ``normkit run mapo``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normkit.recipes._language import Played, Study, conduct, open_trainer
from normkit.recipes.mapo import Config, make_environment
from normkit.rl.environment import HELDOUT_SEED
from normkit.rl.trainer import Trainer

SCORE = "EPM-Q"


def run_language(config: Config, folder: Path) -> Mapping[str, Any]:
    """Train a chat model with MAPO or a baseline, scored on held-out scenarios before and after."""
    world = make_environment(config, folder)
    trainer, console = open_trainer(config, folder, world, SCORE, config.training, config.loss)
    study = Study(
        title=f"normkit run mapo: {config.estimator}",
        about=f"{config.estimator} on {config.model}, judge {config.judge}",
        score=SCORE,
        metrics=("score", "closed", "stability"),
        play=_play,
        tasks="held-out scenarios",
    )
    results = conduct(trainer, folder, study, console)
    if config.save_hf is not None:
        trainer.save_hf(config.save_hf)
        console.print(f"model saved to {config.save_hf}")
    return results


def _play(trainer: Trainer) -> Played:
    """Every held-out scenario, sampled as in training and greedily."""
    modes = (("sampled", False), ("greedy", True))
    return {m: trainer.evaluate(greedy=greedy, seed=HELDOUT_SEED) for m, greedy in modes}
