"""What ST-PPO states exactly, as checks (part of the recipe :mod:`normkit.recipes.st_ppo`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normkit.functional.moments import segment_moments
from normkit.optim import ClippingBias, correction_factor
from normkit.recipes._st_ppo_arms import CLIP, coefficients
from normkit.recipes._st_ppo_chain import ANSWER, CELLS, TURNS, VOCABULARY, roll_out, truth
from normkit.recipes._st_ppo_tabular import ascent, flatten
from normkit.recipes.base import Claim, Finding, within
from normkit.rl.critic import ValueHead
from normkit.rl.loss import Level, PolicyLossConfig, complementary_loss, policy_loss

_LEVELS: tuple[Level, ...] = ("token", "turn", "sequence")
_LOG_RATIO = (0.1, -0.2, 0.3, 0.05, 0.0)
_TURN = (0, 0, 0, 1, 1)
_NO_CLIP = 0.999999
"""Lower end of a range that no ratio leaves; the upper end is far away."""


@dataclass(frozen=True)
class _Problem:
    """Responses of a linear policy, off-policy by ``drift``; float64.

    Attributes:
        features: of each token ``[M, D]``.
        token: that was written ``[M]``.
        weight: of the policy ``[D, V]``; a leaf that requires a gradient.
        old: log-probabilities under the policy that sampled ``[M]``.
        advantage: ``[M]``.
        turn: ``[M]``.
        dialogue: ``[M]``.
        share: weight of each token in the loss ``[M]``.
    """

    features: Tensor
    token: Tensor
    weight: Tensor
    old: Tensor
    advantage: Tensor
    turn: Tensor
    dialogue: Tensor
    share: Tensor

    @property
    def logprob(self) -> Tensor:
        """Under the policy that is trained ``[M]``."""
        return self._chance(self.weight)

    def _chance(self, weight: Tensor) -> Tensor:
        chance = (self.features @ weight).log_softmax(-1)
        return chance.gather(1, self.token[:, None])[:, 0]

    def loss(self, ratio: Level, clip: bool = True) -> Tensor:
        """The surrogate, to be minimized."""
        return policy_loss(*self.rows(), _config(ratio, clip))[0]

    def complement(self, ratio: Level) -> Tensor | None:
        """What clipping takes out of it."""
        return complementary_loss(*self.rows(), _config(ratio))

    def gradient(self, loss: Tensor | None) -> Tensor:
        """Direction of ascent ``[D, V]``."""
        if loss is None:
            return torch.zeros_like(self.weight)
        return -torch.autograd.grad(loss, self.weight)[0]

    def terms(self, ratio: Level) -> Tensor:
        """The gradient and the clipping bias ``[2, D, V]``."""
        return torch.stack([self.gradient(x) for x in (self.loss(ratio), self.complement(ratio))])

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the losses take."""
        return self.logprob, self.old, self.advantage, self.turn, self.dialogue, self.share


def _config(ratio: Level, clip: bool = True) -> PolicyLossConfig:
    low, high = (CLIP, CLIP) if clip else (_NO_CLIP, 1e9)
    return PolicyLossConfig(ratio=ratio, clip_low=low, clip_high=high, dual_clip=0)


def _problem(drift: float, seed: int = 0, turns: Sequence[int] = (3, 1, 5, 2, 4, 4)) -> _Problem:
    """Three responses of two turns each."""
    g = torch.Generator().manual_seed(seed)
    count = torch.tensor(turns)
    turn = torch.arange(len(turns)).repeat_interleave(count)
    dialogue = turn // 2
    features = torch.randn(len(turn), 4, generator=g, dtype=torch.float64)
    weight = torch.randn(4, 6, generator=g, dtype=torch.float64)
    moved = weight + drift * torch.randn(4, 6, generator=g, dtype=torch.float64)
    problem = _Problem(
        features=features,
        token=torch.randint(6, (len(turn),), generator=g),
        weight=moved.requires_grad_(),
        old=torch.zeros(len(turn)),
        advantage=torch.randn(len(turn), generator=g, dtype=torch.float64),
        turn=turn,
        dialogue=dialogue,
        share=1 / (torch.bincount(dialogue)[dialogue].double() * 3),
    )
    return replace(problem, old=problem._chance(weight))


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def _by_turn(x: Tensor, turn: Tensor) -> Tensor:
    """Mean over each turn, for each of its tokens ``[M]``."""
    return segment_moments(x, turn, int(turn.max()) + 1).center[turn]


