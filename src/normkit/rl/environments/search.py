"""The search world: questions whose answers have to be searched for, one to three times.

A reply is one action, ``<search>query</search>`` or ``<answer>text</answer>``, with free text
around it, as in Search-R1 (arXiv 2503.09516). The passages that a query finds are the next message;
an answer ends the dialogue and earns exact match, 0 or 1. A reply that is no single action earns
nothing and is told so.

Passages are data. What looks like one of the world's tags in them is taken out before they are
shown, and only replies are ever read for actions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from normkit.errors import InputError, check_least
from normkit.rl.answers import exact_match, token_f1
from normkit.rl.environment import Reply, Split, Step, check_paired
from normkit.rl.environments.search_index import Passage, Searcher
from normkit.rl.environments.search_land import passages as land_passages
from normkit.rl.environments.search_questions import Question, make_questions

_FORMAT = (
    "Answer the question by searching. Write one action in each reply:\n"
    "<search>QUERY</search> shows the passages that fit the query best.\n"
    "<answer>ANSWER</answer> ends the dialogue; the answer is a name or a few words.\n"
    "A question may take several searches, each for what the one before it found."
)
_TAG = re.compile(r"<(/?)(search|answer|information)>", re.IGNORECASE)
_MALFORMED = "Write exactly one action: <search>QUERY</search> or <answer>ANSWER</answer>."


@dataclass(frozen=True)
class SearchWorldConfig:
    """Options of the world.

    Attributes:
        max_turns: a dialogue ends here, answered or not.
        hits: most passages that a query finds.
        max_passage: characters of a passage that are shown.
        max_action: longest query and answer, in characters.
        hops: questions that are asked, by the passages that they need; empty for all.
        reward: what an answer earns: exact match ("em") or F1 of its words ("f1").
        bonus: what finding all reference passages earns in sum, each at the turn that first finds
            it.
    """

    max_turns: int = 6
    hits: int = 3
    max_passage: int = 400
    max_action: int = 200
    hops: tuple[int, ...] = ()
    reward: Literal["em", "f1"] = "em"
    bonus: float = 0.0

    def __post_init__(self) -> None:
        check_least(self, 1, "max_turns", "hits", "max_passage", "max_action")
        if self.reward not in ("em", "f1"):
            raise InputError(f"reward must be em or f1, got {self.reward!r}")
        if not 0 <= self.bonus < float("inf"):
            raise InputError(f"bonus must be at least 0, got {self.bonus}")


@dataclass(frozen=True)
class Action:
    """What a reply does.

    Attributes:
        kind: "search", "answer", or "malformed".
        text: the query, the answer, or what is wrong.
    """

    kind: Literal["search", "answer", "malformed"]
    text: str


def read_action(text: str, max_characters: int) -> Action:
    """Read the action of a reply.

    Args:
        text: the reply.
        max_characters: longest query or answer.
    """
    tags = list(_TAG.finditer(text))
    names = [(tag[1], tag[2].lower()) for tag in tags]
    # A tag too many leaves open what is meant.
    if names not in ([("", "search"), ("/", "search")], [("", "answer"), ("/", "answer")]):
        return Action("malformed", _MALFORMED)
    kind, content = names[0][1], text[tags[0].end() : tags[1].start()].strip()
    if not content:
        return Action("malformed", f"The {kind} is empty. {_MALFORMED}")
    if len(content) > max_characters:
        return Action("malformed", f"The {kind} is longer than {max_characters} characters.")
    return Action("search" if kind == "search" else "answer", content)


@dataclass(eq=False)
class SearchSession:
    """One dialogue in progress.

    Attributes:
        question: what is asked, with its reference.
        system: system prompt of the policy.
        actions: what each reply did.
        found: reference passages that were found, in the order of being found.
        ended: why it is over; None while it goes on.
    """

    question: Question
    system: str
    actions: list[Action] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    ended: str | None = None

    @property
    def task(self) -> str:
        """Id of the question."""
        return self.question.id

    @property
    def message(self) -> str:
        """The question."""
        return f"Question: {self.question.text}"

    @property
    def answer(self) -> str | None:
        """The answer; None while there is none."""
        last = self.actions[-1] if self.actions else None
        return last.text if last is not None and last.kind == "answer" else None


class SearchWorld:
    """Many dialogues with a search engine side by side; they share an index that is only read.

    Args:
        config: options of the world.
        passages: what is searched, or a searcher over it, which has its own number of hits; the
            invented land if None.
        questions: those of each split, with different ids; those about the land if None.

    Raises:
        InputError: for a question whose id stands twice or whose passages are not there, or where
            no question of the given hops is left.
        MissingDependencyError: without the extra ``search``.
    """

    def __init__(
        self,
        config: SearchWorldConfig | None = None,
        passages: Sequence[Passage] | Searcher | None = None,
        questions: Mapping[Split, Sequence[Question]] | None = None,
    ) -> None:
        self.config = config or SearchWorldConfig()
        given = land_passages() if passages is None else passages
        self.searcher = given if isinstance(given, Searcher) else Searcher(given, self.config.hits)
        self._splits: dict[Split, list[str]] = {"train": [], "heldout": []}
        self.questions: dict[str, Question] = {}
        for split, names in self._splits.items():
            asked = make_questions(split) if questions is None else questions.get(split, ())
            for question in asked:
                if question.id in self.questions:
                    raise InputError(f"questions: the id {question.id!r} stands twice")
                lost = [p for p in question.passages if p not in self.searcher.place]
                if lost:
                    raise InputError(f"questions: {question.id} needs a passage {lost[0]!r}")
                if not self.config.hops or question.hops in self.config.hops:
                    self.questions[question.id] = question
                    names.append(question.id)
        if not self.questions:
            wanted = f" with hops in {self.config.hops} (empty for all)" if self.config.hops else ""
            raise InputError(f"questions must be at least one{wanted}")

    @property
    def max_turns(self) -> int:
        """No dialogue has more turns than this."""
        return self.config.max_turns

    def tasks(self, split: Split) -> Sequence[str]:
        """Ids of the questions of a split.

        Raises:
            InputError: for a split that does not exist.
        """
        if split not in self._splits:
            raise InputError(f"split must be train or heldout, got {split!r}")
        return self._splits[split]

    def start(self, task: str, seed: int) -> SearchSession:
        """Ask a question; nothing in this world is random.

        Raises:
            InputError: where there is no such question.
        """
        if task not in self.questions:
            raise InputError(f"task: there is no question {task!r}")
        return SearchSession(self.questions[task], _FORMAT)

    def retrieve(self, queries: Sequence[str]) -> npt.NDArray[np.int64]:
        """Places in ``searcher.passages`` of what queries find ``[Q, hits]``, -1 for none.

        All queries are searched at once, without limits on their lengths.
        """
        return self.searcher.retrieve(queries)

    def step(self, sessions: Sequence[SearchSession], replies: Sequence[Reply]) -> list[Step]:
        """Take one reply of each session; all queries are searched at once.

        Raises:
            InputError: where sessions and replies do not fit together or a session has ended.
        """
        check_paired(sessions, replies)
        if any(session.ended is not None for session in sessions):
            raise InputError("sessions must not have ended")
        actions = [read_action(reply.text, self.config.max_action) for reply in replies]
        queries = [action.text for action in actions if action.kind == "search"]
        rows = iter(self.retrieve(queries).tolist())
        steps = []
        for session, action in zip(sessions, actions, strict=True):
            places = [p for p in next(rows) if p >= 0] if action.kind == "search" else []
            steps.append(self._answer(session, action, places))
        return steps

    def score(self, session: SearchSession) -> dict[str, float]:
        """Metrics of a session.

        Returns:
            ``score`` (exact match), ``f1``; ``found``, the share of the reference passages that
            were found (NaN where none is known); ``answered``, 0 or 1; counts ``searches``,
            ``repeated`` (searches for what was searched for before) and ``malformed``.
        """
        queries = [action.text for action in session.actions if action.kind == "search"]
        answer, question = session.answer, session.question
        kinds = [action.kind for action in session.actions]
        known = len(question.passages)
        return {
            "score": 0.0 if answer is None else exact_match(answer, question.answers),
            "f1": 0.0 if answer is None else token_f1(answer, question.answers),
            "found": len(session.found) / known if known else float("nan"),
            "answered": float(answer is not None),
            "searches": float(len(queries)),
            "repeated": float(len(queries) - len({query.lower() for query in queries})),
            "malformed": float(kinds.count("malformed")),
        }

    def _answer(self, session: SearchSession, action: Action, places: Sequence[int]) -> Step:
        """Let an action happen."""
        session.actions.append(action)
        config, question = self.config, session.question
        passages = [self.searcher.passages[place] for place in places]
        gold = set(question.passages)
        new = [p.id for p in passages if p.id in gold and p.id not in session.found]
        session.found += new
        info: dict[str, Any] = {
            "action": action.kind,
            "text": action.text,
            "found": [passage.id for passage in passages],
        }
        reward = config.bonus * len(new) / len(gold) if gold else 0.0
        if action.kind == "answer":
            score = exact_match if config.reward == "em" else token_f1
            reward = score(action.text, question.answers)
            right = exact_match(action.text, question.answers) == 1
            session.ended = "success" if right else "answered"
        elif len(session.actions) == config.max_turns:
            session.ended = "max_turns"
        if session.ended is not None:
            return Step(reward, None, session.ended, info)
        message = self._shown(passages) if action.kind == "search" else action.text
        return Step(reward, message, None, info)

    def _shown(self, passages: Sequence[Passage]) -> str:
        lines = [
            f"[{number}] {_plain(passage.title)}: {_plain(passage.text)}"
            for number, passage in enumerate(passages, start=1)
        ]
        limit = self.config.max_passage
        cut = [line if len(line) <= limit else line[: limit - 3] + "..." for line in lines]
        found = "\n".join(cut) if cut else "Nothing was found."
        return f"<information>\n{found}\n</information>"


def _plain(text: str) -> str:
    """Text of a passage on one line, without tags of this world."""
    return " ".join(_TAG.sub(" ", text).split())
