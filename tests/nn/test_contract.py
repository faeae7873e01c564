"""Every layer keeps the contract of :mod:`normkit.testing.layers`."""

from __future__ import annotations

import pytest

from normkit.testing.layers import LAYER_CHECKS
from tests.nn.cases import CASES

SLOW = {"inductor"}  # compiles C++

PAIRS = [
    pytest.param(case, check, id=f"{case.name}-{name}", marks=[pytest.mark.slow] * (name in SLOW))
    for case in CASES
    for name, check in LAYER_CHECKS.items()
    if case.applies(name)
]


@pytest.mark.parametrize(("case", "check"), PAIRS)
def test_layer(case, check):
    check(case)


def test_cases_have_names_of_their_own_and_skip_checks_that_exist():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        assert set(case.skip) <= set(LAYER_CHECKS)
        assert all(case.skip.values()), "a skipped check needs its reason"
