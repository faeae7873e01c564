"""The recipe of ST-PPO: claims, the chain, the search world in tokens, verdicts, run folder."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from normkit.errors import InputError
from normkit.recipes import _st_ppo_chain as chain
from normkit.recipes import _st_ppo_measured as measured
from normkit.recipes import _st_ppo_recurrent as recurrent
from normkit.recipes import _st_ppo_search as search
from normkit.recipes import _st_ppo_tabular as tabular
from normkit.recipes._st_ppo_arms import ARMS, CLIP, Tokens, coefficients, group_advantage, limited
from normkit.recipes._st_ppo_comparison import Plan, Trial
from normkit.recipes._st_ppo_comparison import chain as play_chain
from normkit.recipes._st_ppo_comparison import search as play_search
from normkit.recipes._st_ppo_tabular import Schedule
from normkit.recipes.st_ppo import SYSTEM, Config, run
from normkit.rl.environment import Reply
from normkit.rl.environments.search import SearchWorld, SearchWorldConfig
from normkit.runs import read_json, read_table
from tests.reference import st_ppo as oracle

SHORT = Schedule(updates=4, staleness=2, dialogues=8)


@pytest.mark.parametrize(
    "claim", [c for c in SYSTEM.claims if c.kind != "measured"], ids=lambda c: c.name
)
def test_an_identity_holds(claim):
    assert claim.check().verdict == "holds"


# ---------------------------------------------------------------------- coefficients


@pytest.mark.parametrize("ratio", ["token", "turn", "sequence"])
def test_coefficients_are_the_oracle_s(ratio):
    g = torch.Generator().manual_seed(0)
    turn = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3])
    dialogue = turn // 2
    new, old, advantage = torch.randn(3, 10, generator=g, dtype=torch.float64)
    weight = torch.rand(10, generator=g, dtype=torch.float64)
    found = coefficients(new / 2, advantage, Tokens(old / 2, turn, dialogue, weight), ratio)
    unit = {"token": torch.arange(10), "turn": turn, "sequence": dialogue}[ratio].tolist()
    rows = ((new - old).numpy() / 2, advantage.numpy(), unit, weight.numpy())
    lost = oracle.clipping_bias(*rows, CLIP, CLIP, 0)
    whole = oracle.gradient(*rows, [True] * 10)
    assert found.clipped.any()
    np.testing.assert_allclose(found.lost, lost, atol=1e-12)
    np.testing.assert_allclose(found.kept, whole - lost, atol=1e-12)
    ratios = oracle.ratios(rows[0], unit)
    clipped = [
        oracle.is_clipped(w, a, CLIP, CLIP, 0) for w, a in zip(ratios, advantage, strict=True)
    ]
    assert found.clipped.tolist() == clipped


def test_groups_are_compared_within_and_norms_are_limited():
    reward = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 5.0, 7.0]], dtype=torch.float64)
    found = group_advantage(reward, 2)
    np.testing.assert_allclose(found[:, :2], [[-(0.5**0.5), 0.5**0.5], [0, 0]], atol=2e-6)
    np.testing.assert_allclose(found[:, 2:], [[0, 0], [-(0.5**0.5), 0.5**0.5]], atol=2e-6)
    rows = limited(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.3, 0.4]], atol=1e-7)


# ---------------------------------------------------------------------- the chain


def pointed(choose):
    """A policy that says ``choose(hop, place)`` for sure."""
    policy = torch.zeros(1, chain.CELLS, chain.VOCABULARY, dtype=torch.float64)
    for cell in range(chain.CELLS):
        hop, place = cell // chain.LENGTH**2, cell // chain.LENGTH % chain.LENGTH
        policy[0, cell, choose(hop, place)] = 1
    return policy


def right(hop, place):
    return 1 + (hop + hop * chain.LENGTH + place) % (chain.VOCABULARY - 1)


def test_values_are_those_worked_out_by_hand():
    """Always answer: the first guess. Answer when all is found: both facts in four queries."""
    early = pointed(lambda *_: chain.ANSWER)
    assert float(chain.truth(early).start) == pytest.approx(chain.GUESS[0])
    wise = pointed(lambda h, j: chain.ANSWER if h == chain.HOPS and j == 0 else right(h, j))
    queries = chain.TURNS - 1
    late = sum(
        math.comb(queries, k) * 0.95**k * 0.05 ** (queries - k)
        for k in range(chain.HOPS, queries + 1)
    )
    assert float(chain.truth(wise).start) == pytest.approx(late)


def test_dialogues_come_by_cells_as_often_as_occupancy_says():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, chain.CELLS, chain.VOCABULARY, generator=g, dtype=torch.float64)
    policy = torch.softmax(logits, -1)
    size = 20_000
    played = chain.roll_out(policy, size, g)
    batch = tabular.flatten(played, policy)
    visits = torch.bincount(batch.step, minlength=2 * chain.TURNS * chain.CELLS) / size
    expected = chain.occupancy(policy).flatten()
    assert float((visits - expected).abs().max()) < 0.02
    spread = 4 * 0.5 / size**0.5
    np.testing.assert_allclose(played.reward.mean(1), chain.truth(policy).start, atol=spread)
    shares = torch.bincount(batch.run, batch.tokens.weight)
    np.testing.assert_allclose(shares, 1, atol=1e-12)


def test_sampled_gradients_are_right_on_average():
    """On-policy, without a critic: the mean over responses of A times the mean score."""
    g = torch.Generator().manual_seed(1)
    policy = torch.softmax(torch.randn(1, chain.CELLS, chain.VOCABULARY, generator=g).double(), -1)
    played = chain.roll_out(policy, 40_000, g)
    batch = tabular.flatten(played, policy)
    # Undo the division by the response's length, which makes it the gradient of no reward.
    length = played.live.sum((2, 3)).double().flatten()[batch.tokens.dialogue]
    found = tabular.ascent(batch.reward * batch.tokens.weight * length, batch, policy)
    exact = chain.truth(policy).gradient.flatten(1)
    assert float(torch.cosine_similarity(found, exact)) > 0.97
    assert float(found.norm() / exact.norm()) == pytest.approx(1, abs=0.05)


def test_corrections_do_nothing_on_policy_and_something_later():
    rates = torch.tensor([0.3, 0.3])
    at_once = replace(SHORT, staleness=1)
    plain, corrected = (tabular.train(ARMS[n], rates, at_once, 0) for n in ("PPO", "S-PPO"))
    assert torch.equal(plain.value, corrected.value)
    assert float(plain.bias.max()) == 0
    stale = Schedule(16, 16, 8)
    plain, corrected = (tabular.train(ARMS[n], rates, stale, 0) for n in ("PPO", "S-PPO"))
    assert float(plain.bias.max()) > 0
    assert not torch.equal(plain.value, corrected.value)


def test_training_in_the_chain_helps_and_measures_the_lemma():
    found = tabular.train(ARMS["PPO"], torch.full((3,), 0.2), Schedule(48, 8, 16), 0, lemma=True)
    assert float((found.value[-1] - found.value[0]).mean()) > 0.1
    for name in ("true", "luck", "critic", "value_error", "cosine"):
        assert torch.isfinite(getattr(found, name)).all()
    plain = tabular.train(ARMS["GRPO"], torch.full((3,), 0.2), SHORT, 0, lemma=True)
    assert torch.isnan(plain.true).all()


# ---------------------------------------------------------------------- the search world


def test_tables_find_what_the_world_finds():
    pytest.importorskip("bm25s")
    world = SearchWorld(SearchWorldConfig(max_turns=search.TURNS, hits=1))
    table = search.tables()
    asked = [world.questions[name] for name in world.tasks("heldout")]
    seen = 0
    for number in (0, 45, 100):
        question = asked[number]
        session = world.start(question.id, 0)
        subject = int(table.subject["heldout"][number])
        assert search.hops("heldout")[number] == question.hops
        relation = table.relation["heldout"][number].tolist()
        (step,) = world.step([session], [Reply(f"<search>{question.queries[0]}</search>")])
        place = int(table.found[subject, relation[0]])
        assert step.info["found"] == [world.searcher.passages[place].id]
        assert (
            question.hops > 1 or table.told[place, relation[0]] == table.answer["heldout"][number]
        )
        seen += step.info["found"][0] == question.passages[0]
    assert seen >= 2


def test_a_teacher_without_errors_mostly_answers_right():
    pytest.importorskip("bm25s")
    question = torch.arange(len(search.hops("train")))
    luck = torch.Generator().manual_seed(0)
    found = search.play("train", question, search.teacher("train", question, 0, luck))
    assert float(found.reward.mean()) > 0.9
    assert found.seen.shape == (len(question), 1 + search.TURNS * (search.LENGTH + 1))
    # A query takes four tokens, an answer three; where nothing is found no answer ends it.
    paid = found.reward > 0
    assert found.live.sum(1)[paid].tolist() == (4 * search.hops("train") + 3)[paid].tolist()
    said = found.seen[:, 1:]
    places = torch.arange(said.shape[1]) % (search.LENGTH + 1) < search.LENGTH
    assert (said[:, places][~found.live[:, places]] == search.END).all()


@pytest.mark.parametrize(
    ("turn", "paid"),
    [
        ((search.ANSWER, search.POINT, search.END, search.END), False),
        ((search.ANSWER, search.ANSWER, search.END, search.END), False),
        ((search.SEARCH, search.POINT, search.END, search.END), False),
    ],
)
def test_turns_that_answer_nothing_earn_nothing(turn, paid):
    pytest.importorskip("bm25s")
    steps = iter([*turn, search.END] * search.TURNS)

    def say(token):
        return torch.full_like(token, next(steps)), torch.zeros(1, len(token))

    found = search.play("train", torch.arange(5), say)
    assert bool(found.reward.any()) == paid


@pytest.fixture(scope="module")
def novice():
    """A beginner who was taught for less long."""
    pytest.importorskip("bm25s")
    return recurrent.beginner(12)


@pytest.fixture
def taught(monkeypatch, novice):
    monkeypatch.setattr(recurrent, "beginner", lambda: novice)


def test_training_reads_what_sampling_said(taught, novice):
    """Log-probabilities of the forward pass are those noted while playing."""
    critic = [x[None] for x in recurrent._initial(recurrent._CRITIC, 1)]
    say = recurrent.player(novice, critic, torch.Generator().manual_seed(0), 1, 6)
    found = search.play("train", torch.arange(6), say)
    hidden = recurrent.states(found.seen[None, :, :-1], novice)
    chance = recurrent.speak(hidden, novice)[0]
    following = found.seen[:, 1:, None].clamp(max=search.VOCABULARY - 1)
    logprob = chance.gather(-1, following)[..., 0]
    np.testing.assert_allclose(logprob[found.live], found.said[0][found.live], atol=1e-5)
    value = recurrent.judge(hidden.flatten(1, 2), critic).view(found.live.shape)
    np.testing.assert_allclose(value[found.live], found.said[1][found.live], atol=1e-5)


def test_runs_do_not_see_each_other(taught):
    """A method trained beside others is as if it were alone."""
    beside = recurrent.train(["PPO", "GSPO", "ST-PPO"], [0.02, 0.02, 0.02], 2, SHORT, 0)
    alone = recurrent.train(["ST-PPO"], [0.02], 2, SHORT, 0)
    np.testing.assert_allclose(beside.gradient[:, 4:], alone.gradient, rtol=1e-3)
    np.testing.assert_allclose(beside.match[:, 4:], alone.match, atol=1e-9)


def test_recurrent_corrections_do_nothing_on_policy(taught):
    found = recurrent.train(["PPO", "S-PPO"], [0.02, 0.02], 2, replace(SHORT, staleness=1), 0)
    assert float(found.bias.max()) == 0
    assert torch.equal(found.gradient[:, :2], found.gradient[:, 2:])


# ---------------------------------------------------------------------- verdicts


def trial(name, curve, rate=0.1, **lags):
    by_lag = {"bias": [[0.0, 0.0], [0.1, 0.2]], "gradient": [[1.0] * 2] * 2, "clipped": [[0] * 2]}
    tuning = {"0.1": [curve[-1][0]], "0.2": [curve[-1][1]]}
    return Trial(name, 2, rate, tuning, curve, {**by_lag, **lags}, [[0.1, 0.1], [0.2, 0.4]], [1, 2])


@pytest.mark.parametrize(
    ("ours", "expected"),
    [((0.8, 0.9), "holds"), ((0.2, 0.1), "contradicted"), ((0.4, 0.6), "not shown")],
)
def test_a_verdict_is_as_it_falls(ours, expected):
    a, b = trial("a", [[0.0, 0.0], list(ours)]), trial("b", [[0.0, 0.0], [0.5, 0.5]])
    finding = measured.difference(a, b, "final")
    assert finding.verdict == expected
    assert finding.details == {"a at 0.1": pytest.approx(list(ours)), "b at 0.1": [0.5, 0.5]}
    assert measured.robust({"a": a, "b": b}, "a", "b").verdict == expected


def test_a_fall_is_measured_from_the_best_so_far():
    found = trial("a", [[0.1, 0.9], [0.6, 0.5], [0.2, 0.7]])
    np.testing.assert_allclose(found.values("drop"), [0.4, 0.4])
    np.testing.assert_allclose(found.values("mean"), [0.3, 0.7])
    np.testing.assert_allclose(found.values("bias"), [0.05, 0.1])
    np.testing.assert_allclose(found.values("tail"), [1, 2])


def test_growth_tells_an_exponential_from_a_power():
    lag = np.arange(32.0)[:, None] * np.ones(3)
    doubling = measured.growth(trial("a", [[0.0] * 3], bias=np.where(lag > 0, 2 ** (lag / 5), 0)))
    np.testing.assert_allclose(doubling.exponential, 1)
    np.testing.assert_allclose(doubling.doubling, 5)
    square = trial("a", [[0.0] * 3], bias=lag**2)
    np.testing.assert_allclose(measured.growth(square).power, 1)
    assert measured.exponential_growth(square).verdict == "contradicted"
    assert measured.exponential_growth(trial("a", [[0.0, 0.0]])).verdict == "not shown"


def test_lags_are_compared_at_both_ends():
    down = trial("a", [[0.0] * 2], cosine=[[0.9, 0.8]] * 8 + [[0.1, 0.2]] * 8)
    assert measured.falls(down, "cosine").verdict == "holds"
    assert measured.falls(down, "cosine", -1).verdict == "contradicted"
    both = trial("a", [[0.0] * 2], bias=[[0, 0], [1, 2], [3, 4]], critic=[[1, 1], [2, 2], [3, 4]])
    assert measured.tracks(both).verdict == "holds"
    assert measured.over_training(both).verdict == "holds"


def test_equal_trainings_are_equal_and_others_are_not():
    names = ("PPO", "S-PPO", "Turn-PPO", "ST-PPO")
    same = {name: trial(name, [[0.1, 0.2], [0.3, 0.4]]) for name in names}
    assert measured.same_at_one(same).verdict == "holds"
    other = {**same, "S-PPO": trial("S-PPO", [[0.1, 0.2], [0.3, 0.5]])}
    assert measured.same_at_one(other).verdict == "contradicted"
    elsewhere = {**same, "S-PPO": replace(same["S-PPO"], rate=0.3)}
    assert measured.same_at_one(elsewhere).verdict == "contradicted"


def test_the_claims_judge_the_comparisons(monkeypatch, taught):
    rates = (0.05, 0.2)
    in_chain = {t.name: t for t in play_chain(Plan(2, 1, 16, rates, 8, (16,)), 0)}
    plan = Plan(2, 1, 4, (0.02,), 8, (1, 4), hot=0.05)
    on, off, large = ({t.name: t for t in trials} for trials in play_search(plan, 0))

    def played(staleness, hot=False):
        return large if hot else on if staleness == 1 else off

    monkeypatch.setattr(measured, "_chain", lambda: in_chain)
    monkeypatch.setattr(measured, "_search", played)
    names = [claim.name for claim in measured.MEASURED]
    assert len(set(names)) == len(names)
    for claim in measured.MEASURED:
        if claim.name == "bias-grows-in-training":  # takes two batches
            continue
        assert claim.check().verdict in ("holds", "not shown", "contradicted")


# ---------------------------------------------------------------------- the run


@pytest.mark.parametrize(
    ("world", "plots", "flags"),
    [
        ("tabular", 4, {"updates": 8, "staleness": (8,), "rates": (0.1, 0.3)}),
        ("search", 5, {"updates": 4, "staleness": (1, 4), "rates": (0.01, 0.02)}),
    ],
)
def test_a_run_leaves_tables_plots_and_a_report(tmp_path, taught, world, plots, flags):
    config = Config(world=world, seeds=2, tuning_seeds=1, seed=5, **flags)
    results = run(config, tmp_path)
    rounds = 1 if world == "tabular" else 3
    assert [row[0] for row in results["table"]["rows"]] == list(ARMS) * rounds
    assert read_json(tmp_path, "results.json")["title"] == results["title"]
    assert len(read_table(tmp_path)) == rounds * len(ARMS)
    trials = read_table(tmp_path, "trials")
    assert [len(t["curve"][-1]) for t in trials] == [2] * rounds * len(ARMS)
    assert len(list(tmp_path.glob("plots/*.png"))) == plots
    assert "<img" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("seeds", 1),
        ("updates", 0),
        ("rates", (-1.0,)),
        ("staleness", (7,)),
        ("staleness", (8, 16)),
        ("heldout", 0),
        ("max_turns", 0),
        ("warm_start", -1),
    ],
)
def test_bad_flags_are_refused(flag, value):
    with pytest.raises(InputError, match=flag):
        Config(**{flag: value}).validate()
