"""A world whose words are scripted, and checks that every rollout must pass."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from normkit.rl.environment import Step


@dataclass
class Talk:
    task: str
    seed: int
    system: str
    message: str
    replies: list = field(default_factory=list)


class ScriptedWorld:
    """Messages of varying length; a dialogue lasts as many turns as ``turns(seed)`` says."""

    def __init__(self, max_turns=12, turns=None, say=None, system="Be kind."):
        self.max_turns = max_turns
        self.turns = turns or (lambda seed: max_turns)
        self.say = say or (lambda task, seed, turn: f"{task} {turn} " + "a b" * ((seed + turn) % 5))
        self.system = system
        self.sessions = []

    def start(self, task, seed):
        self.sessions.append(Talk(task, seed, self.system, self.say(task, seed, 0)))
        return self.sessions[-1]

    def step(self, sessions, replies):
        steps = []
        for session, reply in zip(sessions, replies, strict=True):
            session.replies.append(reply)
            turn = len(session.replies)
            over = turn >= self.turns(session.seed)
            message = None if over else self.say(session.task, session.seed, turn)
            steps.append(Step(float(turn), message, "done" if over else None, {"turn": turn}))
        return steps

    def score(self, session):
        return {"score": float(len(session.replies))}


def tasks(count, group_size=2):
    return [(f"task{i // group_size}", i // group_size, i) for i in range(count)]


def plain_logprobs(model, ids, temperature=1.0):
    """Log-probability of each token of a row but the first, by one ordinary forward pass."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    table = torch.log_softmax(logits / temperature, -1)
    return table[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def check_dialogue(dialogue, model, temperature=1.0, tolerance=1e-4):
    """Every sampled token lies in one span, with the probability the plain model gives it."""
    seen = [[] for _ in dialogue.turns]
    worst = 0.0
    for segment in dialogue.segments:
        expected = plain_logprobs(model, segment.token_ids, temperature)
        stop_before = 0
        for turn, start, stop in segment.spans:
            assert stop_before < start < stop <= len(segment.token_ids)
            stop_before = stop
            seen[turn].append(segment.token_ids[start:stop])
            found = torch.tensor(dialogue.turns[turn].logprobs)
            worst = max(worst, float((found - expected[start - 1 : stop - 1]).abs().max()))
        assert segment.spans[-1][2] == len(segment.token_ids)
    assert seen == [[turn.token_ids] for turn in dialogue.turns]
    assert all(len(turn.token_ids) == len(turn.logprobs) for turn in dialogue.turns)
    assert worst < tolerance, worst


def said(dialogues):
    """The tokens of all turns of all dialogues."""
    return [[turn.token_ids for turn in dialogue.turns] for dialogue in dialogues]


class LateWorld(ScriptedWorld):
    """A world that pays the turns of a dialogue anew with every reply: 10 n + k for turn k of n."""

    def step(self, sessions, replies):
        steps = super().step(sessions, replies)
        for session, step in zip(sessions, steps, strict=True):
            count = len(session.replies)
            step.info["turn_rewards"] = [10.0 * count + k for k in range(count)]
        return steps