# ----------------------------------------------------------------------- exact


def _on_policy() -> Finding:
    """Ratios are one: equal losses, no bias, token ratios give the plain policy gradient."""
    p = _problem(0.0)
    value = -(p.share * p.advantage).sum()
    plain = p.gradient(-(p.share * p.advantage * p.logprob).sum())
    error = _gap(p.gradient(p.loss("token")), plain)
    for ratio in _LEVELS:
        error = max(error, _gap(p.loss(ratio), value), float(p.complement(ratio) is not None))
    for mode in ("floor", "ratio"):
        norms = torch.tensor(2.0), torch.tensor(0.0)
        error = max(error, abs(float(correction_factor(*norms, mode)) - 1))
    return within(error, 1e-12)


def _decomposition() -> Finding:
    error, clipped = 0.0, 0
    for seed in range(20):
        p = _problem(0.4, seed)
        for ratio in _LEVELS:
            kept, lost = p.terms(ratio)
            error = max(error, _gap(kept + lost, p.gradient(p.loss(ratio, clip=False))))
            clipped += int(lost.norm() > 0)
    return within(error if clipped > 30 else 1.0, 1e-12, clipped_batches=clipped)


def _turn_credit() -> Finding:
    error = 0.0
    for seed in range(20):
        p = _problem(0.4, seed)
        ratio = _by_turn(p.logprob - p.old, p.turn).exp().detach()
        mean = _by_turn(p.advantage, p.turn)
        lemma = p.gradient(-(p.share * ratio * mean * p.logprob).sum())
        error = max(error, _gap(p.gradient(p.loss("turn", clip=False)), lemma))
    on_policy = _problem(0.0)
    averaged = replace(on_policy, advantage=_by_turn(on_policy.advantage, on_policy.turn))
    gradients = (
        on_policy.gradient(on_policy.loss("turn")),
        averaged.gradient(averaged.loss("token")),
    )
    return within(max(error, _gap(*gradients)), 1e-12)


def _units_meet() -> Finding:
    """One token a turn, or one turn a response."""
    p = _problem(0.4)
    short = replace(p, turn=torch.arange(len(p.turn)))
    long = replace(p, turn=p.dialogue)
    error = 0.0
    pairs: tuple[tuple[_Problem, Level], ...] = ((short, "token"), (long, "sequence"))
    for problem, ratio in pairs:
        error = max(error, _gap(problem.terms("turn"), problem.terms(ratio)))
    return within(error, 1e-12)


def _worked() -> Finding:
    """The card's ratios, read off the loss of a unit advantage."""
    x = torch.tensor(_LOG_RATIO, dtype=torch.float64)
    turn = torch.tensor(_TURN)
    expected = {
        "token": [1.1051709181, 0.8187307531, 1.3498588076, 1.0512710964, 1.0],
        "turn": [1.0689391057] * 3 + [1.0253151205] * 2,
    }
    error = 0.0
    clipped = {}
    for ratio, known in expected.items():
        level: Level = "token" if ratio == "token" else "turn"
        one = torch.ones_like(x, requires_grad=True)
        rows = (x, torch.zeros_like(x), one, turn, torch.zeros_like(turn), torch.ones_like(x))
        (found,) = torch.autograd.grad(-policy_loss(*rows, _config(level, clip=False))[0], one)
        error = max(error, _gap(found, torch.tensor(known, dtype=torch.float64)))
        complement = complementary_loss(*rows, _config(level))
        clipped[ratio] = 0.0 if complement is None else float(-complement.detach())
    error = max(error, abs(clipped["token"] - expected["token"][2]), clipped["turn"])
    return within(error, 1e-9)


def _scaling() -> Finding:
    p = _problem(0.4)
    louder = replace(p, advantage=7 * p.advantage)
    error = 0.0
    for ratio in _LEVELS:
        error = max(error, _gap(7 * p.terms(ratio), louder.terms(ratio)))
    return within(error, 1e-12)


