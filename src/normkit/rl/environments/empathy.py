"""The emotional-support world: a person with unmet needs, a judge, and the state between them.

The world of MAPO (arXiv 2603.06194) after EMPA (arXiv 2603.00552), in our own words: the Empathy
Potential Model (:mod:`normkit.rl.environments.epm`) holds the person's state, a judge fills the
rubric for every reply, the rubric moves the state, and a turn earns how much closer the person came
to "need met". The policy sees a short system prompt and what the person says; the scenario's needs,
points and deficit reach the judge and the simulated user only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from normkit.errors import InputError
from normkit.files import finite
from normkit.rl.environment import Reply, Split, Step
from normkit.rl.environments.epm import (
    EPMConfig,
    RewardKind,
    State,
    Trajectory,
    epm_q,
    initial_state,
)
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
        epm: constants of the model; its ``max_turns`` ends a dialogue, and neither success nor
            failure is declared before ``min_turns`` judged turns (never, where that is more).
        reward: what a turn earns (:meth:`normkit.rl.environments.epm.Trajectory.reward`).
        truncated: a reply cut at the length limit is judged like any other ("judge"), or it moves
            the state but its turn earns nothing ("zero", as in MAPO's code).
        system: system prompt of the policy; empty for none.
        patience: the run stops after this many batches in a row without one valid verdict. Near the
            end of a long rollout a batch may be a single dialogue, whose reply a judge may refuse
            for good: with 1, such a reply would stop every attempt to resume.
    """

    epm: EPMConfig = field(default_factory=EPMConfig)
    reward: RewardKind = "idr"
    truncated: Literal["judge", "zero"] = "judge"
    system: str = SYSTEM_PROMPT
    patience: int = 3

    def __post_init__(self) -> None:
        kinds = get_args(RewardKind)
        if self.reward not in kinds:
            raise InputError(f"reward must be one of {', '.join(kinds)}, got {self.reward!r}")
        if self.truncated not in ("judge", "zero"):
            raise InputError(f"truncated must be judge or zero, got {self.truncated!r}")
        if self.patience < 1:
            raise InputError(f"patience must be at least 1 batch, got {self.patience}")


@dataclass
class EmpathyTurn:
    """One exchange of a session.

    Attributes:
        message: what the person said.
        reply: what the policy answered.
        truncated: True where the reply was cut at the length limit.
        reward: what the turn earned; NaN where the judge failed.
        info: the facts of :class:`~normkit.rl.environment.Step`. A judged turn has the rubric, what
            it did (increment, work, total_work, alignment) and where the person is now (state,
            distance); a failed one has the reason as ``"failed"``, and state and distance. Where
            the simulated user failed, ``"user_failed"`` has the reason.
    """

    message: str
    reply: str
    truncated: bool
    reward: float
    info: dict[str, Any]


@dataclass(eq=False)
class EmpathySession:
    """One dialogue in progress.

    Attributes:
        scenario: who the person is and what happened.
        seed: of the simulated user.
        system: system prompt of the policy.
        trajectory: the person's state, moved by every valid verdict. Turns without one are not in
            it, so that they count neither for nor against the dialogue.
        turns: the exchanges so far.
        said: what the person said last; empty once the dialogue is over.
        ended: why it is over; None while it goes on.
    """

    scenario: Scenario
    seed: int
    system: str
    trajectory: Trajectory
    turns: list[EmpathyTurn] = field(default_factory=list)
    said: str = ""
    ended: str | None = None

    def __post_init__(self) -> None:
        self.said = self.said or self.scenario.opening

    @property
    def task(self) -> str:
        """Name of the scenario."""
        return self.scenario.id

    @property
    def message(self) -> str:
        """The message that opens the dialogue."""
        return self.scenario.opening

    @property
    def history(self) -> tuple[tuple[str, str], ...]:
        """``(user message, reply)`` of all turns, oldest first."""
        return tuple((turn.message, turn.reply) for turn in self.turns)

    @property
    def failed_judgements(self) -> int:
        """Turns without a valid verdict."""
        return sum("failed" in turn.info for turn in self.turns)

    @property
    def simulator_failures(self) -> int:
        """Turns after which the simulator failed, so that the scripted user spoke or nobody did."""
        return sum("user_failed" in turn.info for turn in self.turns)


