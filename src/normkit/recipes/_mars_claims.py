"""What MARS states exactly, as checks (part of the recipe :mod:`normkit.recipes.mars`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from normkit.recipes._mars_gradient import (
    Arm,
    Setting,
    bias,
    credit,
    equilibrium,
    study,
)
from normkit.recipes._mars_tree import tree
from normkit.recipes.base import Claim, Finding, within
from normkit.rl.advantage import estimate, get_estimator
from normkit.rl.environments.games import OpenSpielText
from normkit.rl.self_play import cfr, expected_returns, exploitability, play, uniform
from normkit.rl.spiel import load_game, positions, states

_CARD = ((0.1, 0.0, 1.0), (0.0, -1.0), (0.0, 0.0, -1.0), (0.1, 1.0))
"""Rewards of four trajectories of one game, of seats 0, 1, 0, 1."""


def _tensor(x: Any) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def _gap(got: Tensor, expected: Any) -> float:
    return float((got - torch.as_tensor(expected, dtype=torch.float64)).abs().max())


def _rows(
    rewards: Sequence[Sequence[float]] = _CARD,
    seat: Callable[[int], int] = lambda i: i % 2,
    game: Callable[[int], int] = lambda i: 0,
) -> dict[str, Tensor]:
    """Flat rows; games and seats by the number of the trajectory."""
    flat = [(r, i, k) for i, row in enumerate(rewards) for k, r in enumerate(row)]
    dialogue = torch.tensor([i for _, i, _ in flat])
    return {
        "reward": _tensor([r for r, _, _ in flat]),
        "dialogue": dialogue,
        "turn": torch.tensor([k for _, _, k in flat]),
        "group": torch.tensor([game(i) for i in dialogue.tolist()]),
        "agent": torch.tensor([seat(i) for i in dialogue.tolist()]),
    }


def _mars(rewards: Sequence[Sequence[float]] = _CARD, **options: Any) -> Tensor:
    return estimate("mars", **_rows(rewards), **options)


def _random_rows() -> dict[str, Tensor]:
    """Two games, three seats, ragged."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 6, (24,), generator=generator).tolist()
    rewards = [torch.randn(n, generator=generator).tolist() for n in lengths]
    return _rows(rewards, seat=lambda i: i % 3, game=lambda i: i // 12)


# ---------------------------------------------------------------------- the estimator


def _worked_seats() -> Finding:
    centered = [1.083333, 0.983333, 0.983333, -1.025, -1.025, *[-1.016667] * 3, 1.075, 0.975]
    scaled = [0.972208, 0.882466, 0.882466, -0.86551, -0.86551, *[-0.91238] * 3, 0.90773, 0.82329]
    return within(max(_gap(_mars(), centered), _gap(_mars(scale=True), scaled)), 1e-5)


def _worked_others() -> Finding:
    pooled = [1.08, 0.98, 0.98, -1.02, -1.02, *[-1.02] * 3, 1.08, 0.98]
    other = [1.05, 0.966667, 0.983333, -1.05, -1.025, -1.05, -1.033333, -1.016667, 1.05, 0.975]
    rows = {name: x for name, x in _rows().items() if name != "agent"}
    reward, live = _padded()
    found, _ = credit("normalize-then-sum", reward, live, torch.zeros(1, 2, dtype=torch.float64))
    return within(max(_gap(estimate("mars", **rows), pooled), _gap(found[live], other)), 1e-6)


def _padded() -> tuple[Tensor, Tensor]:
    """Those trajectories as two games of two seats ``[1, 2, 2, 3]``, and which turns are."""
    reward, live = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.bool)
    for i, row in enumerate(_CARD):
        reward[i, : len(row)], live[i, : len(row)] = _tensor(row), True
    return reward.view(1, 2, 2, 3), live.view(1, 2, 2, 3)


