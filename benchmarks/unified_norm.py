"""UnifiedNorm and PowerNorm beside torch's norms, and inference with the norm fused away.

First the layers at token shapes, forward and forward with backward in training mode: torch's
LayerNorm (what the others are compared with), torch's BatchNorm over the tokens, ours eager and
compiled, and the authors' algorithms of single operations. Then a pre-norm transformer in
inference: LayerNorm, UnifiedNorm, and UnifiedNorm fused into the linear layers, with the peak of
living tensors.

    python benchmarks/unified_norm.py --quick
    python benchmarks/unified_norm.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from _memory import keep_freed_memory
from _timing import compare, print_table
from rich.console import Console
from torch import Tensor, nn

from normkit.nn import PowerNorm, UnifiedNorm
from normkit.recipes._lm import TokenBatchNorm
from normkit.recipes._unified_norm_fused import SHAPE, inference, models, peak_bytes

SHAPES = {"language": (8, 512, 768), "vision": (64, 197, 384)}
EPS, KEEP = 1e-5, 0.9


class ComposedUnified(torch.autograd.Function):
    """Unified Normalization past its warm-up, as its authors write it: z is kept, not x."""

    @staticmethod
    def forward(ctx, x, weight, bias, var, window, grad_window, mean, slot):
        square = (x * x).mean((0, 1))
        window[slot] = square
        used = torch.exp(torch.mean(torch.log(window), 0))
        z = x / (used + EPS).sqrt()
        ctx.save_for_backward(z, used, weight, grad_window, mean)
        ctx.slot = slot
        var.copy_(KEEP * var + (1 - KEEP) * used)
        return weight * z + bias

    @staticmethod
    def backward(ctx, grad):
        z, used, weight, grad_window, mean = ctx.saved_tensors
        g = grad * weight
        grad_window[ctx.slot] = (g * z).mean((0, 1))
        mean.copy_(mean * KEEP + (1 - KEEP) * grad_window.mean(0))
        dx = 1.0 / torch.sqrt(used + EPS) * (g - mean * z)
        return dx, (grad * z).sum((0, 1)), grad.sum((0, 1)), *(None,) * 5


class ComposedPower(torch.autograd.Function):
    """PN-V past its warm-up, as its authors write it."""

    @staticmethod
    def forward(ctx, x, weight, bias, psi2, nu):
        square = (x * x).mean((0, 1))
        root = (psi2 + EPS).sqrt()
        z = x / root
        ctx.save_for_backward(z, root, weight, nu)
        psi2.copy_(KEEP * psi2 + (1 - KEEP) * square)
        return weight * z + bias

    @staticmethod
    def backward(ctx, grad):
        z, root, weight, nu = ctx.saved_tensors
        rest = grad * weight - nu * z
        nu.add_((1 - KEEP) * (rest * z).mean((0, 1)))
        return 1.0 / root * rest, (grad * z).sum((0, 1)), grad.sum((0, 1)), None, None


class Composed(nn.Module):
    """One of the two as a layer."""

    def __init__(self, d: int, unified: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))
        self.unified = unified
        self.var, self.mean = torch.ones(d), torch.zeros(d)
        self.window, self.grad_window = torch.ones(4, d), torch.zeros(4, d)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        own = (x, self.weight, self.bias, self.var)
        if not self.unified:
            return ComposedPower.apply(*own, self.mean)
        slot = self.steps % 4
        return ComposedUnified.apply(*own, self.window, self.grad_window, self.mean, slot)


def layers(d: int) -> dict[str, nn.Module]:
    """What is timed; the first is what the others are compared with."""
    unified, power = UnifiedNorm(d, warmup=0), PowerNorm(d, warmup=0, groups=None)
    return {
        "torch LayerNorm": nn.LayerNorm(d),
        "torch BatchNorm": TokenBatchNorm(d),
        "UnifiedNorm": unified,
        "UnifiedNorm compiled": torch.compile(UnifiedNorm(d, warmup=0), fullgraph=True),
        "UnifiedNorm composed": Composed(d, unified=True),
        "PowerNorm (PN-V)": power,
        "PowerNorm (PN-V) compiled": torch.compile(
            PowerNorm(d, warmup=0, groups=None), fullgraph=True
        ),
        "PowerNorm (PN-V) composed": Composed(d, unified=False),
        "PowerNorm (8 groups)": PowerNorm(d, warmup=0, groups=8),
    }


def both(layer: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], object]:
    leaves = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), leaves, upstream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="one shape, few repeats")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    repeats = 5 if options.quick else options.repeats
    keep_freed_memory()
    torch.manual_seed(0)
    for name in ["vision"] if options.quick else list(SHAPES):
        shape = SHAPES[name]
        torch.compiler.reset()
        x, upstream = torch.randn(shape, requires_grad=True), torch.randn(shape)
        made = layers(shape[-1])
        title = f"{name} {list(shape)} float32, {torch.get_num_threads()} threads"
        rows = compare({label: inference(layer, x) for label, layer in made.items()}, repeats)
        print_table(rows, f"{title}, forward")
        rows = compare({label: both(layer, x, upstream) for label, layer in made.items()}, repeats)
        print_table(rows, f"{title}, forward and backward")
    x = torch.randn(SHAPE)
    made = models()
    print_table(
        compare({label: inference(model, x) for label, model in made.items()}, repeats),
        f"pre-norm transformer {list(SHAPE)}, inference",
    )
    peaks = {label: peak_bytes(inference(model, x)) for label, model in made.items()}
    for label, peak in peaks.items():
        share = peak / peaks["layer"]
        Console().print(f"{label}: peak {peak / 2**20:.1f} MiB, {share:.3f} of LayerNorm's")


if __name__ == "__main__":
    main()
