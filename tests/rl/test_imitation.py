"""Written dialogues, and a model that learns to say them."""

from __future__ import annotations

import copy

import pytest
import torch

from normkit.errors import InputError
from normkit.rl.chat_format import ChatFormat
from normkit.rl.dialogue import pack
from normkit.rl.environment import Step
from normkit.rl.imitation import imitate, write_dialogues
from normkit.rl.policy import collate, token_logprobs
from normkit.rl.rollout import Rollout, RolloutConfig
from tests.rl.tiny import tiny_model, tiny_tokenizer


class Session:
    def __init__(self, task):
        self.task, self.system, self.message, self.turn = task, "Repeat.", task, 0


class Echo:
    """Three turns about a letter; a reply that repeats it earns 1."""

    max_turns = 3

    def tasks(self, split):
        return ["a", "b"]

    def start(self, task, seed):
        return Session(task)

    def step(self, sessions, replies):
        steps = []
        for session, reply in zip(sessions, replies, strict=True):
            session.turn += 1
            over = session.turn == self.max_turns
            right = float(reply.text == session.task)
            steps.append(Step(right, None if over else session.task, "done" if over else None))
        return steps

    def score(self, session):
        return {"score": float(session.turn)}


@pytest.fixture(scope="module")
def parts():
    tokenizer = tiny_tokenizer()
    return tiny_model(tokenizer), tokenizer, ChatFormat(tokenizer)


def written(parts, tasks=("a", "b")):
    return write_dialogues(Echo(), tasks, lambda session: session.task, parts[2])


def test_a_written_dialogue_is_the_row_that_the_template_writes(parts):
    _, tokenizer, _ = parts
    (dialogue,) = written(parts, ["a"])
    messages = [{"role": "system", "content": "Repeat."}]
    messages += [{"role": role, "content": "a"} for _ in range(3) for role in ("user", "assistant")]
    text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    assert tokenizer.decode(dialogue.segments[0].token_ids) == text
    assert [turn.reward for turn in dialogue.turns] == [1.0] * 3
    assert (dialogue.end_reason, dialogue.scores) == ("done", {"score": 3.0})
    for (turn, start, stop), said in zip(dialogue.segments[0].spans, dialogue.turns, strict=True):
        assert dialogue.turns[turn] is said
        assert dialogue.segments[0].token_ids[start:stop] == said.token_ids
        assert tokenizer.decode(said.token_ids) == "a<|im_end|>"


def test_it_is_the_row_of_a_rollout_that_says_the_same(parts):
    """A model that has learned to say it has the same tokens in the same places."""
    model = copy.deepcopy(parts[0])
    losses = imitate(model, written(parts), 200, batch=2, learning_rate=1e-2)
    assert losses[-1] < 0.1 < losses[0]
    config = RolloutConfig(max_new_tokens=4, greedy=True, dtype="float32")
    played = Rollout(model, parts[1], config).run(Echo(), [("a", 0, 0), ("b", 1, 1)])
    for found, reference in zip(played, written(parts), strict=True):
        assert found.segments == reference.segments


def test_only_replies_are_learned(parts):
    """The first loss is the mean cross-entropy of the replies' tokens, however it is split."""
    dialogues = written(parts)
    with torch.no_grad():
        logprob, _ = token_logprobs(parts[0], collate(pack(dialogues)))
    assert len(logprob) == 2 * 3 * 2
    for budget in (1, 4096):
        model = copy.deepcopy(parts[0])
        losses = imitate(model, dialogues, 3, batch=2, micro_batch_tokens=budget)
        # Where the machine multiplies bfloat16, the forward pass is in it.
        assert losses[0] == pytest.approx(-float(logprob.mean()), rel=2e-2)


def test_the_same_seed_gives_the_same_weights(parts):
    found = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(parts[0])
        imitate(model, written(parts, "abcdef"), 3, batch=2, seed=seed)
        found.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_what_cannot_be_imitated(parts):
    model = parts[0]
    before = [p.clone() for p in model.parameters()]
    assert imitate(model, written(parts), 0) == []
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    for arguments in ((written(parts), -1), ([], 1), (written(parts), 1, 0)):
        with pytest.raises(InputError, match="must be at least"):
            imitate(model, *arguments)
