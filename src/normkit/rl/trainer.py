"""The loop of multi-turn RL: roll out, judge, normalize, update, log, checkpoint.

One step samples ``groups`` tasks with ``group_size`` dialogues each, credits every turn with the
chosen estimator, and trains each dialogue in one forward pass over its whole packed text.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from normkit.errors import InputError
from normkit.files import check_new, replaced_folder
from normkit.rl.checkpoint import load_checkpoint, save_checkpoint
from normkit.rl.dialogue import Dialogue, finite_mean
from normkit.rl.engine import Engine
from normkit.rl.environment import Environment, Split, evaluation_tasks
from normkit.rl.loss import PolicyLossConfig
from normkit.rl.rollout import Rollout, RolloutConfig
from normkit.rl.trainer_config import TrainerConfig
from normkit.rl.update import PolicyUpdate
from normkit.runs import RunLogger

__all__ = ["Report", "Trainer", "TrainerConfig"]

Report = Callable[[str, Mapping[str, Any]], None]


class Trainer:
    """Trains a causal language model in a multi-turn world.

    Args:
        model: a float32 causal language model of transformers; changed in place.
        tokenizer: its tokenizer, with a chat template.
        environment: the world.
        config: options of the loop.
        rollout: options of generation.
        loss: options of the loss.
        logger: where numbers and samples go; None keeps nothing.
        report: called with a phase name and its numbers, for a live progress line.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        environment: Environment[Any],
        config: TrainerConfig | None = None,
        rollout: RolloutConfig | None = None,
        loss: PolicyLossConfig | None = None,
        logger: RunLogger | None = None,
        report: Report | None = None,
    ) -> None:
        self.config = config or TrainerConfig()
        self.environment = environment
        self.tokenizer = tokenizer
        self.logger = logger
        self.report: Report = report or (lambda _phase, _numbers: None)
        self.step = 0
        self.best: dict[str, float] = {}
        self._saved = 0

        self.engine = Engine()
        torch.manual_seed(self.config.seed)
        rollout = rollout or RolloutConfig()
        self.learner = PolicyUpdate(
            model,
            self.engine,
            self.config,
            loss or PolicyLossConfig(),
            rollout.temperature,
        )
        self.rollout = Rollout(self.model, tokenizer, rollout)

    @property
    def model(self) -> Any:
        """The model that is trained, without its data-parallel wrapper."""
        return self.learner.model

    # ------------------------------------------------------------------ the loop

    def train(self, checkpoint: str | Path | None = None, best: str | Path | None = None) -> None:
        """Run the remaining steps.

        Where a step fails or is interrupted before its update has begun, the steps before it are
        saved; in the middle of an update nothing is, and the last checkpoint stands.

        Args:
            checkpoint: folder that is written every ``checkpoint_every`` steps, at the end, and
                when a step fails; None keeps no checkpoint.
            best: folder for the checkpoint with the best held-out score (``evaluate_every``).
        """
        while self.step < self.config.steps:
            try:
                self.train_step()
                if self._due(self.config.evaluate_every):
                    self._evaluate_midway(best)
            except BaseException:
                if checkpoint is not None and self.learner.whole and self.step > self._saved:
                    # Other processes may be anywhere: there is no waiting for them.
                    with contextlib.suppress(OSError):
                        self._write(checkpoint)
                raise
            if checkpoint is not None and (
                self._due(self.config.checkpoint_every) or self.step == self.config.steps
            ):
                self.save(checkpoint)

    def train_step(self) -> dict[str, Any]:
        """Roll out one batch, credit it, update on it, and return the step's numbers."""
        started = time.perf_counter()
        self.rollout.sync(self.model)
        tasks = self.schedule(self.step)
        ours = [task for task in tasks if task[1] % self.engine.world == self.engine.rank]
        dialogues = self.rollout.run(self.environment, ours)
        generated = time.perf_counter()
        numbers = self.update(dialogues)
        updates = numbers.pop("updates")
        finished = time.perf_counter()
        described = self._describe(dialogues)
        tokens = described["sampled_tokens"]
        numbers.update(described)
        numbers.update(
            rollout_seconds=generated - started,
            update_seconds=finished - generated,
            sampled_tokens_per_second=tokens / max(generated - started, 1e-9),
            trained_tokens_per_second=tokens / max(finished - generated, 1e-9),
        )
        self.step += 1
        self.learner.whole = True
        if self.logger is not None and self.engine.rank == 0:
            self.logger.log(self.step, numbers)
            rows = [{"step": self.step, **_sample(d)} for d in dialogues[:2]]
            self.logger.append("dialogues", rows)
            if len(updates) > 1:
                self.logger.append("updates", [{"step": self.step, **u} for u in updates])
        self.report("train", {"step": self.step, "steps": self.config.steps, **numbers})
        return numbers

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _evaluate_midway(self, best: str | Path | None) -> None:
        """Score the held-out tasks, log it, and keep the best checkpoint so far."""
        scores = [d.scores["score"] for d in self.evaluate(seed=self.config.seed)]
        score = finite_mean(scores)
        numbers = {"score": score, "tasks": len(scores)}
        if self.logger is not None and self.engine.rank == 0:
            self.logger.append("heldout", [{"step": self.step, **numbers}])
        self.report("evaluate", {"step": self.step, "steps": self.config.steps, **numbers})
        if score > self.best.get("score", -math.inf):
            self.best = {"step": self.step, "score": score}
            if best is not None:
                self._write(best)
                self.engine.wait()

    def schedule(self, step: int) -> list[tuple[str, int, int]]:
        """Tasks of a step as ``(task, group, seed)``: shuffled passes over the training tasks.

        Raises:
            InputError: where the world has no training tasks.
        """
        names = list(self.environment.tasks("train"))
        if not names:
            raise InputError("environment: it has no training tasks")
        first = step * self.config.groups
        chosen = []
        for group in range(self.config.groups):
            turn, place = divmod(first + group, len(names))
            order = np.random.default_rng([self.config.seed, turn]).permutation(len(names))
            for member in range(self.config.group_size):
                seed = np.random.SeedSequence([self.config.seed, step, group, member])
                chosen.append((names[order[place]], group, int(seed.generate_state(1)[0])))
        return chosen

    def evaluate(
        self, split: Split = "heldout", greedy: bool = True, seed: int = 0, repeats: int = 1
    ) -> list[Dialogue]:
        """Play every task of a split with the current policy.

        Args:
            split: which tasks.
            greedy: most likely tokens instead of sampling.
            seed: of the sessions and the sampling.
            repeats: dialogues per task.
        """
        self.rollout.sync(self.model)
        tasks = [
            task
            for repeat in range(repeats)
            for task in evaluation_tasks(self.environment, split, seed, repeat)
        ]
        speech = replace(self.rollout.config, greedy=greedy)
        return self.rollout.with_config(speech).run(self.environment, tasks)

    def update(self, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
        """Credit and train a batch of dialogues; return its numbers (:meth:`PolicyUpdate.run`)."""
        return self.learner.run(dialogues, self.step)

    def _describe(self, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
        """What the step's dialogues of all processes were like."""
        turns, _ = self.engine.gather_rows(
            torch.tensor(
                [
                    (t, turn.reward, len(turn.token_ids), turn.truncated)
                    for d in dialogues
                    for t, turn in enumerate(d.turns)
                ],
                dtype=torch.float64,
            ).reshape(-1, 4)
        )
        ends, _ = self.engine.gather_rows(
            torch.tensor(
                [(d.scores["score"], d.end_reason == "success") for d in dialogues],
                dtype=torch.float64,
            ).reshape(-1, 2)
        )
        index, reward, tokens, truncated = turns.unbind(1)
        length = int(index.max()) + 1 if len(index) else 0
        share = max(len(turns), 1)
        return {
            "reward": finite_mean(reward.tolist()),
            "reward_by_turn": [finite_mean(reward[index == t].tolist()) for t in range(length)],
            "score": finite_mean(ends[:, 0].tolist()),
            "turns": len(turns) / max(len(ends), 1),
            "reply_tokens": float(tokens.sum()) / share,
            "sampled_tokens": float(tokens.sum()),
            "truncated": float(truncated.sum()) / share,
            "masked_turns": int((~torch.isfinite(reward)).sum()),
            "success": float(ends[:, 1].sum()) / max(len(ends), 1),
        }

    # ------------------------------------------------------------------ keeping it

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint that :meth:`resume` goes on from, number for number."""
        self._write(folder)
        self._saved = self.step
        self.engine.wait()

    def resume(self, folder: str | Path) -> None:
        """Go on from a checkpoint; log lines newer than it are forgotten."""
        state = load_checkpoint(
            folder, self.model, self.learner.bare_optimizer, self.learner.critic
        )
        self.step = self._saved = int(state["step"])
        self.best = dict(state.get("best", {}))
        if self.logger is not None and self.engine.rank == 0:
            self.logger.rewind(self.step)

    def _write(self, folder: str | Path) -> None:
        if self.engine.rank == 0:
            state = {"step": self.step, "best": self.best}
            optimizer, critic = self.learner.bare_optimizer, self.learner.critic
            save_checkpoint(folder, self.model, optimizer, state, critic)

    def save_hf(self, folder: str | Path) -> None:
        """Export the model, adapters merged, as a folder that plain transformers loads.

        Args:
            folder: to write; it must not exist, or be empty.

        Raises:
            InputError: where it is not.
        """
        if self.engine.rank != 0:
            return
        model = self.model
        if hasattr(model, "merge_and_unload"):
            model = deepcopy(model).merge_and_unload()
        with replaced_folder(check_new(folder)) as new:
            model.save_pretrained(new)
            self.tokenizer.save_pretrained(new)


def _sample(dialogue: Dialogue) -> dict[str, Any]:
    return {
        "task": dialogue.task,
        "end_reason": dialogue.end_reason,
        "scores": dialogue.scores,
        "turns": [
            {
                "message": turn.message,
                "reply": turn.reply,
                "reward": turn.reward,
                "info": dict(turn.info),
            }
            for turn in dialogue.turns
        ],
    }
