"""Exact match and F1 of short answers, beside a slow reading of SQuAD's rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normkit.rl.answers import exact_match, normalize_answer, token_f1

words = st.lists(st.sampled_from(["the", "a", "an", "Orla", "orla,", "Venn", "ban", "1790"]))


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The River Olse.", ["River Olse"], 1.0, 1.0),
        ("river  olse", ["the River Olse", "Olse"], 1.0, 1.0),
        ("Olse", ["the River Olse"], 0.0, 2 / 3),
        # 2 shared words, 4 given and 2 wanted: 2 * 2 / 6.
        ("Orla Venn of Kesmarrow", ["Orla Venn"], 0.0, 2 / 3),
        # Words count as often as they occur: one shared, 3 given, 1 wanted.
        ("tin tin tin", ["tin"], 0.0, 0.5),
        ("Orla", ["Bram", "Orla Venn"], 0.0, 2 / 3),
        ("anthem", ["them"], 0.0, 0.0),
        ("o'clock", ["oclock"], 1.0, 1.0),
        ("the", ["a"], 1.0, 1.0),
        ("", ["Orla"], 0.0, 0.0),
        ("Orla", [], 0.0, 0.0),
    ],
)
def test_worked_answers(answer, references, exact, f1):
    assert exact_match(answer, references) == exact
    assert token_f1(answer, references) == pytest.approx(f1)


@given(words, words)
def test_f1_is_symmetric_and_bounded_by_exact_match(a, b):
    left, right = " ".join(a), " ".join(b)
    f1 = token_f1(left, [right])
    assert f1 == pytest.approx(token_f1(right, [left]))
    assert exact_match(left, [right]) <= f1 <= 1
    assert f1 == pytest.approx(_slow_f1(left, right))


def _slow_f1(a, b):
    """Match words one by one."""
    given, wanted = [], []
    for text, out in ((a, given), (b, wanted)):
        for word in text.split():
            kept = "".join(c for c in word.lower() if c.isalnum())
            if kept not in ("a", "an", "the", ""):
                out.append(kept)
    if not given or not wanted:
        return float(given == wanted)
    left, shared = list(wanted), 0
    for word in given:
        if word in left:
            left.remove(word)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(given), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def test_normalization_is_idempotent():
    once = normalize_answer("The  Academy, of (the) Bells!")
    assert once == "academy of bells"
    assert normalize_answer(once) == once
