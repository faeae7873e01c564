"""TRL: its GRPOTrainer with normkit's turn-level advantages, worlds and judges.

TRL keeps everything that it is used for (vLLM, DeepSpeed, FSDP, PEFT, logging, the loss); here each
token of a completion gets the advantage of its turn instead of the completion's::

    trainer = MAPOTrainer(model, environment, args=GRPOConfig(...), processing_class=tokenizer)
    trainer.train()

A world of normkit is played through TRL's ``rollout_func`` (:class:`WorldRollout`). A rollout or a
TRL environment of your own works too: see :class:`TurnAdvantageTrainer`. Written against TRL 1.16,
which calls both interfaces experimental.

Shapes: B completions of a process, L tokens of a completion (padded), N turns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normkit.errors import InputError, MissingDependencyError
from normkit.rl.advantage import estimate, get_estimator, to_tokens
from normkit.rl.chat_format import ChatFormat
from normkit.rl.dialogue import Dialogue, PackedRow, Segment, Turn, finite_mean, pack, settle
from normkit.rl.environment import Environment, Reply, SeatedEnvironment, Split
from normkit.rl.rollout import Rollout, RolloutConfig
from normkit.rl.token_grid import turns_of_mask

try:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
except ImportError:
    raise MissingDependencyError("trl", "trl") from None

_UNSAID = PackedRow(torch.zeros(2, dtype=torch.int64), torch.full((2,), -1), torch.zeros(2))
"""Stands for a dialogue without turns: TRL wants one token of prompt and one of completion."""


class TurnAdvantageTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPOTrainer with an advantage per turn.

    Where a completion's turn rewards come from, in this order:

    - the field ``turn_rewards`` of the rollout's output, a list per completion: a world of normkit
      fills it, and a ``rollout_func`` of your own may. Turns are the runs of its ``env_mask``, or
      what the field ``turn_ids`` says (a number per completion token, -1 outside of turns);
    - the attribute ``turn_rewards`` of a TRL environment (``environment_factory``): one number per
      assistant message;
    - else TRL's own reward of the completion, earned in its last turn.

    A reward that is NaN or None is unknown. Where the rollout's output has a field ``agent``, a
    number per completion (the seat in a game), agents are credited apart. Statistics are those of
    all processes together.

    Args:
        model: a model or name, as TRL takes it.
        environment: a world of normkit, which then supplies tasks, rollouts and rewards; None where
            ``kwargs`` say where completions come from.
        args: TRL's configuration. ``num_generations`` is the group size; prompts per step,
            optimizer and loss are set here too.
        estimator: how turns are credited (a key of :data:`normkit.rl.advantage.ESTIMATORS`).
        estimator_options: its options.
        rollout: options of generation in a world. None takes over ``temperature``, ``top_p`` and
            ``max_completion_length`` (here the length limit of one reply) from ``args``.
        kwargs: whatever else GRPOTrainer takes.

    Raises:
        InputError: for an unknown estimator, one that needs a critic, a world together with what it
            supplies, or one with fewer tasks than a step takes.
    """

    def __init__(
        self,
        model: Any,
        environment: Environment[Any] | None = None,
        *,
        args: GRPOConfig | None = None,
        estimator: str = "mapo",
        estimator_options: Mapping[str, Any] | None = None,
        rollout: RolloutConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if get_estimator(estimator).needs:
            raise InputError(
                f"estimator {estimator!r} needs a critic, which TRL's GRPOTrainer does not train: "
                "use normkit's own trainer, or verl (normkit.integrations.verl)"
            )
        if environment is None and rollout is not None:
            raise InputError("rollout must be None without an environment: nothing else reads it")
        if environment is not None:
            taken = [name for name in ("rollout_func", "environment_factory") if kwargs.get(name)]
            if taken:
                raise InputError(f"{taken[0]} must not be given together with environment")
            kwargs.setdefault("train_dataset", task_dataset(environment))
            kwargs.setdefault("reward_funcs", [dialogue_reward])
            kwargs["rollout_func"] = WorldRollout(environment, rollout)
        self.estimator = estimator
        self.estimator_options = dict(estimator_options or {})
        self._outcome = torch.zeros(0)
        super().__init__(model, args=args, **kwargs)
        needed = self.args.generation_batch_size // self.num_generations
        if environment is not None and (count := len(self.train_dataset)) < needed:
            # TRL would end at once, without a step.
            raise InputError(f"args: one step takes {needed} tasks, and environment has {count}")

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        weighted = rewards * self.reward_weights.to(rewards.device)
        unknown = torch.isnan(rewards).all(1)
        self._outcome = weighted.nansum(1).masked_fill(unknown, math.nan)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        turn = self._turns(inputs, output)
        rewards = self._turn_rewards(inputs, turn)
        agents = [int(example.get("agent", 0)) for example in inputs]
        advantage, mean = self._advantages(rewards, turn, agents)
        output["advantages"] = advantage.to(output["advantages"])
        # TRL has logged an advantage per completion; the mean over its turns is what it got.
        logged = self._logs["advantages"]
        for _ in range(min(len(mean), len(logged))):
            logged.pop()
        logged.extend(mean.tolist())
        return output

    def _turns(self, inputs: Sequence[Mapping[str, Any]], output: Mapping[str, Any]) -> Tensor:
        """Turn of each token ``[B, L]``, -1 outside, on the CPU."""
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        if "turn_ids" not in inputs[0]:
            return turns_of_mask(mask.cpu())
        turn = torch.full(mask.shape, -1, dtype=torch.int64)
        for row, example in zip(turn, inputs, strict=True):
            row[: len(example["turn_ids"])] = torch.tensor(example["turn_ids"])
        return turn.masked_fill(~mask.cpu().bool(), -1)

    def _turn_rewards(self, inputs: Sequence[Mapping[str, Any]], turn: Tensor) -> list[list[float]]:
        """Rewards of the turns of each completion."""
        counts = (turn.amax(1) + 1).tolist() if turn.shape[1] else [0] * len(turn)
        if "turn_rewards" in inputs[0]:
            found = [example["turn_rewards"] for example in inputs]
        elif hasattr((self.environments or [None])[0], "turn_rewards"):
            found = [environment.turn_rewards for environment in self.environments]
        else:
            first = self.accelerator.process_index * len(inputs)
            outcome = self._outcome[first : first + len(inputs)].tolist()
            found = [[0.0] * (n - 1) + [r] for n, r in zip(counts, outcome, strict=True)]
        rewards = [[math.nan if r is None else float(r) for r in row] for row in found]
        for row, count in zip(rewards, counts, strict=True):
            # A completion that TRL masks as a whole (truncated) keeps its rewards, without tokens.
            if count not in (0, len(row)):
                raise InputError(
                    f"turn_rewards must have one number per turn, got {len(row)} for {count} turns"
                )
        return rewards

    def _advantages(
        self, rewards: Sequence[Sequence[float]], turn: Tensor, agents: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Advantage of each token ``[B, L]``, and the means over turns of all completions."""
        size, rank = len(rewards), int(self.accelerator.process_index)
        rows = torch.tensor(
            [
                (r, rank * size + b, t, agents[b])
                for b, row in enumerate(rewards)
                for t, r in enumerate(row)
            ],
            dtype=torch.float64,
        ).reshape(-1, 4)
        everyone = self._gather_rows(rows)
        dialogue, index, agent = everyone[:, 1:].long().unbind(1)
        members = self.num_generations if self.model.training else self.num_generations_eval
        advantage = estimate(
            self.estimator,
            everyone[:, 0],
            dialogue,
            index,
            dialogue // members,
            agent=agent,
            **self.estimator_options,
        )
        ours = advantage[(dialogue >= rank * size) & (dialogue < (rank + 1) * size)]
        lengths = torch.tensor([len(row) for row in rewards])
        first = (lengths.cumsum(0) - lengths)[:, None]
        total = torch.zeros(size * int(self.accelerator.num_processes), dtype=torch.float64)
        count = torch.zeros_like(total).index_add(0, dialogue, torch.ones_like(advantage))
        mean = total.index_add(0, dialogue, advantage) / count.clamp(min=1)
        return to_tokens(ours, torch.where(turn < 0, -1, first + turn)), mean

    def _gather_rows(self, rows: Tensor) -> Tensor:
        """Rows of every process, process by process."""
        if self.accelerator.num_processes == 1:
            return rows
        device = self.accelerator.device
        rows = rows.to(device, torch.float32 if device.type == "mps" else torch.float64)
        padded = self.accelerator.pad_across_processes(rows, dim=0, pad_index=-1)
        gathered: Tensor = self.accelerator.gather(padded).cpu().double()
        return gathered[gathered[:, 1] >= 0]


class MAPOTrainer(TurnAdvantageTrainer):
    """MAPO (arXiv 2603.06194) in TRL: :class:`TurnAdvantageTrainer` with its estimator alone.

    Args:
        model: a model or name, as TRL takes it.
        environment: a world of normkit, or None.
        alpha: weight of the turn-level term.
        gamma: discount per turn.
        kwargs: as :class:`TurnAdvantageTrainer`.
    """

    def __init__(
        self,
        model: Any,
        environment: Environment[Any] | None = None,
        *,
        alpha: float = 0.5,
        gamma: float = 0.85,
        **kwargs: Any,
    ) -> None:
        options = {"alpha": alpha, "gamma": gamma}
        super().__init__(model, environment, estimator_options=options, **kwargs)


class WorldRollout:
    """TRL's ``rollout_func`` for a world of normkit: every prompt is the name of a task.

    normkit's own generation plays the dialogues, with a KV cache from turn to turn, where every
    process holds a whole model. With vLLM or a sharded model the replies come from TRL's
    generation, one round of turns after the other.

    In a :class:`~normkit.rl.environment.SeatedEnvironment` the dialogues of a group are the seats
    of ``num_generations / seats`` games; TRL's generation cannot play it.

    Args:
        environment: the world.
        config: options of normkit's generation; None takes them from the trainer's arguments.
        through_trl: whether TRL generates the replies; None decides as described.
    """

    def __init__(
        self,
        environment: Environment[Any],
        config: RolloutConfig | None = None,
        through_trl: bool | None = None,
    ) -> None:
        self.environment = environment
        self.config = config
        self.through_trl = through_trl
        self._calls = 0
        self._rollout: Rollout | None = None

    def __call__(self, prompts: Sequence[str], trainer: Any) -> dict[str, Any]:
        """Play one dialogue per prompt (TRL has repeated the prompt of a group for its members).

        Returns:
            What :func:`completions` makes of the dialogues.
        """
        self._calls += 1
        now = [trainer.args.seed, trainer.state.global_step, self._calls]
        seeds = np.random.SeedSequence([*now, trainer.accelerator.process_index])
        games = self._games(prompts)
        numbers = seeds.generate_state(len(games)).tolist()
        tasks = [(task, i, numbers[i]) for i, task in enumerate(games)]
        through_trl = self.through_trl
        if through_trl is None:
            kind = trainer.accelerator.distributed_type.name
            through_trl = trainer.use_vllm or kind in ("FSDP", "DEEPSPEED")
        if through_trl:
            if self.config is not None:
                raise InputError("rollout must be None where TRL generates: its args say how")
            if isinstance(self.environment, SeatedEnvironment):
                raise InputError("environment: TRL's generation cannot play one with seats")
            return completions(_play_rounds(self.environment, tasks, trainer))
        dialogues = self._play(tasks, trainer)
        if len(dialogues) != len(prompts):
            raise InputError("environment: its games must all have the same number of seats")
        return completions(dialogues)

    def _games(self, prompts: Sequence[str]) -> list[str]:
        """The tasks to open, where each gives a dialogue per seat."""
        if not isinstance(self.environment, SeatedEnvironment):
            return list(prompts)
        seats = len(self.environment.start_seats(prompts[0], 0))
        games = list(prompts[::seats])
        if [task for task in games for _ in range(seats)] != list(prompts):
            raise InputError(
                f"args: num_generations must be a multiple of the {seats} seats of a game, and so "
                "must the completions of a process"
            )
        return games

    def _play(self, tasks: Sequence[tuple[str, int, int]], trainer: Any) -> list[Dialogue]:
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self._rollout is None:
            config = self.config or rollout_config(trainer.args)
            if config.temperature != trainer.args.temperature:
                raise InputError(
                    f"rollout: its temperature must be that of args ({trainer.args.temperature}), "
                    f"got {config.temperature}"
                )
            self._rollout = Rollout(model, trainer.processing_class, config)
        self._rollout.sync(model)
        return self._rollout.run(self.environment, tasks)


def completions(dialogues: Sequence[Dialogue]) -> dict[str, Any]:
    """Lay out dialogues as a ``rollout_func`` returns them.

    A dialogue is one prompt, up to the first reply, and one completion, everything after it.

    Args:
        dialogues: dialogues of one segment each. One without turns (a seat whose game ended first)
            is a single token that nobody trains.

    Returns:
        ``prompt_ids``, ``completion_ids``, ``logprobs`` (0 on tokens not sampled), ``env_mask``,
        ``turn_ids``, ``turn_rewards``, ``agent`` and ``scores``: lists with one element per
        dialogue.

    Raises:
        InputError: for a dialogue that outgrew its context: TRL trains one row per completion.
    """
    if any(len(dialogue.segments) > 1 for dialogue in dialogues):
        raise InputError(
            "rollout: a dialogue outgrew max_context, and TRL trains one row per dialogue; raise "
            "max_context, or lower the world's max_turns or the length limit of replies"
        )
    fields: dict[str, Any] = {
        name: [] for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask", "turn_ids")
    }
    for dialogue in dialogues:
        (row,) = pack([dialogue]) if dialogue.turns else [_UNSAID]
        sampled = row.turn_row >= 0
        begin = int(sampled.nonzero()[0]) if dialogue.turns else 1
        fields["prompt_ids"].append(row.token_ids[:begin].tolist())
        fields["completion_ids"].append(row.token_ids[begin:].tolist())
        fields["logprobs"].append(row.logprob[begin:].tolist())
        fields["env_mask"].append(sampled[begin:].long().tolist())
        fields["turn_ids"].append(row.turn_row[begin:].tolist())
    fields["turn_rewards"] = [[turn.reward for turn in d.turns] for d in dialogues]
    fields["agent"] = [d.agent for d in dialogues]
    fields["scores"] = [d.scores["score"] for d in dialogues]
    return fields


def dialogue_reward(
    turn_rewards: Sequence[Sequence[float]], scores: Sequence[float], log_metric: Any, **_: Any
) -> list[float | None]:
    """TRL's reward of a dialogue, for its logs: the sum of its turns' known rewards.

    The world's score is logged beside it as "score".

    Args:
        turn_rewards: rewards of each dialogue's turns; NaN for unknown.
        scores: the world's score of each dialogue.
        log_metric: TRL's function that logs a number under a name.

    Returns:
        The sum for each dialogue; None for one without a known reward.
    """
    known = [[r for r in row if math.isfinite(r)] for row in turn_rewards]
    log_metric("score", finite_mean(scores))
    return [sum(row) if row else None for row in known]


def task_dataset(environment: Environment[Any], split: Split = "train") -> Dataset:
    """Names of a world's tasks as the column "prompt", which :class:`WorldRollout` plays."""
    return Dataset.from_dict({"prompt": list(environment.tasks(split))})


def rollout_config(args: GRPOConfig) -> RolloutConfig:
    """Read options of generation off TRL's arguments."""
    return RolloutConfig(
        max_new_tokens=args.max_completion_length, temperature=args.temperature, top_p=args.top_p
    )


def _play_rounds(
    environment: Environment[Any], tasks: Sequence[tuple[str, int, int]], trainer: Any
) -> list[Dialogue]:
    """Play dialogues side by side with replies from TRL's generation.

    Every process sends equally many rows in equally many rounds, since vLLM's are shared out by
    number: where other processes have more dialogues left, a row is sent that nobody reads.
    """
    chat = ChatFormat(trainer.processing_class, trainer.eos_token_ids)
    room = _longest_row(trainer) - trainer.args.max_completion_length
    sessions = [environment.start(task, seed) for task, _, seed in tasks]
    dialogues = [
        Dialogue(
            task,
            group,
            i,
            seed,
            s.system,
            [],
            [Segment(chat.opening(s.system, s.message), [])],
            "",
            {},
        )
        for i, ((task, group, seed), s) in enumerate(zip(tasks, sessions, strict=True))
    ]
    messages = [session.message for session in sessions]
    alive = list(range(len(tasks)))
    while (count := _most(len(alive), trainer)) > 0:
        rows = [dialogues[i].segments[0].token_ids for i in alive or [0]]
        sent = rows + rows[:1] * (count - len(rows))
        sampled, logprobs = trainer._generate_single_turn(sent, None, {}, 1)
        replies = [
            Reply(chat.decode(ids), not ids or ids[-1] not in chat.end_ids)
            for ids in sampled[: len(alive)]
        ]
        steps = environment.step([sessions[i] for i in alive], replies) if alive else []
        for k, (i, reply, step) in enumerate(zip(alive, replies, steps, strict=True)):
            ids, segment = list(sampled[k]), dialogues[i].segments[0]
            chances = [0.0] * len(ids) if logprobs is None else list(logprobs[k])
            begin = len(segment.token_ids)
            segment.spans.append((len(dialogues[i].turns), begin, begin + len(ids)))
            segment.token_ids.extend(ids)
            dialogues[i].turns.append(
                Turn(messages[i], reply.text, ids, chances, reply.truncated, step.reward, step.info)
            )
            if step.message is None:
                dialogues[i].end_reason = step.end_reason or "end"
                continue
            following = chat.following(step.message, chat.closed(ids))
            if len(segment.token_ids) + len(following) > room:
                dialogues[i].end_reason = "context"
                continue
            messages[i] = step.message
            segment.token_ids.extend(following)
        alive = [i for i in alive if not dialogues[i].end_reason]
    for dialogue, session in zip(dialogues, sessions, strict=True):
        dialogue.scores = environment.score(session)
        settle(dialogue)
    return dialogues


def _most(count: int, trainer: Any) -> int:
    """Largest count of any process."""
    if trainer.accelerator.num_processes == 1:
        return count
    counts = torch.tensor([count], device=trainer.accelerator.device)
    return int(trainer.accelerator.gather(counts).max())


def _longest_row(trainer: Any) -> int:
    """Tokens of the longest row that can be generated from."""
    limits = [trainer.model.config.get_text_config().max_position_embeddings]
    if trainer.use_vllm and trainer.args.vllm_max_model_length is not None:
        limits.append(trainer.args.vllm_max_model_length)
    return int(min(limits))
