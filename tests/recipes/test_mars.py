"""The recipe of MARS: claims, game tables, exact gradients, self-play, verdicts, run folder."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest
import torch

from normkit.errors import InputError
from normkit.recipes import _mars_board as boards
from normkit.recipes import _mars_hanabi as hanabi
from normkit.recipes import _mars_measured as measured
from normkit.recipes._mars_gradient import (
    ARMS,
    Setting,
    bias,
    credit,
    equilibrium,
    expected_credit,
    mean_of_pool,
    running_means,
    study,
)
from normkit.recipes._mars_measured import Plan, Trial, compare, compare_hanabi, gain
from normkit.recipes._mars_selfplay import train
from normkit.runs import read_json, read_table
from tests.reference import mars as oracle

pytest.importorskip("pyspiel")

from normkit.recipes._mars_tree import LOADED, policy_gradient, tree
from normkit.recipes.mars import SYSTEM, Config, run
from normkit.rl.self_play import Tabular, exploitability

LOADED_DEALS = {
    (a, b): (LOADED if a > b else 1 - LOADED) / 3 for a, b in itertools.permutations(range(3), 2)
}
DEALS = {"kuhn": None, "loaded": LOADED_DEALS}
SMALL = {
    "seeds": 2,
    "tuning_seeds": 1,
    "updates": 15,
    "rates": (0.2, 0.4),
    "batches": 50,
    "hanabi_seeds": 3,
    "hanabi_updates": 10,
    "hanabi_rates": (0.004,),
}
BOARD = {"board_seeds": 3, "board_rates": (0.1,)}


@pytest.mark.parametrize(
    "claim", [c for c in SYSTEM.claims if c.kind != "measured"], ids=lambda c: c.name
)
def test_an_identity_holds(claim):
    assert claim.check().verdict == "holds"


def random_policy(game, seed=0):
    table = tree(game)
    logits = torch.randn(
        table.legal.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return logits.masked_fill(~table.legal, -torch.inf).softmax(-1)[None]


def in_words(policy):
    """A policy of Kuhn poker for the oracle: probability of a bet by card and history."""
    bets = policy[0, :, 1].tolist()
    return {(int(name[0]), name[1:]): p for name, p in zip(tree("kuhn").names, bets, strict=True)}


def by_logit(gradient):
    """The oracle's gradient by the logit of a bet, as one by both logits ``[I, 2]``."""
    bets = np.array([gradient[int(name[0]), name[1:]] for name in tree("kuhn").names])
    return np.stack([-bets, bets], 1)


# ---------------------------------------------------------------------- game tables


@pytest.mark.parametrize("game", ["kuhn", "loaded"])
def test_the_table_is_the_game_played_by_hand(game):
    policy = random_policy(game)
    table, lines = tree(game), oracle.kuhn_histories(in_words(policy), DEALS[game])
    assert float(table.reach(policy).sum()) == pytest.approx(1)
    expected = sum(p * chips for p, _, chips in lines)
    assert float(table.value(policy)) == pytest.approx(expected)
    found = sorted(zip(table.reach(policy)[0].tolist(), table.payoff[:, 0].tolist(), strict=True))
    np.testing.assert_allclose(found, sorted((p, c) for p, _, c in lines), atol=1e-12)


@pytest.mark.parametrize("game", ["kuhn", "loaded"])
def test_the_exact_gradient_is_the_sum_over_lines_of_play(game):
    policy = random_policy(game)
    expected = by_logit(oracle.kuhn_gradient(in_words(policy), DEALS[game]))
    np.testing.assert_allclose(tree(game).true_gradient(policy)[0], expected, atol=1e-12)


def test_the_equilibrium_is_kuhns():
    assert in_words(equilibrium(0.2)) == pytest.approx(oracle.kuhn_equilibrium(0.2))


