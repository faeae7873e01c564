"""The errors that normkit raises for its users."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class NormkitError(Exception):
    """A problem that the user can solve; the text says what to do.

    The command line prints it as one sentence and exits with :attr:`exit_code`.
    """

    exit_code = 1


class InputError(NormkitError, ValueError):
    """An argument, file or option is not what was expected (exit code 2).

    The message names the argument, what was expected and what was given.
    """

    exit_code = 2


class MissingDependencyError(NormkitError, ImportError):
    """A feature needs an extra that is not installed (exit code 2)."""

    exit_code = 2

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'normkit[{extra}]'")


def meant(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" for an unknown name that is close to a known one, else ""."""
    plain = {other.lower().replace("_", "-"): other for other in known}
    close = get_close_matches(name.lower().replace("_", "-"), plain, n=1)
    return f" (did you mean {plain[close[0]]}?)" if close else ""


def check_least(options: object, least: float, *names: str) -> None:
    """Check that attributes are at least so large.

    Raises:
        InputError: names the first that is not.
    """
    for name in names:
        if not getattr(options, name) >= least:
            raise InputError(f"{name} must be at least {least}, got {getattr(options, name)}")
