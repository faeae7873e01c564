"""Judges: what gives a turn its reward.

They are imported when they are asked for, since each needs an extra of its own.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from normkit.errors import InputError

JUDGES: dict[str, tuple[str, str]] = {
    "embedding": ("normkit.rl.judges.embedding", "EmbeddingJudge"),
    "llm": ("normkit.rl.judges.llm", "LLMJudge"),
    "openai": ("normkit.rl.judges.openai", "OpenAIJudge"),
}
"""Name of every judge, with the module and class that hold it."""


def judge_class(name: str) -> Any:
    """Return the class of a judge, importing its module.

    Args:
        name: a key of :data:`JUDGES`.

    Raises:
        InputError: where there is no judge of that name.
    """
    if name not in JUDGES:
        raise InputError(f"judge must be one of {', '.join(JUDGES)}, got {name!r}")
    module, attribute = JUDGES[name]
    return getattr(import_module(module), attribute)
