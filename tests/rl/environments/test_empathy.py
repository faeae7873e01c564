"""The emotional-support world: state, user, failures and scores, with judges that are known."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from normkit.errors import InputError
from normkit.rl.environment import Reply
from normkit.rl.environments.empathy import EmpathyConfig, EmpathyEnvironment, session_log
from normkit.rl.environments.epm import EPMConfig, epm_q
from normkit.rl.judge import Failed, JudgeUnavailableError
from normkit.rl.rubric import AXES
from tests.rl.fakes import TableJudge, filled, scenario

TABLE = {
    "good": filled((1, 0), (2, 0), (0, 0)),
    "bad": filled((0, -1), (0, 0), (0, -1)),
    "heal": filled((2, 0), (2, 0), (2, 0)),
    "fail": "no verdict",
}


def world(max_turns=4, judge=None, user=None, **options):
    config = EmpathyConfig(epm=EPMConfig(max_turns=max_turns), **options)
    return EmpathyEnvironment(
        [scenario("career-a")], [scenario("career-b")], judge or TableJudge(TABLE), user, config
    )


def play(env, *replies, seed=0):
    session = env.start("career-a", seed)
    return session, [env.step([session], [Reply(text)])[0] for text in replies]


def test_rewards_telescope_to_the_distance_closed():
    session, steps = play(world(), "good", "bad", "good")
    t = session.trajectory
    assert sum(step.reward for step in steps) == pytest.approx(t.initial_distance - t.distance)
    assert steps[0].reward > 0 > steps[1].reward
    assert steps[0].info["increment"] == [1, 3, 0]


def test_the_user_answers_to_the_state():
    session, steps = play(world(max_turns=9), "bad", "good", "heal", "heal", "heal", "heal")
    said = [step.message for step in steps]
    assert said[0].startswith("ouch")
    assert said[1].split()[0] in AXES
    assert said[-1].startswith("better")
    assert len(set(said)) == len(said)
    after = dict(zip(AXES, session.trajectory.turns[1].state, strict=True))
    start = dict(zip(AXES, session.trajectory.initial, strict=True))
    neediest = max(AXES, key=lambda axis: after[axis] / start[axis])
    assert said[1].startswith(neediest)


def test_a_long_dialogue_reuses_the_oldest_line():
    _, steps = play(world(max_turns=30), *["nothing"] * 29)
    said = [step.message for step in steps]
    assert all(said)
    assert len(set(said[:9])) == 9
    assert all(a != b for a, b in itertools.pairwise(said))


def test_the_last_turn_ends_the_dialogue():
    session, steps = play(world(max_turns=2), "good", "good")
    assert steps[0].end_reason is None
    assert steps[1].end_reason == "max_turns"
    assert steps[1].message is None
    assert session.ended == "max_turns"


def test_success_and_collapse_end_early():
    _, steps = play(world(max_turns=45), *["heal"] * 12)
    assert [s.end_reason for s in steps[:11]] == [None] * 11
    assert steps[11].end_reason == "success"
    _, steps = play(world(max_turns=45), *["bad"] * 12)
    assert steps[11].end_reason.startswith("failure: direction collapse")


def test_a_failed_judgement_is_masked_and_counted():
    env = world(patience=3)
    session, steps = play(env, "good", "fail", "good")
    assert math.isnan(steps[1].reward)
    assert steps[1].message
    assert steps[1].info["failed"] == "no verdict"
    assert steps[1].info["state"] == steps[0].info["state"]
    assert env.score(session)["failed_judgements"] == 1
    assert len(session.trajectory.turns) == 2


def test_a_dialogue_of_failures_still_ends():
    session, steps = play(world(max_turns=2, patience=9), "fail", "fail")
    assert steps[1].end_reason == "max_turns"
    assert math.isnan(world().score(session)["score"])


def test_all_judgements_failing_stops_with_the_reason():
    env = world(patience=2)
    session = env.start("career-a", 0)
    env.step([session], [Reply("fail")])
    with pytest.raises(JudgeUnavailableError, match="no verdict"):
        env.step([session], [Reply("fail")])


def test_one_valid_judgement_of_a_batch_is_enough():
    env = world()
    pair = [env.start("career-a", 0), env.start("career-a", 1)]
    first, second = env.step(pair, [Reply("fail"), Reply("good")])
    assert math.isnan(first.reward)
    assert second.reward > 0


def test_a_failing_simulator_falls_back_to_the_script():
    class Silent:
        def respond(self, requests):
            return [Failed("mute") for _ in requests]

    session, steps = play(world(user=Silent()), "good")
    assert steps[0].message.split()[0] in AXES
    assert session.simulator_failures == 1


def test_truncated_replies_may_earn_nothing():
    env = world(truncated="zero")
    session = env.start("career-a", 0)
    assert env.step([session], [Reply("good", truncated=True)])[0].reward == 0
    env = world()
    session = env.start("career-a", 0)
    assert env.step([session], [Reply("good", truncated=True)])[0].reward > 0


def test_same_seed_same_dialogue_other_seed_other_lines():
    replies = ["good", "bad", "nothing"]
    first = [s.message for s in play(world(), *replies, seed=5)[1]]
    assert first == [s.message for s in play(world(), *replies, seed=5)[1]]
    others = {tuple(s.message for s in play(world(), *replies, seed=n)[1]) for n in range(12)}
    assert len(others) > 1


def test_the_policy_is_told_nothing_private():
    env = world()
    session = env.start("career-a", 0)
    told = session.system + session.message
    private = [session.scenario.needs, *session.scenario.points["affective"], "deficit"]
    assert not any(text in told for text in private)


def test_score_is_epm_q():
    env = world()
    session, _ = play(env, "good", "bad", "heal")
    assert env.score(session)["score"] == pytest.approx(epm_q([session.trajectory]).score)


def test_the_log_rebuilds_the_trajectory():
    session, _ = play(world(), "good", "bad")
    log = session_log(session)
    state = log["initial"]
    for step, expected in zip(log["increments"], log["states"], strict=True):
        state = [a + b for a, b in zip(state, step, strict=True)]
        assert state == expected


def test_splits_must_not_overlap():
    with pytest.raises(InputError, match="'career-a' is a training scenario too"):
        EmpathyEnvironment([scenario("career-a")], [scenario("career-a")], TableJudge())
    with pytest.raises(InputError, match="no scenario 'nope'"):
        world().start("nope", 0)
    assert dataclasses.asdict(EmpathyConfig())["patience"] == 1
