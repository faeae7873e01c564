"""What can be counted in the words of a reply: cues of what it does, and of text that is broken.

Plain patterns for English, each a count in [0, 3] or a share in [0, 1]. They stand beside the
similarities of :mod:`normkit.rl.judges.features`; none decides a level alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from normkit.errors import MissingDependencyError

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SENTENCE = re.compile(r"[^.!?\n]+[.!?…]*[\"”')\]]*")
_LIST_ITEM = re.compile(r"(?m)^\s*(?:[-*•]|\d+[.)]|[a-z]\))\s+")
# Cues that punctuation or distance is a part of.
_ACROSS_WORDS = {
    "question": r"\?",
    "strength": r"\byou(?:r|'ve|'re)?\b[^.?!\n]{0,40}?\b<strength>\b"
    r"|\b<strength>\b[^.?!\n]{0,25}?\b(?:of you|from you|your)\b"
    r"|\b(?:that|it|this)\b[^.?!\n]{0,20}?\b(?:courage|strength|effort|brave|strong|love)\b",
    "imperative": r"(?:^|[.!?\n]\s*|[-*•]\s+|\d[.)]\s*|,\s*(?:and |or )?"
    r"|(?:just|simply|please|first|then|also|and|or)\s+)<advice_verb>\b(?! (?:me|that must|a lot))",
}
# After an article or a possessive no English phrase goes on with one of these.
_BROKEN = re.compile(
    r"\b(?:the|a|an|my|your|his|their|our) (?:the|a|an|of|is|are|was|and|but|to|in|on|i|you|he|she"
    r"|they|it|my|your|whose|under|for|with|from|at|so)\b"
    r"|\b(?:of|to|from|with|for) (?:of|and|but|is|are|was|whose|would|were)\b|\b(\w+) \1 \1\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Cues:
    """The patterns of ``cues.yaml``.

    Attributes:
        counted: name of each cue and the pattern whose matches are counted.
        frames: first-person phrases that speak to the other person.
        first_person: first-person words.
        function: words without content.
    """

    counted: Mapping[str, re.Pattern[str]]
    frames: re.Pattern[str]
    first_person: re.Pattern[str]
    function: frozenset[str]


@lru_cache(maxsize=1)
def load_cues() -> Cues:
    """The cues that ship with normkit."""
    try:
        import yaml
    except ImportError:
        raise MissingDependencyError("pyyaml", "rl") from None
    file = resources.files("normkit.rl.judges").joinpath("cues.yaml")
    data = yaml.safe_load(file.read_text("utf-8"))
    alternatives = {name: "|".join(words) for name, words in data["words"].items()}

    def pattern(text: str) -> re.Pattern[str]:
        for name, words in alternatives.items():
            text = text.replace(f"<{name}>", f"(?:{words})")
        return re.compile(text, re.IGNORECASE)

    def any_of(patterns: Sequence[str]) -> re.Pattern[str]:
        return pattern(rf"(?<![\w'])(?:{'|'.join(patterns)})(?!\w)")

    counted = {name: any_of(patterns) for name, patterns in data["cues"].items()}
    counted |= {name: pattern(text) for name, text in _ACROSS_WORDS.items()}
    return Cues(
        counted=counted,
        frames=any_of(data["frames"]),
        first_person=any_of(data["self"]),
        function=frozenset(data["function"]),
    )


def words(text: str) -> list[str]:
    """Return the lower-case words of a text."""
    return [word.replace("’", "'") for word in _WORD.findall(text.lower())]


def split_sentences(text: str) -> list[str]:
    """Split a reply into its sentences; a text without one is a sentence itself."""
    found = [sentence.strip() for sentence in _SENTENCE.findall(text)]
    return [sentence for sentence in found if _WORD.search(sentence)] or [text]


def content_words(text: str) -> set[str]:
    """Return the words that carry meaning, cut to a stem of six letters at most."""
    function = load_cues().function
    return {_stem(word) for word in words(text) if word not in function and len(word) > 2}


def list_items(text: str) -> int:
    """Count the lines that begin like items of a list."""
    return len(_LIST_ITEM.findall(text))


def loops(tokens: Sequence[str]) -> bool:
    """Whether a run of three words comes back three times, or most words are repetitions."""
    runs = [tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)]
    if any(runs.count(run) >= 3 for run in set(runs)):
        return True
    return len(tokens) >= 12 and len(set(tokens)) < 0.4 * len(tokens)


def copied_share(tokens: Sequence[str], source: Sequence[str]) -> float:
    """Share of the words that stand in a run of three words taken from ``source``.

    Words that only turn from "I" to "you" count as taken over.
    """
    if not tokens:
        return 0.0
    mine, theirs = [_turned(t) for t in tokens], [_turned(t) for t in source]
    known = {tuple(theirs[i : i + 3]) for i in range(len(theirs) - 2)}
    taken = [False] * len(mine)
    for i in range(len(mine) - 2):
        if tuple(mine[i : i + 3]) in known:
            taken[i : i + 3] = [True] * 3
    return sum(taken) / len(mine)


def count_cues(text: str) -> dict[str, float]:
    """Count every cue of a reply, capped at 3, and measure the shares that tell broken text.

    Args:
        text: the reply.

    Returns:
        Name to number: the counted cues; ``self``, first-person words outside phrases
        of sympathy; the shares ``function``, ``you``, ``foreign``; and ``broken`` pairs of words.
    """
    cues = load_cues()
    plain = text.replace("’", "'")
    tokens = words(plain)
    n = max(len(tokens), 1)
    found = {name: float(min(len(p.findall(plain)), 3)) for name, p in cues.counted.items()}
    found["self"] = float(min(len(cues.first_person.findall(cues.frames.sub(" ", plain))), 4))
    found["function"] = sum(token in cues.function for token in tokens) / n
    found["you"] = min(sum(token.startswith("you") for token in tokens) / n, 0.3)
    odd = sum(ord(c) > 0x2026 or c in "{}[]<>*#_=|\\~^@" or 0xC0 <= ord(c) < 0x250 for c in plain)
    found["foreign"] = min(odd / n, 1.0)
    found["broken"] = float(min(len(_BROKEN.findall(plain)), 3))
    return found


def _stem(word: str) -> str:
    for end in ("'s", "ings", "ing", "ied", "ies", "ed", "es", "ly", "s", "e", "y"):
        if word.endswith(end) and len(word) - len(end) >= 3:
            word = word[: -len(end)]
            break
    return word[:6]


_TURN = {
    "you": "i",
    "your": "my",
    "yours": "mine",
    "me": "i",
    "yourself": "myself",
    "you're": "i'm",
    "you've": "i've",
    "are": "am",
    "were": "was",
    "you'd": "i'd",
    "you'll": "i'll",
}


def _turned(word: str) -> str:
    return _TURN.get(word, word)
