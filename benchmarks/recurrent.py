"""Layer-normalized LSTM and GRU beside the authors' algorithm, and beside torch's without norms.

The algorithm is that of the authors' code: the input is projected at once, and every step
normalizes both its share and the state's, here in single operations. The bar: at least 1.3 times
faster. torch's layers do less (no norms) in one fused call: they bound what can be reached. The
loop calls the cell on each step's input, the obvious way, which projects the input step by step.

    python benchmarks/recurrent.py --quick
    OMP_NUM_THREADS=1 python benchmarks/recurrent.py --cpu-time    # on a machine that is shared
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from _timing import compare, print_table
from torch import Tensor, nn
from torch.nn import functional as F

from normkit.nn import LNGRU, LNLSTM

SIZES = ((64, 32, 64, 128), (256, 16, 64, 256))  # steps, batch, input, hidden
FASTER = 1.3


def normalize(a: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm of single operations."""
    centered = a - a.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + shift


def lstm(layer: LNLSTM, x: Tensor) -> Tensor:
    """Outputs of the authors' LN-LSTM with the weights of ours."""
    p = layer.cells[0]
    h = c = x.new_zeros(x.shape[1], p.hidden_size)
    outputs = []
    for below in F.linear(x, p.weight_ih):
        gates = normalize(below, p.gain_ih, p.bias_ih)
        gates = gates + normalize(F.linear(h, p.weight_hh), p.gain_hh, p.bias_hh)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * normalize(c, p.gain_c, p.bias_c).tanh()
        outputs.append(h)
    return torch.stack(outputs)


def gru(layer: LNGRU, x: Tensor) -> Tensor:
    """Outputs of the authors' LN-GRU with the weights of ours."""
    p = layer.cells[0]
    split = [2 * p.hidden_size, p.hidden_size]
    own = list(zip(p.gain_ih.split(split), p.bias_ih.split(split), strict=True))
    carried = list(zip(p.gain_hh.split(split), p.bias_hh.split(split), strict=True))
    h = x.new_zeros(x.shape[1], p.hidden_size)
    outputs = []
    for below in F.linear(x, p.weight_ih):
        ours = [normalize(a, *n) for a, n in zip(below.split(split, -1), own, strict=True)]
        above = F.linear(h, p.weight_hh).split(split, -1)
        theirs = [normalize(a, *n) for a, n in zip(above, carried, strict=True)]
        r, z = (ours[0] + theirs[0]).sigmoid().chunk(2, -1)
        n = (ours[1] + r * theirs[1]).tanh()
        h = (1 - z) * n + z * h
        outputs.append(h)
    return torch.stack(outputs)


def loop(layer: LNLSTM | LNGRU, x: Tensor) -> Tensor:
    """Outputs of the layer's cell, step by step."""
    cell, state, outputs = layer.cells[0], None, []
    for step in x:
        state = cell(step, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs)


def passes(call: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> dict[str, Callable]:
    """The forward pass, and both passes."""
    leaves = [x, *module.parameters()]

    def forward() -> Tensor:
        with torch.no_grad():
            return call(x)

    return {
        "forward": forward,
        "forward+backward": lambda: torch.autograd.grad(call(x).square().sum(), leaves),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="one size, few repeats")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--cpu-time", action="store_true", help="of this process, for one thread of a busy machine"
    )
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    for steps, batch, features, hidden in SIZES[: 1 if options.quick else None]:
        x = torch.randn(steps, batch, features, requires_grad=True)
        for ours, peer, authors in ((LNLSTM, nn.LSTM, lstm), (LNGRU, nn.GRU, gru)):
            layer, plain = ours(features, hidden), peer(features, hidden)
            few = x[:4]  # rounding grows from step to step
            torch.testing.assert_close(authors(layer, few), layer(few)[0], rtol=1e-3, atol=1e-4)
            calls = {
                "composed": passes(lambda x, m=layer, f=authors: f(m, x), x, layer),
                ours.__name__: passes(lambda x, m=layer: m(x)[0], x, layer),
                "its cell in a loop": passes(lambda x, m=layer: loop(m, x), x, layer),
                f"torch {peer.__name__}, no norms": passes(lambda x, m=plain: m(x)[0], x, plain),
            }
            for which in ("forward", "forward+backward"):
                rows = compare(
                    {name: call[which] for name, call in calls.items()},
                    repeats=5 if options.quick else options.repeats,
                    clock=clock,
                )
                print_table(rows, f"{steps} steps, batch {batch}, {features} -> {hidden}, {which}")
                verdict = "PASS" if rows[1].ratio.median <= 1 / FASTER else "MISS"
                print(f"times composed: at most {1 / FASTER:.2f}: {verdict}")


if __name__ == "__main__":
    main()