def _order_and_padding() -> Finding:
    """Tokens of a turn in another order, and tokens without weight beside them."""
    p = _problem(0.4)
    order = torch.randperm(len(p.turn), generator=torch.Generator().manual_seed(1))
    mixed = replace(
        p,
        **{
            name: getattr(p, name)[order]
            for name in ("features", "token", "old", "advantage", "turn", "dialogue", "share")
        },
    )
    padded = replace(
        p,
        features=torch.cat([p.features, torch.ones(2, 4, dtype=torch.float64)]),
        token=torch.cat([p.token, torch.zeros(2, dtype=torch.int64)]),
        old=torch.cat([p.old, torch.full((2,), -9.0, dtype=torch.float64)]),
        advantage=torch.cat([p.advantage, torch.full((2,), 50.0, dtype=torch.float64)]),
        turn=torch.cat([p.turn, torch.full((2,), int(p.turn.max()) + 1)]),
        dialogue=torch.cat([p.dialogue, torch.full((2,), int(p.dialogue.max()) + 1)]),
        share=torch.cat([p.share, torch.zeros(2, dtype=torch.float64)]),
    )
    error = 0.0
    for ratio in _LEVELS:
        plain, *others = (q.terms(ratio) for q in (p, mixed, padded))
        error = max(error, *(_gap(plain, other) for other in others))
    return within(error, 1e-12)


def _steps(kind: Callable[..., torch.optim.Optimizer], factor: float, **options: float) -> Tensor:
    x = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    made = kind([x], **options)
    g = torch.Generator().manual_seed(0)
    for _ in range(10):
        x.grad = factor * torch.randn(6, generator=g, dtype=torch.float64)
        made.step()
    return x.detach()


def _adam() -> Finding:
    """Adam's steps are those of gradients divided by a constant; SGD's are not."""
    adam = [_steps(torch.optim.Adam, f, lr=0.1, eps=0.0) for f in (1.0, 0.01)]
    sgd = [_steps(torch.optim.SGD, f, lr=0.1) for f in (1.0, 0.01)]
    return within(max(_gap(*adam), _gap(sgd[0] * 0.01, sgd[1])), 1e-12)


def _needs_a_floor() -> Finding:
    """Equation 8 on-policy: the factor is one over whatever keeps it finite."""
    norms = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    factors = [float(correction_factor(*norms, "paper", delta=d)) for d in (1e-3, 1e-6, 1e-9)]
    error = max(abs(f * d - 1) for f, d in zip(factors, (1e-3, 1e-6, 1e-9), strict=True))
    return within(error, 1e-12, factors=factors)


def _lemma() -> Finding:
    """True term, luck and critic's error less the clipping bias are the gradient, in the chain."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, CELLS, VOCABULARY, generator=g, dtype=torch.float64)
    old = torch.softmax(logits, -1)
    now = torch.softmax(logits + 0.4 * torch.randn(logits.shape, generator=g), -1)
    batch = flatten(roll_out(old, 64, g), old)
    value = torch.rand(2 * TURNS * CELLS, generator=g, dtype=torch.float64)[batch.step]
    logprob = now.flatten()[batch.place].log()
    then, here = truth(old), truth(now)
    exact = here.q.flatten()[batch.choice] - here.value.flatten()[batch.step]
    expected = then.q.flatten()[batch.choice]
    terms = (exact, batch.reward - expected, expected - value - exact)
    error = 0.0
    for ratio in _LEVELS:
        found = coefficients(logprob, batch.reward - value, batch.tokens, ratio)
        total = -ascent(found.lost, batch, now)
        for term in terms:
            part = coefficients(logprob, term, batch.tokens, ratio)
            total = total + ascent(part.kept + part.lost, batch, now)
        error = max(error, _gap(total, ascent(found.kept, batch, now)))
    return within(error, 1e-12)


def _chain() -> Finding:
    """The exact gradient of the chain against differences of exact values."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, CELLS, VOCABULARY, generator=g, dtype=torch.float64)
    gradient = truth(torch.softmax(logits, -1)).gradient
    error = 0.0
    for cell, token in ((0, ANSWER), (0, 1), (3, 2), (9, 3), (18, ANSWER)):
        ends = []
        for step in (1e-5, -1e-5):
            moved = logits.clone()
            moved[0, cell, token] += step
            ends.append(float(truth(torch.softmax(moved, -1)).start))
        error = max(error, abs((ends[0] - ends[1]) / 2e-5 - float(gradient[0, cell, token])))
    return within(error, 1e-8)


