"""Dialogues that are played to be scored, not to train on: by a local model or a served one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from normkit.rl.chat import ChatModel, Message
from normkit.rl.dialogue import Dialogue, Turn, finite_mean
from normkit.rl.environment import Environment, Reply, S
from normkit.rl.evaluation.measure import Measure, Outcome, Report, check_answered
from normkit.rl.judge import Failed

NO_REPLY = "no reply"
"""How the end reason of a dialogue begins that the model left unanswered."""


def play_chat(
    environment: Environment[S],
    tasks: Sequence[tuple[str, int, int]],
    chat: ChatModel,
    report: Report | None = None,
) -> list[Dialogue]:
    """Play one dialogue per task with a model that is seen as texts only.

    The counterpart of :meth:`normkit.rl.rollout.Rollout.run` for models behind a server: turns have
    no tokens, and whether a reply was cut at its length limit is not known. A dialogue whose
    request failed ends there, with the reason.

    Args:
        environment: the world.
        tasks: ``(task, group, seed)`` per dialogue.
        chat: the model.
        report: called after every round of turns with the turns done and the most there can be.

    Returns:
        One dialogue per task, in order.

    Raises:
        NormkitError: where the model answers none of the opening messages.
    """
    sessions = [environment.start(task, seed) for task, _, seed in tasks]
    dialogues = [
        Dialogue(task, group, i, seed, session.system, [], [], "", {})
        for i, ((task, group, seed), session) in enumerate(zip(tasks, sessions, strict=True))
    ]
    messages = [session.message for session in sessions]
    running = list(range(len(tasks)))
    while running:
        answers = chat.complete([_conversation(dialogues[i], messages[i]) for i in running])
        if not any(dialogue.turns for dialogue in dialogues):
            check_answered(chat.name, answers)
        replied = []
        for i, answer in zip(running, answers, strict=True):
            if isinstance(answer, Failed):
                dialogues[i].end_reason = f"{NO_REPLY}: {answer.reason}"
            else:
                replied.append((i, Reply(answer)))
        running = _step(environment, sessions, dialogues, messages, replied)
        if report is not None:
            done = sum(len(dialogue.turns) for dialogue in dialogues)
            left = sum(environment.max_turns - len(dialogues[i].turns) for i in running)
            report(done, done + left)
    for dialogue, session in zip(dialogues, sessions, strict=True):
        dialogue.scores = environment.score(session)
    return dialogues


def _conversation(dialogue: Dialogue, message: str) -> list[Message]:
    system = [("system", dialogue.system)] if dialogue.system else []
    past = [
        pair
        for turn in dialogue.turns
        for pair in (("user", turn.message), ("assistant", turn.reply))
    ]
    return [{"role": r, "content": c} for r, c in (*system, *past, ("user", message))]


def _step(
    environment: Environment[S],
    sessions: Sequence[S],
    dialogues: Sequence[Dialogue],
    messages: list[str],
    replied: Sequence[tuple[int, Reply]],
) -> list[int]:
    """Let the world answer the replies; return the dialogues that go on."""
    if not replied:
        return []
    steps = environment.step([sessions[i] for i, _ in replied], [reply for _, reply in replied])
    going = []
    for (i, reply), step in zip(replied, steps, strict=True):
        turn = Turn(messages[i], reply.text, [], [], reply.truncated, step.reward, step.info)
        dialogues[i].turns.append(turn)
        if step.message is None:
            dialogues[i].end_reason = step.end_reason or "end"
        else:
            messages[i] = step.message
            going.append(i)
    return going


def score_dialogues(
    world: str, dialogues: Mapping[str, Sequence[Dialogue]], metrics: Mapping[str, str]
) -> Outcome:
    """Score played dialogues, task by task.

    Dialogues of a task are averaged; those that the model left unanswered are left out.

    Args:
        world: name of the world, for the measures.
        dialogues: the dialogues of each way to reply, such as "greedy".
        metrics: the world's metrics to show, by what to call them.
    """
    measures = []
    played = [dialogue for side in dialogues.values() for dialogue in side]
    for label, metric in metrics.items():
        for mode, side in dialogues.items():
            values: dict[str, list[float]] = {}
            for dialogue in side:
                if not dialogue.end_reason.startswith(NO_REPLY):
                    values.setdefault(dialogue.task, []).append(dialogue.scores[metric])
            means = {task: finite_mean(found) for task, found in values.items()}
            measures.append(Measure(f"{world} {label}, {mode}", means))
    counts = {
        "dialogues": len(played),
        "without_reply": sum(d.end_reason.startswith(NO_REPLY) for d in played),
        "turns": sum(len(d.turns) for d in played),
        "turns_without_verdict": sum(t.reward != t.reward for d in played for t in d.turns),
    }
    notes = []
    if counts["without_reply"]:
        reason = next(d.end_reason for d in played if d.end_reason.startswith(NO_REPLY))
        notes.append(
            f"{world}: {counts['without_reply']} of {len(played)} dialogues are left out ({reason})"
        )
    if counts["turns_without_verdict"]:
        notes.append(
            f"{world}: {counts['turns_without_verdict']} of {counts['turns']} turns have no verdict"
        )
    records = [_record(mode, d) for mode, side in dialogues.items() for d in side]
    return Outcome(tuple(measures), counts, tuple(notes), tuple(records))


def _record(mode: str, dialogue: Dialogue) -> dict[str, Any]:
    return {
        "mode": mode,
        "task": dialogue.task,
        "seed": dialogue.seed,
        "end_reason": dialogue.end_reason,
        "scores": dialogue.scores,
        "turns": [
            {"message": turn.message, "reply": turn.reply, "reward": turn.reward}
            for turn in dialogue.turns
        ],
    }
