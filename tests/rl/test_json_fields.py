"""Fields of JSON files: what is there is returned, what is not is named."""

from __future__ import annotations

import re

import pytest

from normkit.errors import InputError
from normkit.rl.json_fields import Field, read_json, read_json_lines, read_text

FIELD = Field({"a": {"b": [1, 2.0, "x"]}, "n": None, "t": "word", "e": " "}, "file.json")


def test_fields_know_where_they_stand():
    numbers = FIELD["a"]["b"]
    assert [item.name for item in numbers] == ["a.b[0]", "a.b[1]", "a.b[2]"]
    assert [item.value for item in numbers] == [1, 2.0, "x"]
    assert FIELD.first("n", "missing", "t").text() == "word"
    assert FIELD.first("n", "missing").name == "n"
    missing = FIELD.get("none").get("deeper")
    assert not missing
    assert missing.name == "none.deeper"
    assert FIELD.get("a").get("b").value == [1, 2.0, "x"]


def test_values_are_read():
    first, second, _ = FIELD["a"]["b"]
    assert first.integer(1, 1) == 1
    assert second.integer() == 2
    assert second.number() == 2.0
    assert FIELD["n"].text(empty=True) == ""
    assert FIELD["e"].text(empty=True) == " "
    assert Field([1, 2], "f").numbers(2) == (1.0, 2.0)
    assert Field(10**400, "f").integer() == 10**400


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: FIELD["t"]["x"], 'file.json: t must be an object, got "word"'),
        (lambda: list(FIELD["t"]), 'file.json: t must be a list, got "word"'),
        (lambda: list(Field(1, "f")), "f: it must be a list, got 1"),
        (FIELD["n"].text, "n must be a text that is not empty, got nothing"),
        (FIELD["e"].text, 'e must be a text that is not empty, got " "'),
        (lambda: FIELD["a"].text(empty=True), "a must be a text, got {"),
        (Field("\ud83d", "f").text, 'it must be a text without lone surrogates, got "\\ud83d"'),
        (lambda: Field(True, "f").number(), "it must be a number, got true"),
        (lambda: Field(10**400, "f").number(), "it must be a finite number, got 1000"),
        (lambda: Field(float("nan"), "f").number(), "it must be a finite number, got NaN"),
        (lambda: Field(float("inf"), "f").integer(), "it must be an integer, got Infinity"),
        (lambda: Field(False, "f").integer(), "it must be an integer, got false"),
        (lambda: Field(2, "f").integer(3), "it must be an integer of at least 3, got 2"),
        (lambda: Field(2, "f").integer(0, 1), "an integer of at least 0 and of at most 1, got 2"),
        (lambda: Field([1], "f").numbers(2), "it must be a list of 2 numbers, got [1]"),
        (lambda: Field("x" * 99, "f").number(), "..."),
    ],
)
def test_what_is_wrong_is_named(read, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read()


def test_files_are_read_with_or_without_a_mark(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\ufeff{"a": "ü"}', encoding="utf-8")
    assert read_json(path)["a"].value == "ü"
    # U+2028 stands in JSON as it is, and ends no line.
    path.write_text('{"a": "\u2028"}\n\n[2]\n', encoding="utf-8")
    first, second = read_json_lines(path)
    assert first["a"].value == "\u2028"
    assert second.file == f"{path} line 3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON: Expecting"),
        (b'{"a": \xff}', "is not UTF-8: invalid start byte at byte "),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_files_that_are_not_json(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_json(path)
    path.write_bytes(b"{}\n" + content)
    with pytest.raises(InputError, match=message):
        read_json_lines(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_text(tmp_path / "none")