class EmpathyEnvironment:
    """Many emotional-support dialogues side by side.

    Sessions share nothing: the same scenario, seed, replies and verdicts give the same dialogue,
    whichever other sessions are in the batch.

    Args:
        train: scenarios of training.
        heldout: scenarios of evaluation; none may be among ``train``.
        judge: fills the rubric.
        user: speaks for the person; the scenario's own lines by default.
        config: options of the world.

    Raises:
        InputError: where two scenarios have the same name, or one without lines of its own has no
            ``user`` to speak for it.
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
        self._splits: dict[Split, list[str]] = {"train": [], "heldout": []}
        self._scenarios: dict[str, Scenario] = {}
        splits: list[tuple[Split, Sequence[Scenario]]] = [("train", train), ("heldout", heldout)]
        for split, scenarios in splits:
            for scenario in scenarios:
                if scenario.id in self._splits["train"] and split == "heldout":
                    raise InputError(f"heldout: {scenario.id!r} is a training scenario too")
                if scenario.id in self._scenarios:
                    raise InputError(f"{split}: {scenario.id!r} is there twice")
                if user is None and not scenario.scripted:
                    raise InputError(
                        f"user must be given for {scenario.id!r}, which has no lines of its own: "
                        "a chat model that speaks for the person, such as LLMUser"
                    )
                self._scenarios[scenario.id] = scenario
                self._splits[split].append(scenario.id)
        self._failed_batches = 0

    @property
    def max_turns(self) -> int:
        """No dialogue has more turns than this."""
        return self.config.epm.max_turns

    def tasks(self, split: Split) -> Sequence[str]:
        """Names of the scenarios of a split.

        Raises:
            InputError: for a split that does not exist.
        """
        if split not in self._splits:
            raise InputError(f"split must be train or heldout, got {split!r}")
        return list(self._splits[split])

    def start(self, task: str, seed: int) -> EmpathySession:
        """Open a session with the person of a scenario.

        Raises:
            InputError: where there is no such scenario.
        """
        if task not in self._scenarios:
            raise InputError(f"task: there is no scenario {task!r}")
        scenario = self._scenarios[task]
        trajectory = Trajectory(initial_state(scenario.deficit), self.config.epm)
        return EmpathySession(scenario, seed, self.config.system, trajectory)

    def step(self, sessions: Sequence[EmpathySession], replies: Sequence[Reply]) -> list[Step]:
        """Judge one reply of each session, move its state, and let the person answer.

        The judge is asked once for the whole batch, the simulated user once for all sessions that
        go on. A failed judgement leaves the state as it was; its turn has reward NaN and counts as
        a turn of the dialogue. Where the simulated user fails, the scripted one speaks; a scenario
        without lines of its own ends there.

        Args:
            sessions: sessions that have not ended, each once.
            replies: one reply for each; a reply may be empty.

        Raises:
            InputError: where sessions and replies do not fit together; no session has changed then.
            JudgeUnavailableError: when ``patience`` batches in a row had no valid verdict; the
                sessions of the last one have not changed then.
        """
        _check(sessions, replies)
        if not sessions:
            return []
        verdicts = self._verdicts(sessions, replies)
        for session, reply, verdict in zip(sessions, replies, verdicts, strict=True):
            self._apply(session, reply, verdict)
        self._speak(
            [(s, v) for s, v in zip(sessions, verdicts, strict=True) if s.ended is None],
        )
        return [
            Step(s.turns[-1].reward, s.said or None, s.ended, dict(s.turns[-1].info))
            for s in sessions
        ]

    def score(self, session: EmpathySession) -> dict[str, float]:
        """EPM-Q of the dialogue as ``"score"``, and what it is made of (`session_scores`)."""
        return session_scores(session)

    def _verdicts(
        self, sessions: Sequence[EmpathySession], replies: Sequence[Reply]
    ) -> list[Progress | Failed]:
        requests = [
            JudgeRequest(s.scenario, s.history, s.said, r.text, r.truncated)
            for s, r in zip(sessions, replies, strict=True)
        ]
        verdicts = self.judge.judge(requests)
        _one_each(f"judge {self.judge.name!r}", verdicts, requests)
        failures = [v for v in verdicts if isinstance(v, Failed)]
        self._failed_batches = self._failed_batches + 1 if len(failures) == len(verdicts) else 0
        if self._failed_batches >= self.config.patience:
            raise JudgeUnavailableError(
                f"judge {self.judge.name!r} gave no valid verdict in {self._failed_batches} "
                f"batches in a row, the last of {len(failures)} replies; "
                f"the last reason: {failures[-1].reason}"
            )
        return verdicts

    def _apply(self, session: EmpathySession, reply: Reply, verdict: Progress | Failed) -> None:
        trajectory = session.trajectory
        info: dict[str, Any]
        if isinstance(verdict, Failed):
            reward = math.nan
            info = {"failed": verdict.reason}
        else:
            turn = trajectory.advance(verdict)
            reward = trajectory.reward(self.config.reward)
            if reply.truncated and self.config.truncated == "zero":
                reward = 0.0
            info = {
                "rubric": verdict.to_json(),
                "increment": list(turn.increment),
                "work": turn.work,
                "total_work": turn.total_work,
                "alignment": turn.alignment,
            }
        info.update(state=list(trajectory.state), distance=trajectory.distance)
        session.turns.append(EmpathyTurn(session.said, reply.text, reply.truncated, reward, info))
        session.said = ""
        session.ended = trajectory.outcome()
        if session.ended == "failure":
            session.ended = f"failure: {trajectory.reason}"
        # Failed judgements are turns of the dialogue, which must end, but not of the trajectory.
        if session.ended is None and len(session.turns) >= self.max_turns:
            session.ended = "max_turns"

    def _speak(self, live: Sequence[tuple[EmpathySession, Progress | Failed]]) -> None:
        if not live:
            return
        requests = [
            UserRequest(
                scenario=session.scenario,
                history=session.history,
                initial=session.trajectory.initial,
                state=session.trajectory.state,
                progress=None if isinstance(verdict, Failed) else verdict,
                seed=session.seed,
            )
            for session, verdict in live
        ]
        answers = self.user.respond(requests)
        _one_each("the simulated user", answers, requests)
        for (session, _), request, answer in zip(live, requests, answers, strict=True):
            if isinstance(answer, Failed) or not answer.strip():
                reason = answer.reason if isinstance(answer, Failed) else "it said nothing"
                session.turns[-1].info["user_failed"] = reason
                if session.scenario.scripted:
                    session.said = self._scripted.respond([request])[0]
                else:
                    session.ended = f"the person has nothing to say: {reason}"
            else:
                session.said = answer


def session_scores(session: EmpathySession) -> dict[str, float]:
    """Metrics of a dialogue as it stands.

    Returns:
        ``score`` (EPM-Q) with its parts ``outcome``, ``efficiency`` and ``stability``, NaN without
        one judged turn; ``closed``, the share of the initial distance that was closed; ``work``,
        the effective work in points; ``reward``, the sum of the known rewards; ``success``, 1 or 0;
        and the counts ``turns``, ``failed_judgements`` and ``simulator_failures``.
    """
    trajectory = session.trajectory
    q = epm_q([trajectory]) if trajectory.turns else None
    start = trajectory.initial_distance
    return {
        "score": q.score if q else math.nan,
        "outcome": q.outcome if q else math.nan,
        "efficiency": q.efficiency if q else math.nan,
        "stability": q.stability if q else math.nan,
        "closed": (start - trajectory.distance) / start if start else 0.0,
        "work": trajectory.total_work,
        "reward": math.fsum(t.reward for t in session.turns if not math.isnan(t.reward)),
        "success": float(session.ended == "success"),
        "turns": float(len(session.turns)),
        "failed_judgements": float(session.failed_judgements),
        "simulator_failures": float(session.simulator_failures),
    }


def session_log(session: EmpathySession) -> dict[str, Any]:
    """The dialogue and its trajectory as JSON-ready values; NaN stands as None.

    Returns:
        ``scenario``, ``seed``, ``system``, ``epm`` (the constants), ``initial`` (P_0), ``turns``,
        ``end_reason`` and ``scores``. A turn has the attributes of :class:`EmpathyTurn`, its info
        among them. :func:`replay` rebuilds the trajectory.
    """
    log: dict[str, Any] = finite(
        {
            "scenario": session.scenario.id,
            "seed": session.seed,
            "system": session.system,
            "epm": asdict(session.trajectory.config),
            "initial": list(session.trajectory.initial),
            "turns": [
                {
                    "message": turn.message,
                    "reply": turn.reply,
                    "truncated": turn.truncated,
                    "reward": turn.reward,
                    **turn.info,
                }
                for turn in session.turns
            ],
            "end_reason": session.ended,
            "scores": session_scores(session),
        }
    )
    return log


def replay(log: Mapping[str, Any]) -> Trajectory:
    """Rebuild the trajectory of a :func:`session_log` from its rubrics.

    Args:
        log: the log, also after a round trip through JSON.

    Returns:
        The trajectory; turns without a verdict have none in it.

    Raises:
        InputError: where a field is missing or wrong, or a recorded state is not the one that the
            rubrics lead to; the message names the turn.
    """
    try:
        c, a, p = (float(x) for x in log["initial"])
        trajectory = Trajectory((c, a, p), EPMConfig(**log["epm"]))
        judged = [(i, turn) for i, turn in enumerate(log["turns"], 1) if "failed" not in turn]
        for number, turn in judged:
            try:
                trajectory.advance(Progress.from_json(turn["rubric"]))
            except InputError as error:
                raise InputError(f"log: turn {number}: {error}") from None
            recorded: State = tuple(turn["state"])
            if math.dist(recorded, trajectory.state) > 1e-6:
                raise InputError(
                    f"log: turn {number}: state must be {list(trajectory.state)}, as the rubrics "
                    f"have it, got {list(recorded)}"
                )
    except KeyError as error:
        raise InputError(f"log: the field {error} is missing") from None
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"log: it is not the log of a session: {error}") from None
    return trajectory


def _check(sessions: Sequence[EmpathySession], replies: Sequence[Reply]) -> None:
    if len(sessions) != len(replies):
        raise InputError(
            f"replies must be one for each of the {len(sessions)} sessions, got {len(replies)}"
        )
    if len({id(session) for session in sessions}) < len(sessions):
        raise InputError("sessions must be different, got one of them twice")
    for i, (session, reply) in enumerate(zip(sessions, replies, strict=True)):
        if session.ended is not None:
            raise InputError(
                f"sessions[{i}] must be in progress, got {session.task!r}, which ended: "
                f"{session.ended}"
            )
        text = getattr(reply, "text", reply)
        if not isinstance(reply, Reply) or not isinstance(text, str):
            raise InputError(f"replies[{i}] must be a Reply with a text, got {text!r}")


def _one_each(source: str, answers: Sequence[object], requests: Sequence[object]) -> None:
    if len(answers) != len(requests):
        raise InputError(
            f"{source} must give one answer for each of {len(requests)} requests, "
            f"got {len(answers)}"
        )
