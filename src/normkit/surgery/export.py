"""ONNX files of models, checked against the model by onnxruntime."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normkit.errors import InputError, MissingDependencyError, NormkitError
from normkit.files import atomic_path
from normkit.surgery.reads import evaluating, largest_difference, run
from normkit.surgery.samples import sample_inputs

_TOLERANCE = 1e-3
_LIMIT = 2**31


class _Tensors(nn.Module):
    """A model that takes its inputs in order and returns its first tensor."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names
        cached = hasattr(getattr(model, "config", None), "use_cache")
        self.options = {"use_cache": False} if cached else {}

    def forward(self, *inputs: Tensor) -> Tensor:
        arguments = dict(zip(self.names, inputs, strict=True)) if self.names else {}
        out = self.model(*(() if self.names else inputs), **arguments, **self.options)
        first = next(iter(out.values())) if isinstance(out, Mapping) else out
        result: Tensor = first[0] if isinstance(first, (tuple, list)) else first
        return result


def export_onnx(
    model: nn.Module, file: str | Path, inputs: Mapping[str, Any] | Sequence[Any] | None = None
) -> float:
    """Write a model's forward pass as an ONNX file, and check it with onnxruntime.

    The first dimension of every input may vary afterwards, and the second of token ids.

    Args:
        model: a layer, or a model; its first output is what the file computes.
        file: the ``.onnx`` file.
        inputs: example inputs: keyword arguments as a mapping, or positional ones as a sequence;
            random ones that fit the configuration of a transformers model if not given.

    Returns:
        The largest absolute difference between onnxruntime and the model on ``inputs``.

    Raises:
        InputError: for a model of 2 GB or more, which one ONNX file cannot hold, or in bfloat16.
        MissingDependencyError: without the extra ``onnx``.
        NormkitError: if the file cannot be made, or computes something else.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(error.name or "onnxruntime", "onnx") from None
    if sum(p.numel() * p.element_size() for p in model.parameters()) >= _LIMIT:
        raise InputError("model: its weights take 2 GB or more, which one ONNX file cannot hold")
    if any(p.dtype == torch.bfloat16 for p in model.parameters()):
        raise InputError("model: onnxruntime cannot check bfloat16; convert it with .float() first")
    inputs = sample_inputs(model) if inputs is None else inputs
    names = tuple(inputs) if isinstance(inputs, Mapping) else ()
    tensors = tuple(inputs.values()) if isinstance(inputs, Mapping) else tuple(inputs)
    wrapped = _Tensors(model, names)
    expected = run(wrapped, tensors)
    varying = torch.export.Dim.AUTO
    shapes = tuple(
        {0: varying} if x.is_floating_point() else {0: varying, 1: varying} for x in tensors
    )
    with _quiet(), evaluating(wrapped), torch.no_grad():
        program = _export(wrapped, tensors, names, shapes)
    with tempfile.TemporaryDirectory() as scratch:
        trial = Path(scratch) / "model.onnx"
        program.save(trial)
        session = onnxruntime.InferenceSession(str(trial), providers=["CPUExecutionProvider"])
        places = [place.name for place in session.get_inputs()]
        feed = {n: x.cpu().numpy() for n, x in zip(places, tensors, strict=True)}
        got = torch.from_numpy(session.run(None, feed)[0])
    gap = largest_difference([got], expected)
    if not gap <= _TOLERANCE * max(1.0, float(expected[0].abs().max())):
        raise NormkitError(f"the ONNX file would differ from the model by {gap:.1e}")
    with atomic_path(file) as temporary:
        program.save(temporary)
    return gap


def _export(
    wrapped: nn.Module, tensors: tuple[Tensor, ...], names: tuple[str, ...], shapes: Any
) -> Any:
    try:
        return torch.onnx.export(
            wrapped,
            tensors,
            input_names=names or None,
            output_names=["output"],
            dynamic_shapes=(shapes,),
            dynamo=True,
            verbose=False,
        )
    except Exception as error:  # torch.onnx raises many kinds
        raise NormkitError(f"export to ONNX failed: {str(error).splitlines()[0]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks on what is not installed, and its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
