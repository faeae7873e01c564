"""A scenario and judges whose verdicts are known, for tests of everything around them."""

from __future__ import annotations

from normkit.rl.environments.scenario import INDICATORS, Persona, Scenario
from normkit.rl.judge import Failed
from normkit.rl.rubric import AXES, AxisLevels, Progress


def scenario(name="career-test", **changes):
    fields = {
        "id": name,
        "category": "career",
        "persona": Persona("Ada", 30, "A tester.", "plain", "low"),
        "situation": "Ada's test broke on her first day.",
        "needs": "To be heard.",
        "deficit": dict.fromkeys(INDICATORS, 1),
        "points": {axis: (f"point {axis}",) for axis in AXES},
        "opening": "My test broke.",
        "lines": {axis: tuple(f"{axis} line {i}" for i in range(3)) for axis in AXES},
        "hurt": ("ouch one", "ouch two"),
        "relief": ("better one", "better two"),
    }
    return Scenario(**{**fields, **changes})


def filled(cognitive=(0, 0), affective=(0, 0), proactive=(0, 0)):
    return Progress(AxisLevels(*cognitive), AxisLevels(*affective), AxisLevels(*proactive))


class TableJudge:
    """Verdict by the first word of the reply that is in the table; failing where it says so."""

    name = "table"

    def __init__(self, table=None):
        self.table = table or {}
        self.seen = []

    def judge(self, requests):
        self.seen.append(list(requests))
        verdicts = []
        for request in requests:
            word = next((w for w in request.reply.split() if w in self.table), None)
            verdict = self.table.get(word, filled())
            verdicts.append(Failed(verdict) if isinstance(verdict, str) else verdict)
        return verdicts
