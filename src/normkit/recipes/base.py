"""What a system is: a recipe that runs, and claims that are checked.

A recipe module defines one :class:`System` named ``SYSTEM``. Registering it is the only step that
makes it exist for the command line, the docs and the test suite.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console

from normkit.errors import InputError
from normkit.report.page import write_report
from normkit.runs import RunLogger
from normkit.statistics import Interval

Kind = Literal["exact", "structural", "measured"]
Verdict = Literal["holds", "not shown", "contradicted"]
T = TypeVar("T")

_MOST = 2**31 - 1
"""Largest number that a flag may be; seeds and sizes beyond it overflow somewhere or other."""


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        verdict: "holds", "not shown" (no clear answer at this scale) or "contradicted".
        measured: the measured value, as text with its unit and interval.
        details: JSON-ready numbers behind it: every seed, mean, interval.
    """

    verdict: Verdict
    measured: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.measured} ({self.verdict})"


def within(error: float, tolerance: float, **details: Any) -> Finding:
    """Find that an identity holds to a tolerance, or is contradicted.

    Args:
        error: largest difference between the two sides.
        tolerance: how large it may be.
        details: further figures.
    """
    verdict: Verdict = "holds" if error <= tolerance else "contradicted"
    return Finding(verdict, f"largest difference {error:.1e}", {"error": error, **details})


def verdict_of(gain: Interval) -> Verdict:
    """Verdict on a gain that is claimed to be positive: where its interval lies beside zero."""
    if gain.low > 0:
        return "holds"
    return "contradicted" if gain.high < 0 else "not shown"


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, turned into a check.

    Attributes:
        name: short name in kebab-case, unique in its system.
        statement: what is claimed, in our words.
        published: the published figure, or "identity" for an exact statement.
        kind: "exact" (an identity to tolerance), "structural" (counted) or "measured" (a small
            honest experiment over seeds, run by ``normkit verify --measured``).
        check: runs the check.
    """

    name: str
    statement: str
    published: str
    kind: Kind
    check: Callable[[], Finding]


@dataclass(frozen=True)
class System:
    """A published system as normkit holds it.

    Attributes:
        slug: its name on the command line.
        title: title of the paper.
        arxiv: arXiv number.
        year: year of the paper.
        tags: what it normalizes, and where.
        symbols: public names of normkit that implement it, as import paths.
        Config: frozen dataclass whose fields are the flags of ``normkit run``; a method
            ``validate()``, where it has one, checks what their types cannot say.
        run: ``run(config, folder) -> results``: does the work in a run folder and writes its
            ``results.json`` and report there.
        claims: the paper's statements as checks.
        aliases: other names of the same system.
    """

    slug: str
    title: str
    arxiv: str
    year: int
    tags: Sequence[str]
    symbols: Sequence[str]
    Config: type[Any]
    run: Callable[[Any, Path], Mapping[str, Any]]
    claims: Sequence[Claim]
    aliases: Sequence[str] = ()


def check_numbers(config: Any) -> None:
    """Check that the numbers among a recipe's flags are finite, and its seed not negative.

    It comes after what is known of each flag, and speaks of the rest.

    Args:
        config: the configuration, a dataclass of numbers, tuples of them and other things.

    Raises:
        InputError: names the flag.
    """
    for flag in fields(config):
        value = getattr(config, flag.name)
        least = 0 if flag.name == "seed" else -_MOST
        for number in value if isinstance(value, tuple) else (value,):
            # NaN fails every comparison, and so must fail here.
            if isinstance(number, (int, float)) and not least <= number <= _MOST:
                raise InputError(f"{flag.name} must be in {least}..{_MOST}, got {number}")


def flags_of(kind: type[Any], config: Any) -> dict[str, Any]:
    """The flags of a recipe that are options of a dataclass, by name."""
    names = {option.name for option in fields(kind)}
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name in names}


def from_flags(kind: type[T], config: Any, **others: Any) -> T:
    """Make options of a recipe's flags of the same names.

    Args:
        kind: the dataclass of the options.
        config: the recipe's configuration.
        others: options whose values are not a flag of the same name.

    Raises:
        InputError: where an option is not what was expected.
    """
    return kind(**{**flags_of(kind, config), **others})


def table(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows with the same keys as the table of a report: its columns are the keys."""
    rows = list(rows)
    return {"columns": list(rows[0]), "rows": [list(row.values()) for row in rows]}


class Run:
    """A run in its folder: where it logs, where it speaks, and how long it has taken.

    Args:
        config: its configuration, checked.
        folder: the run folder.
        anew: begin from nothing; otherwise the configuration and tables of an earlier part stay.
    """

    def __init__(self, config: Any, folder: Path, anew: bool = True) -> None:
        self._started = time.perf_counter()
        self.folder = folder
        self.console = Console()
        self.logger = RunLogger(folder)
        if anew:
            self.logger.begin(config)
        else:
            self.logger.go_on(config)

    @property
    def seconds(self) -> float:
        """Time since the run was opened, earlier parts not included."""
        return time.perf_counter() - self._started

    def finish(self, results: Mapping[str, Any]) -> Mapping[str, Any]:
        """End the run (:func:`finish`)."""
        return finish(self.logger, results, self.console)


def finish(logger: RunLogger, results: Mapping[str, Any], console: Console) -> Mapping[str, Any]:
    """End a run: keep its results, write its page, and print the summary and where the page is.

    Args:
        logger: of the run; it is closed.
        results: what is kept as ``results.json``; ``summary`` holds the lines to print.
        console: where they go.

    Returns:
        The results.
    """
    logger.results(results)
    logger.close()
    page = write_report(logger.folder)
    for line in results["summary"]:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return results
