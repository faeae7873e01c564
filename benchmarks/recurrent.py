"""Layer-normalized LSTM and GRU beside torch's without norms, and beside a cell called in a loop.

torch's layers do less (no norms) in one fused call: they bound what can be reached. The loop calls
the cell on each step's input, the obvious way, which projects the input step by step.

    python benchmarks/recurrent.py --quick
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from _timing import compare, print_table
from torch import Tensor, nn

from normkit.nn import LNGRU, LNLSTM

SIZES = ((64, 32, 64, 128), (256, 16, 64, 256))  # steps, batch, input, hidden


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
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    for steps, batch, features, hidden in SIZES[: 1 if options.quick else None]:
        x = torch.randn(steps, batch, features, requires_grad=True)
        for ours, peer in ((LNLSTM, nn.LSTM), (LNGRU, nn.GRU)):
            layer, plain = ours(features, hidden), peer(features, hidden)
            calls = {
                f"torch {peer.__name__}, no norms": passes(lambda x, m=plain: m(x)[0], x, plain),
                f"normkit {ours.__name__}": passes(lambda x, m=layer: m(x)[0], x, layer),
                "its cell in a loop": passes(lambda x, m=layer: loop(m, x), x, layer),
            }
            for which in ("forward", "forward+backward"):
                rows = compare(
                    {name: call[which] for name, call in calls.items()},
                    repeats=5 if options.quick else options.repeats,
                )
                print_table(rows, f"{steps} steps, batch {batch}, {features} -> {hidden}, {which}")


if __name__ == "__main__":
    main()
