"""The update of multi-turn RL: credit a batch of dialogues and train on it.

Each dialogue is trained in one forward pass over its whole packed text. The loss of a batch is a
sum over tokens whose weights are those of the whole batch, so that micro-batches and processes add
up to the batch at once.

Shapes: M sampled tokens, N turns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normkit.rl.advantage import estimate
from normkit.rl.checkpoint import trainable
from normkit.rl.dialogue import Dialogue, PackedRow, TurnTable, micro_batches, pack, turn_table
from normkit.rl.engine import Engine
from normkit.rl.loss import PolicyLossConfig, aggregation_weights, kl_estimate, policy_loss
from normkit.rl.models import resolve_dtype, with_lora
from normkit.rl.policy import TokenBatch, collate, token_logprobs
from normkit.rl.trainer_config import TrainerConfig


class PolicyUpdate:
    """Trains a causal language model on batches of dialogues.

    Args:
        model: a float32 causal language model of transformers; changed in place.
        engine: what the processes do together.
        config: options of the trainer.
        loss: options of the loss.
        temperature: temperature the replies are sampled at.

    Attributes:
        policy: the model, wrapped for the engine, with adapters where LoRA is on.
        optimizer: AdamW, wrapped for the engine.
        whole: False from the first change of the weights by a batch on; whoever calls sets it to
            True when the batch is done.
    """

    def __init__(
        self,
        model: Any,
        engine: Engine,
        config: TrainerConfig,
        loss: PolicyLossConfig,
        temperature: float,
    ) -> None:
        self.engine = engine
        self.config = config
        self.loss = loss
        self.temperature = temperature
        self.whole = True
        self.reference: nn.Module | None = None
        if config.lora_rank:
            model = with_lora(model, config.lora_rank)
        elif loss.kl_weight:
            self.reference = deepcopy(model).eval().requires_grad_(False)
        # Dropout would make the trained log-probabilities those of another policy.
        model.eval()
        optimizer = torch.optim.AdamW(
            trainable(model).values(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.policy, self.optimizer = engine.prepare(model, optimizer)
        if self.reference is not None:
            self.reference.to(engine.device)

    @property
    def model(self) -> Any:
        """The model that is trained, without its data-parallel wrapper."""
        return self.engine.unwrap(self.policy)

    @property
    def bare_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without the engine's wrapper."""
        bare: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return bare

    def run(self, dialogues: Sequence[Dialogue], step: int) -> dict[str, Any]:
        """Credit and train a batch of dialogues; return the update's numbers.

        Args:
            dialogues: this process's share of the batch.
            step: number of the step, from which the order of mini-batches and the learning rate
                follow.
        """
        table = turn_table(dialogues)
        advantage = self.advantage(table)
        rows = pack(dialogues)
        owner = torch.tensor([i for i, d in enumerate(dialogues) for _ in d.segments])
        keep = [i for i, row in enumerate(rows) if bool((row.turn_row >= 0).any())]
        several = self.config.mini_batches * self.config.epochs > 1
        old = self._logprobs_of(rows, keep) if several else None
        totals: dict[str, float] = {}
        updates = 0
        for epoch in range(self.config.epochs):
            order = np.random.default_rng([self.config.seed, step, epoch]).permutation(
                len(dialogues)
            )
            for part in np.array_split(order, self.config.mini_batches):
                members = set(part.tolist())
                chosen = [i for i in keep if int(owner[i]) in members]
                rate = self.rate(step, updates)
                numbers = self._optimize(rows, chosen, table, advantage, old, rate)
                updates += 1
                for name, value in numbers.items():
                    totals[name] = totals.get(name, 0.0) + value
        numbers = {name: value / updates for name, value in totals.items()}
        known = advantage[table.mask].abs()
        sums = torch.tensor([float(known.sum()), float(len(known))])
        size, count = self.engine.reduce(sums, "sum")
        numbers["advantage_abs"] = float(size / count.clamp_min(1))
        return numbers

    def advantage(self, table: TurnTable) -> Tensor:
        """Advantages ``[N]`` of our rows, from the statistics of all processes' rows."""
        fields = (table.reward, table.dialogue, table.turn, table.group, table.agent)
        rows, source = self.engine.gather_rows(torch.stack([f.double() for f in fields], 1))
        # A reward that is not finite says that the turn was not judged: no mask is needed.
        reward, *index = rows.unbind(1)
        dialogue, turn, group, agent = (x.long() for x in index)
        whole = estimate(
            self.config.estimator,
            reward,
            # Dialogues are numbered within their process.
            dialogue * self.engine.world + source,
            turn,
            group,
            agent=agent,
            **self.config.estimator_options,
        )
        return whole[source == self.engine.rank]

    def rate(self, step: int, update: int) -> float:
        """Learning rate of an update of a step."""
        updates = self.config.mini_batches * self.config.epochs
        done = step * updates + update
        total = self.config.steps * updates
        rate = self.config.learning_rate
        if done < self.config.warmup_steps:
            return rate * (done + 1) / (self.config.warmup_steps + 1)
        if self.config.schedule == "cosine":
            share = (done - self.config.warmup_steps) / max(total - self.config.warmup_steps, 1)
            return rate * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        return rate

    # ------------------------------------------------------------------ one update

    def _optimize(
        self,
        rows: Sequence[PackedRow],
        chosen: Sequence[int],
        table: TurnTable,
        advantage: Tensor,
        old: Mapping[int, Tensor] | None,
        rate: float,
    ) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)  # a failed pass may have left some
        batches = micro_batches([rows[i] for i in chosen], self.config.micro_batch_tokens)
        weights, units = self._weights(rows, chosen, table)
        sums: dict[str, float] = {}
        # Every process must take part in the same number of passes: the wrapper waits for all.
        passes = int(self.engine.reduce(torch.tensor(float(len(batches))), "max"))
        for number in range(passes):
            with self.engine.accumulating(self.policy, last=number == passes - 1):
                if number >= len(batches):
                    self._empty_pass()
                    continue
                members = [chosen[k] for k in batches[number]]
                batch = collate([rows[i] for i in members], self.engine.device)
                weight = torch.cat([weights[i] for i in members]) / units
                previous = None if old is None else torch.cat([old[i] for i in members])
                loss, metrics = self._loss(batch, weight, previous, table, advantage)
                self.engine.backward(loss)
            for name, value in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        names = sorted(sums)
        values = self.engine.reduce(
            torch.tensor([sums[n] for n in names], dtype=torch.float64), "sum"
        )
        norm = self.engine.clip_gradients(
            trainable(self.policy).values(), self.config.max_grad_norm
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if torch.isfinite(norm):
            self.whole = False
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            **dict(zip(names, values.tolist(), strict=True)),
            "grad_norm": float(norm),
            "learning_rate": rate,
            "skipped_updates": float(not torch.isfinite(norm)),
        }

    def _loss(
        self,
        batch: TokenBatch,
        weight: Tensor,
        previous: Tensor | None,
        table: TurnTable,
        advantage: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch, and sums of its numbers.

        Args:
            batch: the packed rows.
            weight: of each sampled token ``[M]``.
            previous: log-probabilities before the first update ``[M]``; None where this is it.
            table: the turns.
            advantage: of each turn ``[N]``.
        """
        device = self.engine.device
        turn = batch.turn_row.cpu()
        weight = weight.to(device)
        with self._autocast():
            logprob, entropy = token_logprobs(
                self.policy,
                batch,
                self.temperature,
                entropy=True,
                recompute=self.config.recompute,
            )
        loss, metrics = policy_loss(
            logprob,
            logprob.detach() if previous is None else previous.to(device),
            advantage[turn].to(device, torch.float32),
            batch.turn_row,
            table.dialogue[turn].to(device),
            weight,
            self.loss,
            self._reference_logprobs(batch),
            # Without a bonus it is a number to watch, and costs no backward pass.
            entropy if self.loss.entropy_weight or entropy is None else entropy.detach(),
        )
        with torch.no_grad():
            gap = kl_estimate(batch.logprob, logprob.detach(), "k3")
            metrics["sampling_kl"] = (weight * gap).sum()
        return loss, metrics

    def _weights(
        self, rows: Sequence[PackedRow], chosen: Sequence[int], table: TurnTable
    ) -> tuple[dict[int, Tensor], float]:
        """Weight of each token that counts, per row, and the units of all processes together."""
        tokens = {i: rows[i].turn_row[rows[i].turn_row >= 0] for i in chosen}
        turn = torch.cat([*tokens.values(), torch.zeros(0, dtype=torch.int64)])
        dialogue = table.dialogue[turn]
        counts = table.mask[turn]
        flat = torch.zeros(len(turn))
        flat[counts] = aggregation_weights(turn[counts], dialogue[counts], self.loss.aggregate)
        units = float(self.engine.reduce(flat.sum(), "sum"))
        split = torch.split(flat, [len(t) for t in tokens.values()]) if tokens else ()
        return dict(zip(tokens, split, strict=True)), max(units, 1.0)

    def _logprobs_of(self, rows: Sequence[PackedRow], chosen: Sequence[int]) -> dict[int, Tensor]:
        """Log-probabilities before the first update, per row."""
        found: dict[int, Tensor] = {}
        for places in micro_batches([rows[i] for i in chosen], self.config.micro_batch_tokens):
            members = [chosen[k] for k in places]
            batch = collate([rows[i] for i in members], self.engine.device)
            with torch.no_grad(), self._autocast():
                logprob, _ = token_logprobs(self.model, batch, self.temperature)
            lengths = [int((rows[i].turn_row >= 0).sum()) for i in members]
            found.update(zip(members, torch.split(logprob.cpu(), lengths), strict=True))
        return found

    def _reference_logprobs(self, batch: TokenBatch) -> Tensor | None:
        if not self.loss.kl_weight:
            return None
        with torch.no_grad(), self._autocast():
            if self.reference is not None:
                return token_logprobs(self.reference, batch, self.temperature)[0]
            # With adapters switched off the model is its own reference.
            with self.model.disable_adapter():
                return token_logprobs(self.model, batch, self.temperature)[0]

    def _empty_pass(self) -> None:
        """Take part in a pass without rows of our own: one token that weighs nothing.

        It goes through the wrapped model, whose forward pass is what readies the exchange.
        """
        row = PackedRow(torch.zeros(2, dtype=torch.int64), torch.tensor([-1, 0]), torch.zeros(2))
        with self._autocast():
            logprob, _ = token_logprobs(self.policy, collate([row], self.engine.device))
        self.engine.backward(logprob.sum() * 0.0)

    def _autocast(self) -> torch.autocast:
        device = self.engine.device
        dtype = resolve_dtype(self.config.autocast, device)
        return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
