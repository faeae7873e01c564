"""Pre-RMSNorm and Pre-CRMSNorm: LayerNorm's mean, removed once.

Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers (Jiang et
al., 2023), arXiv 2305.14858.

``LN(x) = RMSNorm(x C) g + b`` with ``C = I - 11^T/d``; whatever writes to the residual stream is
multiplied by ``C`` once.

Run it::

    normkit run pre-rmsnorm                       # GPT-2-small and ViT-B sizes, random weights
    normkit run pre-rmsnorm --layers 4 --tokens 128 --no-compiled

Differences from the authors' code: models of transformers with random gains and shifts are
converted, rather than three networks written side by side; times are of a CPU, in turns.
See docs/papers/pre-rmsnorm.md.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional as F

from normkit.errors import InputError, check_least
from normkit.nn import CRMSNorm, RMSNorm
from normkit.recipes import _pre_rmsnorm_latency as timing
from normkit.recipes import _pre_rmsnorm_models as models
from normkit.recipes.base import Claim, Finding, System, check_numbers, finish, within
from normkit.runs import RunLogger
from normkit.statistics import bootstrap_interval
from normkit.surgery import recenter, stream_means
from normkit.surgery.norms import norm_layers
from normkit.surgery.reads import largest_difference
from normkit.surgery.reads import run as outputs
from normkit.surgery.recenter import TARGETS
from normkit.surgery.samples import sample_inputs


@dataclass(frozen=True)
class Config:
    """Flags of ``normkit run pre-rmsnorm``; the sizes are those of GPT-2 small and ViT-B/16.

    Attributes:
        layers: blocks of both models.
        width: channels of both.
        heads: of attention.
        vocab: tokens that the language model knows.
        tokens: length of the prompt.
        image: side of an image.
        patch: side of a patch.
        images: images in a batch.
        repeats: times each call is timed.
        compiled: also time the models compiled (one token at a time is timed in eager mode only).
        seed: of the weights.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocab: int = 50257
    tokens: int = 512
    image: int = 224
    patch: int = 16
    images: int = 8
    repeats: int = 7
    compiled: bool = True
    seed: int = 0

    def validate(self) -> None:
        """Check what the types cannot say.

        Raises:
            InputError: names the flag.
        """
        check_least(self, 1, "layers", "heads", "vocab", "tokens", "image", "patch", "images")
        check_least(self, 1, "repeats")
        if self.width < 2 or self.width % self.heads:
            raise InputError(f"width must be a multiple of heads {self.heads}, got {self.width}")
        if self.image % self.patch:
            raise InputError(f"image must be a multiple of patch {self.patch}, got {self.image}")
        check_numbers(self)


def run(config: Config, folder: Path) -> Mapping[str, Any]:
    """Convert a GPT-2 and a ViT, compare them with the originals, and time all three forms."""
    config.validate()
    started = time.perf_counter()
    console, logger = Console(), RunLogger(folder, tensorboard=False)
    logger.config(config)
    shape = (config.layers, config.width, config.heads)
    language = models.gpt2(*shape, config.vocab, config.tokens + 1, config.seed)
    vision = models.vit(*shape, config.image, config.patch, config.seed)
    jobs = {
        "GPT-2": (language, sample_inputs(language, 1, config.tokens)),
        "ViT": (vision, sample_inputs(vision, config.images)),
    }
    exactness: dict[str, Any] = {}
    means: dict[str, Any] = {}
    timings: dict[str, Any] = {}
    for name, (original, inputs) in jobs.items():
        with console.status(f"converting {name}"):
            forms = convert(original)
            exactness[name] = exact(forms, inputs)
            means[name] = {
                form: stream_means(forms[form], inputs, list(norm_layers(original)))
                for form in ("original", "pre-rmsnorm")
            }
        timed = [(f"{name} {what}", forms, make) for what, make in calls(name)]
        if config.compiled:
            compiled = {form: torch.compile(model) for form, model in forms.items()}
            timed.append((f"{timed[0][0]}, compiled", compiled, timing.whole_pass))
        for what, these, make in timed:
            with console.status(f"timing {what}"):
                timings[what] = timing.latency(these, make, inputs, config.repeats)
        torch._dynamo.reset()
    timing.draw(timings, means, folder / "plots" / "1_latency-and-means.png")
    results = summarize(config, exactness, means, timings, time.perf_counter() - started)
    return finish(logger, results, console)


