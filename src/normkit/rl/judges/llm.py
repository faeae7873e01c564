"""A chat model as the judge: it fills the rubric with evidence quoted from the reply."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from normkit.errors import InputError
from normkit.rl.chat import ChatModel, ask
from normkit.rl.judge import Failed, JudgeRequest
from normkit.rl.judges.prompt import judge_messages, keep_quoted, parse_verdict
from normkit.rl.rubric import Progress


class ChatJudge:
    """Asks a chat model for the verdict on each reply of a batch.

    A verdict that cannot be used is sent back once, with what is wrong; a request that still has
    none comes back as :class:`~normkit.rl.judge.Failed`. Evidence that the reply does not contain
    is dropped from the verdict and counted.

    Args:
        chat: the model.
        repairs: how often the model may correct a verdict.
        window: how many of the earlier exchanges the model is shown; None for all.

    Attributes:
        counts: ``asked``, ``repaired``, ``failed``, and ``evidence_dropped``, since construction.
    """

    kind = "chat"

    def __init__(self, chat: ChatModel, repairs: int = 1, window: int | None = 12) -> None:
        if repairs < 0:
            raise InputError(f"repairs must not be negative, got {repairs}")
        if window is not None and window < 0:
            raise InputError(f"window must be None or not negative, got {window}")
        self.chat = chat
        self.repairs = repairs
        self.window = window
        self.counts: Counter[str] = Counter()

    @property
    def name(self) -> str:
        """Kind of the judge and name of its model."""
        return f"{self.kind}:{self.chat.name}"

    def judge(self, requests: Sequence[JudgeRequest]) -> list[Progress | Failed]:
        """Return one filled rubric, or a failure with its reason, per request, in order."""

        def read(i: int, answer: str) -> Progress:
            verdict, dropped = keep_quoted(parse_verdict(answer), requests[i].reply)
            self.counts["evidence_dropped"] += dropped
            return verdict

        conversations = [judge_messages(request, self.window) for request in requests]
        return ask(self.chat, conversations, read, self.repairs, self.counts)


class LLMJudge(ChatJudge):
    """A judge over any chat model, such as :class:`~normkit.rl.chat_local.LocalChat`."""

    kind = "llm"