# ------------------------------------------------------------------ structural


class _Count(torch.autograd.Function):
    """Passes through, and counts backward passes."""

    passes = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        _Count.passes += 1
        return grads[0]


def _update(drift: float) -> tuple[int, int]:
    """Backward passes of one update, and numbers that the correction keeps beside the gradient."""
    p = _problem(drift)
    weight = nn.Parameter(p.weight.detach())
    _Count.passes = 0
    counted = replace(p, weight=_Count.apply(weight))  # type: ignore[no-untyped-call]
    bias = ClippingBias([weight])
    rows = counted.rows()
    bias.collect(complementary_loss(*rows, _config("turn")))
    kept = {id(t): t for x in vars(bias).values() if isinstance(x, list) for t in x}
    kept.pop(id(weight), None)
    policy_loss(*rows, _config("turn"))[0].backward()  # type: ignore[no-untyped-call]
    bias.correct()
    return _Count.passes, sum(t.numel() for t in kept.values())


def _backward_passes() -> Finding:
    off, on = _update(0.4)[0], _update(0.0)[0]
    return Finding(
        "holds" if (off, on) == (2, 1) else "contradicted",
        f"{off} backward passes where something is clipped, {on} where nothing is",
    )


def _buffer() -> Finding:
    off, on = _update(0.4)[1], _update(0.0)[1]
    size = _problem(0.0).weight.numel()
    return Finding(
        "holds" if (off, on) == (size, 0) else "contradicted",
        f"{off} numbers for {size} weights where something is clipped, {on} where nothing is",
    )


def _critic_is_a_head() -> Finding:
    width = 576
    extra = sum(x.numel() for x in ValueHead(width).parameters())
    return Finding(
        "holds" if extra == width + 1 else "contradicted",
        f"{extra} weights on hidden states of width {width}",
    )


def _exact(name: str, statement: str, check: Callable[[], Finding]) -> Claim:
    return Claim(name, statement, "identity", "exact", check)


CLAIMS: tuple[Claim, ...] = (
    _exact(
        "on-policy",
        "on-policy all ratios give the same loss, nothing is clipped, the correction does nothing "
        "and token ratios give the policy gradient",
        _on_policy,
    ),
    _exact(
        "decomposition",
        "the gradient plus the clipping bias is the gradient without clipping, for any ratio",
        _decomposition,
    ),
    _exact(
        "turn-credit",
        "with turn ratios a turn's tokens share its mean advantage (Lemma 4.1)",
        _turn_credit,
    ),
    _exact(
        "units-meet",
        "turn ratios are token ratios for turns of one token and sequence ratios for one turn",
        _units_meet,
    ),
    _exact("worked-ratios", "ratios and clipped tokens of the worked example", _worked),
    _exact("scaling", "advantages times c make gradient and clipping bias times c", _scaling),
    _exact(
        "order-and-padding",
        "neither the order of tokens nor tokens without weight matter",
        _order_and_padding,
    ),
    _exact(
        "lemma",
        "true term, luck and critic's error less the clipping bias are the gradient (Lemma 4.2)",
        _lemma,
    ),
    _exact("chain", "the exact gradient in the chain is that of its exact values", _chain),
    _exact(
        "needs-a-floor",
        "without a floor the correction of an on-policy gradient is as large as one likes",
        _needs_a_floor,
    ),
    _exact(
        "adam-invariance",
        "a constant factor leaves Adam's steps alone and scales those of SGD",
        _adam,
    ),
    Claim(
        "one-more-backward",
        "the correction costs one more backward pass, and none where nothing is clipped",
        "not stated",
        "structural",
        _backward_passes,
    ),
    Claim(
        "one-more-buffer",
        "the correction keeps one more buffer of gradients, and none where nothing is clipped",
        "not stated",
        "structural",
        _buffer,
    ),
    Claim(
        "critic-is-a-head",
        "the critic is the policy and a head: width + 1 weights",
        "ours",
        "structural",
        _critic_is_a_head,
    ),
)