def convert(original: Any) -> dict[str, Any]:
    """Return the model and its two recentered forms."""
    forms = {"original": original}
    for to in TARGETS:
        forms[to] = copy.deepcopy(original)
        recenter(forms[to], to)
    return forms


def exact(forms: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Largest difference of each form's outputs from the original's, and the outputs' size."""
    before = outputs(forms["original"], inputs)
    found: dict[str, Any] = {"largest output": max(float(x.abs().max()) for x in before)}
    for to in TARGETS:
        found[to] = largest_difference(before, outputs(forms[to], inputs))
    return found


def calls(name: str) -> list[tuple[str, Any]]:
    """What is timed of a model: name and maker of each call."""
    if name == "ViT":
        return [("images", timing.whole_pass)]
    return [("prompt", timing.whole_pass), ("one token", timing.one_token)]


def summarize(
    config: Config,
    exactness: Mapping[str, Any],
    means: Mapping[str, Any],
    timings: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Put the findings into lines and a table."""
    rows = [
        [what, form, 1e3 * t["seconds"], f"{t['ratio']:.3f} ({t['low']:.3f} .. {t['high']:.3f})"]
        for what, forms in timings.items()
        for form, t in forms.items()
    ]
    lines = [
        f"{config.layers} layers of {config.width}: prompt of {config.tokens} tokens, "
        f"{config.images} images of {config.image} pixels, float32, "
        f"{torch.get_num_threads()} threads, {config.repeats} repeats, {seconds / 60:.1f} minutes"
    ]
    for name, found in exactness.items():
        lines.append(
            f"{name}: largest difference {found['pre-rmsnorm']:.1e} (pre-rmsnorm), "
            f"{found['pre-crmsnorm']:.1e} (pre-crmsnorm) at outputs up to "
            f"{found['largest output']:.2f}; largest mean on the stream "
            f"{max(means[name]['original'].values()):.1e} before, "
            f"{max(means[name]['pre-rmsnorm'].values()):.1e} after"
        )
    lines += [_line(what, forms) for what, forms in timings.items()]
    return {
        "title": "normkit run pre-rmsnorm",
        "summary": lines,
        "table": {"columns": ["call", "form", "ms", "ratio (quartiles)"], "rows": rows},
        "exactness": dict(exactness),
        "means": dict(means),
        "timings": dict(timings),
        "seconds": seconds,
    }


def _line(what: str, forms: Mapping[str, Any]) -> str:
    ratios = ", ".join(f"{forms[to]['ratio']:.3f} ({to})" for to in TARGETS)
    return f"{what}: time over that of the original {ratios}"


# ---------------------------------------------------------------------- claims


def _worked_numbers() -> Finding:
    x = torch.tensor([1.0, 2, 4, 5], dtype=torch.float64)
    centered = torch.tensor([-2.0, -1, 1, 2], dtype=torch.float64)
    expected = centered / 2.5**0.5
    found = [
        F.layer_norm(x, (4,), eps=0.0) - expected,
        RMSNorm(4, eps=0.0).double()(centered) - expected,
        CRMSNorm(3, eps=0.0)(centered[:-1]) - expected[:-1],
    ]
    return within(max(gap.abs().max().item() for gap in found), 1e-14)


def _equivalence() -> Finding:
    gaps = {}
    for name, make in models.tiny_models().items():
        forms = convert(make())
        found = exact(forms, sample_inputs(forms["original"], seed=1))
        gaps[name] = max(found[to] for to in TARGETS)
    return within(max(gaps.values()), 1e-10, architectures=gaps)


def _zero_mean() -> Finding:
    means = {}
    for name, make in models.tiny_models().items():
        model = make()
        norms = list(norm_layers(model))
        recenter(model)
        means[name] = max(stream_means(model, sample_inputs(model, seed=1), norms).values())
    return within(max(means.values()), 1e-12, architectures=means)


def _training() -> Finding:
    gaps = {}
    for to in TARGETS:
        original = models.randomize(models.gpt2(2, 32, 4, 61, 16, 0).double(), 0, 0.3)
        online = copy.deepcopy(original)
        recenter(online, to, online=True)
        pairs = zip(_losses(original), _losses(online), strict=True)
        gaps[to] = max(abs(a - b) for a, b in pairs)
    return within(max(gaps.values()), 1e-9, forms=gaps)


def _losses(model: Any) -> list[float]:
    """Loss of 20 steps of AdamW."""
    dice = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    losses = []
    for _ in range(20):
        ids = torch.randint(61, (2, 12), generator=dice)
        logits = model(input_ids=ids).logits[:, :-1]  # the model's own loss is float32
        loss: Any = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


_BLOCK_WEIGHTS = tuple(
    f"{layer}.weight" for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
)


def _size() -> Finding:
    width = 32
    forms = convert(models.gpt2(2, width, 4, 61, 16, 0))
    original, short = (forms[n].transformer.h[0] for n in ("original", "pre-crmsnorm"))
    shares = {
        part: short.get_parameter(part).numel() / original.get_parameter(part).numel()
        for part in _BLOCK_WEIGHTS
    }
    exactly = all(share == (width - 1) / width for share in shares.values())
    return Finding(
        "holds" if exactly else "contradicted",
        f"{min(shares.values()):.5f} of the weights of a block at d = {width}",
        shares,
    )


def _saves_time(make: Callable[..., Any]) -> Callable[[], Finding]:
    def check() -> Finding:
        forms = convert(models.gpt2(4, 768, 12, 1000, 256, 0))
        inputs = sample_inputs(forms["original"], 2, 256)
        found = timing.latency(forms, make, inputs, repeats=15)
        intervals = {to: bootstrap_interval(found[to]["ratios"]) for to in TARGETS}
        best = min(intervals.values(), key=lambda interval: interval.mean)
        saved = "holds" if best.high < 1 else "contradicted" if best.low > 1 else "not shown"
        text = ", ".join(f"{to} {interval}" for to, interval in intervals.items())
        return Finding(saved, f"time over the original: {text}", found)  # type: ignore[arg-type]

    return check


CLAIMS: list[Claim] = [
    Claim(
        "worked-numbers",
        "LayerNorm of [1, 2, 4, 5] is RMSNorm of [-2, -1, 1, 2] and CRMSNorm of [-2, -1, 1]",
        "identity",
        "exact",
        _worked_numbers,
    ),
    Claim(
        "equivalence",
        "six Pre-LN architectures equal their Pre-RMSNorm and Pre-CRMSNorm forms",
        "identity",
        "exact",
        _equivalence,
    ),
    Claim(
        "zero-mean",
        "after conversion no norm on a residual stream reads a mean",
        "identity",
        "exact",
        _zero_mean,
    ),
    Claim(
        "training",
        "trained with the weights recentered in each forward pass, every step is the original's",
        "identity",
        "exact",
        _training,
    ),
    Claim(
        "compressed-size",
        "Pre-CRMSNorm keeps d - 1 of d channels of the stream and of the weights on it",
        "(d - 1) / d",
        "structural",
        _size,
    ),
    Claim(
        "inference-time",
        "the recentered forms take less time to infer (4 layers of 768, 2 x 256 tokens, CPU)",
        "1% to 10% saved",
        "measured",
        _saves_time(timing.whole_pass),
    ),
    Claim(
        "training-time",
        "the recentered forms take less time to train (4 layers of 768, 2 x 256 tokens, CPU)",
        "1% to 10% saved",
        "measured",
        _saves_time(timing.training_step),
    ),
]

SYSTEM = System(
    slug="pre-rmsnorm",
    title="Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers",
    arxiv="2305.14858",
    year=2023,
    tags=("activations", "transformers", "surgery"),
    symbols=("normkit.nn.CRMSNorm", "normkit.surgery.recenter", "normkit.surgery.stream_means"),
    Config=Config,
    run=run,
    claims=tuple(CLAIMS),
)
