"""What every recipe refuses, driven by the flags that its configuration has."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from normkit import recipes
from normkit.cli import main
from normkit.errors import InputError

NUMBERS = {int: (0, -1, 10**30), float: (0.0, -1.0, math.nan, math.inf, -math.inf, 1e30)}
"""By type; no flag takes the huge ones, and none those that are not finite."""

ZERO = {
    "mapo": "alpha gamma learning_rate lora_rank kl evaluate_every checkpoint_every seed",
    "mars": "warm_up learning_rate lora_rank seed",
    "matchtir": "warm_start learning_rate lora_rank seed",
    "st-ppo": "bonus warm_start learning_rate lora_rank seed",
    "layernorm": "seed",
    "pre-rmsnorm": "seed",
    "peri-ln": "seed",
}
"""Flags for which 0 means something; below it no number does."""
EMPTY = {"mars": "heldout opponents", "st-ppo": "rates staleness hops"}
"""Lists that may be empty: nothing is held out, nobody else plays, the default or all are taken."""
REPLIES = ("max_new_tokens", "temperature")
"""Checked where a chat model replies, by what generates the replies and needs an extra."""


def _flags(config: type[Any]) -> dict[str, tuple[type, bool]]:
    """Numeric flags: their type, and whether they are lists; lists of names have type str."""
    found = {}
    hints = get_type_hints(config)
    for flag in fields(config):
        hint = hints[flag.name]
        listed = get_origin(hint) is tuple
        kinds = {hint, *get_args(hint)}
        kind = next((k for k in (int, float) if k in kinds), str)
        if listed or kind is not str:
            found[flag.name] = (kind, listed)
    return found


def _cases():
    for entry in recipes.built():
        slug, config = entry.slug, recipes.load(entry.slug).Config
        worlds = get_args(get_type_hints(config).get("world")) or (None,)
        for world in worlds:
            given = {"world": world} if world else {}
            for name, (kind, listed) in _flags(config).items():
                if name in REPLIES and world in ("tabular", "search"):
                    continue
                values = [(x,) if listed else x for x in NUMBERS.get(kind, ())]
                for value in [*values, ()] if listed else values:
                    spared = EMPTY if value == () else ZERO if value == 0 else {}
                    fine = name in spared.get(slug, "").split()
                    yield pytest.param(
                        slug,
                        {**given, name: value},
                        name,
                        fine,
                        id=f"{slug} {world} {name} {value}",
                    )


@pytest.mark.parametrize(("slug", "options", "name", "fine"), _cases())
def test_numbers_without_meaning_are_refused_in_a_sentence(slug, options, name, fine):
    config = recipes.load(slug).Config(**options)
    if fine:
        config.validate()
        return
    with pytest.raises(InputError, match=name) as caught:
        config.validate()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("slug", [entry.slug for entry in recipes.built()])
def test_a_run_refuses_before_it_writes(slug, tmp_path):
    system = recipes.load(slug)
    name = next(iter(_flags(system.Config)))
    kind, listed = _flags(system.Config)[name]
    bad = (-1,) if listed and kind is not str else () if listed else -1
    folder = tmp_path / "run"
    with pytest.raises(InputError, match=name):
        system.run(system.Config(**{name: bad}), folder)
    assert not folder.exists()


@pytest.mark.parametrize("slug", ["mars", "matchtir", "st-ppo"])
@pytest.mark.parametrize(
    ("flag", "value"),
    [("learning-rate", "nan"), ("max-new-tokens", "0"), ("group-size", "0"), ("seed", "-1")],
)
def test_a_dry_run_finds_what_the_trainer_would(slug, flag, value, capsys):
    arguments = ["run", slug, "--world", "language", f"--{flag}={value}", "--dry-run"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert flag.replace("-", "_") in said
    assert "Traceback" not in said
