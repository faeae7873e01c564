"""WordNet's nouns, where the user has them: words, glosses, and what is a kind of what.

Princeton WordNet (Fellbaum, 1998) comes with Debian's package ``wordnet-base`` and with NLTK's
corpus ``wordnet``; normkit ships nothing of it. The format is that of wndb(5WN).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from normkit.errors import InputError
from normkit.rl.json_fields import read_text

_HOW = (
    "install Debian's package wordnet-base, or NLTK's corpus (python -m nltk.downloader wordnet, "
    "then unpack wordnet.zip), or set WNSEARCHDIR to the folder"
)


@dataclass(frozen=True)
class Synset:
    """Words of one meaning.

    Attributes:
        offset: its number in the file.
        words: the words, spaces as spaces, the most frequent first.
        gloss: definition and examples.
        hypernyms: offsets of what it is a kind of; empty for the names of single things.
    """

    offset: int
    words: tuple[str, ...]
    gloss: str
    hypernyms: tuple[int, ...]

    @property
    def definition(self) -> str:
        """The gloss without examples."""
        return self.gloss.split('; "')[0].strip()


def find_wordnet() -> Path:
    """The folder with ``data.noun``, where Debian, NLTK or the variable WNSEARCHDIR have it.

    Raises:
        InputError: says how to get it.
    """
    for folder in _folders():
        if (folder / "data.noun").is_file():
            return folder
    raise InputError(f"wordnet: data.noun was not found; {_HOW}")


def read_nouns(folder: str | Path | None = None) -> list[Synset]:
    """Read all nouns, in the order of the file.

    Args:
        folder: where ``data.noun`` is; looked for if None (:func:`find_wordnet`).

    Raises:
        InputError: where there is no such file, or names its line that is malformed.
    """
    path = (find_wordnet() if folder is None else Path(folder)) / "data.noun"
    lines = enumerate(read_text(path).splitlines(), start=1)
    synsets = []
    for number, line in lines:
        # The licence stands on top, on lines that begin with spaces.
        if line.strip() and not line.startswith("  "):
            try:
                synsets.append(_synset(line))
            except (ValueError, IndexError):
                raise InputError(f"{path} line {number} is not a line of wndb(5WN)") from None
    return synsets


def _folders() -> Iterator[Path]:
    if "WNSEARCHDIR" in os.environ:
        yield Path(os.environ["WNSEARCHDIR"])
    yield Path("/usr/share/wordnet")
    given = filter(None, os.environ.get("NLTK_DATA", "").split(os.pathsep))
    nltk = [*map(Path, given), Path.home() / "nltk_data", *map(Path, ("/usr/share/nltk_data",))]
    for root in nltk:
        yield root / "corpora" / "wordnet"


def _synset(line: str) -> Synset:
    """``offset file type count (word id)* count (symbol offset type place)* | gloss``."""
    data, gloss = line.split(" | ", 1)
    fields = data.split()
    count = int(fields[3], 16)
    words = tuple(word.replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])
    start = 5 + 2 * count
    stop = start + 4 * int(fields[start - 1])
    pointers = zip(fields[start:stop:4], fields[start + 1 : stop : 4], strict=True)
    above = tuple(int(offset) for symbol, offset in pointers if symbol == "@")
    if len(words) != count or len(fields) < stop:
        raise ValueError
    return Synset(int(fields[0]), words, gloss.strip(), above)
