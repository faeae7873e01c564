import math

import numpy as np
import pytest

from normkit.rl.evaluation.measure import Measure, complete_all


def test_paired_differences_use_the_items_that_both_have():
    first = Measure("m", {"a": 1.0, "b": 2.0, "c": math.nan, "d": 7.0})
    second = Measure("m", {"a": 3.0, "b": 5.0, "c": 9.0, "e": 0.0})
    gain = second.gain_over(first)
    assert (gain.mean, gain.n) == (2.5, 2)
    assert first.interval().n == 3
    assert Measure("m", {"a": math.nan}).interval() is None
    assert Measure("m", {"x": 1.0}).gain_over(first) is None


def test_pairing_makes_the_interval_of_a_common_gain_narrow():
    rng = np.random.default_rng(0)
    values = {str(i): float(v) for i, v in enumerate(100 * rng.random(50))}
    better = Measure("m", {item: value + 1 for item, value in values.items()})
    gain = better.gain_over(Measure("m", values))
    assert gain.low == pytest.approx(1) == gain.high
    alone = better.interval()
    assert alone.high - alone.low > 10


def test_long_lists_are_asked_in_parts_with_progress():
    class Parrot:
        name = "parrot"

        def complete(self, conversations):
            return [messages[0]["content"] for messages in conversations]

    asked = [[{"role": "user", "content": str(i)}] for i in range(70)]
    seen = []
    answers = complete_all(Parrot(), asked, lambda *done: seen.append(done))
    assert answers == [str(i) for i in range(70)]
    assert seen == [(32, 70), (64, 70), (70, 70)]
