"""The emotional-support world: state, user, failures and scores, with judges that are known."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace as changed

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.errors import InputError
from normkit.rl.environment import Reply
from normkit.rl.environments.empathy import (
    SYSTEM_PROMPT,
    EmpathyConfig,
    EmpathyEnvironment,
    replay,
    session_log,
)
from normkit.rl.environments.epm import EPMConfig, Trajectory, epm_q
from normkit.rl.environments.scenario import INDICATORS, builtin_scenarios
from normkit.rl.judge import Failed, JudgeUnavailableError
from normkit.rl.rubric import AXES
from normkit.rl.users.scripted import ScriptedUser
from tests.rl.fakes import TableJudge, filled, scenario

TABLE = {
    "good": filled((1, 0), (2, 0), (0, 0)),
    "mixed": filled((2, 0), (1, 0), (0, -1)),
    "sharp": filled((0, -2), (2, 0), (1, 0)),
    "bad": filled((0, -1), (0, 0), (0, -1)),
    "heal": filled((2, 0), (2, 0), (2, 0)),
    "fail": "no verdict",
}
# The deficit of the worked numbers: P_0 = (-12, -24, -9).
CARD = dict(zip(INDICATORS, (1, 2, 2, 3, 3, 2, 1, 1, 1), strict=True))


def world(max_turns=4, min_turns=12, judge=None, user=None, **options):
    epm = EPMConfig(max_turns=max_turns, min_turns=min_turns)
    return EmpathyEnvironment(
        [scenario("career-a"), scenario("career-card", deficit=CARD)],
        [scenario("career-b")],
        judge or TableJudge(TABLE),
        user,
        EmpathyConfig(epm=epm, **options),
    )


def play(env, *replies, task="career-a", seed=0):
    session = env.start(task, seed)
    return session, [env.step([session], [Reply(text)])[0] for text in replies]


class Recorder:
    """A simulated user who answers from a list and keeps what it was asked."""

    def __init__(self, *answers):
        self.answers = answers
        self.asked = []

    def respond(self, requests):
        self.asked.append(list(requests))
        return [self.answers[(len(self.asked) - 1) % len(self.answers)] for _ in requests]


# ------------------------------------------------------------------ state and rewards


def test_the_worked_numbers_of_the_card():
    session, steps = play(world(), "good", "mixed", "sharp", task="career-card")
    assert session.trajectory.initial == (-12, -24, -9)
    assert [s.info["increment"] for s in steps] == [[1, 3, 0], [3, 1, -2], [-4, 3, 1]]
    assert [s.reward for s in steps] == pytest.approx([2.972094, 1.165505, 1.182245], abs=1e-6)
    assert [s.info["work"] for s in steps] == pytest.approx(
        [2.967994, 1.483997, 1.165998], abs=1e-6
    )
    assert steps[0].info["distance"] == pytest.approx(23.748684, abs=1e-6)
    assert steps[0].info["alignment"] == pytest.approx(0.938562, abs=1e-6)
    assert steps[1].info["alignment"] == pytest.approx(0.396615, abs=1e-6)
    assert steps[2].info["total_work"] == pytest.approx(5.617989, abs=1e-6)
    assert steps[2].info["state"] == [-12, -17, -10]
    assert steps[2].info["rubric"] == TABLE["sharp"].to_json()


@pytest.mark.parametrize("kind", ["idr", "absolute", "increment", "potential", "work"])
def test_every_kind_of_reward_is_that_of_the_model(kind):
    session, steps = play(world(reward=kind), "good", "mixed", "sharp")
    model = Trajectory(session.trajectory.initial)
    for step, name in zip(steps, ("good", "mixed", "sharp"), strict=True):
        model.advance(TABLE[name])
        assert step.reward == model.reward(kind)


def test_truncated_replies_move_the_state_and_may_earn_nothing():
    for rule in ("judge", "zero"):
        env = world(truncated=rule)
        session = env.start("career-a", 0)
        (step,) = env.step([session], [Reply("good", truncated=True)])
        assert step.info["increment"] == [1, 3, 0]
        assert (step.reward > 0) == (rule == "judge")
        assert step.reward == 0 or rule == "judge"
        assert env.judge.seen[0][0].truncated
        (step,) = env.step([session], [Reply("good")])
        assert step.reward > 0


def test_the_judge_is_shown_the_dialogue_in_one_call_a_batch():
    env = world()
    pair = [env.start("career-a", 0), env.start("career-b", 1)]
    env.step(pair, [Reply("good one"), Reply("bad two")])
    said = [session.said for session in pair]
    env.step(pair, [Reply("three"), Reply("")])
    assert len(env.judge.seen) == 2
    first, second = env.judge.seen[1]
    assert first.history == (("My test broke.", "good one"),)
    assert [first.message, second.message] == said
    assert [first.reply, second.reply] == ["three", ""]
    assert [first.scenario.id, second.scenario.id] == ["career-a", "career-b"]


# ------------------------------------------------------------------ how it ends


def test_the_last_turn_ends_the_dialogue():
    session, steps = play(world(max_turns=2), "good", "good")
    assert [s.end_reason for s in steps] == [None, "max_turns"]
    assert steps[0].message
    assert steps[1].message is None
    assert session.ended == "max_turns"


@pytest.mark.parametrize("max_turns", [1, 3, 6])
@pytest.mark.parametrize("min_turns", [7, 12])
def test_a_short_dialogue_has_no_early_end(max_turns, min_turns):
    for reply in ("heal", "bad"):
        env = world(max_turns, min_turns)
        session, steps = play(env, *[reply] * max_turns)
        assert [s.end_reason for s in steps] == [None] * (max_turns - 1) + ["max_turns"]
        assert env.score(session)["success"] == 0


def test_success_and_collapse_end_early():
    env = world(max_turns=45)
    session, steps = play(env, *["heal"] * 12)
    assert [s.end_reason for s in steps] == [None] * 11 + ["success"]
    assert steps[11].message is None
    assert env.score(session)["success"] == 1
    session, steps = play(env, *["bad"] * 12)
    assert steps[11].end_reason.startswith("failure: direction collapse")
    assert env.score(session)["success"] == 0
    _, steps = play(world(max_turns=6, min_turns=4), *["heal"] * 4)
    assert steps[3].end_reason == "success"


def test_success_on_the_last_turn_is_a_success():
    _, steps = play(world(max_turns=5, min_turns=5), *["heal"] * 5)
    assert steps[4].end_reason == "success"


def test_sessions_of_a_batch_end_at_different_times():
    user = Recorder("go on")
    env = world(max_turns=2, user=user)
    early = env.start("career-a", 0)
    env.step([early], [Reply("good")])
    late = env.start("career-b", 1)
    steps = env.step([early, late], [Reply("good"), Reply("good")])
    assert [s.message for s in steps] == [None, "go on"]
    assert [r.scenario.id for r in user.asked[-1]] == ["career-b"]
    env.step([late], [Reply("good")])
    assert len(user.asked) == 2


# ------------------------------------------------------------------ the person


def test_the_user_answers_to_the_state():
    session, steps = play(world(max_turns=9), "bad", "good", "heal", "heal", "heal", "heal")
    said = [step.message for step in steps]
    assert said[0].startswith("ouch")
    assert said[-1].startswith("better")
    assert len(set(said)) == len(said)
    after = dict(zip(AXES, session.trajectory.turns[1].state, strict=True))
    start = dict(zip(AXES, session.trajectory.initial, strict=True))
    neediest = max(AXES, key=lambda axis: after[axis] / start[axis])
    assert said[1] in session.scenario.lines[neediest]


def test_the_simulator_is_told_the_state():
    user = Recorder("go on")
    session, _ = play(world(user=user), "good", "fail", seed=7)
    first, second = (asked[0] for asked in user.asked)
    assert (first.initial, first.state) == (session.trajectory.initial, session.trajectory.state)
    assert (first.progress, second.progress) == (TABLE["good"], None)
    assert second.history == (("My test broke.", "good"), ("go on", "fail"))
    assert second.seed == 7


@pytest.mark.parametrize(
    ("answer", "reason"), [(Failed("mute"), "mute"), ("", "it said"), (" \n", "it said")]
)
def test_a_failing_simulator_falls_back_to_the_script(answer, reason):
    env = world(user=Recorder(answer, "I am back"))
    session, steps = play(env, "good", "good", "good")
    assert steps[0].message == play(world(), "good")[1][0].message
    assert steps[0].info["user_failed"].startswith(reason)
    assert steps[1].message == "I am back"
    assert "user_failed" not in steps[1].info
    assert session.simulator_failures == 2
    assert env.score(session)["simulator_failures"] == 2


def test_only_the_failed_answers_of_a_batch_are_replaced():
    class Half:
        def respond(self, requests):
            return [Failed("mute") if i else "fine" for i in range(len(requests))]

    env = world(user=Half())
    sessions = [env.start("career-a", seed) for seed in range(3)]
    steps = env.step(sessions, [Reply("good")] * 3)
    assert steps[0].message == "fine"
    assert all(steps[i].message in sum(scenario().lines.values(), ()) for i in (1, 2))
    assert [s.simulator_failures for s in sessions] == [0, 1, 1]


# ------------------------------------------------------------------ judges that fail


def test_a_failed_judgement_is_masked_and_counted():
    env = world()
    session, steps = play(env, "good", "fail", "good", "good")
    assert [math.isnan(s.reward) for s in steps] == [False, True, False, False]
    assert steps[1].message in sum(session.scenario.lines.values(), ())
    assert steps[1].info["failed"] == "no verdict"
    assert "rubric" not in steps[1].info
    assert steps[1].info["state"] == steps[0].info["state"]
    assert steps[1].info["distance"] == steps[0].info["distance"]
    assert steps[3].end_reason == "max_turns"
    assert len(session.trajectory.turns) == 3
    score = env.score(session)
    assert (score["turns"], score["failed_judgements"]) == (4, 1)
    assert score["score"] == env.score(play(world(), "good", "good", "good")[0])["score"]
    start, end = session.trajectory.initial_distance, session.trajectory.distance
    assert score["reward"] == pytest.approx(start - end)


def test_failed_turns_do_not_count_towards_an_early_end():
    replies = ["heal"] * 6 + ["fail"] + ["heal"] * 6
    _, steps = play(world(max_turns=45), *replies)
    assert [s.end_reason for s in steps] == [None] * 12 + ["success"]


def test_a_dialogue_of_failures_still_ends():
    env = world(max_turns=2)
    session, steps = play(env, "fail", "fail")
    assert steps[1].end_reason == "max_turns"
    score = env.score(session)
    assert math.isnan(score["score"])
    assert (score["closed"], score["reward"], score["success"], score["turns"]) == (0, 0, 0, 2)


def test_one_valid_judgement_of_a_batch_is_enough():
    env = world(patience=1)
    pair = [env.start("career-a", 0), env.start("career-a", 1)]
    first, second = env.step(pair, [Reply("fail"), Reply("good")])
    assert math.isnan(first.reward)
    assert second.reward > 0


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_all_judgements_failing_stops_with_the_reason(patience):
    env = world(max_turns=9, patience=patience)
    pair = [env.start("career-a", 0), env.start("career-a", 1)]
    for _ in range(patience - 1):
        env.step(pair, [Reply("fail")] * 2)
    env.step(pair, [Reply("good"), Reply("fail")])
    for _ in range(patience - 1):
        env.step(pair, [Reply("fail")] * 2)
    before = [session_log(session) for session in pair]
    with pytest.raises(JudgeUnavailableError, match=r"judge 'table' .* 2 replies.* no verdict"):
        env.step(pair, [Reply("fail")] * 2)
    assert [json.dumps(session_log(session)) for session in pair] == [json.dumps(x) for x in before]
    env.step(pair, [Reply("good")] * 2)
    assert [len(session.turns) for session in pair] == [2 * patience] * 2


# ------------------------------------------------------------------ determinism

NAMES = st.sampled_from([*TABLE, "", "other words"])


def transcript(session):
    return json.dumps(session_log(session))


def test_same_seed_same_dialogue_other_seed_other_lines():
    replies = ["good", "bad", "nothing"]
    first = transcript(play(world(), *replies, seed=5)[0])
    assert first == transcript(play(world(), *replies, seed=5)[0])
    said = {tuple(t.message for t in play(world(), *replies, seed=n)[0].turns) for n in range(12)}
    assert len(said) > 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(NAMES, min_size=4, max_size=4), min_size=1, max_size=4), st.randoms())
def test_a_session_does_not_depend_on_the_others_of_its_batch(plan, random):
    alone = [play(world(patience=99), *replies, seed=i)[0] for i, replies in enumerate(plan)]
    env = world(patience=99)
    sessions = [env.start("career-a", i) for i in range(len(plan))]
    while live := [i for i, session in enumerate(sessions) if session.ended is None]:
        batch = random.sample(live, random.randint(1, len(live)))
        replies = [Reply(plan[i][len(sessions[i].turns)]) for i in batch]
        env.step([sessions[i] for i in batch], replies)
    assert [transcript(s) for s in sessions] == [transcript(s) for s in alone]


def test_a_copied_session_goes_on_by_itself():
    env = world()
    session, _ = play(env, "good")
    other = copy.deepcopy(session)
    env.step([other], [Reply("bad")])
    assert len(session.turns) == len(session.trajectory.turns) == 1
    env.step([session], [Reply("bad")])
    assert transcript(session) == transcript(other)


# ------------------------------------------------------------------ scores and logs


@settings(max_examples=60, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=20))
def test_scores_and_log_agree_with_the_model(replies):
    env = world(max_turns=20, patience=99)
    session = env.start("career-card", 3)
    for text in replies:
        if session.ended is None:
            env.step([session], [Reply(text)])
    score, trajectory = env.score(session), session.trajectory
    model = Trajectory((-12.0, -24.0, -9.0), EPMConfig(max_turns=20))
    for text in replies[: len(session.turns)]:
        if text != "fail":
            model.advance(TABLE.get(text, filled()))
    assert trajectory == model
    if model.turns:
        q = epm_q([model])
        parts = [score[name] for name in ("score", "outcome", "efficiency", "stability")]
        assert parts == [q.score, q.outcome, q.efficiency, q.stability]
    closed = model.initial_distance - model.distance
    assert score["reward"] == pytest.approx(closed, abs=1e-9)
    assert score["closed"] == pytest.approx(closed / model.initial_distance)
    assert score["work"] == model.total_work
    assert score["success"] == (model.outcome() == "success")
    assert score["turns"] == len(session.turns)
    assert score["failed_judgements"] == replies[: len(session.turns)].count("fail")

    log = json.loads(json.dumps(session_log(session), allow_nan=False))
    assert replay(log) == trajectory
    assert [turn["reply"] for turn in log["turns"]] == replies[: len(session.turns)]
    assert [turn["reward"] is None for turn in log["turns"]] == [
        "failed" in turn for turn in log["turns"]
    ]
    assert (log["scenario"], log["seed"], log["end_reason"]) == ("career-card", 3, session.ended)


def test_a_person_who_needs_nothing_has_scores():
    calm = scenario("career-calm", deficit=dict.fromkeys(INDICATORS, 0))
    env = EmpathyEnvironment([calm], [], TableJudge(TABLE))
    session, _ = play(env, "bad", "good", task="career-calm")
    assert env.score(session)["closed"] == 0
    assert all(math.isfinite(value) for value in env.score(session).values())


def spoilt(change):
    log = json.loads(json.dumps(session_log(play(world(), "good", "fail", "mixed")[0])))
    change(log)
    return log


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda log: log.pop("initial"), "the field 'initial' is missing"),
        (lambda log: log["turns"][0].pop("state"), "the field 'state' is missing"),
        (lambda log: log["turns"][2]["state"].__setitem__(0, 5.0), "log: turn 3: state must be"),
        (
            lambda log: log["turns"][2]["rubric"]["affective"].update(progress=3),
            "log: turn 3: rubric: affective: progress must be 0, 1 or 2",
        ),
        (lambda log: log["turns"][0].update(rubric=None), "not the log of a session"),
        (lambda log: log["turns"][0].update(state=[1]), "not the log of a session"),
        (lambda log: log.update(initial=[1, 2]), "not the log of a session"),
        (lambda log: log["epm"].update(patience=1), "not the log of a session"),
        (lambda log: log["epm"].update(max_turns=0), "max_turns"),
    ],
)
def test_a_log_that_is_not_consistent_is_refused(change, words):
    with pytest.raises(InputError) as caught:
        replay(spoilt(change))
    assert words in str(caught.value)


# ------------------------------------------------------------------ what the policy sees


def test_the_system_prompt_can_be_chosen():
    assert world().start("career-a", 0).system == SYSTEM_PROMPT
    assert world(system="Listen.").start("career-a", 0).system == "Listen."
    assert len(SYSTEM_PROMPT.split()) < 40


def test_the_policy_is_told_nothing_private():
    scenarios = [*builtin_scenarios("train"), *builtin_scenarios("heldout")]
    env = EmpathyEnvironment(scenarios, [], TableJudge(TABLE), None, EmpathyConfig())
    for s in scenarios:
        session, steps = play(env, "good", "bad", "heal", "heal", task=s.id)
        told = " ".join([session.system, session.message, *(x.message for x in steps)]).casefold()
        points = [point for axis in AXES for point in s.points[axis]]
        for private in (s.needs, s.situation, s.persona.about, "deficit", "rubric", *points):
            assert private.casefold() not in told, s.id


def test_every_shipped_scenario_can_be_played():
    train, heldout = builtin_scenarios("train"), builtin_scenarios("heldout")
    env = EmpathyEnvironment(train, heldout, TableJudge(TABLE))
    assert env.max_turns == 45
    assert [*env.tasks("train"), *env.tasks("heldout")] == [s.id for s in (*train, *heldout)]
    sessions = [env.start(task, 1) for split in ("train", "heldout") for task in env.tasks(split)]
    for number in range(12):
        reply = Reply("bad" if number == 1 else "heal")
        live = [session for session in sessions if session.ended is None]
        steps = env.step(live, [reply] * len(live))
        assert all(bool(s.message) == (s.end_reason is None) for s in steps)
    for session in sessions:
        assert session.turns[2].message in session.scenario.hurt
        assert len({turn.message for turn in session.turns}) == 12


# ------------------------------------------------------------------ what is refused


def test_replies_must_fit_the_sessions():
    env = world(max_turns=1)
    a, b = env.start("career-a", 0), env.start("career-b", 0)
    with pytest.raises(InputError, match="replies must be one for each of the 2 sessions, got 1"):
        env.step([a, b], [Reply("good")])
    with pytest.raises(InputError, match="sessions must be different"):
        env.step([a, a], [Reply("good")] * 2)
    for wrong in (Reply(None), "good", None, Reply(b"good")):
        with pytest.raises(InputError, match=r"replies\[1\] must be a Reply with a text, got"):
            env.step([a, b], [Reply("good"), wrong])
    assert env.judge.seen == []
    env.step([a], [Reply("good")])
    with pytest.raises(InputError, match=r"sessions\[1\] must be in progress.*ended: max_turns"):
        env.step([b, a], [Reply("good")] * 2)
    assert b.turns == []
    assert env.step([], []) == []
    assert len(env.judge.seen) == 1


def test_judges_and_users_must_answer_each_request():
    class Silent:
        name = "silent"

        def judge(self, requests):
            return []

        respond = judge

    with pytest.raises(InputError, match="judge 'silent' must give one answer for each of 1 req"):
        play(world(judge=Silent()), "good")
    with pytest.raises(InputError, match="the simulated user must give one answer for each of 1"):
        play(world(user=Silent()), "good")


def test_names_must_be_unique_and_known():
    a, judge = scenario("career-a"), TableJudge()
    with pytest.raises(InputError, match="heldout: 'career-a' is a training scenario too"):
        EmpathyEnvironment([a], [a], judge)
    with pytest.raises(InputError, match="train: 'career-a' is there twice"):
        EmpathyEnvironment([a, a], [], judge)
    with pytest.raises(InputError, match="heldout: 'career-a' is there twice"):
        EmpathyEnvironment([], [a, a], judge)
    with pytest.raises(InputError, match="there is no scenario 'nope'"):
        world().start("nope", 0)
    with pytest.raises(InputError, match="split must be train or heldout, got 'test'"):
        world().tasks("test")
    assert isinstance(EmpathyEnvironment([a], [], judge).user, ScriptedUser)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reward": "rdi"}, "reward must be one of idr, absolute, increment, potential, work, got"),
        ({"truncated": "drop"}, "truncated must be judge or zero, got 'drop'"),
        ({"patience": 0}, "patience must be at least 1 batch, got 0"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(InputError, match=words):
        EmpathyConfig(**options)


def test_a_person_without_lines_needs_a_model_to_speak():
    mute = changed(scenario("career-c"), lines=dict.fromkeys(AXES, ()), hurt=(), relief=())
    with pytest.raises(InputError, match="user must be given for 'career-c'"):
        EmpathyEnvironment([mute], [], TableJudge(TABLE))
    user = Recorder("And then?", Failed("down"))
    env = EmpathyEnvironment([mute], [], TableJudge(TABLE), user)
    session, steps = play(env, "good", "good", task="career-c")
    assert steps[0].message == "And then?"
    assert steps[1].message is None
    assert steps[1].end_reason == session.ended == "the person has nothing to say: down"
    assert session.simulator_failures == 1
