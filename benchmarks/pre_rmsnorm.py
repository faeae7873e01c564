"""Pre-LN beside Pre-RMSNorm and Pre-CRMSNorm: the same model in three forms, in one run.

A GPT-2-small-size and a ViT-B/16-size model of transformers with random weights, converted by
normkit.surgery.recenter. Each call is timed in turns on all forms; ratios are to the original in
the same repeat. "folded" is the original with gains and shifts folded into the linear layers, so
that what centering alone costs can be told apart. Decoding is timed in eager mode: a cache that
grows would be compiled anew.

    python benchmarks/pre_rmsnorm.py --quick
    python benchmarks/pre_rmsnorm.py --json benchmarks/pre_rmsnorm.json
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from _timing import Row, compare, print_table

from normkit.recipes import _pre_rmsnorm_latency as latency
from normkit.recipes import _pre_rmsnorm_models as models
from normkit.surgery import fold, recenter
from normkit.surgery.samples import sample_inputs


def forms_of(original: Any) -> dict[str, Any]:
    """The original and what it is turned into."""
    forms = {"original": original}
    for to in ("pre-rmsnorm", "pre-crmsnorm"):
        forms[to] = copy.deepcopy(original)
        recenter(forms[to], to)
    for name, source in (("folded", original), ("pre-rmsnorm, folded", forms["pre-rmsnorm"])):
        forms[name] = copy.deepcopy(source)
        fold(forms[name])
    return forms


def time_forms(
    title: str,
    forms: Mapping[str, Any],
    make: Callable[[Any, Mapping[str, Any]], Callable[[], object]],
    inputs: Mapping[str, Any],
    repeats: int,
) -> dict[str, Any]:
    """Time one call on every form; print and return the rows."""
    rows = compare({name: make(model, inputs) for name, model in forms.items()}, repeats)
    print_table(rows, title)
    return {"title": title, "rows": [_as_dict(row) for row in rows]}


def _as_dict(row: Row) -> dict[str, Any]:
    return {"name": row.name, "seconds": vars(row.seconds), "ratio": vars(row.ratio)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two layers, not compiled")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    layers, tokens, images = (2, 64, 1) if options.quick else (12, 512, 8)
    repeats = 3 if options.quick else options.repeats
    gpt2 = models.gpt2(layers, 768, 12, 50257, tokens + 1, seed=0)
    vit = models.vit(layers, 768, 12, 224, 16, seed=0)
    found = []
    for name, original, inputs, makers in (
        (
            f"GPT-2, {layers} layers, {tokens} tokens",
            gpt2,
            sample_inputs(gpt2, 1, tokens),
            {
                "prompt": latency.whole_pass,
                "one token": latency.one_token,
                "forward and backward": latency.training_step,
            },
        ),
        (
            f"ViT-B/16, {layers} layers, {images} images",
            vit,
            sample_inputs(vit, images),
            {"images": latency.whole_pass, "forward and backward": latency.training_step},
        ),
    ):
        forms = forms_of(original)
        for what, make in makers.items():
            found.append(time_forms(f"{name}: {what}", forms, make, inputs, repeats))
        if not options.quick:
            compiled = {form: torch.compile(model) for form, model in forms.items()}
            title = f"{name}: {next(iter(makers))}, compiled"
            found.append(time_forms(title, compiled, latency.whole_pass, inputs, repeats))
            torch._dynamo.reset()
    if options.json:
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps({**facts, "tables": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
