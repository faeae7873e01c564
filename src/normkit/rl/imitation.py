"""Supervised warm start: a chat model learns to say what reference dialogues say.

A model that never does what is rewarded learns nothing from rewards. Here the replies come from a
rule instead of the policy, the world answers them as it answers any, and the model is trained on
their tokens by cross-entropy, in one pass over each dialogue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from normkit.errors import InputError
from normkit.rl.chat_format import ChatFormat
from normkit.rl.checkpoint import trainable
from normkit.rl.dialogue import Dialogue, Segment, Turn, micro_batches, pack
from normkit.rl.environment import Environment, Reply, S
from normkit.rl.models import resolve_dtype
from normkit.rl.policy import collate, takes_trees, token_logprobs


def write_dialogues(
    environment: Environment[S],
    tasks: Sequence[str],
    write: Callable[[S], str],
    form: ChatFormat,
) -> list[Dialogue]:
    """Play one dialogue per task with replies that a rule writes.

    Args:
        environment: the world.
        tasks: what to play.
        write: the reply to a session as it stands.
        form: how the model's template lays out a dialogue.
    """
    return [
        _write(environment, environment.start(task, 0), write, form, index)
        for index, task in enumerate(tasks)
    ]


def _write(
    environment: Environment[S],
    session: S,
    write: Callable[[S], str],
    form: ChatFormat,
    index: int,
) -> Dialogue:
    dialogue = Dialogue(session.task, index, index, 0, session.system, [], [], "", {})
    segment = Segment(form.opening(session.system, session.message), [])
    dialogue.segments.append(segment)
    message: str | None = session.message
    while message is not None:
        text = write(session)
        tokens = [*form.tokenizer(text, add_special_tokens=False)["input_ids"], _end(form)]
        (step,) = environment.step([session], [Reply(text)])
        start = len(segment.token_ids)
        segment.spans.append((len(dialogue.turns), start, start + len(tokens)))
        segment.token_ids += tokens
        unknown = [0.0] * len(tokens)
        dialogue.turns.append(Turn(message, text, tokens, unknown, False, step.reward, step.info))
        message = step.message
        if message is not None:
            segment.token_ids += form.following(message, form.closed(tokens))
    dialogue.end_reason = step.end_reason or "end"
    dialogue.scores = environment.score(session)
    return dialogue


def imitate(
    model: torch.nn.Module,
    dialogues: Sequence[Dialogue],
    updates: int,
    batch: int = 4,
    learning_rate: float = 5e-5,
    micro_batch_tokens: int = 2048,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train a model on the replies of dialogues, with Adam, in shuffled passes.

    Args:
        model: a causal language model of transformers; what is trainable of it is changed in place.
        dialogues: the dialogues, such as those of :func:`write_dialogues`.
        updates: number of updates; the first tenth warms the rate up.
        batch: dialogues of an update.
        learning_rate: of Adam.
        micro_batch_tokens: tokens of one forward pass; bounds memory.
        seed: of the order.
        report: called after every update with its number and loss.

    Returns:
        Loss of each update, in nats a token.

    Raises:
        InputError: without dialogues, for fewer than 0 updates, or for a batch below 1.
    """
    if updates < 0 or batch < 1:
        raise InputError(f"updates must be at least 0 and batch at least 1, got {updates}, {batch}")
    if not dialogues:
        raise InputError("dialogues must be at least one")
    weights = list(trainable(model).values())
    device = weights[0].device
    dtype = resolve_dtype("auto", device)
    optimizer = torch.optim.Adam(weights, lr=learning_rate)
    generator = np.random.default_rng([seed, len(dialogues)])
    order: list[int] = []
    losses = []
    for update in range(updates):
        while len(order) < batch:
            order += generator.permutation(len(dialogues)).tolist()
        chosen, order = order[:batch], order[batch:]
        rows = pack([dialogues[i] for i in chosen])
        count = sum(int((row.turn_row >= 0).sum()) for row in rows)
        total = 0.0
        for members in micro_batches(rows, micro_batch_tokens, trees=takes_trees(model)):
            part = collate([rows[i] for i in members], device)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                logprob, _ = token_logprobs(model, part)
            loss = -logprob.sum() / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, 10 * (update + 1) / updates)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
        if report is not None:
            report(update + 1, total)
    return losses


def _end(form: ChatFormat) -> int:
    """The token that closes a reply, or one that ends it where the template closes none."""
    return form.end_ids[0] if form.closing_id is None else form.closing_id
