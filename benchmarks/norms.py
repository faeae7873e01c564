"""Norm layers beside torch's, at token shapes of a language model and of a vision transformer.

For each shape, dtype and pass (forward; forward and backward): ours eager and compiled, torch's
layer eager and compiled, and the formula composed of torch operations. Ratios are within a repeat,
to torch's eager layer. "of copy bound" is the least traffic that the pass needs (forward: read x,
write y; backward: read x and the gradient, write one) over what the call takes, both at the speed
of a measured copy; "saved" counts the bytes that autograd keeps for the backward pass.

    python benchmarks/norms.py --quick
    python benchmarks/norms.py --json benchmarks/norms.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from _timing import Row, Spread, compare
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from normkit.nn import CRMSNorm, LayerNorm, RMSNorm

SHAPES = {"language": (8, 512, 768), "vision": (64, 197, 384)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EPS = 1e-5


class ComposedLayerNorm(nn.LayerNorm):
    """LayerNorm of single operations, statistics in float32."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        centered = wide - wide.mean(-1, keepdim=True)
        power = centered.square().mean(-1, keepdim=True)
        return (centered * (power + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)


class ComposedRMSNorm(nn.RMSNorm):
    """RMSNorm of single operations, as language models write it."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight).to(
            x.dtype
        )


class ComposedCRMSNorm(nn.Module):
    """CRMSNorm as its authors write it."""

    def forward(self, z: Tensor) -> Tensor:
        wide = z.float()
        power = wide.square().sum(-1, keepdim=True) + wide.sum(-1, keepdim=True).square()
        return (wide * torch.rsqrt(power / (z.shape[-1] + 1) + EPS)).type_as(z)


def layers(kind: str, d: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Ours and the peers of one kind; the first is what the others are compared with."""
    if kind == "LayerNorm":
        made = {
            "torch": nn.LayerNorm(d, EPS),
            "ours": LayerNorm(d, EPS),
            "composed": ComposedLayerNorm(d, EPS),
        }
    elif kind == "RMSNorm":
        made = {
            "torch": nn.RMSNorm(d, EPS),
            "ours": RMSNorm(d, EPS),
            "composed": ComposedRMSNorm(d, EPS),
        }
    else:
        made = {"composed": ComposedCRMSNorm(), "ours": CRMSNorm(d, EPS)}
    return {name: layer.to(dtype) for name, layer in made.items()}


def saved_bytes(layer: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, x and parameters left out."""
    own = {x.untyped_storage().data_ptr()}
    if isinstance(layer, nn.Module):
        own |= {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(x)
    del out
    return sum(kept.values())


def measure(kind: str, shape: tuple[int, ...], dtype: torch.dtype, repeats: int) -> list[dict]:
    """Time every variant of a kind at one shape and dtype."""
    torch.manual_seed(0)
    shape = (*shape[:-1], shape[-1] - (kind == "CRMSNorm"))
    x = torch.randn(shape).to(dtype).requires_grad_()
    upstream = torch.randn(shape).to(dtype)
    target = torch.empty_like(upstream)
    torch.compiler.reset()
    calls: dict[str, Callable[[Tensor], Tensor]] = dict(layers(kind, shape[-1], dtype))
    for name, layer in list(calls.items()):
        calls[f"{name} compiled"] = torch.compile(layer, fullgraph=True)
    saved = {name: saved_bytes(layer, x) for name, layer in calls.items()}

    def forward(layer: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def call() -> Tensor:
            with torch.no_grad():
                return layer(x)

        return call

    def both(layer: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        leaves = [x, *layer.parameters()]  # type: ignore[attr-defined]
        return lambda: torch.autograd.grad(layer(x), leaves, upstream)

    rows = []
    for name, make, tensors in (("forward", forward, 2), ("forward+backward", both, 5)):
        timed = compare(
            {
                **{label: make(layer) for label, layer in calls.items()},
                "copy": lambda: target.copy_(upstream),
            },
            repeats,
        )
        copy = timed.pop().seconds.median
        bound = copy * tensors / 2  # a copy moves two tensors
        rows += [record(kind, shape, dtype, name, row, bound, saved[row.name]) for row in timed]
    return rows


def record(
    kind: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    which: str,
    row: Row,
    bound: float,
    saved: int,
) -> dict:
    """One measurement as a JSON-ready row."""

    def spread(s: Spread) -> list[float]:
        return [s.median, s.low, s.high]

    return {
        "layer": kind,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "pass": which,
        "call": row.name,
        "seconds": spread(row.seconds),
        "ratio": spread(row.ratio),
        "of_copy_bound": bound / row.seconds.median,
        "saved_bytes": saved,
    }


def show(rows: list[dict]) -> None:
    """Print the rows of one kind, shape and dtype."""
    first = rows[0]
    table = Table(title=f"{first['layer']} {first['shape']} {first['dtype']}", title_justify="left")
    for column in ("pass", "call", "ms", f"times {first['call']}", "quartiles", "of copy bound"):
        table.add_column(column, justify="left" if column in ("pass", "call") else "right")
    table.add_column("saved KiB", justify="right")
    for row in rows:
        ratio, low, high = row["ratio"]
        table.add_row(
            row["pass"],
            row["call"],
            f"{1e3 * row['seconds'][0]:.2f}",
            f"{ratio:.2f}",
            f"{low:.2f} .. {high:.2f}",
            f"{row['of_copy_bound']:.2f}",
            f"{row['saved_bytes'] / 1024:.0f}",
        )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="one shape, few repeats")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    shapes = ["vision"] if options.quick else list(SHAPES)
    repeats = 5 if options.quick else options.repeats
    rows: list[dict] = []
    for kind in ("LayerNorm", "RMSNorm", "CRMSNorm"):
        for shape in shapes:
            for dtype in DTYPES.values():
                found = measure(kind, SHAPES[shape], dtype, repeats)
                show(found)
                rows += found
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
