"""The emotional-support world: a person with unmet needs, a judge, and the state between them.

EMPA's Empathy Potential Model (:mod:`normkit.rl.environments.epm`) holds the state; a judge fills
the rubric for every reply, the rubric moves the state, and the reward of a turn is how much
closer the person came to "need met". Nothing of the scenario's needs, points or deficit reaches
the policy: it sees a short system prompt and what the person says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from normkit.errors import InputError
from normkit.rl.environment import Reply, Split, Step
from normkit.rl.environments.epm import EPMConfig, RewardKind, Trajectory, epm_q, initial_state
from normkit.rl.environments.scenario import Scenario
from normkit.rl.judge import Failed, Judge, JudgeRequest, JudgeUnavailableError
from normkit.rl.rubric import Progress
from normkit.rl.user import UserRequest, UserSimulator
from normkit.rl.users.scripted import ScriptedUser

SYSTEM_PROMPT = (
    "You are a warm, attentive friend in a chat. Someone tells you what is on their mind. "
    "Answer in one to three short sentences."
)


@dataclass(frozen=True)
class EmpathyConfig:
    """Options of the world.

    Attributes:
        epm: constants of the model; its ``max_turns`` ends a dialogue.
        reward: what a turn earns (:meth:`normkit.rl.environments.epm.Trajectory.reward`).
        truncated: a reply cut at the length limit is judged like any other ("judge"), or its turn
            earns nothing ("zero", as in MAPO's code).
        system: system prompt of the policy.
        patience: the run stops after this many batches in a row without one valid judgement.
    """

    epm: EPMConfig = field(default_factory=EPMConfig)
    reward: RewardKind = "idr"
    truncated: Literal["judge", "zero"] = "judge"
    system: str = SYSTEM_PROMPT
    patience: int = 1


@dataclass
class EmpathySession:
    """One dialogue in progress."""

    scenario: Scenario
    seed: int
    system: str
    trajectory: Trajectory
    history: list[tuple[str, str]] = field(default_factory=list)
    said: str = ""
    rewards: list[float] = field(default_factory=list)
    failed_judgements: int = 0
    simulator_failures: int = 0
    ended: str | None = None

    @property
    def task(self) -> str:
        """Name of the scenario."""
        return self.scenario.id

    @property
    def message(self) -> str:
        """The message that opens the dialogue."""
        return self.scenario.opening


class EmpathyEnvironment:
    """Many emotional-support dialogues side by side.

    Args:
        train: scenarios of training.
        heldout: scenarios of evaluation; none may be among ``train``.
        judge: fills the rubric.
        user: speaks for the person; the scenario's own lines by default.
        config: options of the world.

    Raises:
        InputError: where a scenario stands in both splits.
    """

    def __init__(
        self,
        train: Sequence[Scenario],
        heldout: Sequence[Scenario],
        judge: Judge,
        user: UserSimulator | None = None,
        config: EmpathyConfig | None = None,
    ) -> None:
        self.config = config or EmpathyConfig()
        self.judge = judge
        self._scripted = ScriptedUser()
        self.user: UserSimulator = user or self._scripted
        self._splits: dict[str, list[str]] = {
            "train": [s.id for s in train],
            "heldout": [s.id for s in heldout],
        }
        both = set(self._splits["train"]) & set(self._splits["heldout"])
        if both:
            raise InputError(f"heldout: {sorted(both)[0]!r} is a training scenario too")
        self._scenarios = {s.id: s for s in [*train, *heldout]}
        self._failed_batches = 0

    @property
    def max_turns(self) -> int:
        """No dialogue has more turns than this."""
        return self.config.epm.max_turns

    def tasks(self, split: Split) -> Sequence[str]:
        """Names of the scenarios of a split."""
        return self._splits[split]

    def start(self, task: str, seed: int) -> EmpathySession:
        """Open a session with the person of a scenario."""
        if task not in self._scenarios:
            raise InputError(f"task: there is no scenario {task!r}")
        scenario = self._scenarios[task]
        trajectory = Trajectory(initial_state(scenario.deficit), self.config.epm)
        session = EmpathySession(scenario, seed, self.config.system, trajectory)
        session.said = session.message
        return session

    def step(self, sessions: Sequence[EmpathySession], replies: Sequence[Reply]) -> list[Step]:
        """Judge one reply of each session, move its state, and let the person answer.

        A failed judgement leaves the state as it was; its turn has reward NaN and is counted.

        Raises:
            JudgeUnavailableError: when ``patience`` batches in a row had no valid judgement.
        """
        requests = [
            JudgeRequest(s.scenario, tuple(s.history), s.said, r.text, r.truncated)
            for s, r in zip(sessions, replies, strict=True)
        ]
        verdicts = self.judge.judge(requests)
        self._count_failures(verdicts)
        results: list[tuple[float, dict[str, Any], Progress | None]] = []
        for session, reply, verdict in zip(sessions, replies, verdicts, strict=True):
            session.history.append((session.said, reply.text))
            results.append(self._apply(session, reply, verdict))
        live = [i for i, session in enumerate(sessions) if session.ended is None]
        messages = dict(
            zip(live, self._speak(sessions, [r[2] for r in results], live), strict=True)
        )
        steps = []
        for i, (session, (reward, info, _)) in enumerate(zip(sessions, results, strict=True)):
            session.said = messages.get(i, "")
            steps.append(Step(reward, messages.get(i), session.ended, info))
        return steps

    def score(self, session: EmpathySession) -> dict[str, float]:
        """EPM-Q of the dialogue as ``"score"``, and what it is made of."""
        trajectory = session.trajectory
        q = epm_q([trajectory]) if trajectory.turns else None
        start = max(trajectory.initial_distance, 1e-9)
        known = [r for r in session.rewards if not math.isnan(r)]
        return {
            "score": q.score if q else math.nan,
            "outcome": q.outcome if q else math.nan,
            "efficiency": q.efficiency if q else math.nan,
            "stability": q.stability if q else math.nan,
            "closed": (start - trajectory.distance) / start,
            "work": trajectory.total_work,
            "reward": sum(known),
            "success": float(trajectory.outcome() == "success"),
            "turns": float(len(session.history)),
            "failed_judgements": float(session.failed_judgements),
        }

    def _count_failures(self, verdicts: Sequence[Progress | Failed]) -> None:
        failures = [v for v in verdicts if isinstance(v, Failed)]
        if not verdicts or len(failures) < len(verdicts):
            self._failed_batches = 0
            return
        self._failed_batches += 1
        if self._failed_batches >= self.config.patience:
            raise JudgeUnavailableError(
                f"judge {self.judge.name!r} gave no valid verdict for {len(failures)} replies in "
                f"{self._failed_batches} batches in a row; the last reason: {failures[-1].reason}"
            )

    def _apply(
        self, session: EmpathySession, reply: Reply, verdict: Progress | Failed
    ) -> tuple[float, dict[str, Any], Progress | None]:
        trajectory = session.trajectory
        if isinstance(verdict, Failed):
            session.failed_judgements += 1
            session.rewards.append(math.nan)
            if len(session.history) >= self.max_turns:
                session.ended = "max_turns"
            return math.nan, {"failed": verdict.reason, "state": list(trajectory.state)}, None
        turn = trajectory.advance(verdict)
        reward = trajectory.reward(self.config.reward)
        if reply.truncated and self.config.truncated == "zero":
            reward = 0.0
        session.rewards.append(reward)
        outcome = trajectory.outcome()
        if outcome == "failure":
            session.ended = f"failure: {trajectory.reason}"
        elif outcome is not None:
            session.ended = outcome
        elif len(session.history) >= self.max_turns:
            session.ended = "max_turns"
        info = {
            "rubric": verdict.to_json(),
            "increment": list(turn.increment),
            "state": list(turn.state),
            "distance": turn.distance,
            "work": turn.work,
            "alignment": turn.alignment,
        }
        return reward, info, verdict

    def _speak(
        self,
        sessions: Sequence[EmpathySession],
        verdicts: Sequence[Progress | None],
        live: Sequence[int],
    ) -> list[str]:
        requests = [
            UserRequest(
                scenario=sessions[i].scenario,
                history=tuple(sessions[i].history),
                initial=sessions[i].trajectory.initial,
                state=sessions[i].trajectory.state,
                progress=verdicts[i],
                seed=sessions[i].seed,
            )
            for i in live
        ]
        spoken: list[str] = []
        for i, request, answer in zip(live, requests, self.user.respond(requests), strict=True):
            if isinstance(answer, Failed):
                sessions[i].simulator_failures += 1
                spoken += self._scripted.respond([request])
            else:
                spoken.append(answer)
        return spoken


def session_log(session: EmpathySession) -> Mapping[str, Any]:
    """The dialogue and its trajectory as JSON-ready values."""
    trajectory = session.trajectory
    return {
        "scenario": session.scenario.id,
        "seed": session.seed,
        "initial": list(trajectory.initial),
        "history": [list(pair) for pair in session.history],
        "rewards": list(session.rewards),
        "increments": [list(turn.increment) for turn in trajectory.turns],
        "states": [list(turn.state) for turn in trajectory.turns],
        "end_reason": session.ended,
    }
