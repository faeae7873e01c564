"""The update of multi-turn RL: credit a batch of dialogues and train on it.

Each dialogue is trained in one forward pass over its whole packed text. The loss of a batch is a
sum over tokens whose weights are those of the whole batch, so that micro-batches and processes add
up to the batch at once.

Shapes: M sampled tokens of a batch, m of a micro-batch, N turns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from normkit.optim import ClippingBias
from normkit.rl.checkpoint import trainable
from normkit.rl.credit import Credit, SampledTokens, token_credit, turn_advantage, turn_credit
from normkit.rl.critic import ValueHead, explained_variance, value_loss, variance_sums
from normkit.rl.dialogue import Dialogue, PackedRow, TurnTable, micro_batches, pack, turn_table
from normkit.rl.engine import Engine
from normkit.rl.loss import (
    PolicyLossConfig,
    aggregation_weights,
    complementary_loss,
    kl_estimate,
    policy_loss,
    sampling_weight,
)
from normkit.rl.models import resolve_dtype, with_lora
from normkit.rl.policy import (
    TokenBatch,
    collate,
    state_logprobs,
    takes_trees,
    token_logprobs,
    token_states,
)
from normkit.rl.trainer_config import TrainerConfig


class _Batch(NamedTuple):
    """What a batch of dialogues is trained with.

    Attributes:
        rows: the packed rows.
        owner: dialogue of each row.
        tokens: their sampled tokens.
        columns: by name, a number for each sampled token ``[M]``: its "dialogue", whether its turn
            was judged ("known"), its "advantage"; its log-probability before the first update
            ("old", where there are several); the critic's "value" before it, the "target" of that
            value, and whether there is one ("valued").
    """

    rows: Sequence[PackedRow]
    owner: Sequence[int]
    tokens: SampledTokens
    columns: Mapping[str, Tensor]


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
        critic: the value head, where the estimator needs values.
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
        self.critic: ValueHead | None = None
        groups: list[dict[str, Any]] = [{"params": list(trainable(model).values())}]
        if config.needs_critic:
            width = model.config.get_text_config().hidden_size
            self.critic = ValueHead(width, config.critic.detach).to(engine.device)
            head = {"params": list(self.critic.parameters()), "lr": config.critic.learning_rate}
            groups.append({**head, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(
            groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self.policy, self.optimizer = engine.prepare(model, optimizer)
        if self.reference is not None:
            self.reference.to(engine.device)
        self.correction: ClippingBias | None = None
        if config.correction is not None:
            self.correction = ClippingBias(
                trainable(self.policy).values(), config.correction, config.correction_floor
            )

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

        Returns:
            Means over the batch's updates (of what ends in "_max", the largest), and as "updates"
            the numbers of each, with its "staleness": the updates since the batch was sampled.
        """
        batch = self._credited(dialogues)
        updates: list[dict[str, float]] = []
        staleness = 0.0
        for epoch in range(self.config.epochs):
            luck = np.random.default_rng([self.config.seed, step, epoch])
            order = luck.permutation(len(dialogues))
            # A seat whose game was over before its turn came has said nothing.
            spoken = order[np.isin(order, batch.owner)]
            for part in np.array_split(spoken, self.config.mini_batches):
                members = set(part.tolist())
                chosen = [i for i in batch.tokens.rows if batch.owner[i] in members]
                numbers = self._optimize(batch, chosen, self.share(step, len(updates)))
                updates.append({"staleness": staleness, **numbers})
                staleness += 1 - numbers["skipped_updates"]
        return {**_summary(updates), **self._credit_numbers(batch), "updates": updates}

    def advantage(self, table: TurnTable) -> Tensor:
        """Advantages ``[N]`` of our turns by an estimator that needs no critic."""
        options = self.config.estimator_options
        return turn_advantage(table, self.engine, self.config.estimator, options)

    def share(self, step: int, update: int) -> float:
        """Learning rates of an update of a step, as a share of their peaks."""
        updates = self.config.mini_batches * self.config.epochs
        done = step * updates + update
        total = self.config.steps * updates
        if done < self.config.warmup_steps:
            return (done + 1) / (self.config.warmup_steps + 1)
        if self.config.schedule == "cosine":
            share = (done - self.config.warmup_steps) / max(total - self.config.warmup_steps, 1)
            return 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        return 1.0

    # ------------------------------------------------------------------ before the first update

    def _credited(self, dialogues: Sequence[Dialogue]) -> _Batch:
        """Credit the tokens of a batch, with the policy and the critic as they are."""
        rows, table = pack(dialogues), turn_table(dialogues)
        owner = [i for i, d in enumerate(dialogues) for _ in d.segments]
        tokens = SampledTokens(rows)
        columns = {"dialogue": table.dialogue[tokens.turn], "known": table.mask[tokens.turn]}
        columns.update(self._before(rows, tokens))
        if self.critic is None:
            columns["advantage"] = self.advantage(table)[tokens.turn].float()
        else:
            credit = self._critic_credit(table, tokens, columns["value"])
            columns["advantage"] = credit.advantage.float()
            columns.update(target=credit.target.float(), valued=credit.valued)
        return _Batch(rows, owner, tokens, columns)

    def _critic_credit(self, table: TurnTable, tokens: SampledTokens, value: Tensor) -> Credit:
        options = self.config.estimator_options
        if self.config.critic.level == "token":
            return token_credit(table, tokens, self.engine, value, **options)
        return turn_credit(table, tokens, self.engine, self.config.estimator, options, value)

    @torch.no_grad()
    def _before(self, rows: Sequence[PackedRow], tokens: SampledTokens) -> dict[str, Tensor]:
        """What updates are going to change: log-probabilities, if there are several, and values."""
        several = self.config.mini_batches * self.config.epochs > 1
        wanted = [*["old"] * several, *["value"] * (self.critic is not None)]
        columns = {name: torch.zeros(len(tokens.turn)) for name in wanted}
        for members in self._micro_batches(rows, tokens.rows) if wanted else ():
            batch, places = self._collate(rows, members), tokens.places(members)
            with self._autocast():
                hidden, head = token_states(self.model, batch)
                if several:
                    found, _ = state_logprobs(hidden, head, batch.target, self.temperature)
                    columns["old"][places] = found.cpu()
            if self.critic is not None:
                columns["value"][places] = self.critic(hidden).cpu()
        return columns

    def _credit_numbers(self, batch: _Batch) -> dict[str, float]:
        """Mean size of the advantages over turns, and how much of the returns the critic knew."""
        known, columns = batch.columns["known"], batch.columns
        turn = batch.tokens.turn[known]
        weight = aggregation_weights(turn, turn, "turn").double()
        sums = [torch.stack([(weight * columns["advantage"][known].abs()).sum(), weight.sum()])]
        if self.critic is not None:
            there = columns["valued"]
            sums.append(variance_sums(columns["target"][there], columns["value"][there]))
        size, count, *moments = self.engine.reduce(torch.cat(sums), "sum")
        numbers = {"advantage_abs": float(size / count.clamp_min(1))}
        if self.critic is not None:
            numbers["explained_variance"] = explained_variance(torch.stack(moments))
        return numbers

    # ------------------------------------------------------------------ one update

    def _optimize(self, batch: _Batch, chosen: Sequence[int], share: float) -> dict[str, float]:
        """Update once on the rows that were chosen, at a share of the peak learning rates."""
        self.optimizer.zero_grad(set_to_none=True)  # a failed pass may have left some
        if self.correction is not None:
            self.correction.forget()
        numbers = self._accumulate(batch, chosen)
        numbers.update(self._corrected())
        norm = self.engine.clip_gradients(
            [p for group in self.optimizer.param_groups for p in group["params"]],
            self.config.max_grad_norm,
        )
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = share * peak
        if torch.isfinite(norm):
            self.whole = False
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            **numbers,
            "grad_norm": float(norm),
            "learning_rate": share * self.config.learning_rate,
            "skipped_updates": float(not torch.isfinite(norm)),
        }

    def _accumulate(self, batch: _Batch, chosen: Sequence[int]) -> dict[str, float]:
        """Gather the gradients of the rows that were chosen, and their numbers."""
        columns = {**batch.columns, **self._weights(batch, chosen)}
        # A ratio of whole dialogues needs all their tokens at once.
        whole = [batch.owner[i] for i in chosen] if self.loss.ratio == "sequence" else None
        pieces = self._micro_batches(batch.rows, chosen, whole)
        totals: dict[str, float] = {}
        # Every process must take part in the same number of passes: the wrapper waits for all.
        passes = int(self.engine.reduce(torch.tensor(float(max(len(pieces), 1))), "max"))
        for number in range(passes):
            if number < len(pieces):
                data = self._collate(batch.rows, pieces[number])
                places = batch.tokens.places(pieces[number])
                part = {name: x[places].to(self.engine.device) for name, x in columns.items()}
            else:
                data, part = self._idle(columns)
            with self.engine.accumulating(self.policy, last=number == passes - 1):
                loss, metrics = self._loss(data, part)
                self.engine.backward(loss)
            for name, value in {"loss": loss.detach(), **metrics}.items():
                join = max if name.endswith("_max") else float.__add__
                totals[name] = join(totals.get(name, 0.0), float(value))
        return self._over_processes(totals)

    def _loss(
        self, batch: TokenBatch, part: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch, and its numbers; what clipping takes out of it is collected.

        Args:
            batch: the packed rows.
            part: columns of its sampled tokens ``[m]``.
        """
        with self._autocast():
            hidden, head = token_states(self.policy, batch, self.config.recompute)
            logprob, entropy = state_logprobs(
                hidden, head, batch.target, self.temperature, entropy=True
            )
        old = part.get("old", logprob.detach())
        advantage = part["advantage"]
        if self.loss.sampling_cap:
            cap = self.loss.sampling_cap
            advantage = advantage * sampling_weight(old, batch.logprob, cap)
        tokens = (logprob, old, advantage, batch.turn_row, part["dialogue"], part["weight"])
        loss, metrics = policy_loss(
            *tokens,
            self.loss,
            self._reference_logprobs(batch),
            # Without a bonus it is a number to watch, and costs no backward pass.
            entropy if self.loss.entropy_weight or entropy is None else entropy.detach(),
        )
        with torch.no_grad():
            gap = kl_estimate(batch.logprob, logprob, "k3")
            metrics["sampling_kl"] = (part["weight"] * gap).sum()
        if self.correction is not None:
            lost = complementary_loss(*tokens, self.loss)
            # Scaled as the engine scales the loss.
            self.correction.collect(None if lost is None else lost * self.engine.world)
        if self.critic is not None:
            error = value_loss(
                self.critic(hidden),
                part["value"],
                part["target"],
                part["value_weight"],
                self.config.critic.clip,
            )
            metrics["value_loss"] = error.detach()
            loss = loss + self.config.critic.weight * error
        return loss, metrics

    def _corrected(self) -> dict[str, float]:
        """Exchange the critic's gradients, and correct the policy's by their clipping bias."""
        if self.critic is not None:
            self.engine.average_gradients(self.critic.parameters())
        if self.correction is None:
            return {}
        norms = self.correction.correct()
        return {
            "bias_norm": float(norms.bias),
            "policy_grad_norm": float(norms.gradient),
            "corrected_grad_norm": float(norms.corrected),
        }

    def _weights(self, batch: _Batch, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Weights of tokens and of their values; those that count add up to 1 over processes."""
        turn, columns = batch.tokens.turn, batch.columns
        there = torch.zeros_like(columns["known"])
        there[batch.tokens.places(chosen)] = True
        own = there & columns["known"]
        weight = torch.zeros(len(turn))
        weight[own] = aggregation_weights(turn[own], columns["dialogue"][own], self.loss.aggregate)
        weights = {"weight": weight}
        if self.critic is not None:
            weights["value_weight"] = (there & columns["valued"]).float()
        units = self.engine.reduce(torch.stack([w.sum() for w in weights.values()]), "sum")
        return {
            name: w / unit.clamp_min(1)
            for (name, w), unit in zip(weights.items(), units, strict=True)
        }

    def _over_processes(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Add up the numbers of all processes; take the largest of what ends in "_max"."""
        found: dict[str, float] = {}
        for how in ("sum", "max"):
            names = sorted(name for name in totals if name.endswith("_max") == (how == "max"))
            values = torch.tensor([totals[name] for name in names], dtype=torch.float64)
            found.update(zip(names, self.engine.reduce(values, how).tolist(), strict=True))
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

    def _idle(self, columns: Mapping[str, Tensor]) -> tuple[TokenBatch, dict[str, Tensor]]:
        """A micro-batch for a pass without rows of our own: one token that weighs nothing.

        It goes through the wrapped model, whose forward pass is what readies the exchange.
        """
        row = PackedRow(torch.zeros(2, dtype=torch.int64), torch.tensor([-1, 0]), torch.zeros(2))
        device = self.engine.device
        nothing = {name: x.new_zeros(1, device=device) for name, x in columns.items()}
        return self._collate([row], [0]), nothing

    def _micro_batches(
        self, rows: Sequence[PackedRow], chosen: Sequence[int], unit: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Split some rows into micro-batches; those of the same unit stay together."""
        budget = self.config.micro_batch_tokens
        trees = takes_trees(self.model)
        places = micro_batches([rows[i] for i in chosen], budget, unit, trees)
        return [[chosen[k] for k in piece] for piece in places]

    def _collate(self, rows: Sequence[PackedRow], members: Sequence[int]) -> TokenBatch:
        return collate([rows[i] for i in members], self.engine.device)

    def _autocast(self) -> torch.autocast:
        device = self.engine.device
        dtype = resolve_dtype(self.config.autocast, device)
        return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _summary(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over updates; of what ends in "_max", the largest."""
    summary = {}
    for name in updates[0]:
        values = [numbers[name] for numbers in updates]
        largest = name.endswith("_max")
        summary[name] = max(values) if largest else sum(values) / len(values)
    return summary
