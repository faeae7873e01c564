"""Pre-LN beside Pre-RMSNorm and Pre-CRMSNorm: the same model in three forms, in one run.

A GPT-2-small-size and a ViT-B/16-size model of transformers with random weights, converted by
normkit.surgery.recenter. Each call is timed in turns on all forms; ratios are to the original in
the same repeat. With --folded the original and Pre-RMSNorm with gains and shifts folded into the
linear layers stand beside them, so that what centering alone costs can be told apart. Decoding is
timed in eager mode: a cache that grows would be compiled anew.

    python benchmarks/pre_rmsnorm.py --quick
    python benchmarks/pre_rmsnorm.py                                # about six minutes
    python benchmarks/pre_rmsnorm.py --models gpt2 --calls whole token    # a part
    python benchmarks/pre_rmsnorm.py --folded --repeats 15 --json FILE
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _memory import keep_freed_memory
from _timing import compare, print_table

from normkit.recipes import _pre_rmsnorm_latency as latency
from normkit.recipes import _pre_rmsnorm_models as models
from normkit.surgery import fold, recenter
from normkit.surgery.samples import sample_inputs

CALLS = {
    "whole": latency.whole_pass,
    "token": latency.one_token,
    "train": latency.training_step,
    "compiled": latency.whole_pass,
}
MODELS = {
    "gpt2": ("whole", "token", "train", "compiled"),
    "vit": ("whole", "train", "compiled"),
}


def forms_of(original: Any, folded: bool) -> dict[str, Any]:
    """The original and what it is turned into."""
    forms = {"original": original}
    for to in ("pre-rmsnorm", "pre-crmsnorm"):
        forms[to] = copy.deepcopy(original)
        recenter(forms[to], to)
    if folded:
        for name, source in (("folded", "original"), ("pre-rmsnorm, folded", "pre-rmsnorm")):
            forms[name] = copy.deepcopy(forms[source])
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
    rows = compare({name: make(model, inputs) for name, model in forms.items()}, repeats, warmup=1)
    print_table(rows, title)
    return {"title": title, "rows": [asdict(row) for row in rows]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two layers, not compiled")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--calls", nargs="+", choices=list(CALLS), default=list(CALLS))
    parser.add_argument("--folded", action="store_true", help="also with gains and shifts folded")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    layers, tokens, images = (2, 64, 1) if options.quick else (12, 512, 4)
    repeats = 3 if options.quick else options.repeats
    calls = [c for c in options.calls if not options.quick or c != "compiled"]
    makers = {
        "gpt2": partial(models.gpt2, layers, 768, 12, 50257, tokens + 1, seed=0),
        "vit": partial(models.vit, layers, 768, 12, 224, 16, seed=0),
    }
    sizes = {"gpt2": f"prompt of {tokens} tokens", "vit": f"{images} images"}
    found = []
    for name in options.models:
        original = makers[name]()
        inputs = sample_inputs(original, 1 if name == "gpt2" else images, tokens)
        forms = forms_of(original, options.folded)
        for call in [c for c in MODELS[name] if c in calls]:
            these = forms
            if call == "compiled":
                these = {form: torch.compile(model) for form, model in forms.items()}
            title = f"{name}, {layers} layers of 768, {sizes[name]}: {call}"
            found.append(time_forms(title, these, CALLS[call], inputs, repeats))
        torch._dynamo.reset()
    if options.json:
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps({**facts, "tables": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
