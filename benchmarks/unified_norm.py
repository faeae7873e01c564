"""Inference of transformers with LayerNorm, with UnifiedNorm, and with UnifiedNorm fused away.

Pre-norm blocks of the sizes of DeiT-Tiny and DeiT-Small on 8 images of 197 tokens, eager and
compiled: time in turns, and the peak of living tensors in eager mode. Published, on a GPU: about
31% faster and 18% less memory than with LayerNorm. The layers alone are in norms.py.

    python benchmarks/unified_norm.py --quick
    python benchmarks/unified_norm.py                      # about three minutes
    python benchmarks/unified_norm.py --sizes DeiT-Small --no-compiled
"""

from __future__ import annotations

import argparse

import torch
from _memory import keep_freed_memory
from _timing import compare, print_table
from rich.console import Console

from normkit.recipes._unified_norm_fused import (
    SMALL,
    TINY,
    Size,
    images,
    inference,
    models,
    peak_bytes,
)

SIZES = {"DeiT-Tiny": TINY, "DeiT-Small": SMALL}


def measure(name: str, size: Size, compiled: bool, repeats: int) -> None:
    """Print time and memory of the three models."""
    console, x, made = Console(), images(size), models(size)
    title = f"{name} {list(x.shape)}, {size.layers} blocks, {torch.get_num_threads()} threads"
    calls = {label: inference(model, x) for label, model in made.items()}
    print_table(compare(calls, repeats, warmup=1), f"{title}, eager")
    peaks = {label: peak_bytes(call) for label, call in calls.items()}
    for label, peak in peaks.items():
        share = peak / peaks["layer"]
        console.print(f"{label}: peak {peak / 2**20:.1f} MiB, {share:.3f} of LayerNorm's")
    if compiled:
        torch.compiler.reset()
        calls = {label: inference(torch.compile(m), x) for label, m in made.items()}
        print_table(compare(calls, repeats, warmup=1), f"{title}, compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="the small size, eager, few repeats")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    keep_freed_memory()
    for name in ["DeiT-Tiny"] if options.quick else options.sizes:
        measure(
            name,
            SIZES[name],
            options.compiled and not options.quick,
            5 if options.quick else options.repeats,
        )


if __name__ == "__main__":
    main()
