"""Norm layers beside torch's and beside the algorithms of single operations, bar by bar.

At token shapes of a language model and of a vision transformer, in float32 and bfloat16, forward
and forward with backward in training mode. The bars:

- compiled, at most 1.10 times the time of torch's own layer, where torch has one;
- elsewhere at least 1.3 times faster than the eager algorithm of the paper (of single operations),
  eager and compiled;
- at most 5% of the input's bytes saved for the backward pass, besides input and parameters; what
  stands between PowerNorm's two norms, the layer scale and PN-V, is allowed on top.

Every call is timed in turns with the others, and ratios are taken within a repeat. Where the peer
is torch's kernel a call is four norms of four inputs: entering a compiled region costs a tenth of a
millisecond, which a model pays once for all its norms. "of copy" is the traffic that the pass
needs at least, at the speed of a measured copy, over what is taken (norms by row: read x, write y;
read x and the gradient, write one; batch-wise norms read all inputs twice).

    python benchmarks/norms.py                        # all bars; about three minutes
    OMP_NUM_THREADS=1 python benchmarks/norms.py --cpu-time    # where others use the machine too
    python benchmarks/norms.py --layers UnifiedNorm --dtypes bfloat16 --json FILE
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import _reference_norms as reference
import torch
from _memory import keep_freed_memory
from _timing import Spread, compare
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from normkit.nn import CRMSNorm, LayerNorm, PowerNorm, RMSNorm, UnifiedNorm

SHAPES = {"language": (8, 512, 768), "vision": (64, 197, 384)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PASSES = ("forward", "forward+backward")
NORMS = 4  # in one call, beside torch's kernel
SLOWER, FASTER = 1.10, 1.3  # the bars of time
EPS = 1e-5


@dataclass(frozen=True)
class Kind:
    """A norm and its peers.

    Attributes:
        ours: makes ours for a number of channels.
        composed: makes the algorithm of single operations.
        torch: makes torch's own layer, where there is one.
        traffic: tensors of the input's size that each pass reads or writes at least.
        saved: bar of what is saved for the backward pass, over the input's bytes.
    """

    ours: Callable[[int], nn.Module]
    composed: Callable[[int], nn.Module]
    torch: Callable[[int], nn.Module] | None = None
    traffic: tuple[int, int] = (2, 5)
    saved: float = 0.05


TWICE = (3, 8)
KINDS = {
    "LayerNorm": Kind(
        lambda d: LayerNorm(d, EPS),
        lambda d: reference.LayerNorm(d, EPS),
        lambda d: nn.LayerNorm(d, EPS),
    ),
    "RMSNorm": Kind(
        lambda d: RMSNorm(d, EPS),
        lambda d: reference.RMSNorm(d, EPS),
        lambda d: nn.RMSNorm(d, EPS),
    ),
    "CRMSNorm": Kind(lambda d: CRMSNorm(d, EPS), lambda d: reference.CRMSNorm()),
    "UnifiedNorm": Kind(
        lambda d: UnifiedNorm(d, EPS, warmup=0), reference.UnifiedNorm, traffic=TWICE
    ),
    "PN-V": Kind(
        lambda d: PowerNorm(d, EPS, warmup=0, groups=None),
        lambda d: reference.PowerNorm(d, None),
        traffic=TWICE,
    ),
    "PowerNorm": Kind(
        lambda d: PowerNorm(d, EPS, warmup=0, groups=8),
        lambda d: reference.PowerNorm(d, 8),
        traffic=TWICE,
        saved=1.05,
    ),
}


@dataclass(frozen=True)
class Bar:
    """One measurement beside its bar.

    Attributes:
        layer: name of the norm.
        shape: name of the shape.
        dtype: of input and parameters.
        which: the pass.
        bar: what is asked, in words.
        found: the ratio's median and quartiles.
        passed: whether the median clears the bar.
        of_copy: share of the bound by a memory copy that is reached; None for memory.
        milliseconds: of one norm of ours, median; None for memory.
    """

    layer: str
    shape: str
    dtype: str
    which: str
    bar: str
    found: Spread
    passed: bool
    of_copy: float | None = None
    milliseconds: float | None = None


Call = Callable[..., tuple[Tensor, ...]]


def each(layer: nn.Module) -> Call:
    """The layer on every input."""
    return lambda *inputs: tuple(layer(x) for x in inputs)


def saved_bytes(call: Call, own: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Bytes that autograd keeps between forward and backward, inputs and parameters left out."""
    known = {t.untyped_storage().data_ptr() for t in (*inputs, *own.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call(*inputs)
    del out
    return sum(kept.values())


def forward(call: Call, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """A call without autograd."""

    def run() -> object:
        with torch.no_grad():
            return call(*inputs)

    return run


def both(
    call: Call, own: nn.Module, inputs: tuple[Tensor, ...], upstream: Tensor
) -> Callable[[], object]:
    """A call with all derivatives."""
    leaves, grads = [*inputs, *own.parameters()], [upstream] * len(inputs)
    return lambda: torch.autograd.grad(call(*inputs), leaves, grads)


def measure(
    name: str, shape: str, dtype: str, repeats: int, clock: Callable[[], float]
) -> list[Bar]:
    """Time a norm and its peers at one shape and dtype."""
    torch.manual_seed(0)
    torch.compiler.reset()
    kind = KINDS[name]
    peer, most, n = ("composed", 1 / FASTER, 1) if kind.torch is None else ("torch", SLOWER, NORMS)
    *leading, d = SHAPES[shape]
    d -= name == "CRMSNorm"
    inputs = tuple(torch.randn(*leading, d).to(DTYPES[dtype]).requires_grad_() for _ in range(n))
    upstream, target = torch.randn_like(inputs[0]), torch.empty_like(inputs[0].detach())
    makers = {"torch": kind.torch, "composed": kind.composed, "eager": kind.ours}
    made = {label: make(d).to(target.dtype) for label, make in makers.items() if make is not None}
    made["compiled"] = kind.ours(d).to(target.dtype)
    first = next(iter(made.values()))
    for layer in made.values():  # where parameters lie in memory can cost a kernel half its time
        for parameter, value in first.named_parameters():
            setattr(layer, parameter, value)
    calls = {label: each(layer) for label, layer in made.items()}
    calls["compiled"] = torch.compile(calls["compiled"], fullgraph=True)
    bars = []
    for which, traffic in zip(PASSES, kind.traffic, strict=True):
        timed = {
            label: forward(call, inputs)
            if which == "forward"
            else both(call, made[label], inputs, upstream)
            for label, call in calls.items()
        }
        rows = compare({**timed, "copy": lambda: target.copy_(upstream)}, repeats, clock=clock)
        taken = {row.name: row for row in rows}
        bound = n * taken["copy"].seconds.median * traffic / 2  # a copy moves two tensors
        for label in ("compiled", "eager") if kind.torch is None else ("compiled",):
            found = taken[label].ratio  # to the peer, which comes first
            seconds = taken[label].seconds.median
            text = f"{label}, times {peer}: at most {most:.2f}"
            spot = (name, shape, dtype, which, text)
            reached = bound / seconds
            bars.append(Bar(*spot, found, found.median <= most, reached, 1e3 * seconds / n))
    size = sum(x.untyped_storage().nbytes() for x in inputs)
    for label in ("eager", "compiled"):
        share = saved_bytes(calls[label], made[label], inputs) / size
        text = f"{label}, saved over the input's bytes: at most {kind.saved:.2f}"
        found = Spread(share, share, share)
        bars.append(Bar(name, shape, dtype, "backward", text, found, share <= kind.saved))
    return bars


def show(bars: list[Bar]) -> None:
    """Print the bars of one norm."""
    table = Table(title=bars[0].layer, title_justify="left")
    for column in ("shape", "dtype", "pass", "bar"):
        table.add_column(column)
    for column in ("found", "quartiles", "ms", "of copy"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for b in bars:
        table.add_row(
            b.shape,
            b.dtype,
            b.which,
            b.bar,
            f"{b.found.median:.3f}",
            f"{b.found.low:.2f} .. {b.found.high:.2f}" if b.of_copy is not None else "",
            f"{b.milliseconds:.2f}" if b.milliseconds is not None else "",
            f"{b.of_copy:.2f}" if b.of_copy is not None else "",
            "PASS" if b.passed else "MISS",
        )
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    for name, known in (("layers", KINDS), ("shapes", SHAPES), ("dtypes", DTYPES)):
        parser.add_argument(f"--{name}", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--cpu-time", action="store_true", help="of this process, for one thread of a busy machine"
    )
    parser.add_argument("--json", type=Path, help="also write the bars there")
    options = parser.parse_args()
    keep_freed_memory()
    clock = time.process_time if options.cpu_time else time.perf_counter
    bars: list[Bar] = []
    for layer in options.layers:
        found = [
            bar
            for shape in options.shapes
            for dtype in options.dtypes
            for bar in measure(layer, shape, dtype, options.repeats, clock)
        ]
        show(found)
        bars += found
    missed = sum(not bar.passed for bar in bars)
    print(
        f"{len(bars) - missed} of {len(bars)} bars passed, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}"
    )
    if options.json:
        options.json.write_text(json.dumps([asdict(b) for b in bars], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
