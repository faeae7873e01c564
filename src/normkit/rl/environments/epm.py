"""Empathy Potential Model (EPM): how replies move a user's state, and what a dialogue was worth.

EMPA: Evaluating Persona-Aligned Empathy as a Process (arXiv 2603.00552); used as the world of MAPO
(arXiv 2603.06194). The state P in R^3 holds the unmet need per axis (cognitive, affective,
proactive), negative while unmet and zero when met. A filled rubric is an increment v of the state::

    P_t = P_{t-1} + v_t                    state
    phi(P) = |max(0, -epsilon - P)|        distance still to go, to the box {x >= -epsilon}
    dE_t = v_t . v*,  v* = -P_0 / |P_0|    effective work along the direction of full relief
    r_t = phi(P_{t-1}) - phi(P_t)          incremental distance reward (IDR)

Where EMPA's paper and its code differ, the code is followed, since the published results do. In the
paper v* follows the state, and a success also needs a relieved user or enough mean alignment
(``direction="current"``); with v* fixed, ``P . v* = E - |P_0|``, so that work of ``|P_0|`` is all.
The version that made the published results, like MAPO's copy of the sandbox, also ended dialogues
that got nowhere (``standstill_window=12``); EMPA's code of today does not.

All vectors are tuples of three floats, in points, ordered as :data:`normkit.rl.rubric.AXES`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, get_args

from normkit.errors import InputError
from normkit.rl.environments.scenario import INDICATORS, THRESHOLDS
from normkit.rl.rubric import AXES, Axis, Progress

State = tuple[float, float, float]
Direction = Literal["initial", "current"]
RewardKind = Literal["idr", "absolute", "increment", "potential", "work"]
Outcome = Literal["success", "failure", "max_turns"]

_POINTS = {"C.1": 2, "C.2": 2, "C.3": 3, "A.1": 2, "A.2": 4, "A.3": 3, "P.1": 2, "P.2": 4, "P.3": 3}
"""Points of deficit per level of each indicator of the initial-deficit form."""
_PROGRESS = (0, 1, 3)
_SETBACK: Mapping[Axis, tuple[int, int, int]] = {"cognitive": (0, -2, -4), "affective": (0, -2, -5)}
_SETBACK = {**_SETBACK, "proactive": _SETBACK["affective"]}

_COLLAPSE_TURNS = 5
_STAGNATION_TURNS, _STAGNATION_STD = 5, 0.5
_REGRESSION_TURNS, _REGRESSION_SHARE, _REGRESSION_WORK = 8, 0.7, -1.0
_STANDSTILL_POINTS, _STANDSTILL_DISTANCE = 3, 2.0
_EXACT = 1e-9
"""Rubric points are integers, so that work is a multiple of 1/|P_0| >= 0.02: less is rounding."""


@dataclass(frozen=True)
class EPMConfig:
    """Constants of the model; the defaults are EMPA's.

    Attributes:
        max_turns: the dialogue ends here.
        min_turns: neither success nor failure is declared earlier.
        epsilon: tolerance per axis, in points, within which a need counts as met.
        direction: whether v* is fixed at the start or follows the state.
        alpha: share of ``|P_0|`` within which a user counts as relieved. With a fixed direction it
            only decides whether a success is called geometric or positional; EMPA's published
            results have 0.1.
        min_alignment: mean alignment of a success further away (with ``direction="current"``; the
            paper's tau_align).
        standstill_window: a dialogue fails whose state, over this many judged turns, got nowhere:
            it ended less than 3 points (sum of absolute values) from where it began, or its
            distance, on average above epsilon, stayed within less than 2; 0 switches the rule off.
    """

    max_turns: int = 45
    min_turns: int = 12
    epsilon: float = 1.0
    direction: Direction = "initial"
    alpha: float = 0.05
    min_alignment: float = 0.0
    standstill_window: int = 0

    def __post_init__(self) -> None:
        least = {"max_turns": 1, "min_turns": 1, "epsilon": 0, "alpha": 0, "standstill_window": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= bound):
                raise InputError(f"{name} must be at least {bound}, got {value}")
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


def tolerance(threshold: str) -> float:
    """Tolerance per axis, in points, of a user with a "low", "medium" or "high" empathy threshold.

    3, 2 and 1: whoever is hard to reach is satisfied last. MAPO's sandbox knows all three and, like
    EMPA, uses 1 for everyone, the default of :class:`EPMConfig`.

    Raises:
        InputError: for another threshold.
    """
    if threshold not in THRESHOLDS:
        raise InputError(f"threshold must be one of {', '.join(THRESHOLDS)}, got {threshold!r}")
    return 3.0 - THRESHOLDS.index(threshold)


def increment(progress: Progress) -> State:
    """Increment v of the state from a filled rubric: progress plus setback points per axis.

    Progress levels 0, 1, 2 give 0, +1, +3 points; setback levels 0, -1, -2 give 0, -2, -4
    (cognitive) or 0, -2, -5 (affective, proactive).
    """
    c, a, p = (
        float(_PROGRESS[progress[axis].progress] + _SETBACK[axis][-progress[axis].setback])
        for axis in AXES
    )
    return (c, a, p)


def box_distance(P: Sequence[float], epsilon: float = 1.0) -> float:
    """Distance still to go: Euclidean distance of P to the box ``{x >= -epsilon}``, in points."""
    return math.hypot(*(max(0.0, -epsilon - x) for x in P))


@dataclass(frozen=True)
class EPMTurn:
    """What one judged turn did.

    Attributes:
        turn: number of the turn in the dialogue, from 1.
        increment: v_t, points per axis.
        state: P_t.
        norm: |P_t|.
        distance: phi(P_t).
        projection: P_t . v*; minus |P_0| at the start, zero at full relief.
        work: dE_t.
        total_work: sum of the work so far.
        alignment: cosine of v_t with v*; zero for v_t = 0.
        net_level: sum of the rubric's progress and setback levels; None where the increment was
            given without a rubric and no rubric gives it.
        setback_level: sum of the sizes of the setback levels; None likewise.
    """

    turn: int
    increment: State
    state: State
    norm: float
    distance: float
    projection: float
    work: float
    total_work: float
    alignment: float
    net_level: int | None
    setback_level: int | None


@dataclass
class Trajectory:
    """The state of one user through a dialogue.

    Attributes:
        initial: P_0.
        config: constants of the model.
        total_turns: turns of the dialogue, where it went on after the last judged one.
        turns: what the judged turns did.

    Raises:
        InputError: where ``initial`` is not three finite numbers.
    """

    initial: State
    config: EPMConfig = field(default_factory=EPMConfig)
    total_turns: int | None = None
    turns: list[EPMTurn] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.initial = _vector(self.initial, "initial")

    @property
    def length(self) -> int:
        """Turns of the dialogue, judged or not."""
        return max(self.turns[-1].turn if self.turns else 0, self.total_turns or 0)

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

    def advance(self, judged: Progress | Sequence[float], turn: int | None = None) -> EPMTurn:
        """Apply what one turn did, and return it.

        Args:
            judged: the filled rubric, or the increment itself. The rubric of an increment, which
                EPM-Q needs, is taken to be the one with the fewest setbacks that gives it.
            turn: number of the turn, where not every turn is judged; the next one by default.

        Raises:
            InputError: for an increment that is not three finite numbers, or a turn number that
                does not follow the one before.
        """
        last = self.turns[-1].turn if self.turns else 0
        if turn is not None and turn <= last:
            raise InputError(f"turn must be above {last}, got {turn}")
        v = increment(judged) if isinstance(judged, Progress) else _vector(judged, "increment")
        levels = _levels(judged) if isinstance(judged, Progress) else _fewest_setbacks(v)
        before = self.state
        target = _unit(self.initial if self.config.direction == "initial" else before)
        state = (before[0] + v[0], before[1] + v[1], before[2] + v[2])
        size = math.hypot(*v)
        work = _dot(v, target)
        work = work if abs(work) > _EXACT else 0.0
        done = EPMTurn(
            turn=last + 1 if turn is None else turn,
            increment=v,
            state=state,
            norm=math.hypot(*state),
            distance=box_distance(state, self.config.epsilon),
            projection=_dot(state, target),
            work=work,
            total_work=self.total_work + work,
            alignment=min(max(work / size, -1.0), 1.0) if size else 0.0,
            net_level=levels[0],
            setback_level=levels[1],
        )
        self.turns.append(done)
        return done

    def reward(self, kind: RewardKind = "idr") -> float:
        """Reward of the latest turn.

        Args:
            kind: "idr" ``phi(P_{t-1}) - phi(P_t)``, the distance closed; "absolute" ``-phi(P_t)``
                (MAPO's code: ``distance_to_goal``); "increment" the sum of v's components
                (``v_t_last_increment``); "potential" ``.99 Phi(P_t) - Phi(P_{t-1})``,
                ``Phi = 9 / (9 + |P|)`` (``Potential_Based_reward``); "work" dE_t.

        Raises:
            InputError: before the first turn, or for another kind.
        """
        if kind not in get_args(RewardKind):
            raise InputError(f"reward must be one of {get_args(RewardKind)}, got {kind!r}")
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
            return 0.99 * _potential(last.norm) - _potential(math.hypot(*before))
        return last.work

    def outcome(self) -> Outcome | None:
        """How the dialogue ended, or None while it goes on."""
        return self._ending()[0]

    @property
    def reason(self) -> str:
        """Why the dialogue ended; empty while it goes on.

        "geometric" or "positional" for a success ("aligned" with a direction that follows the
        state); for a failure every rule that holds, of "direction collapse", "stagnation" and
        "persistent regression", or the way it stood still: "standstill (total change 2)",
        "standstill (distance within 1.8)" or "oscillation (total change 40, net change 2)".
        """
        return self._ending()[1]

    def _ending(self) -> tuple[Outcome | None, str]:
        """The rules in EMPA's order: success, failure, out of turns, standstill."""
        config = self.config
        if self.length >= config.min_turns and (success := self._success()):
            return "success", success
        # Like EMPA's code, failure counts judged turns where success counts turns.
        judged_enough = len(self.turns) >= config.min_turns
        if judged_enough and (failures := self._failures()):
            return "failure", ", ".join(failures)
        if self.length >= config.max_turns:
            return "max_turns", f"reached {config.max_turns} turns"
        if judged_enough and (standstill := self._standstill()):
            return "failure", standstill
        return None, ""

    def _success(self) -> str:
        """How the user's need was met; empty where it was not."""
        goal = math.hypot(*self.initial)
        if self.total_work < goal - _EXACT:
            return ""
        if math.hypot(*self.state) <= self.config.alpha * goal + _EXACT:
            return "geometric"
        if self.config.direction == "initial":
            return "positional"
        mean = statistics.fmean(turn.alignment for turn in self.turns) if self.turns else 0.0
        return "aligned" if mean > self.config.min_alignment else ""

    def _failures(self) -> list[str]:
        """Every rule that holds, where they end the dialogue."""
        work = [turn.work for turn in self.turns]
        collapsing = len(work) >= _COLLAPSE_TURNS and all(w < 0 for w in work[-_COLLAPSE_TURNS:])
        norms = [turn.norm for turn in self.turns[-_STAGNATION_TURNS:]]
        stagnant = len(norms) == _STAGNATION_TURNS and statistics.stdev(norms) < _STAGNATION_STD
        recent = work[-_REGRESSION_TURNS:]
        regressing = (
            len(recent) == _REGRESSION_TURNS
            and sum(w < 0 for w in recent) > _REGRESSION_SHARE * _REGRESSION_TURNS
            and sum(recent) < _REGRESSION_WORK
        )
        if not (collapsing or (stagnant and regressing)):
            return []
        rules = {
            "direction collapse": collapsing,
            "stagnation": stagnant,
            "persistent regression": regressing,
        }
        return [name for name, holds in rules.items() if holds]

    def _standstill(self) -> str:
        """How the dialogue got nowhere, with EMPA's figures; empty where it did not."""
        recent = self.turns[-self.config.standstill_window :]
        if not 0 < self.config.standstill_window == len(recent) or recent[-1].distance == 0:
            return ""
        total = sum(abs(x) for turn in recent for x in turn.increment)
        if total < _STANDSTILL_POINTS:
            return f"standstill (total change {total:g})"
        distances = [turn.distance for turn in recent]
        spread = max(distances) - min(distances)
        if spread < _STANDSTILL_DISTANCE and statistics.fmean(distances) > self.config.epsilon:
            return f"standstill (distance within {spread:.1f})"
        # From the first state of the window on: its own increment led there and is not part.
        net = sum(abs(b - a) for a, b in zip(recent[0].state, recent[-1].state, strict=True))
        if net < _STANDSTILL_POINTS:
            return f"oscillation (total change {total:g}, net change {net:g})"
        return ""


@dataclass(frozen=True)
class EPMQ:
    """EPM-Q of one dialogue, or the mean over several; every index in percent, higher is better.

    With d_0, d_T the first and last distance, r_0 = d_0, E the total work over T turns, and means
    over the n points of the trajectory:

    Attributes:
        rdi: relative distance improvement, ``(100 (d_0 - d_T) / d_0 + 100) / 2`` within [0, 100].
        etot: total work, ``100 max(0, E) / (1.2 r_0)``.
        snet: net rubric levels S, ``100 max(0, S) / (1.5 r_0)``.
        rho: work per turn, ``100 max(0, E / T) / 2.5``.
        sproj: mean work per point, ``100 max(0, sum dE / n) / 2.5``.
        tau: directness, ``max(0, 100 (3 - path / displacement) / 2)``.
        rpos: share of points with positive work.
        align: mean alignment, ``50 (mean + 1)``.
        pen: freedom from setbacks, ``max(0, 100 (3 - sum |setback levels| / n) / 3)``.
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

    def to_json(self) -> dict[str, float]:
        """The nine indices, the three parts and the score by name."""
        parts = ("outcome", "efficiency", "stability", "score")
        return {**asdict(self), **{name: getattr(self, name) for name in parts}}


def epm_q(trajectories: Sequence[Trajectory], include_initial: bool = True) -> EPMQ:
    """EPM-Q over dialogues: each index is averaged over the cases, then combined.

    Args:
        trajectories: dialogues of any length, at least one.
        include_initial: count the starting point, with work, alignment and setbacks zero, in
            per-turn means, as EMPA's code and published table do.

    Raises:
        InputError: without a trajectory, or for an increment that no rubric gives.
    """
    if not trajectories:
        raise InputError("trajectories must hold at least one dialogue, got none")
    cases = [epm_q_case(trajectory, include_initial) for trajectory in trajectories]
    names = [each.name for each in fields(EPMQ)]
    return EPMQ(*(statistics.fmean(getattr(case, name) for case in cases) for name in names))


def epm_q_case(trajectory: Trajectory, include_initial: bool = True) -> EPMQ:
    """EPM-Q of one dialogue; see :func:`epm_q`.

    A dialogue without turns scores as one that changed nothing. A path that ends where it began
    has infinite tortuosity and thus ``tau`` 0 (EMPA's code divides nothing there and gives 100; no
    published dialogue is one). A user who lacked nothing counts as at distance 1.

    Args:
        trajectory: the dialogue's path.
        include_initial: whether the beginning counts as a point of the path.

    Raises:
        InputError: where an increment does not come from a rubric.
    """
    turns = trajectory.turns
    for turn in turns:
        if turn.net_level is None:
            raise InputError(
                f"increment of turn {turn.turn} must come from a rubric, whose levels EPM-Q needs, "
                f"got {turn.increment}"
            )
    net = sum(turn.net_level or 0 for turn in turns)
    setbacks = sum(turn.setback_level or 0 for turn in turns)
    start = trajectory.initial_distance
    unmet = start > _EXACT
    scale, closed = (start, 100 * (1 - trajectory.distance / start)) if unmet else (1.0, 0.0)
    work = max(0.0, trajectory.total_work)
    points = max(1, len(turns) + (1 if include_initial else 0))
    path = sum(math.hypot(*turn.increment) for turn in turns)
    displacement = math.dist(trajectory.state, trajectory.initial)
    tortuosity = 1.0
    if path > _EXACT:
        tortuosity = path / displacement if displacement > _EXACT else math.inf
    return EPMQ(
        rdi=min(max((closed + 100) / 2, 0.0), 100.0),
        etot=100 * work / (1.2 * scale),
        snet=100 * max(0, net) / (1.5 * scale),
        rho=100 * work / max(1, trajectory.length) / 2.5,
        sproj=100 * max(0.0, sum(turn.work for turn in turns)) / points / 2.5,
        tau=max(0.0, 100 * (3 - max(1.0, tortuosity)) / 2),
        rpos=100 * sum(turn.work > 0 for turn in turns) / points,
        align=50 * (sum(turn.alignment for turn in turns) / points + 1),
        pen=max(0.0, 100 * (3 - setbacks / points) / 3),
    )


def _levels(progress: Progress) -> tuple[int | None, int | None]:
    """Net level and size of the setbacks of a filled rubric, over the axes."""
    setbacks = -sum(progress[axis].setback for axis in AXES)
    return sum(progress[axis].progress for axis in AXES) - setbacks, setbacks


def _fewest_setbacks(v: State) -> tuple[int | None, int | None]:
    """The same for an increment, from the rubric with the fewest setbacks that gives it."""
    net = setbacks = 0
    for axis, points in zip(AXES, v, strict=True):
        pairs = ((s, p) for s in range(3) for p in range(3))
        given = [(s, p) for s, p in pairs if _PROGRESS[p] + _SETBACK[axis][s] == points]
        if not given:
            return None, None
        setback, progress = given[0]
        net, setbacks = net + progress - setback, setbacks + setback
    return net, setbacks


def _potential(norm: float) -> float:
    return 9 / (9 + norm)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _unit(P: State) -> State:
    """Direction from P to full relief; zero at full relief."""
    size = math.hypot(*P)
    return (-P[0] / size, -P[1] / size, -P[2] / size) if size else (0.0, 0.0, 0.0)


def _vector(values: Sequence[float], name: str) -> State:
    if len(values) != 3 or not all(math.isfinite(x) for x in values):
        raise InputError(f"{name} must be three finite numbers, got {values!r}")
    c, a, p = (float(x) for x in values)
    return (c, a, p)
