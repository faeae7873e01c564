"""``normkit convert``: turn a model into its Pre-RMSNorm, Pre-CRMSNorm or folded form, checked."""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from normkit.errors import InputError
from normkit.files import check_file, check_new
from normkit.surgery.export import export_onnx
from normkit.surgery.fold import fold
from normkit.surgery.load import save
from normkit.surgery.pretrained import dtype_of, load_pretrained
from normkit.surgery.reads import largest_difference, run
from normkit.surgery.recenter import recenter
from normkit.surgery.report import Report
from normkit.surgery.samples import real_inputs, sample_inputs
from normkit.surgery.timing import in_turns

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class ConvertOptions:
    """Options of ``normkit convert``: convert a model's norms exactly, and write it.

    Attributes:
        model: "smollm2", a folder that transformers or normkit wrote, or a name on the hub.
        to: the form: Pre-RMSNorm, Pre-CRMSNorm, or norms folded into the layers beside them.
        out: folder to write; it must not exist, or be empty.
        dtype: of the converted weights; "auto" keeps that of the model.
        untie: give a head that shares the embedding table its own copy.
        onnx: also write an ONNX file, checked with onnxruntime.
        repeats: forward passes per model that are timed.
        json: print JSON instead of text.
    """

    model: Annotated[str, tyro.conf.Positional]
    to: Literal["pre-rmsnorm", "pre-crmsnorm", "folded"]
    out: Path
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    untie: bool = False
    onnx: Path | None = None
    repeats: int = 10
    json: bool = False


def main(arguments: Sequence[str]) -> None:
    """Run ``normkit convert``."""
    options = tyro.cli(ConvertOptions, args=arguments, prog="normkit convert")
    check_new(options.out)
    if options.onnx is not None:
        check_file(options.onnx)
    if options.untie and options.to == "folded":
        raise InputError("untie: folding leaves the embedding table as it is")
    if options.repeats < 1:
        raise InputError(f"repeats must be at least 1, got {options.repeats}")
    console = Console(stderr=True)
    with console.status(f"loading {options.model}"):
        original, tokenizer = load_pretrained(options.model)
    with console.status(f"converting {type(original).__name__} to {options.to}"):
        model, report = convert(original, options)
    with console.status("comparing it with the original"):
        facts = compare(original, model, tokenizer, options.repeats)
    if options.onnx is not None:
        with console.status(f"writing {options.onnx}"):
            facts["onnx_difference"] = export_onnx(model, options.onnx)
    with console.status(f"writing {options.out}"):
        kept = {"to": options.to, "from": options.model, **facts, "report": report.as_dict()}
        save(model, options.out, options.model, kept, tokenizer)
    line = f"model = normkit.surgery.load({str(options.out)!r})"
    if options.json:
        print(json.dumps({**kept, "load": line}, indent=2))
        return
    print(report)
    for name in ("random", "real"):
        found = facts[name]
        print(
            f"largest difference on {found['inputs']}: {found['difference']:.2e} "
            f"(outputs reach {found['largest']:.3g}; {100 * found['same_choice']:.2f}% of the "
            "largest outputs are the same)"
        )
    print(f"time of a forward pass: {facts['time_ratio']:.3f} times that of the original")
    if options.onnx is not None:
        print(f"{options.onnx}: onnxruntime differs by {facts['onnx_difference']:.2e}")
    print(f"{options.out} is written; load it by:\n  import normkit.surgery\n  {line}")


def convert(original: Any, options: ConvertOptions) -> tuple[Any, Report]:
    """Return the converted copy of a model, in the dtype asked for, and the report."""
    dtype = dtype_of(original) if options.dtype == "auto" else _DTYPES[options.dtype]
    model = copy.deepcopy(original)
    if dtype != dtype_of(original):
        model = model.double()  # so that the weights are rounded once, at the end
    if options.to == "folded":
        report = fold(model)
    else:
        report = recenter(model, options.to, untie=options.untie)
    return model.to(dtype), report


def compare(original: Any, model: Any, tokenizer: Any, repeats: int) -> dict[str, Any]:
    """Compare a converted model with its original on noise and on real inputs.

    Returns:
        For "random" and "real" the largest difference of the outputs, their size, and how often the
        largest output of a position is the same; and the ratio of the times of a forward pass.
    """
    real, made_of = real_inputs(original, tokenizer)
    samples = {"random": (sample_inputs(original, seed=1), "noise"), "real": (real, made_of)}
    facts: dict[str, Any] = {}
    for name, (inputs, what) in samples.items():
        before, after = run(original, inputs), run(model, as_dtype(inputs, dtype_of(model)))
        same = before[0].argmax(-1) == after[0].argmax(-1)
        facts[name] = {
            "inputs": what,
            "difference": largest_difference(before, after),
            "largest": max(float(x.abs().max()) for x in before),
            "same_choice": float(same.double().mean()),
        }
    facts["time_ratio"] = _time_ratio(original, model, real, repeats)
    return facts


def as_dtype(inputs: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Cast floating inputs to the dtype of a model."""
    return {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}


def _time_ratio(original: Any, model: Any, inputs: Any, repeats: int) -> float:
    """Median over repeats of the time of ``model`` over that of ``original``."""
    given = as_dtype(inputs, dtype_of(model))
    calls = {"original": lambda: run(original, inputs), "model": lambda: run(model, given)}
    seconds = in_turns(calls, repeats)
    pairs = zip(seconds["model"], seconds["original"], strict=True)
    return statistics.median(new / old for new, old in pairs)
