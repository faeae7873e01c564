"""Values of JSON files that know where they stand, so that a bad one can be named."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normkit.errors import InputError

_LARGEST = sys.float_info.max
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Field:
    """A value and its address.

    Attributes:
        value: what JSON has there; None where there is nothing.
        file: the file, and the line where it has one value a line.
        name: path of the value within it, such as ``epj.trajectory[3].v_t``.
    """

    value: Any
    file: str
    name: str = ""

    def __getitem__(self, key: str) -> Field:
        """The field of a mapping; one without a value where the key is missing."""
        return Field(self.mapping().get(key), self.file, f"{self.name}.{key}" if self.name else key)

    def get(self, key: str) -> Field:
        """Like ``field[key]``, for a mapping that may be missing itself."""
        return self[key] if self else Field(None, self.file, f"{self.name}.{key}")

    def first(self, *keys: str) -> Field:
        """The field of the first key that has a value; that of the first key where none has."""
        return next((self[key] for key in keys if self[key]), self[keys[0]])

    def __bool__(self) -> bool:
        """Whether there is a value."""
        return self.value is not None

    def __iter__(self) -> Iterator[Field]:
        """The fields of a list."""
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        for i, item in enumerate(self.value):
            yield Field(item, self.file, f"{self.name}[{i}]")

    def mapping(self) -> dict[str, Any]:
        """The value as a mapping."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        return self.value

    def text(self, empty: bool = False) -> str:
        """The value as a text; with ``empty`` it may be empty or missing."""
        value = "" if empty and self.value is None else self.value
        if not isinstance(value, str) or not (empty or value.strip()):
            raise self.wrong("a text" if empty else "a text that is not empty")
        # JSON can spell halves of characters, which no tokenizer and no file takes.
        if not value.isascii() and _HALF.search(value):
            raise self.wrong("a text without lone surrogates")
        return value

    def number(self) -> float:
        """The value as a finite number."""
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise self.wrong("a number")
        if not -_LARGEST <= self.value <= _LARGEST:
            raise self.wrong("a finite number")
        return float(self.value)

    def integer(self, low: int | None = None, high: int | None = None) -> int:
        """The value as an integer within bounds; 2.0 counts as one."""
        value = self.value
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        outside = whole and (
            (low is not None and value < low) or (high is not None and value > high)
        )
        if isinstance(value, bool) or not whole or outside:
            bounds = [f" of at least {low}"] if low is not None else []
            bounds += [f" of at most {high}"] if high is not None else []
            raise self.wrong("an integer" + " and".join(bounds))
        return int(value)

    def numbers(self, count: int) -> tuple[float, ...]:
        """The value as a list of so many finite numbers."""
        if not isinstance(self.value, list) or len(self.value) != count:
            raise self.wrong(f"a list of {count} numbers")
        return tuple(item.number() for item in self)

    def wrong(self, expected: str) -> InputError:
        """The error that says where something else was expected."""
        given = json.dumps(self.value, ensure_ascii=False, default=repr) if self else "nothing"
        given = given if len(given) <= 60 else given[:57] + "..."
        message = f"{self.file}: {self.name or 'it'} must be {expected}, got {given}"
        # What is wrong may be that it cannot be printed.
        return InputError(message.encode("utf-8", "backslashreplace").decode())


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Raises:
        InputError: where it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None


def read_json(path: Path) -> Field:
    """Read a file with one JSON value.

    Raises:
        InputError: where it cannot be read or is not JSON.
    """
    return _parse(read_text(path), str(path))


def read_json_lines(path: Path) -> list[Field]:
    """Read a file with one JSON value a line; lines without text are passed over.

    Raises:
        InputError: where it cannot be read or a line is not JSON; the message has its number.
    """
    # Not splitlines: JSON texts may hold U+2028 and its like as they are.
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [_parse(line, f"{path} line {number}") for number, line in lines if line.strip()]


def _parse(text: str, file: str) -> Field:
    try:
        return Field(json.loads(text), file)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{file} is not JSON: {error.msg} ({where})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON that can be read: {error}") from None
