"""The loop of multi-turn RL: roll out, judge, normalize, update, log, checkpoint.

One step samples ``groups`` tasks with ``group_size`` dialogues each, credits every turn with the
chosen estimator, and trains each dialogue in one forward pass over its whole packed text.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from normkit.errors import InputError, MissingDependencyError
from normkit.files import replaced_folder
from normkit.rl.advantage import estimate, get_estimator
from normkit.rl.checkpoint import load_checkpoint, save_checkpoint, trainable
from normkit.rl.dialogue import (
    Dialogue,
    PackedRow,
    TurnTable,
    finite_mean,
    micro_batches,
    pack,
    turn_table,
)
from normkit.rl.environment import Environment, Split, evaluation_tasks
from normkit.rl.loss import PolicyLossConfig, aggregation_weights, kl_estimate, policy_loss
from normkit.rl.models import resolve_dtype, with_lora
from normkit.rl.policy import TokenBatch, collate, token_logprobs
from normkit.rl.rollout import Rollout, RolloutConfig
from normkit.runs import RunLogger

Report = Callable[[str, Mapping[str, Any]], None]

_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Kinds of accelerate's engine that keep no whole model in any process."""


@dataclass(frozen=True)
class TrainerConfig:
    """Options of the trainer.

    Attributes:
        steps: rollout-and-update rounds.
        groups: tasks per step.
        group_size: dialogues per task, compared with one another.
        estimator: how turns are credited (a key of :data:`normkit.rl.advantage.ESTIMATORS`).
        estimator_options: its options.
        learning_rate: peak of the schedule.
        schedule: "constant" or "cosine" (to zero) after the warm-up.
        warmup_steps: updates of linear warm-up.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        mini_batches: updates that one batch is split into.
        epochs: passes over a batch.
        micro_batch_tokens: padded tokens of one forward pass; bounds memory.
        lora_rank: rank of LoRA adapters; 0 trains all weights.
        autocast: dtype of the forward pass: "auto", "float32" or "bfloat16".
        recompute: compute the layers' activations again in the backward pass instead of keeping
            them; less memory for about a third more time.
        checkpoint_every: steps between checkpoints; 0 keeps only the last.
        evaluate_every: steps between evaluations on held-out tasks; 0 evaluates never.
        seed: of tasks, sampling and adapters.
    """

    steps: int = 24
    groups: int = 4
    group_size: int = 4
    estimator: str = "mapo"
    estimator_options: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mini_batches: int = 1
    epochs: int = 1
    micro_batch_tokens: int = 2048
    lora_rank: int = 0
    autocast: Literal["auto", "float32", "bfloat16"] = "auto"
    recompute: bool = False
    checkpoint_every: int = 10
    evaluate_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "groups", "group_size", "mini_batches", "epochs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("checkpoint_every", "evaluate_every", "warmup_steps", "lora_rank"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}")
        if get_estimator(self.estimator).needs:
            raise InputError(f"estimator {self.estimator!r} needs a critic, which is not built")
        if self.mini_batches > self.groups * self.group_size:
            raise InputError("mini_batches must not exceed groups x group_size")


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
        try:
            from accelerate import Accelerator
        except ImportError:
            raise MissingDependencyError("accelerate", "rl") from None
        self.config = config or TrainerConfig()
        self.loss = loss or PolicyLossConfig()
        self.environment = environment
        self.tokenizer = tokenizer
        self.logger = logger
        self.report: Report = report or (lambda _phase, _numbers: None)
        self.accelerator = Accelerator()
        if self.accelerator.distributed_type.name in _SHARDED:
            raise InputError(
                "accelerate: the trainer runs in one process or data-parallel; to shard a model, "
                "use the estimators in TRL or verl (normkit.integrations)"
            )
        self.step = 0
        self.best: dict[str, float] = {}
        # What a checkpoint may be written from: weights that no update is half through with.
        self._whole = True
        self._saved = 0

        torch.manual_seed(self.config.seed)
        self.reference: nn.Module | None = None
        if self.config.lora_rank:
            model = with_lora(model, self.config.lora_rank)
        elif self.loss.kl_weight:
            self.reference = deepcopy(model).eval().requires_grad_(False)
        self.rollout_config = rollout or RolloutConfig()
        # Dropout would make the trained log-probabilities those of another policy.
        model.eval()
        optimizer = torch.optim.AdamW(
            trainable(model).values(),
            lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        self.policy, self.optimizer = self.accelerator.prepare(model, optimizer)
        if self.reference is not None:
            self.reference.to(self.accelerator.device)
        self.rollout = Rollout(self.model, tokenizer, self.rollout_config)

    @property
    def model(self) -> Any:
        """The model that is trained, without its data-parallel wrapper."""
        return self.accelerator.unwrap_model(self.policy)

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
                if checkpoint is not None and self._whole and self.step > self._saved:
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
        ours = [task for task in tasks if task[1] % self._world == self._rank]
        dialogues = self.rollout.run(self.environment, ours)
        generated = time.perf_counter()
        numbers = self.update(dialogues)
        finished = time.perf_counter()
        described = self._describe(dialogues)
        tokens = described.pop("sampled_tokens")
        numbers.update(described)
        numbers.update(
            rollout_seconds=generated - started,
            update_seconds=finished - generated,
            sampled_tokens_per_second=tokens / max(generated - started, 1e-9),
            trained_tokens_per_second=tokens / max(finished - generated, 1e-9),
        )
        self.step += 1
        self._whole = True
        if self.logger is not None and self._rank == 0:
            self.logger.log(self.step, numbers)
            rows = [{"step": self.step, **_sample(d)} for d in dialogues[:2]]
            self.logger.append("dialogues", rows)
        self.report("train", {"step": self.step, "steps": self.config.steps, **numbers})
        return numbers

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _evaluate_midway(self, best: str | Path | None) -> None:
        """Score the held-out tasks, log it, and keep the best checkpoint so far."""
        scores = [d.scores["score"] for d in self.evaluate(seed=self.config.seed)]
        score = finite_mean(scores)
        numbers = {"score": score, "tasks": len(scores)}
        if self.logger is not None and self._rank == 0:
            self.logger.append("heldout", [{"step": self.step, **numbers}])
        self.report("evaluate", {"step": self.step, "steps": self.config.steps, **numbers})
        if score > self.best.get("score", -math.inf):
            self.best = {"step": self.step, "score": score}
            if best is not None:
                self._write(best)
                self.accelerator.wait_for_everyone()

    def schedule(self, step: int) -> list[tuple[str, int, int]]:
        """Tasks of a step as ``(task, group, seed)``: shuffled passes over the training tasks."""
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
        sampling = self.rollout.config
        self.rollout.config = replace(sampling, greedy=greedy)
        try:
            return self.rollout.run(self.environment, tasks)
        finally:
            self.rollout.config = sampling

    # ------------------------------------------------------------------ the update

    def update(self, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
        """Credit and train a batch of dialogues; return the update's numbers."""
        table = turn_table(dialogues)
        advantage = self._advantage(table)
        rows = pack(dialogues)
        owner = torch.tensor([i for i, d in enumerate(dialogues) for _ in d.segments])
        keep = [i for i, row in enumerate(rows) if bool((row.turn_row >= 0).any())]
        several = self.config.mini_batches * self.config.epochs > 1
        old = self._logprobs_of(rows, keep) if several else None
        totals: dict[str, float] = {}
        updates = 0
        for epoch in range(self.config.epochs):
            order = np.random.default_rng([self.config.seed, self.step, epoch]).permutation(
                len(dialogues)
            )
            for part in np.array_split(order, self.config.mini_batches):
                members = set(part.tolist())
                chosen = [i for i in keep if int(owner[i]) in members]
                rate = self._rate(updates)
                numbers = self._optimize(rows, chosen, owner, table, advantage, old, rate)
                updates += 1
                for name, value in numbers.items():
                    totals[name] = totals.get(name, 0.0) + value
        numbers = {name: value / updates for name, value in totals.items()}
        known = advantage[table.mask].abs()
        size, count = self._reduce(torch.tensor([float(known.sum()), float(len(known))]), "sum")
        numbers["advantage_abs"] = float(size / count.clamp_min(1))
        return numbers

    def _optimize(
        self,
        rows: Sequence[PackedRow],
        chosen: Sequence[int],
        owner: Tensor,
        table: TurnTable,
        advantage: Tensor,
        old: dict[int, Tensor] | None,
        rate: float,
    ) -> dict[str, float]:
        device = self.accelerator.device
        self.optimizer.zero_grad(set_to_none=True)  # a failed pass may have left some
        batches = micro_batches([rows[i] for i in chosen], self.config.micro_batch_tokens)
        weights, units = self._weights(rows, chosen, owner, table)
        sums: dict[str, float] = {}
        # Every process must take part in the same number of passes: the wrapper waits for all.
        passes = int(self._reduce(torch.tensor(float(len(batches))), "max"))
        for number in range(passes):
            last = number == passes - 1
            with self._sync(last):
                if number >= len(batches):
                    self._empty_pass()
                    continue
                members = [chosen[k] for k in batches[number]]
                batch = collate([rows[i] for i in members], device)
                turn = batch.turn_row.cpu()
                weight = torch.cat([weights[i] for i in members]) / units
                with self._autocast():
                    logprob, entropy = token_logprobs(
                        self.policy,
                        batch,
                        self.rollout_config.temperature,
                        entropy=True,
                        recompute=self.config.recompute,
                    )
                previous = (
                    logprob.detach()
                    if old is None
                    else torch.cat([old[i] for i in members]).to(device)
                )
                loss, metrics = policy_loss(
                    logprob,
                    previous,
                    advantage[turn].to(device, torch.float32),
                    batch.turn_row,
                    table.dialogue[turn].to(device),
                    weight.to(device),
                    self.loss,
                    self._reference_logprobs(batch),
                    # Without a bonus it is a number to watch, and costs no backward pass.
                    entropy if self.loss.entropy_weight or entropy is None else entropy.detach(),
                )
                with torch.no_grad():
                    gap = kl_estimate(batch.logprob, logprob.detach(), "k3")
                    metrics["sampling_kl"] = (weight.to(device) * gap).sum()
                self.accelerator.backward(loss * self._world)
            for name, value in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        names = sorted(sums)
        values = self._reduce(torch.tensor([sums[n] for n in names], dtype=torch.float64), "sum")
        norm = self.accelerator.clip_grad_norm_(
            trainable(self.policy).values(), self.config.max_grad_norm
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if torch.isfinite(norm):
            self._whole = False
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            **dict(zip(names, values.tolist(), strict=True)),
            "grad_norm": float(norm),
            "learning_rate": rate,
            "skipped_updates": float(not torch.isfinite(norm)),
        }

    def _weights(
        self,
        rows: Sequence[PackedRow],
        chosen: Sequence[int],
        owner: Tensor,
        table: TurnTable,
    ) -> tuple[dict[int, Tensor], float]:
        """Weight of each token that counts, per row, and the units of all processes together."""
        tokens = {i: rows[i].turn_row[rows[i].turn_row >= 0] for i in chosen}
        turn = torch.cat([*tokens.values(), torch.zeros(0, dtype=torch.int64)])
        dialogue = table.dialogue[turn]
        counts = table.mask[turn]
        flat = torch.zeros(len(turn))
        flat[counts] = aggregation_weights(turn[counts], dialogue[counts], self.loss.aggregate)
        units = float(self._reduce(flat.sum(), "sum"))
        split = torch.split(flat, [len(t) for t in tokens.values()]) if tokens else ()
        return dict(zip(tokens, split, strict=True)), max(units, 1.0)

    def _advantage(self, table: TurnTable) -> Tensor:
        """Advantages of our rows, from the statistics of all processes' rows."""
        fields = (table.reward, table.dialogue, table.turn, table.group)
        rows, source = self._gather_rows(torch.stack([f.double() for f in fields], 1))
        # A reward that is not finite says that the turn was not judged: no mask is needed.
        reward, dialogue, turn, group = rows.unbind(1)
        whole = estimate(
            self.config.estimator,
            reward,
            # Dialogues are numbered within their process.
            dialogue.long() * self._world + source,
            turn.long(),
            group.long(),
            **self.config.estimator_options,
        )
        return whole[source == self._rank]

    def _describe(self, dialogues: Sequence[Dialogue]) -> dict[str, Any]:
        """What the step's dialogues of all processes were like."""
        turns, _ = self._gather_rows(
            torch.tensor(
                [
                    (t, turn.reward, len(turn.token_ids), turn.truncated)
                    for d in dialogues
                    for t, turn in enumerate(d.turns)
                ],
                dtype=torch.float64,
            ).reshape(-1, 4)
        )
        ends, _ = self._gather_rows(
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

    def _gather_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``[N, F]`` of every process, process by process, and the process of each row."""
        if self._world == 1:
            return rows, torch.zeros(len(rows), dtype=torch.int64)
        device = self.accelerator.device
        most = int(self._reduce(torch.tensor(float(len(rows))), "max"))
        padded = rows.new_full((most, rows.shape[1] + 1), -1.0)
        padded[: len(rows), :-1], padded[: len(rows), -1] = rows, self._rank
        gathered = self.accelerator.gather(padded.to(device)).cpu()
        gathered = gathered[gathered[:, -1] >= 0]
        return gathered[:, :-1], gathered[:, -1].long()

    def _logprobs_of(self, rows: Sequence[PackedRow], chosen: Sequence[int]) -> dict[int, Tensor]:
        """Log-probabilities before the first update, per row."""
        found: dict[int, Tensor] = {}
        for places in micro_batches([rows[i] for i in chosen], self.config.micro_batch_tokens):
            members = [chosen[k] for k in places]
            batch = collate([rows[i] for i in members], self.accelerator.device)
            with torch.no_grad(), self._autocast():
                logprob, _ = token_logprobs(self.model, batch, self.rollout_config.temperature)
            lengths = [int((rows[i].turn_row >= 0).sum()) for i in members]
            found.update(zip(members, torch.split(logprob.cpu(), lengths), strict=True))
        return found

    def _reference_logprobs(self, batch: TokenBatch) -> Tensor | None:
        if not self.loss.kl_weight:
            return None
        temperature = self.rollout_config.temperature
        with torch.no_grad(), self._autocast():
            if self.reference is not None:
                return token_logprobs(self.reference, batch, temperature)[0]
            # With adapters switched off the model is its own reference.
            with self.model.disable_adapter():
                return token_logprobs(self.model, batch, temperature)[0]

    def _empty_pass(self) -> None:
        """Take part in a pass without rows of our own: one token that weighs nothing.

        It goes through the wrapped model, whose forward pass is what readies the exchange.
        """
        row = PackedRow(torch.zeros(2, dtype=torch.int64), torch.tensor([-1, 0]), torch.zeros(2))
        with self._autocast():
            logprob, _ = token_logprobs(self.policy, collate([row], self.accelerator.device))
        self.accelerator.backward(logprob.sum() * 0.0)

    def _rate(self, update: int) -> float:
        """Learning rate of an update of the current step."""
        updates = self.config.mini_batches * self.config.epochs
        done = self.step * updates + update
        total = self.config.steps * updates
        rate = self.config.learning_rate
        if done < self.config.warmup_steps:
            return rate * (done + 1) / (self.config.warmup_steps + 1)
        if self.config.schedule == "cosine":
            share = (done - self.config.warmup_steps) / max(total - self.config.warmup_steps, 1)
            return rate * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        return rate

    # ------------------------------------------------------------------ keeping it

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint that :meth:`resume` goes on from, number for number."""
        self._write(folder)
        self._saved = self.step
        self.accelerator.wait_for_everyone()

    def resume(self, folder: str | Path) -> None:
        """Go on from a checkpoint; log lines newer than it are forgotten."""
        state = load_checkpoint(folder, self.model, self._bare_optimizer)
        self.step = self._saved = int(state["step"])
        self.best = dict(state.get("best", {}))
        if self.logger is not None and self._rank == 0:
            self.logger.rewind(self.step)

    def _write(self, folder: str | Path) -> None:
        if self._rank == 0:
            state = {"step": self.step, "best": self.best}
            save_checkpoint(folder, self.model, self._bare_optimizer, state)

    def save_hf(self, folder: str | Path) -> None:
        """Export the model, adapters merged, as a folder that plain transformers loads."""
        if self._rank != 0:
            return
        model = self.model
        if hasattr(model, "merge_and_unload"):
            model = deepcopy(model).merge_and_unload()
        with replaced_folder(folder) as new:
            model.save_pretrained(new)
            self.tokenizer.save_pretrained(new)

    # ------------------------------------------------------------------ engine

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        bare: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return bare

    @property
    def _world(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def _rank(self) -> int:
        return int(self.accelerator.process_index)

    def _reduce(self, value: Tensor, how: Literal["sum", "max"]) -> Tensor:
        if self._world == 1:
            return value
        gathered: Tensor = self.accelerator.gather(value[None].to(self.accelerator.device))
        return (gathered.sum(0) if how == "sum" else gathered.amax(0)).cpu()

    @contextlib.contextmanager
    def _sync(self, last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.policy):
            yield

    def _autocast(self) -> torch.autocast:
        device = self.accelerator.device
        dtype = resolve_dtype(self.config.autocast, device)
        return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


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
