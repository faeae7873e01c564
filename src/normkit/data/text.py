"""Real text that is always there: the chapters of the Python reference that Python itself ships.

``help("lambda")`` prints one of some eighty chapters: English prose with grammar and examples,
about 465,000 characters in all. Other versions of Python have slightly other words. Tokens are
bytes, so a vocabulary of :data:`VOCABULARY` fits any text.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from normkit.errors import InputError

VOCABULARY = 256
"""Number of tokens: one a byte."""


def encode(text: str) -> Tensor:
    """Tokens ``[N]`` (int64) of a text: its bytes in UTF-8."""
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def decode(tokens: Tensor) -> str:
    """The text of tokens ``[N]``; bytes that are not UTF-8 become question marks in a box."""
    return bytes(tokens.tolist()).decode(errors="replace")


@cache
def reference() -> Tensor:
    """Tokens ``[N]`` of the chapters of the Python reference, in alphabetical order."""
    from pydoc_data.topics import topics  # half a megabyte: only when asked for

    return encode("\n\n".join(topics[name] for name in sorted(topics)))


def corpus(path: str | Path | None = None, held_out: float = 0.1) -> tuple[Tensor, Tensor]:
    """Tokens to train on, and those of the end of the text, which are held out.

    Args:
        path: a UTF-8 text file of your own; None takes the Python reference.
        held_out: share of the text to hold out, in (0, 1).

    Returns:
        Two tensors ``[N]`` of int64.

    Raises:
        InputError: for a share outside (0, 1), or a file that cannot be read as UTF-8 text.
    """
    if not 0 < held_out < 1:
        raise InputError(f"held_out must be in (0, 1), got {held_out}")
    try:
        tokens = reference() if path is None else encode(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"path must be a UTF-8 text file, got {path}: {error}") from None
    start = len(tokens) - int(held_out * len(tokens))
    return tokens[:start], tokens[start:]


def windows(
    tokens: Tensor, batch: int, length: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random stretches of a text, and at each position the token that comes next.

    Args:
        tokens: the text ``[N]``, longer than ``length``.
        batch: number of stretches B.
        length: tokens of each, T.
        generator: of the places; None takes torch's own.

    Returns:
        Inputs and targets ``[B, T]``: ``targets[:, t]`` follows ``inputs[:, t]``.

    Raises:
        InputError: for a text that is too short.
    """
    if len(tokens) <= length:
        raise InputError(f"tokens must be more than length {length}, got {len(tokens)}")
    starts = torch.randint(len(tokens) - length, (batch, 1), generator=generator)
    found = tokens[starts + torch.arange(length + 1)]
    return found[:, :-1], found[:, 1:]
