"""A copy of the policy that only speaks, and the decoders that drive it.

Shapes: B rows of a call, T tokens of a call, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normkit.errors import InputError
from normkit.rl.attention import ATTENTION, RaggedCache

_log = logging.getLogger(__name__)


class InferenceCopy:
    """A model's twin for inference: other dtype, adapters merged, weights refreshed on demand.

    Weights that need no change are shared with the source, so a twin of the same dtype costs no
    memory and is always up to date. On a CPU, bfloat16 weights of linear layers are kept in the
    blocked order that oneDNN multiplies in, which it would otherwise restore at every call.

    Args:
        source: a causal language model of transformers; may be wrapped (DDP, compile, PEFT).
        dtype: dtype of the twin's weights.

    Attributes:
        model: the twin, in eval mode.

    Raises:
        InputError: when adapters cannot be merged (prompt learning, a quantized base).
    """

    def __init__(self, source: nn.Module, dtype: torch.dtype) -> None:
        base = unwrap(source)
        _check_adapters(source)
        keep = tuple(getattr(base, "_keep_in_fp32_modules", None) or ())
        keep += tuple(getattr(base, "_keep_in_fp32_modules_strict", None) or ())
        twins: dict[int, Any] = {}
        for name, parameter in base.named_parameters():
            cast = parameter.is_floating_point() and not any(part in name for part in keep)
            twin = parameter
            if cast and parameter.dtype != dtype:
                twin = nn.Parameter(torch.empty_like(parameter, dtype=dtype), requires_grad=False)
            # deepcopy takes what its memo holds in place of a copy: tied weights stay tied.
            twins[id(parameter)] = twin
        self.model: Any = copy.deepcopy(base, twins)
        self._moved: dict[str, str] = {}
        self._adapted: list[str] = []
        self._strip_adapters()
        self._packed = self._pack_linear_layers()
        self.model.eval()
        self.sync(source)

    @torch.no_grad()
    def sync(self, source: nn.Module) -> None:
        """Take over the weights of ``source``, which has the structure of the original source.

        Adapters are merged in float32 before the result is rounded to the twin's dtype.

        Args:
            source: the model in training.
        """
        base = unwrap(source)
        weights = dict(base.named_parameters(remove_duplicate=False))
        for name, parameter in self.model.named_parameters():
            if name.rpartition(".")[0] not in self._adapted:
                _fill(parameter, weights[self._moved.get(name, name)])
        for name, packed in self._packed.items():
            if name not in self._adapted:
                packed.fill(weights[self._moved.get(f"{name}.weight", f"{name}.weight")])
        for name in self._adapted:
            layer = _merged(base.get_submodule(name))
            if name in self._packed:
                self._packed[name].fill(layer.weight)
            for leaf, parameter in self.model.get_submodule(name).named_parameters():
                _fill(parameter, layer.get_parameter(leaf))

    def _strip_adapters(self) -> None:
        """Replace PEFT's layers in the twin by the plain layers they wrap."""
        try:
            from peft.tuners.tuners_utils import BaseTunerLayer
            from peft.utils import ModulesToSaveWrapper
        except ImportError:
            return
        for name, module in list(self.model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                plain = module.get_base_layer()
                for leaf, parameter in list(plain.named_parameters()):
                    own = nn.Parameter(torch.empty_like(parameter), requires_grad=False)
                    setattr(plain, leaf, own)
                self._adapted.append(name)
            elif isinstance(module, ModulesToSaveWrapper):
                active = module.active_adapters[0]
                plain = module.modules_to_save[active]
                for leaf, _ in plain.named_parameters():
                    self._moved[f"{name}.{leaf}"] = f"{name}.modules_to_save.{active}.{leaf}"
            else:
                continue
            self._replace(name, plain)

    def _pack_linear_layers(self) -> dict[str, _PackedLinear]:
        packed: dict[str, _PackedLinear] = {}
        for name, module in list(self.model.named_modules()):
            if type(module) is nn.Linear and _PackedLinear.suits(module):
                packed[name] = _PackedLinear(module)
                self._replace(name, packed[name])
        return packed

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)


