"""Scores of short answers: exact match and F1 after the normalization of SQuAD.

Rajpurkar et al. (2016), arXiv 1606.05250, as HotpotQA and Search-R1 use it: lower case, no
punctuation, no articles (a, an, the), single spaces. The F1 is over words as often as they occur.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """An answer as it is compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer equals one of the references after normalization, else 0."""
    given = normalize_answer(answer)
    return float(any(given == normalize_answer(reference) for reference in references))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Largest F1 of the words of the answer and of a reference, in 0..1.

    An answer without words is right where a reference has none either.
    """
    return max((_f1(answer, reference) for reference in references), default=0.0)


def _f1(answer: str, reference: str) -> float:
    given, wanted = (normalize_answer(text).split() for text in (answer, reference))
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))
