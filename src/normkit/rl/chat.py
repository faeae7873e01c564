"""What a judge or a simulated user needs of a chat model, whichever it is.

They see only :class:`ChatModel`: a batch of conversations goes in, a batch of answers comes out,
and a conversation that got no answer comes back as :class:`~normkit.rl.judge.Failed` with the
reason, so that one lost request never stops a run. Models behind a server are in
:mod:`normkit.rl.chat_client`, models on this machine in :mod:`normkit.rl.chat_local`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

from normkit.errors import InputError
from normkit.rl.judge import Failed

Message: TypeAlias = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": text}``."""

T = TypeVar("T")


class ChatModel(Protocol):
    """Anything that continues conversations, a batch at a time."""

    @property
    def name(self) -> str:
        """Short name for logs."""

    def complete(self, conversations: Sequence[Sequence[Message]]) -> list[str | Failed]:
        """Return the next assistant message of each conversation, in order.

        An empty string is an answer (the model said nothing); :class:`Failed` is none.
        """


def ask(
    chat: ChatModel,
    conversations: Sequence[Sequence[Message]],
    read: Callable[[int, str], T],
    repairs: int = 1,
    counts: Counter[str] | None = None,
) -> list[T | Failed]:
    """Complete conversations, read every answer, and ask again where an answer is not valid.

    Args:
        chat: the model to ask.
        conversations: one conversation per request.
        read: turns the answer of conversation i into its result; raises InputError with what is
            wrong, and that sentence is sent back to the model.
        repairs: how often the model may correct an answer.
        counts: is given ``asked``, ``repaired`` (right after a correction) and ``failed``.

    Returns:
        The result, or the failure with its reason, per conversation, in order.
    """
    counts = Counter() if counts is None else counts
    results: list[T | Failed] = [Failed("not asked")] * len(conversations)
    pending = [(i, list(messages)) for i, messages in enumerate(conversations)]
    counts["asked"] += len(pending)
    for attempt in range(repairs + 1):
        if not pending:
            break
        answers = chat.complete([messages for _, messages in pending])
        wrong: list[tuple[int, list[Message]]] = []
        for (i, messages), answer in zip(pending, answers, strict=True):
            if isinstance(answer, Failed):
                results[i] = answer
                continue
            try:
                results[i] = read(i, answer)
                counts["repaired"] += attempt > 0
            except InputError as error:
                times = f"{attempt} correction{'' if attempt == 1 else 's'}"
                results[i] = Failed(f"no valid answer after {times}: {error}")
                wrong.append((i, [*messages, *_correction(answer, error)]))
        pending = wrong
    counts["failed"] += sum(isinstance(result, Failed) for result in results)
    return results


def _correction(answer: str, error: InputError) -> list[Message]:
    # A wrong answer can be a runaway one; its beginning is enough to be corrected.
    return [
        {"role": "assistant", "content": answer[:2000] or "(nothing)"},
        {
            "role": "user",
            "content": f"That answer cannot be used: {error}. "
            "Answer once more, in the required form and with nothing else.",
        },
    ]


def as_data(value: Any) -> str:
    r"""Write strings, numbers, lists and mappings as JSON that a prompt can carry as mere data.

    The characters that tags, code fences and the special tokens of chat templates are made of
    (``< > [ ] | ```) appear in strings only as ``\u`` escapes. Hence no text, whoever wrote it,
    can close the delimiter it stands in or be read as the start of another message.

    Args:
        value: the data; keys are strings.

    Returns:
        One line of JSON.
    """
    if isinstance(value, str):
        text = json.dumps(plain_text(value), ensure_ascii=False)
        return re.sub(r"[<>\[\]|`]", lambda found: f"\\u{ord(found[0]):04x}", text)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{as_data(k)}: {as_data(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(as_data(item) for item in value) + "]"
    return json.dumps(value, allow_nan=False)


def content_text(content: Any) -> str:
    """The text of a message's content, which may come in parts (``{"type": "text", "text"}``)."""
    if isinstance(content, list):
        content = "".join(str(p.get("text") or "") for p in content if isinstance(p, Mapping))
    return str(content or "")


def without_reasoning(text: str) -> str:
    """Return ``text`` without the thoughts that reasoning models put before their answer.

    Thoughts that were cut at the length limit, and so never end, leave an empty answer.
    """
    _, ended, answer = text.rpartition("</think>")
    if ended:
        return answer.strip()
    return "" if text.lstrip().startswith("<think>") else text.strip()


def plain_text(text: str) -> str:
    """Return ``text`` with every half of a surrogate pair, which is no character, replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")
