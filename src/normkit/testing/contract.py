"""What the contract checkers share: running named checks on a case and naming all that fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from normkit.errors import InputError


class Case(Protocol):
    """What is checked."""

    @property
    def skip(self) -> Mapping[str, str]:
        """Reasons by name of check."""

    def applies(self, check: str) -> bool:
        """Whether a check is meant for this case and not skipped."""


C = TypeVar("C", bound=Case)


def run_checks(subject: str, checks: Mapping[str, Callable[[C], None]], case: C) -> None:
    """Run every check that applies.

    Args:
        subject: what is checked, for the message.
        checks: the contract, by name.
        case: given to each check.

    Raises:
        AssertionError: names each check that failed, and why.
        InputError: for a reason to skip a check that does not exist.
    """
    unknown = sorted(set(case.skip) - set(checks))
    if unknown:
        raise InputError(
            f"skip names unknown checks {', '.join(unknown)}; there are {', '.join(checks)}"
        )
    failures = []
    for name, check in checks.items():
        if case.applies(name):
            try:
                check(case)
            except Exception as error:
                failures.append(f"{name}: {type(error).__name__}: {error}")
    if failures:
        raise AssertionError(f"the {subject} breaks its contract:\n" + "\n".join(failures))
