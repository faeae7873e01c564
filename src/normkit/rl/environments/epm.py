"""Empathy Potential Model (EPM): how replies move a user's state, and what a dialogue was worth.

EMPA: Evaluating Persona-Aligned Empathy as a Process (arXiv 2603.00552); used as the world of MAPO
(arXiv 2603.06194). The state P in R^3 holds the unmet need per axis (cognitive, affective,
proactive), negative while unmet and zero when met. A filled rubric is an increment v of the state::

    P_t = P_{t-1} + v_t                    state
    phi(P) = |max(0, -epsilon - P)|        distance still to go, to the box {x >= -epsilon}
    dE_t = v_t . v*,  v* = -P_0 / |P_0|    effective work along the direction of full relief
    r_t = phi(P_{t-1}) - phi(P_t)          incremental distance reward

Where EMPA's paper and code differ we follow the code by default, since its published results do:
v* stays at the initial direction (the paper lets it follow the state: ``direction="current"``), and
success needs the work to reach ``|P_0|``, which with a fixed v* implies the positional condition.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from normkit.errors import InputError
from normkit.rl.environments.scenario import INDICATORS
from normkit.rl.rubric import AXES, Progress

State = tuple[float, float, float]
Direction = Literal["initial", "current"]
RewardKind = Literal["idr", "absolute", "increment", "potential", "work"]
Outcome = Literal["success", "failure", "max_turns"]

_POINTS = {"C.1": 2, "C.2": 2, "C.3": 3, "A.1": 2, "A.2": 4, "A.3": 3, "P.1": 2, "P.2": 4, "P.3": 3}
"""Points of deficit per level of each indicator of the initial-deficit form."""
_PROGRESS = (0.0, 1.0, 3.0)
_SETBACK = {"cognitive": (0.0, -2.0, -4.0), "affective": (0.0, -2.0, -5.0)}
_SETBACK["proactive"] = _SETBACK["affective"]

_COLLAPSE_TURNS = 5
_STAGNATION_TURNS, _STAGNATION_STD = 5, 0.5
_REGRESSION_TURNS, _REGRESSION_SHARE, _REGRESSION_WORK = 8, 0.7, -1.0


@dataclass(frozen=True)
class EPMConfig:
    """Constants of the model; the defaults are EMPA's.

    Attributes:
        max_turns: the dialogue ends here.
        min_turns: neither success nor failure is declared earlier.
        epsilon: tolerance per axis, in points, within which a need counts as met.
        direction: whether v* is fixed at the start or follows the state.
        label_tolerance: share of ``|P_0|`` within which a success is labelled geometric; it
            never decides whether there is one.
    """

    max_turns: int = 45
    min_turns: int = 12
    epsilon: float = 1.0
    direction: Direction = "initial"
    label_tolerance: float = 0.05

    def __post_init__(self) -> None:
        if self.max_turns < 1 or self.min_turns < 1:
            raise InputError("max_turns and min_turns must be at least 1")
        if self.epsilon < 0:
            raise InputError(f"epsilon must be at least 0, got {self.epsilon}")
        if self.direction not in ("initial", "current"):
            raise InputError(f"direction must be initial or current, got {self.direction!r}")


def initial_state(levels: Mapping[str, int]) -> State:
    """Initial deficit P_0 from a filled initial-deficit form.

    Args:
        levels: level 0..3 of each indicator ``C.1 .. P.3``.

    Returns:
        Points per axis, each at most zero: cognitive in [-21, 0], the others in [-27, 0].

    Raises:
        InputError: for a missing indicator or a level out of range.
    """
    totals = {"C": 0, "A": 0, "P": 0}
    for indicator in INDICATORS:
        level = levels.get(indicator)
        if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level <= 3:
            raise InputError(f"deficit.{indicator} must be an integer 0..3, got {level!r}")
        totals[indicator[0]] -= level * _POINTS[indicator]
    return (float(totals["C"]), float(totals["A"]), float(totals["P"]))


def increment(progress: Progress) -> State:
    """Increment v of the state from a filled rubric: progress plus setback points per axis."""
    c, a, p = (
        _PROGRESS[progress[axis].progress] + _SETBACK[axis][-progress[axis].setback]
        for axis in AXES
    )
    return (c, a, p)


def box_distance(state: State, epsilon: float = 1.0) -> float:
    """Distance still to go: Euclidean distance of P to the box ``{x >= -epsilon}``."""
    return math.hypot(*(max(0.0, -epsilon - x) for x in state))


@dataclass(frozen=True)
class EPMTurn:
    """What one turn did.

    Attributes:
        turn: number of the turn, from 1.
        increment: v_t, points per axis.
        state: P_t.
        distance: phi(P_t).
        work: dE_t; ``total_work`` is its sum so far.
        alignment: cosine of v_t with v*; zero for v_t = 0.
        projection: P_t . v*; minus |P_0| at the start, zero at full relief.
        progress_levels: sum of the rubric's progress and setback levels.
        setback_levels: sum of the sizes of the setback levels.
    """

    turn: int
    increment: State
    state: State
    distance: float
    work: float
    total_work: float
    alignment: float
    projection: float
    progress_levels: int
    setback_levels: int


@dataclass
class Trajectory:
    """The state of one user through a dialogue.

    Args:
        initial: P_0.
        config: constants of the model.
    """

    initial: State
    config: EPMConfig = field(default_factory=EPMConfig)
    turns: list[EPMTurn] = field(default_factory=list)

    @property
    def state(self) -> State:
        """P now."""
        return self.turns[-1].state if self.turns else self.initial

    @property
    def total_work(self) -> float:
        """Effective work so far, in points."""
        return self.turns[-1].total_work if self.turns else 0.0

    @property
    def initial_distance(self) -> float:
        """phi(P_0)."""
        return box_distance(self.initial, self.config.epsilon)

    @property
    def distance(self) -> float:
        """phi(P) now."""
        return box_distance(self.state, self.config.epsilon)

    def advance(self, progress: Progress) -> EPMTurn:
        """Apply one filled rubric and return what it did."""
        v = increment(progress)
        origin = self.initial if self.config.direction == "initial" else self.state
        target = _unit(tuple(-x for x in origin))
        before = self.state
        state = (before[0] + v[0], before[1] + v[1], before[2] + v[2])
        work = _dot(v, target)
        size = math.hypot(*v)
        turn = EPMTurn(
            turn=len(self.turns) + 1,
            increment=v,
            state=state,
            distance=box_distance(state, self.config.epsilon),
            work=work,
            total_work=self.total_work + work,
            alignment=work / size if size else 0.0,
            projection=_dot(state, target),
            progress_levels=sum(progress[axis].progress + progress[axis].setback for axis in AXES),
            setback_levels=-sum(progress[axis].setback for axis in AXES),
        )
        self.turns.append(turn)
        return turn

    def reward(self, kind: RewardKind = "idr") -> float:
        """Reward of the latest turn.

        Args:
            kind: "idr" ``phi(P_{t-1}) - phi(P_t)``; "absolute" ``-phi(P_t)`` (distance_to_goal in
                MAPO's code); "increment" the sum of v's components (v_t_last_increment);
                "potential" ``.99 Phi(P_t) - Phi(P_{t-1})``, ``Phi = 9 / (9 + |P|)``
                (Potential_Based_reward); "work" dE_t.
        """
        if not self.turns:
            raise InputError("reward: the trajectory has no turn yet")
        last = self.turns[-1]
        before = self.turns[-2].state if len(self.turns) > 1 else self.initial
        if kind == "idr":
            return box_distance(before, self.config.epsilon) - last.distance
        if kind == "absolute":
            return -last.distance
        if kind == "increment":
            return sum(last.increment)
        if kind == "potential":
            return 0.99 * 9 / (9 + math.hypot(*last.state)) - 9 / (9 + math.hypot(*before))
        if kind == "work":
            return last.work
        raise InputError(f"reward: unknown kind {kind!r}")

    def outcome(self) -> Outcome | None:
        """How the dialogue ended, or None while it goes on."""
        return self._ending()[0]

    @property
    def reason(self) -> str:
        """Why the dialogue ended; empty while it goes on."""
        return self._ending()[1]

    def _ending(self) -> tuple[Outcome | None, str]:
        n = len(self.turns)
        if n >= self.config.min_turns:
            goal = math.hypot(*self.initial)
            if self.total_work >= goal:
                near = math.hypot(*self.state) <= self.config.label_tolerance * goal
                return "success", "geometric" if near else "positional"
            causes = self._failures()
            if causes:
                return "failure", ", ".join(causes)
        if n >= self.config.max_turns:
            return "max_turns", f"reached {self.config.max_turns} turns"
        return None, ""

    def _failures(self) -> list[str]:
        work = [turn.work for turn in self.turns]
        collapsing = len(work) >= _COLLAPSE_TURNS and all(w < 0 for w in work[-_COLLAPSE_TURNS:])
        norms = [math.hypot(*turn.state) for turn in self.turns[-_STAGNATION_TURNS:]]
        stagnant = len(norms) == _STAGNATION_TURNS and statistics.stdev(norms) < _STAGNATION_STD
        recent = work[-_REGRESSION_TURNS:]
        regressing = (
            len(recent) == _REGRESSION_TURNS
            and sum(w < 0 for w in recent) > _REGRESSION_SHARE * _REGRESSION_TURNS
            and sum(recent) < _REGRESSION_WORK
        )
        if not collapsing and not (stagnant and regressing):
            return []
        found = (collapsing, stagnant and regressing, regressing)
        names = ("direction collapse", "stagnation", "persistent regression")
        return [name for name, holds in zip(names, found, strict=True) if holds]


@dataclass(frozen=True)
class EPMQ:
    """EPM-Q of one dialogue, or the mean over several; every index in percent, higher is better.

    Attributes:
        rdi: relative distance improvement.
        etot: total effective work.
        snet: net rubric levels.
        rho: work per turn of the dialogue.
        sproj: mean work per recorded turn.
        tau: directness of the path.
        rpos: share of turns with positive work.
        align: mean alignment.
        pen: freedom from setbacks.
    """

    rdi: float
    etot: float
    snet: float
    rho: float
    sproj: float
    tau: float
    rpos: float
    align: float
    pen: float

    @property
    def outcome(self) -> float:
        """Outcome quality: mean of rdi, etot, snet."""
        return (self.rdi + self.etot + self.snet) / 3

    @property
    def efficiency(self) -> float:
        """Process efficiency: mean of rho, sproj, tau."""
        return (self.rho + self.sproj + self.tau) / 3

    @property
    def stability(self) -> float:
        """Process stability: mean of rpos, align, pen."""
        return (self.rpos + self.align + self.pen) / 3

    @property
    def score(self) -> float:
        """``0.4 outcome + 0.2 efficiency + 0.4 stability``; can exceed 100."""
        return 0.4 * self.outcome + 0.2 * self.efficiency + 0.4 * self.stability


def epm_q(trajectories: Sequence[Trajectory], include_initial: bool = True) -> EPMQ:
    """EPM-Q over dialogues: each index is averaged over the cases, then combined.

    Args:
        trajectories: finished dialogues, at least one; each has at least one turn.
        include_initial: count the starting point, with work and alignment zero, in per-turn means,
            as EMPA's code and published table do.

    Raises:
        InputError: without a trajectory, or for one without turns.
    """
    if not trajectories:
        raise InputError("trajectories must hold at least one dialogue")
    cases = [_case(trajectory, include_initial) for trajectory in trajectories]
    names = list(EPMQ.__dataclass_fields__)
    return EPMQ(*(statistics.fmean(getattr(case, name) for case in cases) for name in names))


def _case(trajectory: Trajectory, include_initial: bool) -> EPMQ:
    turns = trajectory.turns
    if not turns:
        raise InputError("trajectories: EPM-Q needs at least one turn in every dialogue")
    start = max(trajectory.initial_distance, 1e-9)
    work = max(0.0, trajectory.total_work)
    points = len(turns) + (1 if include_initial else 0)
    path = sum(math.hypot(*turn.increment) for turn in turns)
    moved = math.dist(trajectory.state, trajectory.initial)
    tortuosity = max(1.0, path / moved) if moved > 0 else (1.0 if path == 0 else math.inf)
    closed = 100 * (start - trajectory.distance) / start
    return EPMQ(
        rdi=min(max((closed + 100) / 2, 0.0), 100.0),
        etot=100 * work / (1.2 * start),
        snet=100 * max(0, sum(turn.progress_levels for turn in turns)) / (1.5 * start),
        rho=100 * work / len(turns) / 2.5,
        sproj=100 * max(0.0, sum(turn.work for turn in turns) / points) / 2.5,
        tau=max(0.0, 100 * (3 - tortuosity) / 2),
        rpos=100 * sum(turn.work > 0 for turn in turns) / points,
        align=50 * (sum(turn.alignment for turn in turns) / points + 1),
        pen=max(0.0, 100 * (3 - sum(turn.setback_levels for turn in turns) / points) / 3),
    )


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _unit(v: Sequence[float]) -> tuple[float, ...]:
    size = math.hypot(*v)
    return tuple(x / size for x in v) if size else tuple(0.0 for _ in v)
