"""Write a converted model of transformers to a folder, and load it back.

::

    DIR/config.json          the configuration, as transformers writes it
    DIR/model.safetensors    the weights; a shared one is kept once
    DIR/normkit.json         class of the model, and the layers that surgery put in

Beside them stand the tokenizer and processor files of the original. Nothing is pickled, and the
folder appears whole or not at all.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normkit.errors import InputError, MissingDependencyError
from normkit.files import check_new, write_json
from normkit.surgery.layers import KINDS
from normkit.surgery.ledger import edits_of, replay
from normkit.surgery.linear import refresh_sizes

RECIPE = "normkit.json"
WEIGHTS = "model.safetensors"
_FORMAT = 1
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_GENERATION = "generation_config.json"
_CARRIED = ("token", "vocab", "merges", "spiece", "preprocessor", "processor")


def save(
    model: nn.Module,
    folder: str | Path,
    original: str | Path | None = None,
    facts: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> None:
    """Write a model of transformers, with what surgery did to it, to a new folder.

    Args:
        model: converted or not; a model in its online form is baked first by the caller.
        folder: it must not exist, or be empty.
        original: folder of the original, whose tokenizer files are copied.
        facts: kept in the recipe: how the model was converted, how far it is from the original.
        tokenizer: written too, where ``original`` is not a folder that has it.

    Raises:
        InputError: for a folder with content, a model of another library, or a model with
            parametrizations or layers that a recipe cannot name.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_diff_dict"):
        raise InputError(
            f"model: only models of transformers are saved, got {type(model).__name__}"
        )
    if any(parametrize.is_parametrized(layer) for layer in model.modules()):
        raise InputError("model is in its online form; call normkit.surgery.bake(model) first")
    edits = edits_of(model)
    for path, spec in edits.items():
        if spec["type"] not in KINDS:
            raise InputError(f"model: {path} is a {spec['type']}, which a recipe cannot name")
    dtype = str(next(p for p in model.parameters() if p.is_floating_point()).dtype)
    recipe = {
        "format": _FORMAT,
        "model": type(model).__name__,
        "dtype": dtype.removeprefix("torch."),
        "layers": edits,
        **({"facts": dict(facts)} if facts else {}),
    }
    with new_folder(folder) as temporary:
        config.save_pretrained(temporary)
        if generation := getattr(model, "generation_config", None):
            generation.save_pretrained(temporary)
        save_file(_own_tensors(model), temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / RECIPE, recipe)
        mode = (temporary / RECIPE).stat().st_mode  # safetensors lets its owner alone read a file
        (temporary / WEIGHTS).chmod(mode)
        carried = _carried(original)
        for source in carried:
            shutil.copy2(source, temporary / source.name)
        if tokenizer is not None and not carried:
            tokenizer.save_pretrained(temporary)


def load(folder: str | Path, dtype: torch.dtype | None = None) -> Any:
    """Load a model that ``normkit convert`` or :func:`save` wrote.

    Args:
        folder: the folder.
        dtype: of the weights; that of the file if not given.

    Returns:
        The model, in evaluation mode.

    Raises:
        InputError: names the file that is missing, broken or does not fit.
        MissingDependencyError: where transformers is not installed.
    """
    folder = Path(folder)
    recipe = _read_json(folder / RECIPE)
    if recipe.get("format") != _FORMAT:
        raise InputError(f"{folder / RECIPE} has format {recipe.get('format')!r}, not {_FORMAT}")
    stored = {str(d).removeprefix("torch."): d for d in _DTYPES}
    if recipe.get("dtype") not in stored:
        raise InputError(
            f"{folder / RECIPE} has dtype {recipe.get('dtype')!r}, not one of {', '.join(stored)}"
        )
    weights = _read_weights(folder / WEIGHTS)
    model = build_empty(folder, str(recipe.get("model")), stored[recipe["dtype"]])
    try:
        replay(model, recipe.get("layers", {}))
    except (AttributeError, TypeError) as error:
        raise InputError(f"{folder / RECIPE} does not fit the model: {error}") from None
    _fill(model, weights, folder / WEIGHTS)
    if (folder / _GENERATION).is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    return (model if dtype is None else model.to(dtype)).eval()


def build_empty(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """Build the model class ``name`` of transformers from a folder's configuration.

    Raises:
        InputError: for a class that transformers does not have, or a broken configuration.
    """
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError("transformers", "rl") from None
    _read_json(folder / "config.json")
    kind: Any = getattr(transformers, name, None)
    if not hasattr(kind, "_from_config"):
        raise InputError(f"{folder}: transformers has no model class {name!r}")
    return kind._from_config(kind.config_class.from_pretrained(folder), dtype=dtype)


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``folder`` when the block ends well.

    Raises:
        InputError: if ``folder`` exists and is not empty.
    """
    folder = check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        if folder.exists():
            folder.rmdir()
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every shared tensor once, under its first name."""
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        seen.setdefault(id(tensor), name)
    state = model.state_dict()
    return {name: state[name].contiguous() for name in seen.values()}


def _fill(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy ``weights`` into a model, whose parameters take over their shapes."""
    places = model.state_dict(keep_vars=True)
    filled: set[int] = set()
    for name, tensor in weights.items():
        owner_path, _, key = name.rpartition(".")
        try:
            owner: Any = model.get_submodule(owner_path)
            old = getattr(owner, key)
        except AttributeError:
            raise InputError(f"{path} has {name}, which the model does not") from None
        if old is None:
            setattr(owner, key, nn.Parameter(tensor))
            continue
        old.data = tensor
        filled.add(id(old))
        if key == "weight":
            refresh_sizes(owner)
    missing = [name for name, tensor in places.items() if id(tensor) not in filled]
    if missing:
        raise InputError(f"{path} lacks {missing[0]}" + _more(len(missing) - 1))


def _more(n: int) -> str:
    return f" and {n} more" if n else ""


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path} does not exist; is {path.parent} a converted model?")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object")
    return value


def _carried(original: str | Path | None) -> list[Path]:
    if original is None or not Path(original).is_dir():
        return []
    return [
        path
        for path in sorted(Path(original).iterdir())
        if path.suffix in (".json", ".txt", ".model", ".jinja") and path.name.startswith(_CARRIED)
    ]
