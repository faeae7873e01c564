"""Where the residual streams of known models lie: architectures as data.

A :class:`Stream` names, with patterns relative to one module, what writes to the stream and what
normalizes it. Who reads a norm is not written down; it is watched (:mod:`normkit.surgery.reads`),
and every conversion is checked on a sample. A model of your own joins with one more Stream::

    mine = Stream(
        module="MyDecoder",                       # class name of the module that holds the stream
        blocks="layers.*",
        norms=("layers.*.norm1", "layers.*.norm2", "norm"),
        writers=("layers.*.attention.out", "layers.*.mlp.out"),
        embeddings=("tokens", "positions"),
    )
    recenter(model, streams=[mine], inputs=(ids,))
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Stream:
    """One residual stream, in patterns relative to ``module``; ``*`` stands for one name.

    A pattern may name a module or a parameter and may match nothing (an optional part).

    Attributes:
        module: class name of the module that holds the stream.
        blocks: its blocks, in order; the first one is where the embeddings arrive.
        norms: every norm that reads the stream, the final one included.
        writers: every linear layer whose output is added to the stream.
        embeddings: what is summed into the first block's input: embeddings, linear layers or
            convolutions, and bare parameters. Empty if a nonlinearity stands before the blocks:
            then the mean is subtracted at their entry.
        scales: for a writer pattern, the parameter that its output is multiplied by per channel.
        keeps_width: the module views its result in the shape of its embeddings, so that those must
            keep all channels.
    """

    module: str
    blocks: str
    norms: tuple[str, ...]
    writers: tuple[str, ...]
    embeddings: tuple[str, ...] = ()
    scales: Mapping[str, str] = field(default_factory=dict)
    keeps_width: bool = False


def select(root: nn.Module, patterns: Iterable[str]) -> list[str]:
    """Return the paths below ``root`` of modules and parameters that match, in pattern order."""
    paths = [name for name, _ in root.named_modules()]
    paths += [name for name, _ in root.named_parameters()]
    found = [p for pattern in patterns for p in paths if matches(pattern, p)]
    return list(dict.fromkeys(found))


def matches(pattern: str, path: str) -> bool:
    """Whether ``path`` fits ``pattern``."""
    return _regex(pattern).fullmatch(path) is not None


def companion(pattern: str, path: str, other: str) -> str:
    """Return ``other`` with its stars filled by what those of ``pattern`` match in ``path``."""
    match = _regex(pattern).fullmatch(path)
    parts = iter(match.groups() if match else ())
    return re.sub(r"\*", lambda _: next(parts), other)


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"([^.]+)"))


_VIT = Stream(
    module="ViTModel",
    blocks="layers.*",
    norms=("layers.*.layernorm_before", "layers.*.layernorm_after", "layernorm"),
    writers=("layers.*.attention.o_proj", "layers.*.mlp.fc2"),
    embeddings=(
        "embeddings.patch_embeddings.projection",
        "embeddings.cls_token",
        "embeddings.mask_token",
        "embeddings.distillation_token",
        "embeddings.position_embeddings",
    ),
)

_WHISPER_BLOCK = ("layers.*.self_attn.out_proj", "layers.*.fc2")
_WHISPER_NORMS = ("layers.*.self_attn_layer_norm", "layers.*.final_layer_norm", "layer_norm")

STREAMS: tuple[Stream, ...] = (
    Stream(
        module="GPT2Model",
        blocks="h.*",
        norms=("h.*.ln_1", "h.*.ln_cross_attn", "h.*.ln_2", "ln_f"),
        writers=("h.*.attn.c_proj", "h.*.crossattention.c_proj", "h.*.mlp.c_proj"),
        embeddings=("wte", "wpe"),
        keeps_width=True,
    ),
    Stream(
        module="OPTDecoder",
        blocks="layers.*",
        norms=("layers.*.self_attn_layer_norm", "layers.*.final_layer_norm", "final_layer_norm"),
        writers=("layers.*.self_attn.out_proj", "layers.*.fc2"),
        # With a narrower embedding it is project_in that writes; `embed_tokens` then has other
        # channels than the stream, and is left by its width.
        embeddings=("embed_tokens", "project_in", "embed_positions"),
    ),
    _VIT,
    Stream("DeiTModel", _VIT.blocks, _VIT.norms, _VIT.writers, _VIT.embeddings),
    Stream(
        module="Dinov2Model",
        blocks="encoder.layer.*",
        norms=("encoder.layer.*.norm1", "encoder.layer.*.norm2", "layernorm"),
        writers=(
            "encoder.layer.*.attention.o_proj",
            "encoder.layer.*.mlp.fc2",
            "encoder.layer.*.mlp.down_proj",
        ),
        embeddings=_VIT.embeddings,
        scales={
            "encoder.layer.*.attention.o_proj": "encoder.layer.*.layer_scale1.lambda1",
            "encoder.layer.*.mlp.fc2": "encoder.layer.*.layer_scale2.lambda1",
            "encoder.layer.*.mlp.down_proj": "encoder.layer.*.layer_scale2.lambda1",
        },
    ),
    Stream("WhisperEncoder", "layers.*", _WHISPER_NORMS, _WHISPER_BLOCK),
    Stream(
        module="WhisperDecoder",
        blocks="layers.*",
        norms=(*_WHISPER_NORMS, "layers.*.encoder_attn_layer_norm"),
        writers=(*_WHISPER_BLOCK, "layers.*.encoder_attn.out_proj"),
        embeddings=("embed_tokens", "embed_positions"),
    ),
    Stream(
        module="GPTNeoXModel",
        blocks="layers.*",
        norms=("layers.*.input_layernorm", "layers.*.post_attention_layernorm", "final_layer_norm"),
        writers=("layers.*.attention.dense", "layers.*.mlp.dense_4h_to_h"),
        embeddings=("embed_in",),
    ),
    Stream(
        module="GPTJModel",
        blocks="h.*",
        norms=("h.*.ln_1", "ln_f"),
        writers=("h.*.attn.out_proj", "h.*.mlp.fc_out"),
        embeddings=("wte",),
    ),
    Stream(
        module="PhiModel",
        blocks="layers.*",
        norms=("layers.*.input_layernorm", "final_layernorm"),
        writers=("layers.*.self_attn.dense", "layers.*.mlp.fc2"),
        embeddings=("embed_tokens",),
    ),
    Stream(
        module="FalconModel",
        blocks="h.*",
        norms=(
            "h.*.input_layernorm",
            "h.*.post_attention_layernorm",
            "h.*.ln_attn",
            "h.*.ln_mlp",
            "ln_f",
        ),
        writers=("h.*.self_attention.dense", "h.*.mlp.dense_4h_to_h"),
        embeddings=("word_embeddings",),
    ),
)
"""Maps that ship with normkit; ``recenter(streams=...)`` adds others for one call."""
