"""Checkpoints of a training run: safetensors and JSON, replaced whole, never pickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from normkit.errors import InputError
from normkit.files import replaced_folder, standing_folder, write_json
from normkit.runs import read_json

_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_CRITIC = "critic.safetensors"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def has_checkpoint(folder: str | Path) -> bool:
    """Whether there is a checkpoint to go on from, an interrupted writer's earlier one included."""
    return (standing_folder(folder) / _STATE).exists()


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    state: Mapping[str, Any],
    critic: nn.Module | None = None,
) -> None:
    """Write a checkpoint beside the old one and put it in its place.

    If writing fails (a full disk), the previous checkpoint stays as it was.

    Args:
        folder: the checkpoint's folder.
        model: its trainable parameters are kept.
        optimizer: its state is kept, tensors apart from numbers.
        state: JSON-ready values to go on from, such as the step.
        critic: what is trained beside the model, if anything; in a file of its own, so that the
            model loads without it.

    Raises:
        OSError: where it cannot be written.
    """
    with replaced_folder(folder) as new:
        _save_weights(model, new / _MODEL)
        if critic is not None:
            _save_weights(critic, new / _CRITIC)
        tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
        numbers: dict[str, dict[str, Any]] = {}
        saved = optimizer.state_dict()
        for index, values in saved["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors[f"{index}.{key}"] = value.detach().contiguous()
                else:
                    numbers.setdefault(str(index), {})[key] = value
        save_file(tensors, new / _OPTIMIZER)
        groups = {"numbers": numbers, "param_groups": saved["param_groups"]}
        write_json(new / _STATE, {"state": dict(state), "optimizer": groups})


def load_checkpoint(
    folder: str | Path,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    critic: nn.Module | None = None,
) -> dict[str, Any]:
    """Restore what :func:`save_checkpoint` wrote; return its ``state``.

    Args:
        folder: the checkpoint's folder. Where a crash fell between taking the old checkpoint away
            and putting the new one in place, the old one is used.
        model: gets the weights.
        optimizer: gets its state, and the random generator its own; left alone if None.
        critic: gets its weights; left alone if None.

    Raises:
        InputError: where there is no checkpoint, it lacks a file or has a broken one, or it is of
            another model or optimizer.
    """
    folder = standing_folder(folder)
    modules = {_MODEL: model} if critic is None else {_MODEL: model, _CRITIC: critic}
    for name in (*modules, _OPTIMIZER, _STATE):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a checkpoint: {name} is missing")
    stored = read_json(folder, _STATE)
    for name, module in modules.items():
        _load_weights(module, folder / name)
    if optimizer is not None:
        tensors = _load_tensors(folder / _OPTIMIZER)
        torch.set_rng_state(tensors.pop("rng"))
        values: dict[int, dict[str, Any]] = {}
        for index, known in stored["optimizer"]["numbers"].items():
            values.setdefault(int(index), {}).update(known)
        for key, tensor in tensors.items():
            index, _, name = key.partition(".")
            values.setdefault(int(index), {})[name] = tensor
        groups = stored["optimizer"]["param_groups"]
        for group in groups:
            # JSON has no tuples, and Adam compares its betas as one.
            group.update({k: tuple(v) for k, v in group.items() if k == "betas"})
        try:
            optimizer.load_state_dict({"state": values, "param_groups": groups})
        except ValueError as error:
            raise InputError(f"{folder} is of another optimizer: {error}") from None
    state: dict[str, Any] = stored["state"]
    return state


def _save_weights(module: nn.Module, path: Path) -> None:
    save_file({name: p.detach().contiguous() for name, p in trainable(module).items()}, path)


def _load_weights(module: nn.Module, path: Path) -> None:
    weights, parameters = _load_tensors(path), trainable(module)
    if weights.keys() != parameters.keys():
        odd = ", ".join(sorted(weights.keys() ^ parameters.keys())[:3])
        raise InputError(f"{path.parent} is of another model; names differ, such as {odd}")
    with torch.no_grad():
        for name, p in parameters.items():
            if p.shape != weights[name].shape:
                raise InputError(
                    f"{path.parent} is of another model: {name} has shape "
                    f"{tuple(weights[name].shape)}, expected {tuple(p.shape)}"
                )
            p.copy_(weights[name])


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return tensors
