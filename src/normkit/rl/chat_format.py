"""Turns a dialogue into token ids piece by piece, so that a row of ids is what the model saw.

A chat template renders a whole list of messages. Generation that keeps its KV cache needs the
increments instead: the opening, and what stands between one reply and the next. They are read off
the template once, by rendering probe texts and cutting at them, and checked to add up to the full
rendering again. From then on the template is not run any more.

Earlier turns stay in the row as the model saw them. Where a template would rewrite them, the row
does not: some templates drop the thinking part of past replies; some begin the current reply with
an empty thinking part that past ones lack; some write a blank before a past reply, which the model
is left to say itself. A template that goes beyond this is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from normkit.errors import InputError

_SYSTEM, _USERS, _REPLIES = "Qsystemq", ("Quserq1", "Quserq2", "Quserq3"), ("Qreplyq1", "Qreplyq2")


@dataclass(frozen=True)
class _Pieces:
    """What the template writes around the contents.

    Attributes:
        before_system: text before the system prompt; None where there is no system message.
        before_first: text between the system prompt, or the beginning, and the first message.
        after_message: text from a user's message to the reply (the generation prompt).
        between: text from a reply to the next user's message.
    """

    before_system: str | None
    before_first: str
    after_message: str
    between: str


class ChatFormat:
    """The increments of a tokenizer's chat template.

    A system prompt that the template has no place for is put before the first message. Without a
    system prompt the template decides (some add one of their own).

    Messages are text and never become control tokens: a message that spells out a special token is
    encoded as the characters it consists of.

    Args:
        tokenizer: a tokenizer of transformers with a chat template.
        end_ids: further tokens that end a reply, beside the template's and the tokenizer's.

    Raises:
        InputError: when there is no template, or it does not write dialogues turn by turn.
    """

    def __init__(self, tokenizer: Any, end_ids: Sequence[int] = ()) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("tokenizer: expected one with a chat template, got one without")
        self.tokenizer = tokenizer
        bare = self._pieces(system=False)
        if bare is None:
            raise InputError(
                "tokenizer: its chat template does not write a dialogue turn by turn (a later "
                "message changes how earlier ones are written), so replies cannot be generated "
                "without encoding the dialogue anew each turn"
            )
        self._bare = bare
        self._with_system = self._pieces(system=True)
        if self._with_system is not None and self._with_system.between != bare.between:
            self._with_system = None
        self._strips = self._strips_messages()
        self._control = self._control_tokens()
        self.closing_id, self._between_closed = self._closing(self._bare.between)
        declared = [tokenizer.eos_token_id, self.closing_id, *end_ids]
        self._end_ids = tuple(sorted({int(i) for i in declared if i is not None}))

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply."""
        return self._end_ids

    def opening(self, system: str, message: str) -> list[int]:
        """Token ids from the beginning up to where the first reply starts.

        Args:
            system: system prompt; empty for none.
            message: the user's first message.
        """
        pieces = self._bare
        if system and self._with_system is not None:
            pieces = self._with_system
            parts = [(pieces.before_system or "", True), (system, False)]
        elif system:
            parts, message = [], f"{system}\n\n{message}"
        else:
            parts = []
        parts += [(pieces.before_first, True), (message, False), (pieces.after_message, True)]
        return self._encode(parts)

    def following(self, message: str, closed: bool) -> list[int]:
        """Token ids from the end of a reply up to where the next reply starts.

        Args:
            message: the user's next message.
            closed: True where the reply's last token is :attr:`closing_id`, so that the turn is
                closed already; False where it was cut, or ended by another token.
        """
        between = self._between_closed if closed else self._bare.between
        return self._encode([(between, True), (message, False), (self._bare.after_message, True)])

    def closed(self, reply_ids: Sequence[int]) -> bool:
        """Whether sampled tokens end the way the template closes a turn."""
        return bool(reply_ids) and reply_ids[-1] == self.closing_id

    def decode(self, reply_ids: Sequence[int]) -> str:
        """Text of a reply, without special tokens and surrounding white space."""
        ids = list(reply_ids)
        while ids and ids[-1] in self._end_ids:
            ids.pop()
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text.strip()

    # ------------------------------------------------------------------ reading the template

    def _render(self, contents: Sequence[str], system: bool) -> str:
        roles = ["system"] * system + ["user", "assistant"] * len(contents)
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return text

    def _pieces(self, system: bool) -> _Pieces | None:
        """Cut a rendered probe dialogue at its contents; None if the increments do not add up."""
        first, second, third = _USERS
        head = [_SYSTEM] if system else []
        contents = [*head, first, _REPLIES[0], second, _REPLIES[1], third]
        try:
            opening = self._render([*head, first], system)
            full = self._render(contents, system)
        except Exception as error:  # templates raise what they like; jinja's own errors among it
            if system:
                return None
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise InputError(f"tokenizer: its chat template fails ({reason})") from error
        cuts = re.split("|".join(map(re.escape, contents)), full)
        order = re.findall("|".join(map(re.escape, contents)), full)
        if order != contents:
            return None
        before_system = cuts.pop(0) if system else None
        before_first, past, between, _, _, prompt = cuts
        start = f"{before_system}{_SYSTEM}" if system else ""
        if cuts != [before_first, past, between, past, between, prompt]:
            return None
        if opening != start + before_first + first + prompt:
            return None
        if past.strip() != prompt.strip() and not prompt.startswith(past):
            return None
        return _Pieces(before_system, before_first, prompt, between)

    def _strips_messages(self) -> bool:
        return f" \n{_USERS[0]}\n " not in self._render([f" \n{_USERS[0]}\n "], system=False)

    def _closing(self, between: str) -> tuple[int | None, str]:
        """Token that closes a reply, and the text between turns that follows it."""
        for match in self._control.finditer(between) if self._control else ():
            before = between[: match.start()]
            if before.strip():
                break
            token = self.tokenizer.convert_tokens_to_ids(match.group())
            return int(token), between[match.end() :]
        return None, between

    # ------------------------------------------------------------------ encoding

    def _control_tokens(self) -> re.Pattern[str] | None:
        """Pattern of every token that is matched before text is split into subwords."""
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        added |= set(self.tokenizer.all_special_tokens)
        # Runs of blanks are ordinary text, though some tokenizers list them as added tokens.
        spelled = sorted((token for token in added if token.strip()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, spelled))) if spelled else None

    def _encode(self, parts: Sequence[tuple[str, bool]]) -> list[int]:
        """Encode text whose parts are the template's (True) or somebody's content (False)."""
        parts = [
            (part.strip() if self._strips and not trusted else part, trusted)
            for part, trusted in parts
        ]
        text = "".join(part for part, _ in parts)
        if self._controls(text) == sum(self._controls(part) for part, trusted in parts if trusted):
            # As one text, so that merges over the seams are those the model was trained with.
            return self._ids(text)
        ids: list[int] = []
        for part, trusted in parts:
            ids += self._ids(part) if trusted else self._content_ids(part)
        return ids

    def _controls(self, text: str) -> int:
        return len(self._control.findall(text)) if self._control is not None else 0

    def _content_ids(self, text: str) -> list[int]:
        """Encode text that spells out control tokens so that none of them comes about."""
        ids: list[int] = []
        start = 0
        control = self._control
        while control is not None and (match := control.search(text, start)) is not None:
            cut = match.start() + 1
            ids += self._ids(text[start:cut])
            start = cut
        return ids + self._ids(text[start:])

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
