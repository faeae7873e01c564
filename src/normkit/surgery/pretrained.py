"""Open a model of transformers by name or folder, whatever it was made for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from normkit.errors import InputError, MissingDependencyError
from normkit.rl.models import SMOLLM2, load_policy
from normkit.surgery.load import RECIPE, load

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def load_pretrained(name: str) -> tuple[Any, Any]:
    """Load a model in the dtype it is stored in, and its tokenizer if it has one.

    Args:
        name: ``"smollm2"``, a folder that transformers or normkit wrote, or a name on the hub.

    Returns:
        ``(model, tokenizer)``; the model in evaluation mode, the tokenizer perhaps None.

    Raises:
        InputError: says what is missing or broken.
        MissingDependencyError: where transformers is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError("transformers", "rl") from None
    if name == SMOLLM2:
        return load_policy(name)
    folder = Path(name)
    if (folder / RECIPE).is_file():
        return load(folder), _tokenizer(name)
    if folder.exists() or folder.is_absolute() or name.startswith("."):
        _check_folder(folder)
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], None)
        if kind is None:
            raise ValueError(f"transformers has no class {config.architectures[0]}")
        model, info = kind.from_pretrained(name, dtype="auto", output_loading_info=True)
    except Exception as error:  # transformers and its loaders raise many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"model: transformers cannot load {name!r} ({reason})") from error
    if info["missing_keys"]:
        first, *more = sorted(info["missing_keys"])
        raise InputError(f"model: {name} lacks the weight {first} and {len(more)} more")
    return model.eval(), _tokenizer(name)


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is no checkpoint, or not a whole one.

    Raises:
        InputError: names the file that is missing.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"model: {folder} {what}")
    if not (folder / "config.json").is_file():
        raise InputError(f"model: {folder} has no config.json; is it a folder of transformers?")
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, AttributeError):
                raise InputError(f"model: {index} is not an index of weights") from None
            absent = sorted(s for s in shards if not (folder / s).is_file())
            if absent:
                raise InputError(f"model: {folder} lacks {absent[0]} of {len(shards)} weight files")
            return
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise InputError(f"model: {folder} has no weights ({' or '.join(_WEIGHTS)})")


def _tokenizer(name: str) -> Any:
    """Load a tokenizer; None where there is none, or only the shell of one without a vocabulary."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        knows = len(tokenizer("a line of words to be read")["input_ids"]) > 4
    except Exception:  # an image model has none; loaders raise many kinds
        return None
    return tokenizer if knows else None


def dtype_of(model: torch.nn.Module) -> torch.dtype:
    """The floating dtype of a model's first weight."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