def _one_turn() -> Finding:
    rows = _rows([[1.0], [2.0], [5.0], [0.0], [3.0]], seat=lambda i: 0, game=lambda i: i // 3)
    errors = [
        _gap(estimate("mars", **rows, scale=scale), estimate("grpo", **rows, scale=scale))
        for scale in (False, True)
    ]
    return within(max(errors), 1e-12)


def _labels() -> Finding:
    rows = _random_rows()
    renamed = {**rows, "agent": torch.tensor([2, 0, 1])[rows["agent"]]}
    return within(_gap(estimate("mars", **renamed), estimate("mars", **rows)), 0.0)


def _means() -> Finding:
    rows = _random_rows()
    found = estimate("mars", **rows)
    pool = 3 * rows["group"] + rows["agent"]
    means = torch.zeros(6, dtype=torch.float64).scatter_reduce(0, pool, found, "mean")
    return within(float(means.abs().max()), 1e-12, pools=len(means))


def _gifts() -> Finding:
    """A gift of 7 to the second seat: at its last turns, and at all its turns."""
    plain = _mars()
    last = [[*row[:-1], row[-1] + 7 * (i % 2)] for i, row in enumerate(_CARD)]
    every = [[r + 7 * (i % 2) for r in row] for i, row in enumerate(_CARD)]
    drift = _mars(every) - plain
    expected = [0.0, 0, 0, 3.5, -3.5, 0, 0, 0, 3.5, -3.5]  # 7 for each turn left, less the mean
    return within(max(_gap(_mars(last), plain), _gap(drift, expected)), 1e-12)


def _like_seats() -> Finding:
    rows = _rows([[0.0, 1.0], [0.0, 1.0], [0.0, -1.0], [0.0, -1.0]])
    pooled = {name: x for name, x in rows.items() if name != "agent"}
    return within(_gap(estimate("mars", **rows), estimate("mars", **pooled)), 1e-12)


def _games_apart() -> Finding:
    rows = _random_rows()
    first = rows["group"] == 0
    scaled = {**rows, "reward": torch.where(first, 100 * rows["reward"], rows["reward"])}
    plain, found = estimate("mars", **rows), estimate("mars", **scaled)
    return within(
        max(_gap(found[~first], plain[~first]), _gap(found[first] / 100, plain[first])), 1e-12
    )


def _terminal() -> Finding:
    rows = _random_rows()
    last = torch.ones_like(rows["dialogue"], dtype=torch.bool)
    last[:-1] = rows["dialogue"][1:] != rows["dialogue"][:-1]
    found = estimate("mars", **{**rows, "reward": rows["reward"] * last})
    return within(_gap(found, found[last][rows["dialogue"]]), 1e-12)


# ---------------------------------------------------------------------- the games


def _kuhn() -> Finding:
    table = tree("kuhn")
    errors = []
    for alpha in (0.0, 0.1, 1 / 3):
        policy = equilibrium(alpha)
        errors += [abs(float(table.value(policy)) + 1 / 18), float(table.exploitability(policy))]
    return within(max(errors), 1e-12)


def _uniform_play() -> Finding:
    """By the tables here and by OpenSpiel's best responses."""
    kuhn, leduc = (float(tree(g).exploitability(tree(g).uniform())) for g in ("kuhn", "leduc"))
    errors = [abs(kuhn - 11 / 24), abs(round(leduc, 6) - 2.373611)]
    errors += [abs(kuhn - exploitability(uniform, "kuhn_poker"))]
    errors += [abs(leduc - exploitability(uniform, "leduc_poker"))]
    return within(max(errors), 1e-9, kuhn=kuhn, leduc=leduc)


def _solved() -> Finding:
    policy = cfr("kuhn_poker", 500, plus=False)
    value, gap = (
        expected_returns([policy, policy], "kuhn_poker")[0],
        exploitability(policy, "kuhn_poker"),
    )
    return within(max(abs(value + 0.055688), abs(gap - 0.00117)), 5e-6, value=value, gap=gap)


def _returns() -> Finding:
    poker = [tree(name).payoff.sum(1).abs().max() for name in ("kuhn", "leduc")]
    hanabi = [play("mini_hanabi", [uniform, uniform], seed) for seed in range(50)]
    return within(max(*map(float, poker), *(abs(a - b) for a, b in hanabi)), 0.0)


def _sizes() -> Finding:
    hanabi = load_game("mini_hanabi")
    found = {
        "information states of Kuhn": len(tree("kuhn").names),
        "terminal histories of Kuhn": len(tree("kuhn").chance),
        "information states of Leduc": len(tree("leduc").names),
        "states of tic-tac-toe": len(positions("tic_tac_toe")),
        "actions of Mini Hanabi": hanabi.num_distinct_actions(),
        "best score of Mini Hanabi": int(hanabi.max_utility()),
        "moves of Mini Hanabi at most": hanabi.max_game_length(),
    }
    wrong = list(found.values()) != [12, 30, 936, 5478, 10, 4, 25]
    text = ", ".join(f"{name} {n}" for name, n in found.items())
    return Finding("contradicted" if wrong else "holds", text, found)


def _positions() -> Iterator[tuple[str, Any]]:
    """Every position of the two small training games, and those of 50 games of the third."""
    boards = positions("tic_tac_toe").values()
    yield from (("kuhn_poker", state) for state in states("kuhn_poker"))
    yield from (("tic_tac_toe", state) for state in boards if state.legal_actions())
    for seed in range(50):
        game = OpenSpielText("mini_hanabi", seed)
        while game.seat >= 0:
            yield "mini_hanabi", game.state.clone()
            game.apply(int(game.numbers.choice(game.state.legal_actions())))


def _round_trip() -> Finding:
    games: dict[str, OpenSpielText] = {}
    moves = lost = 0
    for name, state in _positions():
        game = games.setdefault(name, OpenSpielText(name))
        game.state = state
        named = game.legal()
        lost += len(state.legal_actions()) - len(named)
        lost += sum(game.parse(f"<answer>{text}</answer>") != a for text, a in named.items())
        moves += len(named)
    return Finding("contradicted" if lost else "holds", f"{moves} legal moves, {lost} lost")


# ---------------------------------------------------------------------- gradients


def _unbiased() -> Finding:
    """Pooled totals of a zero-sum game have mean 0; a running mean knows nothing of this game."""
    arms: tuple[Arm, ...] = ("trajectory", "spiral")
    settings = [
        Setting(g, p, n) for g in ("kuhn", "loaded") for p in ("uniform", "mixed") for n in (2, 32)
    ]
    errors = [
        float(bias(arm, tree(s.game), s.probabilities, s.games).abs().max())
        for arm in arms
        for s in settings
    ]
    return within(max(errors), 1e-12)


def _shares(arm: Arm, games: Sequence[int | None]) -> list[float]:
    """Length of the bias over that of the gradient, in loaded Kuhn poker, uniform play."""
    table = tree("loaded")
    policy = table.uniform()
    size = table.true_gradient(policy).norm()
    return [float(bias(arm, table, policy, n).norm() / size) for n in games]


def _vanishes() -> Finding:
    few, twice, many, limit = _shares("mars", (32, 64, 256, None))
    fades = limit < 1e-12 and 1.9 < few / twice < 2.1 and many < 0.006
    text = (
        f"{few:.3f} with 32 games, {twice:.3f} with 64, {many:.4f} with 256, {limit:.0e} with all"
    )
    return Finding("holds" if fades else "contradicted", text)


def _stays() -> Finding:
    few, many, limit = _shares("normalize-then-sum", (32, 256, None))
    text = f"{few:.3f} with 32 games, {many:.3f} with 256, {limit:.3f} with all"
    stays = limit > 0.1 and abs(many - limit) < 0.02
    return Finding("holds" if stays else "contradicted", text)


def _expectations() -> Finding:
    """Mean of 2,000 batches of the estimators of the library, in units of its standard error."""
    found = {}
    for game in ("kuhn", "loaded"):
        for arm, quality in study(Setting(game, "uniform", 8), 2000, 0).items():
            found[f"{game}, {arm}"] = quality.error**0.5
    worst = max(found.values())
    text = f"at most {worst:.1f} standard errors over {len(found)} cases"
    return Finding("holds" if worst < 2.5 else "contradicted", text, found)


# ---------------------------------------------------------------------- counted


def _no_critic() -> Finding:
    needs = get_estimator("mars").needs
    return Finding("contradicted" if needs else "holds", f"{len(needs)} inputs of a value network")


def _two_trajectories() -> Finding:
    turns = {name: tree(name).live.sum(2) for name in ("kuhn", "leduc")}
    least = min(int(x.min()) for x in turns.values())
    text = f"2 trajectories in each of {sum(map(len, turns.values()))} games, at least {least} turn"
    return Finding("holds" if least >= 1 else "contradicted", text)


def _claims() -> Iterator[Claim]:
    exact = (
        ("worked-seats", "worked advantages by seat, centered and scaled", _worked_seats),
        ("worked-others", "worked advantages pooled, and in the other order", _worked_others),
        (
            "one-turn-is-grpo",
            "with one turn a dialogue it is GRPO, with and without std",
            _one_turn,
        ),
        ("seats-are-labels", "renaming seats changes no advantage", _labels),
        ("means-are-zero", "the mean over the turns of a game and seat is 0", _means),
        (
            "gifts",
            "what a seat gets once at the end changes nothing; at every turn it leaves a drift",
            _gifts,
        ),
        ("like-seats", "seats with equal returns may as well be pooled", _like_seats),
        ("games-apart", "the scale of one game's rewards does not reach the others", _games_apart),
        ("terminal-reward", "a reward at the end credits all turns of a seat alike", _terminal),
        ("kuhn-value", "Kuhn's equilibria are worth -1/18 and cannot be exploited", _kuhn),
        ("uniform-play", "uniform play is exploitable by 11/24 and 2.373611", _uniform_play),
        ("cfr", "500 iterations of CFR: value -.055688, exploitability .00117", _solved),
        ("returns", "payoffs sum to 0 in poker and are equal in Hanabi", _returns),
        (
            "unbiased",
            "in zero-sum games pooled totals and running baselines estimate without bias",
            _unbiased,
        ),
        ("bias-vanishes", "the bias of mars is of the order of one over the games", _vanishes),
        (
            "bias-stays",
            "centering before summing keeps a bias that more games do not remove",
            _stays,
        ),
        ("expectations", "estimates average to their exact expectations", _expectations),
    )
    structural = (
        ("no-value-network", "no value network", "0", _no_critic),
        ("two-trajectories", "a game gives a trajectory per seat", "2", _two_trajectories),
        ("sizes", "the games are the paper's", "12, 936, 5478, 10, 4, 25", _sizes),
        ("round-trip", "every legal move is read back from its words", "all", _round_trip),
    )
    for name, statement, check in exact:
        yield Claim(name, statement, "identity", "exact", check)
    for name, statement, published, check in structural:
        yield Claim(name, statement, published, "structural", check)


CLAIMS = tuple(_claims())
