"""Moments: dense beside torch's layers and reductions, ragged beside a loop and a plain scatter.

    python benchmarks/moments.py
    python benchmarks/moments.py --compile

The peers do the same work on the same tensors in the same run. torch's layer norm is one fused
kernel with ``1 / sqrt(var + eps)``; ours divides by ``std + eps`` and has the group's constant
value as exact center. The plain scatter takes ``E[x^2] - E[x]^2`` in the dtype of x: fewer passes,
and wrong where the mean is large against the deviation, which is printed beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from _memory import keep_freed_memory
from _timing import compare, print_table
from torch import Tensor

from normkit.functional.moments import moments, normalize, segment_moments, segment_normalize


def segment_loop(x: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation with one mask per segment."""
    members = [x[ids == s] for s in range(size)]
    center = torch.stack([m.mean(0) for m in members])
    return center, torch.stack([m.std(0, correction=0) for m in members])


def plain_scatter(x: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation from the sums of values and squares."""
    n = torch.bincount(ids, minlength=size).reshape(-1, *(1,) * (x.dim() - 1))
    zero = x.new_zeros(size, *x.shape[1:])
    center = zero.index_add(0, ids, x) / n
    power = zero.index_add(0, ids, x.square()) / n
    return center, (power - center.square()).clamp(min=0).sqrt()


def dense(repeats: int, compiled: bool) -> None:
    """Rows of activations: the shape of a layer norm."""
    x = torch.randn(2048, 768, generator=torch.Generator().manual_seed(0))

    def peer_norm(x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, (768,), eps=1e-8)

    def peer_moments(x: Tensor) -> tuple[Tensor, ...]:
        return torch.std_mean(x, 1, correction=0, keepdim=True)

    def our_norm(x: Tensor) -> Tensor:
        return normalize(x, 1)

    def our_moments(x: Tensor) -> tuple[Tensor, ...]:
        return moments(x, 1)

    def calls(**named: Callable[[Tensor], object]) -> dict[str, Callable[[], object]]:
        use = torch.compile if compiled else lambda f: f
        functions = {name.replace("_", " "): use(f) for name, f in named.items()}
        return {name: (lambda f=f: f(x)) for name, f in functions.items()}

    how = "compiled" if compiled else "eager"
    print_table(
        compare(calls(normalize=our_norm, torch_layer_norm=peer_norm), repeats),
        f"normalize 2048 x 768, {how}",
    )
    print_table(
        compare(calls(moments=our_moments, torch_std_mean=peer_moments), repeats),
        f"moments 2048 x 768, {how}",
    )


def ragged(repeats: int, rows: int, segments: int, features: tuple[int, ...]) -> None:
    """Groups of rows in any order."""
    generator = torch.Generator().manual_seed(0)
    x = 100 + torch.randn(rows, *features, generator=generator)
    ids = torch.randint(segments, (rows,), generator=generator)
    ids[:segments] = torch.arange(segments)  # no empty segment: the peers have no answer to one
    calls = {
        "segment_moments": lambda: segment_moments(x, ids, segments),
        "segment_normalize": lambda: segment_normalize(x, ids, segments),
        "plain scatter": lambda: plain_scatter(x, ids, segments),
        "loop over segments": lambda: segment_loop(x, ids, segments),
    }
    print_table(
        compare(calls, repeats),
        f"{rows} rows{''.join(f' x {f}' for f in features)}, {segments} segments",
    )
    exact = segment_loop(x.double(), ids, segments)[1]
    for name, scale in (
        ("segment_moments", segment_moments(x, ids, segments).scale),
        ("plain scatter", plain_scatter(x, ids, segments)[1]),
    ):
        print(f"largest error of the deviation, {name}: {float((scale - exact).abs().max()):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--compile", action="store_true", help="compile both sides of dense moments"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    dense(options.repeats, options.compile)
    ragged(options.repeats, 32768, 4096, ())
    ragged(options.repeats, 8192, 256, (64,))


if __name__ == "__main__":
    main()
