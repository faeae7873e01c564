import math

import pytest

from normkit.errors import InputError, NormkitError
from normkit.rl.dialogue import Dialogue, Turn
from normkit.rl.environment import evaluation_tasks
from normkit.rl.environments.empathy import EmpathyConfig, EmpathyEnvironment
from normkit.rl.environments.epm import EPMConfig
from normkit.rl.evaluation.dialogues import play_chat, score_dialogues
from normkit.rl.judge import Failed
from normkit.rl.rollout import Rollout, RolloutConfig
from normkit.rl.trainer import Trainer
from tests.rl.fakes import TableJudge, filled, scenario
from tests.rl.talk import ScriptedWorld, tasks
from tests.rl.tiny import tiny_model, tiny_tokenizer


class Echo:
    """Answers with the number of messages it was shown, or as a table says for the first task."""

    name = "echo"

    def __init__(self, fail=lambda messages: False):
        self.fail = fail
        self.seen = []

    def complete(self, conversations):
        self.seen.append([list(messages) for messages in conversations])
        return [Failed("gone") if self.fail(m) else f"reply {len(m)}" for m in conversations]


def test_a_model_sees_the_whole_dialogue_and_the_world_its_replies():
    world = ScriptedWorld(max_turns=4, turns=lambda seed: 1 + seed % 3)
    chat, done = Echo(), []
    played = play_chat(world, tasks(5), chat, lambda *progress: done.append(progress))
    assert [len(d.turns) for d in played] == [1, 2, 3, 1, 2]
    assert [d.end_reason for d in played] == ["done"] * 5
    assert [d.scores["score"] for d in played] == [1, 2, 3, 1, 2]
    assert [len(batch) for batch in chat.seen] == [5, 3, 1]
    roles = [[m["role"] for m in batch[-1]] for batch in chat.seen]
    assert roles[1] == ["system", "user", "assistant", "user"]
    third = chat.seen[2][0]
    assert third[0]["content"] == world.system
    expected = [x for turn in played[2].turns[:2] for x in (turn.message, turn.reply)]
    assert [m["content"] for m in third[1:-1]] == expected
    assert done[-1] == (9, 9)
    assert [t.reward for t in played[2].turns] == [1.0, 2.0, 3.0]


def test_no_system_prompt_is_no_message():
    world = ScriptedWorld(max_turns=1, system="")
    chat = Echo()
    play_chat(world, tasks(1), chat)
    assert [m["role"] for m in chat.seen[0][0]] == ["user"]


def test_a_dialogue_without_a_reply_ends_with_the_reason():
    world = ScriptedWorld(max_turns=3)
    chat = Echo(fail=lambda messages: len(messages) > 2 and "task0" in messages[1]["content"])
    played = play_chat(world, tasks(4), chat)
    assert [len(d.turns) for d in played] == [1, 1, 3, 3]
    assert played[0].end_reason == "no reply: gone"
    outcome = score_dialogues("talk", {"greedy": played}, {"score": "score"})
    assert outcome.measures[0].values == {"task1": 3.0}
    assert outcome.counts["without_reply"] == 2
    assert "2 of 4 dialogues are left out (no reply: gone)" in outcome.notes[0]


def test_a_model_that_never_replies_stops_the_run():
    with pytest.raises(NormkitError, match="echo answered nothing"):
        play_chat(ScriptedWorld(), tasks(2), Echo(fail=lambda messages: True))


def empathy(judge=None, count=3):
    scenarios = [scenario(f"career-{i}", opening=f"Message {i}.") for i in range(count)]
    world = EmpathyConfig(epm=EPMConfig(max_turns=3))
    return EmpathyEnvironment([], scenarios, judge or TableJudge(), None, world)


def test_a_served_model_plays_the_dialogues_that_a_local_one_plays():
    judge = TableJudge({"reply": filled((1, 0), (2, 0), (0, -1))})
    environment = empathy(judge)
    played = play_chat(environment, evaluation_tasks(environment, "heldout", 7), Echo())
    tokenizer = tiny_tokenizer()
    rollout = Rollout(tiny_model(tokenizer), tokenizer, RolloutConfig(max_new_tokens=4))
    local = rollout.run(environment, evaluation_tasks(environment, "heldout", 7))
    assert [(d.task, d.seed, d.group) for d in played] == [(d.task, d.seed, d.group) for d in local]
    assert [d.turns[0].message for d in played] == [d.turns[0].message for d in local]
    assert {len(d.turns) for d in played} == {3}
    assert all(d.scores["work"] != 0 for d in played)


def test_tasks_are_those_of_the_trainer(monkeypatch):
    environment = empathy()
    tokenizer = tiny_tokenizer()
    trainer = Trainer(tiny_model(tokenizer), tokenizer, environment)
    given = []
    monkeypatch.setattr(trainer.rollout, "run", lambda _, tasks: given.append(tasks))
    trainer.evaluate("heldout", seed=12345)
    assert evaluation_tasks(environment, "heldout", 12345) == given[0]
    assert evaluation_tasks(environment, "heldout", 12345, limit=2) == given[0][:2]
    again = evaluation_tasks(environment, "heldout", 12345, repeat=1)
    assert {seed for *_, seed in again}.isdisjoint(seed for *_, seed in given[0])
    with pytest.raises(InputError, match="no tasks in 'train'"):
        evaluation_tasks(environment, "train", 0)


def test_dialogues_of_a_task_are_averaged_and_turns_without_verdict_counted():
    def dialogue(task, score, reward=0.0):
        turns = [Turn("hello", "reply", [], [], False, reward)]
        return Dialogue(task, 0, 0, 0, "", turns, [], "max_turns", {"score": score, "won": 1.0})

    sides = {
        "greedy": [dialogue("a", 10.0), dialogue("b", math.nan, math.nan)],
        "sampled": [dialogue("a", 10.0), dialogue("b", 40.0), dialogue("a", 20.0)],
    }
    outcome = score_dialogues("talk", sides, {"score": "score", "wins": "won"})
    names = [measure.name for measure in outcome.measures]
    assert names == [
        "talk score, greedy",
        "talk score, sampled",
        "talk wins, greedy",
        "talk wins, sampled",
    ]
    greedy, sampled = outcome.measures[:2]
    assert greedy.interval().n == 1
    assert sampled.values == {"a": 15.0, "b": 40.0}
    assert sampled.gain_over(greedy).mean == 5.0
    assert "1 of 5 turns have no verdict" in outcome.notes[0]
    assert len(outcome.records) == 5