@pytest.mark.parametrize(("game", "name"), [("kuhn", "kuhn_poker"), ("leduc", "leduc_poker")])
def test_best_responses_are_those_of_openspiel(game, name):
    table, policy = tree(game), random_policy(game, 3)
    rows = {
        key: {a: float(policy[0, i, a]) for a in table.legal[i].nonzero().flatten().tolist()}
        for i, key in enumerate(table.names)
    }
    expected = exploitability(Tabular(rows), name)
    assert float(table.exploitability(policy)) == pytest.approx(expected, abs=1e-9)


def test_runs_do_not_see_each_other():
    table = tree("leduc")
    both = torch.cat([random_policy("leduc", s) for s in (0, 1)])
    for measure in (table.exploitability, table.reach, table.own_reach, table.true_gradient):
        alone = torch.cat([measure(both[:1]), measure(both[1:])])
        torch.testing.assert_close(measure(both), alone, atol=1e-12, rtol=0)


def test_games_are_played_as_often_as_they_are_likely():
    table, policy = tree("kuhn"), random_policy("kuhn", 1)
    played = table.play(policy, 200_000, torch.Generator().manual_seed(0))
    first = played.reward[0, :, 0].sum(1).mean()
    assert float(first) == pytest.approx(float(table.value(policy)), abs=0.015)
    assert (played.reward[~played.live] == 0).all()
    assert (played.reward.sum((2, 3)) == 0).all()


# ---------------------------------------------------------------------- estimators of the study


def played(runs=3, games=5):
    policy = tree("leduc").uniform(runs)
    return tree("leduc").play(policy, games, torch.Generator().manual_seed(2))