class _PackedLinear(nn.Module):
    """A linear layer whose weight is in the blocked order of oneDNN (inference on a CPU only)."""

    _ROWS = 16
    """Rows of the inputs that the order is chosen for: a decoding step, which is memory bound."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self._dtype = layer.weight.dtype
        self.weight = torch.empty(0)

    @classmethod
    def suits(cls, layer: nn.Linear) -> bool:
        """Whether ``layer`` gains from packing, on a build of torch that offers it."""
        weight = layer.weight
        return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and cls._works()

    @classmethod
    @functools.cache
    def _works(cls) -> bool:
        weight = torch.arange(96.0).reshape(3, 32).remainder(7).bfloat16()
        x = torch.arange(64.0).reshape(1, 2, 32).remainder(5).bfloat16()
        layer = nn.Linear(32, 3, bias=False, dtype=torch.bfloat16)
        try:
            with torch.no_grad():
                packed = cls(layer)
                packed.fill(weight)
                return torch.equal(packed(x), F.linear(x, weight))
        except (AttributeError, RuntimeError):
            return False

    def fill(self, weight: Tensor) -> None:
        """Take over a weight ``[out_features, in_features]`` of any floating dtype."""
        plain = weight.detach().to(self._dtype).contiguous()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(plain, self._ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.weight, self.bias, "none", [], ""
        )
        return result


def _fill(parameter: Tensor, weight: Tensor) -> None:
    if parameter.data_ptr() != weight.data_ptr():
        parameter.copy_(weight)


def _merged(layer: Any) -> Any:
    """Return a float32 copy of the plain layer in a PEFT layer, its adapters merged."""
    if layer.merged or layer.disable_adapters:
        return copy.deepcopy(layer.get_base_layer()).float()
    merged = copy.deepcopy(layer).float()
    merged.merge()
    return merged.get_base_layer()


def _check_adapters(source: nn.Module) -> None:
    """Refuse adapters that cannot become part of plain weights."""
    for name, config in getattr(source, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise InputError(
                f"model: the adapter {name!r} learns prompts; expected one that merges into "
                "weights, such as LoRA"
            )
    for name, module in unwrap(source).named_modules():
        layer = module.get_base_layer() if hasattr(module, "get_base_layer") else None
        if layer is not None and not all(p.is_floating_point() for p in layer.parameters()):
            raise InputError(
                f"model: the adapted layer {name!r} has quantized weights; load the base model "
                "in float32 or bfloat16"
            )


def unwrap(model: nn.Module) -> Any:
    """Return the transformers model inside of compile, data-parallel and PEFT wrappers."""
    inner: Any = model
    for attribute in ("_orig_mod", "module", "_orig_mod"):
        inner = getattr(inner, attribute, inner)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


class Decoder(Protocol):
    """Extends rows of tokens and tells what comes next. Rows are named by slots."""

    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to rows; an unknown slot begins a row.

        Args:
            slots: distinct names of rows ``[B]``.
            tokens: what to append, at least one token a row ``[B]``.

        Returns:
            Logits after each row's last token ``[B, V]``, in the order of ``slots``.
        """

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Begin new rows as copies of others: ``(source, target)`` each."""

    def release(self, slots: Sequence[int]) -> None:
        """Forget rows; unknown slots are passed over."""


class RaggedDecoder:
    """Decodes with one KV cache that lives as long as the dialogues do.

    The rows of a call are moved to the front of the cache, so that they are one contiguous view;
    a row that pauses costs two row copies and then nothing.

    Args:
        model: an inference copy whose attention is :data:`~normkit.rl.attention.ATTENTION`.
        max_tokens: most tokens of one forward pass; longer calls are split by rows.
    """

    def __init__(self, model: Any, max_tokens: int) -> None:
        self.model = model
        self.max_tokens = max_tokens
        self.device = next(model.parameters()).device
        self._cache = RaggedCache(self.device)
        self._order: list[int] = []

    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """See :meth:`Decoder.extend`."""
        self._arrange(slots)
        counts = [len(row) for row in tokens]
        return torch.cat(
            [self._forward((a, b), tokens[a:b], counts[a:b]) for a, b in self._parts(counts)]
        )

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See :meth:`Decoder.copy`."""
        self._add([target for _, target in pairs])
        for source, target in pairs:
            self._cache.copy_row(self._order.index(source), self._order.index(target))

    def release(self, slots: Sequence[int]) -> None:
        """See :meth:`Decoder.release`."""
        for slot in set(slots) & set(self._order):
            self._swap(self._order.index(slot), len(self._order) - 1)
            self._order.pop()
        self._cache.resize(len(self._order))

    def _forward(
        self, rows: tuple[int, int], tokens: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> Tensor:
        flat = torch.tensor([token for row in tokens for token in row], device=self.device)
        with self._cache.step(rows, counts) as step:
            output = self.model(
                input_ids=flat[None],
                position_ids=step.positions[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=step.last,
            )
        logits: Tensor = output.logits[0]
        return logits

    def _parts(self, counts: Sequence[int]) -> Iterator[tuple[int, int]]:
        start = total = 0
        for i, count in enumerate(counts):
            if i > start and total + count > self.max_tokens:
                yield start, i
                start, total = i, 0
            total += count
        yield start, len(counts)

    def _arrange(self, slots: Sequence[int]) -> None:
        self._add([slot for slot in slots if slot not in self._order])
        for i, slot in enumerate(slots):
            if self._order[i] != slot:
                self._swap(i, self._order.index(slot))

    def _add(self, slots: Sequence[int]) -> None:
        self._order += slots
        self._cache.resize(len(self._order))

    def _swap(self, i: int, j: int) -> None:
        if i != j:
            self._cache.swap(i, j)
            self._order[i], self._order[j] = self._order[j], self._order[i]


class ReencodingDecoder:
    """Decodes any causal language model by encoding rows anew when they gain more than a token.

    The way out for architectures whose state is not keys and values alone.

    Args:
        model: an inference copy with its own attention.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._rows: dict[int, list[int]] = {}
        self._running: list[int] = []
        self._past: Any = None
        self._mask = torch.empty(0)

    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """See :meth:`Decoder.extend`."""
        slots = list(slots)
        one_each = all(len(new) == 1 for new in tokens)
        going_on = self._past is not None and one_each and slots == self._running
        for slot, new in zip(slots, tokens, strict=True):
            self._rows.setdefault(slot, []).extend(new)
        if going_on:
            ids = torch.tensor([list(new) for new in tokens], device=self.device)
            self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], 1)
        else:
            rows = [self._rows[slot] for slot in slots]
            longest = max(map(len, rows))
            ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows], device=self.device)
            self._mask = torch.tensor(
                [[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=self.device
            )
            self._past = None
        positions = (self._mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        arguments = {"attention_mask": self._mask, "position_ids": positions}
        output = self._call(ids, arguments)
        self._past, self._running = getattr(output, "past_key_values", None), slots
        logits: Tensor = output.logits[:, -1]
        return logits

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See :meth:`Decoder.copy`."""
        for source, target in pairs:
            self._rows[target] = list(self._rows[source])

    def release(self, slots: Sequence[int]) -> None:
        """See :meth:`Decoder.release`."""
        for slot in slots:
            self._rows.pop(slot, None)
        self._past = None

    def _call(self, ids: Tensor, arguments: dict[str, Tensor]) -> Any:
        return self.model(input_ids=ids, past_key_values=self._past, use_cache=True, **arguments)


@torch.inference_mode()
def make_decoder(copy_of: InferenceCopy, max_tokens: int) -> Decoder:
    """Return the fast decoder if it computes what the model computes, else the general one.

    Both are run on a few tokens; an architecture that the fast one does not fit (recurrent state,
    attention of its own making) is found out by its logits.

    Args:
        copy_of: the inference copy; its attention implementation may be changed.
        max_tokens: see :class:`RaggedDecoder`.
    """
    model = copy_of.model
    size = int(model.get_input_embeddings().num_embeddings)
    rows = [[(7 * i + 3) % size for i in range(n)] for n in (5, 3)]
    turns = [[[11 % size], [5 % size, 2 % size]], [[4 % size], [9 % size]]]
    expected = []
    for turn in turns:
        rows = [row + new for row, new in zip(rows, turn, strict=True)]
        expected += [_plain_logits(model, row) for row in rows]
    original = model.config._attn_implementation
    try:
        model.set_attn_implementation(ATTENTION)
        decoder = RaggedDecoder(model, max_tokens)
        decoder.extend([0, 1], [rows[0][:5], rows[1][:3]])
        found = [logits for turn in turns for logits in decoder.extend([0, 1], turn)]
        decoder.release([0, 1])
        error = max(
            float((a.float() - b.float()).abs().max() / b.float().std().clamp_min(1e-12))
            for a, b in zip(found, expected, strict=True)
        )
        reason = f"its logits differ by {error:.2g} standard deviations"
        if error < (1e-2 if found[0].dtype == torch.float32 else 0.25):
            return RaggedDecoder(model, max_tokens)
    except Exception as failure:  # whatever an unknown architecture trips over
        reason = str(failure).strip().splitlines()[0] if str(failure).strip() else repr(failure)
    _log.warning(
        "%s does not work with the shared KV cache (%s); dialogues are encoded anew each turn",
        type(model).__name__,
        reason,
    )
    model.set_attn_implementation(original)
    return ReencodingDecoder(model)


def _plain_logits(model: Any, row: list[int]) -> Tensor:
    device = next(model.parameters()).device
    output = model(input_ids=torch.tensor([row], device=device), use_cache=False)
    logits: Tensor = output.logits[0, -1]
    if not torch.isfinite(logits).all():
        raise InputError(f"model: {type(model).__name__} gives logits that are not finite")
    return logits