def by_hand(arm, reward, live):
    """Advantages of one run ``[M, 2, K]``, trajectory by trajectory."""
    lines = [reward[m, p][live[m, p]].tolist() for m in range(len(reward)) for p in (0, 1)]
    seats = [i % 2 for i in range(len(lines))]
    if arm == "mars":
        return oracle.mars(lines, seats)
    if arm == "pooled":
        return oracle.mars(lines, [0] * len(lines))
    if arm == "normalize-then-sum":
        return oracle.normalize_then_sum(lines, seats)
    totals = [sum(line) for line in lines]
    if arm == "trajectory":
        each = np.subtract(totals, np.mean(totals)).tolist()
    else:
        kept = [oracle.running_baseline(totals[p::2]) for p in (0, 1)]
        each = [kept[i % 2][i // 2] for i in range(len(lines))]
    return [each[i] for i, line in enumerate(lines) for _ in line]


@pytest.mark.parametrize("arm", ARMS)
def test_the_arms_are_what_they_say(arm):
    found = played()
    got, _ = credit(arm, found.reward, found.live, torch.zeros(3, 2, dtype=torch.float64))
    assert (got[~found.live] == 0).all()
    for r in range(3):
        expected = by_hand(arm, found.reward[r], found.live[r])
        np.testing.assert_allclose(got[r][found.live[r]], expected, atol=1e-12)


def test_the_authors_code_is_the_other_order_but_for_a_number_by_seat():
    """In exact arithmetic: one value a turn, one scale, one shift for each seat."""
    found = played(1)
    live = found.live[0]
    lines = [found.reward[0, m, p][live[m, p]].tolist() for m in range(5) for p in (0, 1)]
    seats, random = [0, 1] * 5, np.random.default_rng(0)
    tokens = [random.integers(1, 6, len(line)).tolist() for line in lines]
    official = oracle.official_tokens(lines, tokens, [0] * 10, seats)
    by_turn = []
    for values, lengths in zip(official, tokens, strict=True):
        turns = np.split(values, np.cumsum(lengths)[:-1])
        assert max(np.ptp(turn) for turn in turns) < 1e-9
        by_turn += [turn[0] for turn in turns]
    start = torch.zeros(1, 2, dtype=torch.float64)
    other = credit("normalize-then-sum", found.reward, found.live, start)[0][found.live].numpy()
    seat = np.array([p for p, line in zip(seats, lines, strict=True) for _ in line])
    columns = np.stack([other, seat == 0, seat == 1], 1)
    fit = np.linalg.lstsq(columns, np.array(by_turn), rcond=None)[0]
    np.testing.assert_allclose(columns @ fit, by_turn, atol=1e-7)
    assert fit[0] > 0.01


def test_a_running_mean_goes_on_where_it_stopped():
    total = torch.randn(2, 7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = torch.zeros(2, 2, dtype=torch.float64)
    whole, end = running_means(total, start)
    first, middle = running_means(total[:, :3], start)
    rest, last = running_means(total[:, 3:], middle)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    torch.testing.assert_close(last, end)


@pytest.mark.parametrize("games", [1, 2, 3])
def test_the_expected_mean_of_a_pool_is_that_of_all_batches(games):
    total, count = torch.tensor([-3.0, 0, 2, 4]).double(), torch.tensor([1.0, 3, 1, 2]).double()
    chance = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    expected = np.zeros(4)
    for first in range(4):
        for others in itertools.product(range(4), repeat=games - 1):
            batch = [first, *others]
            probability = np.prod([chance[i] for i in others])
            expected[first] += probability * float(total[batch].sum() / count[batch].sum())
    np.testing.assert_allclose(mean_of_pool(total, count, chance, games), expected, atol=1e-12)


@pytest.mark.parametrize("arm", ARMS)
def test_the_exact_bias_is_that_of_all_batches_of_two(arm):
    """All 900 pairs of games through the estimators of the library; running means at the value."""
    table, policy = tree("loaded"), random_policy("loaded", 4)
    pairs = torch.cartesian_prod(torch.arange(30), torch.arange(30))
    value = table.value(policy)
    start = torch.stack([value, -value], 1).expand(900, -1)
    got, _ = credit(arm, table.reward[pairs], table.live[pairs], start)
    found = policy_gradient(got, table.cell[pairs], policy.expand(900, -1, -1)) / 4
    weight = table.reach(policy)[0][pairs].prod(1)
    expected = torch.einsum("r,ria->ia", weight, found) - table.true_gradient(policy)[0]
    torch.testing.assert_close(bias(arm, table, policy, 2), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("game", ["kuhn", "loaded"])
def test_the_bias_that_stays_is_the_gradient_of_the_length(game):
    """In closed form: each turn loses its seat's mean reward for every turn that is left."""
    policy = random_policy(game, 5)
    words = in_words(policy)
    rewards = oracle.kuhn_means(words, DEALS[game])[1]
    expected = by_logit(
        oracle.kuhn_gradient(words, DEALS[game], lambda seat, _, left: -rewards[seat] * left)
    )
    got = bias("normalize-then-sum", tree(game), policy, None)
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert bias("mars", tree(game), policy, None).abs().max() < 1e-12


def test_gifts_to_a_seat_do_not_change_what_mars_expects():
    table, policy = tree("kuhn"), random_policy("kuhn", 6)
    gift = type(table)(
        table.chance,
        table.payoff + torch.tensor([5.0, 0.0]),
        table.cell,
        table.legal,
        table.before,
        table.names,
    )
    for games in (4, None):
        plain = expected_credit("mars", table, policy, games)
        torch.testing.assert_close(expected_credit("mars", gift, policy, games), plain)
    change = expected_credit("pooled", gift, policy, 4) - expected_credit(
        "pooled", table, policy, 4
    )
    assert change[:, 0].min() > 1


def test_the_study_sees_what_the_tables_say():
    found = study(Setting("loaded", "uniform", 16), 400, 0)
    assert set(found) == set(ARMS)
    assert found["mars"].variance.mean() < 0.8 * found["pooled"].variance.mean()
    assert found["normalize-then-sum"].limit > 0.2
    assert all(q.limit < 1e-12 for arm, q in found.items() if arm != "normalize-then-sum")
    assert all((q.cosine.abs() <= 1 + 1e-9).all() for q in found.values())


# ---------------------------------------------------------------------- self-play


def test_self_play_can_be_repeated_and_runs_keep_apart():
    rates = torch.tensor([0.1, 0.0, 0.2])
    first, again = (train("mars", "kuhn", rates, 20, 8, 3, 2) for _ in range(2))
    assert torch.equal(first.average, again.average)
    assert first.games == [80, 160]
    still = tree("kuhn").exploitability(tree("kuhn").uniform())
    assert first.last[:, 1].tolist() == pytest.approx([float(still)] * 2)
    assert (first.last[:, [0, 2]] != still).all()


@pytest.mark.parametrize("arm", ARMS)
def test_self_play_becomes_less_exploitable(arm):
    done = train(arm, "loaded", torch.full((4,), 0.1), 100, 32, 0, 2)
    assert float(done.average[-1].mean()) < 0.2  # uniform play: 0.375


def test_the_average_policy_is_weighted_by_how_often_it_was_there():
    """Two policies that reach an information set with 0.9 and 0.1 count 9 to 1 there."""
    table = tree("kuhn")
    i = table.names.index("0pb")
    before = int(table.before[i, 0])
    policy = table.uniform().clone()
    policy[0, before // 2] = torch.tensor([0.9, 0.1])
    assert before % 2 == 0  # a pass
    assert float(table.own_reach(policy)[0, i]) == pytest.approx(0.9)
    assert float(table.own_reach(policy)[0, table.names.index("0")]) == 1


# ---------------------------------------------------------------------- Mini Hanabi


def test_hanabi_is_played_by_its_rules():
    players = hanabi.Players(torch.full((2,), 0.1), torch.Generator().manual_seed(0))
    turns = hanabi.play(players, 6, Random(0))
    assert turns.live.shape[:3] == (2, 6, 2)
    assert turns.legal.gather(4, turns.chosen[..., None]).squeeze(4)[turns.live].all()
    assert ((turns.score >= 0) & (turns.score <= 4) & (turns.score % 1 == 0)).all()
    assert (turns.reward[~turns.live] == 0).all()
    # Points of the first move come before the second seat has a turn.
    assert (turns.reward[:, :, 1].sum(2) <= turns.score).all()
    moves = turns.live.sum(3)
    ahead = moves[..., 0] - moves[..., 1]
    assert ((ahead == 0) | (ahead == 1)).all()


def test_uniform_play_of_hanabi_earns_what_openspiel_says():
    players = hanabi.Players(torch.zeros(1), torch.Generator().manual_seed(0))
    found = hanabi.play(players, 1500, Random(1)).score
    assert float(found.mean()) == pytest.approx(1.43, abs=0.08)  # of 3,000 random games


def test_hanabi_is_learned_and_can_be_repeated():
    rates = torch.tensor([0.0, 0.01])
    first, again = (hanabi.train("mars", rates, 25, 16, 0) for _ in range(2))
    assert torch.equal(first, again)
    assert float(first[-8:, 1].mean()) > float(first[-8:, 0].mean()) + 0.2


# ---------------------------------------------------------------------- tic-tac-toe


def test_the_board_has_its_positions_and_best_play_never_loses():
    table = boards.board()
    assert len(table.names) == 5478
    assert int(table.over.sum()) == 958
    assert [float(table.unbeaten(table.best[None], seat)) for seat in (0, 1)] == [1, 1]


def test_the_chance_not_to_lose_is_that_of_games_played():
    table = boards.board()
    policy = (table.legal / table.legal.sum(1, keepdim=True)).double()
    rows = dict(zip(table.names, table.best, strict=True))
    best = torch.stack([torch.where(policy[i] > 0, rows[n], 0) for i, n in enumerate(table.names)])
    mixed = torch.where((table.moves % 2 == 0)[:, None], policy, best)
    mixed[table.over] = 1 / 9
    played = table.play(mixed[None], 50_000, torch.Generator().manual_seed(0))
    kept = (played.reward[0, :, 0].sum(1) >= 0).double().mean()
    assert float(kept) == pytest.approx(float(table.unbeaten(policy[None], 0)), abs=0.01)


def test_boards_are_played_by_the_rules():
    table = boards.board()
    policy = (table.legal / table.legal.sum(1, keepdim=True)).double()[None]
    played = table.play(policy, 20_000, torch.Generator().manual_seed(1))
    total = played.reward.sum(3)[0]
    assert set(map(tuple, total.tolist())) == {(1.0, -1.0), (-1.0, 1.0), (0.1, 0.1)}
    won, drawn = (total[:, 0] == 1).double().mean(), (total[:, 0] == 0.1).double().mean()
    assert float(won) == pytest.approx(0.585, abs=0.02)  # 737/1260 of random games
    assert float(drawn) == pytest.approx(0.127, abs=0.02)  # 8/63


def test_tree_search_loses_to_no_one_and_beats_uniform_play():
    table = boards.board()
    uniform = (table.legal / table.legal.sum(1, keepdim=True)).double()
    assert boards.unbeaten_by_search(table.best, 1, 4) == 1
    assert boards.unbeaten_by_search(uniform, 1, 8, 50) < 0.6


# ---------------------------------------------------------------------- verdicts


def trial(game, name, final, last=()):
    return Trial(game, name, 0.1, [64], [final], [list(last)] if last else [], [0.5] * len(final))


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [((0.4, 0.5), "holds"), ((0.1, 0.2), "contradicted"), ((0.2, 0.4), "not shown")],
)
def test_less_exploitable_is_better(theirs, expected):
    found = {
        "mars": trial("kuhn", "mars", [0.3, 0.3], (0.1, 0.1)),
        "pooled": trial("kuhn", "pooled", list(theirs), (0.1, 0.1)),
    }
    finding = gain(found, "pooled")
    assert finding.verdict == expected
    assert finding.details["pooled at 0.1"] == list(theirs)


def test_more_points_are_better():
    found = {
        "mars": trial("hanabi", "mars", [3.0, 2.0]),
        "spiral": trial("hanabi", "spiral", [1.0, 1.5]),
    }
    assert gain(found, "spiral").verdict == "holds"


def test_the_claims_judge_the_comparison(monkeypatch):
    plan = Plan(**SMALL, **BOARD, games=8)
    poker = {t.name: t for t in compare(plan, "kuhn", 0)}
    coop = {t.name: t for t in compare_hanabi(plan, 0)}
    board = {t.name: t for t in measured.compare_board(plan, 0)}
    monkeypatch.setattr(measured, "_board", lambda: board)
    monkeypatch.setattr(measured, "_trials", lambda game: poker)
    monkeypatch.setattr(measured, "_hanabi", lambda: coop)
    monkeypatch.setattr(measured, "_quality", lambda setting: study(setting, 50, 0))
    for claim in measured.MEASURED:
        finding = claim.check()
        assert finding.verdict in ("holds", "not shown", "contradicted")
        assert finding.details


# ---------------------------------------------------------------------- the run


def test_a_run_leaves_tables_plots_and_a_report(tmp_path):
    results = run(Config(**SMALL, batch_games=8, seed=5), tmp_path)
    assert len(results["table"]["rows"]) == 3 * len(ARMS) + len(measured.HANABI)
    assert len(results["gradients"]["rows"]) == len(measured.SETTINGS) * len(ARMS)
    assert read_json(tmp_path, "results.json")["title"] == results["title"]
    assert len(read_table(tmp_path, "trials")) == 19
    assert len(list(tmp_path.glob("plots/*.png"))) == 3
    assert "<img" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("seeds", 1),
        ("updates", 3),
        ("rates", ()),
        ("hanabi_rates", (-1.0,)),
        ("games", ()),
        ("batch_games", 1),
        ("warm_up", -1),
        ("evaluation_games", 0),
    ],
)
def test_bad_flags_are_refused(flag, value):
    with pytest.raises(InputError, match=flag):
        Config(**{flag: value}).validate()
