"""A copy of the policy that only speaks, and the decoders that drive it.

Shapes: B rows of a call, T tokens of a call, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

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
        # What accelerate and TRL put around the original's forward would call the original.
        self.model.__dict__.pop("forward", None)
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
        self._cache_name = cache_name(model)
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
                use_cache=True,
                logits_to_keep=step.last,
                **{self._cache_name: self._cache},
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
        carry: how the model's own cache takes rows on by one token: with the mask of their padding
            ("masked": attention), without ("bare": recurrent states), or not at all ("none"; every
            token is then encoded anew, which is right for whatever is causal).
    """

    def __init__(self, model: Any, carry: Literal["masked", "bare", "none"] = "masked") -> None:
        self.model = model
        self.carry = carry
        self.device = next(model.parameters()).device
        self._rows: dict[int, list[int]] = {}
        self._running: list[int] = []
        self._cache: Any = None
        self._mask = torch.empty(0)

    def extend(self, slots: Sequence[int], tokens: Sequence[Sequence[int]]) -> Tensor:
        """See :meth:`Decoder.extend`."""
        slots = list(slots)
        for slot, new in zip(slots, tokens, strict=True):
            self._rows.setdefault(slot, []).extend(new)
        rows = [self._rows[slot] for slot in slots]
        one_each = all(len(new) == 1 for new in tokens)
        if self.carry == "none":
            return self._encode_whole(rows)
        if self._cache is not None and one_each and slots == self._running:
            return self._go_on([row[-1] for row in rows])
        self._running = slots
        return self._begin(rows)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See :meth:`Decoder.copy`."""
        for source, target in pairs:
            self._rows[target] = list(self._rows[source])

    def release(self, slots: Sequence[int]) -> None:
        """See :meth:`Decoder.release`."""
        for slot in slots:
            self._rows.pop(slot, None)
        self._cache = None

    def _begin(self, rows: Sequence[list[int]]) -> Tensor:
        """Encode rows side by side, padded on the left so that all end together."""
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows], device=self.device)
        self._mask = torch.tensor(
            [[0] * (longest - len(r)) + [1] * len(r) for r in rows], device=self.device
        )
        self._cache = None
        return self._call(ids, attention_mask=self._mask)

    def _go_on(self, tokens: list[int]) -> Tensor:
        self._mask = F.pad(self._mask, (0, 1), value=1)
        masks = {"attention_mask": self._mask} if self.carry == "masked" else {}
        return self._call(torch.tensor(tokens, device=self.device)[:, None], **masks)

    def _call(self, ids: Tensor, **masks: Tensor) -> Tensor:
        positions = (self._mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        name = cache_name(self.model)
        output = self.model(
            input_ids=ids, position_ids=positions, use_cache=True, **{name: self._cache}, **masks
        )
        self._cache = getattr(output, name)
        logits: Tensor = output.logits[:, -1]
        return logits

    def _encode_whole(self, rows: Sequence[list[int]]) -> Tensor:
        """Encode rows padded on the right, where a causal model cannot look."""
        padded = nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
        logits = self.model(input_ids=padded.to(self.device), use_cache=False).logits
        last: Tensor = logits[range(len(rows)), [len(r) - 1 for r in rows]]
        return last


def cache_name(model: nn.Module) -> str:
    """What the model's ``forward`` calls the cache that it is given and gives back.

    transformers renamed ``past_key_values`` (and ``cache_params`` of recurrent models) to ``cache``
    in 5.24.
    """
    accepted = inspect.signature(model.forward).parameters
    names = ("cache", "past_key_values", "cache_params")
    return next((name for name in names if name in accepted), "past_key_values")


@torch.inference_mode()
def make_decoder(copy_of: InferenceCopy, max_tokens: int) -> Decoder:
    """Return the fastest decoder that computes what the model computes.

    Each is run on a few tokens and judged by its logits, so that an architecture which does not fit
    (recurrent state, attention of its own making), or a change in transformers, is found out here.

    Args:
        copy_of: the inference copy; its attention implementation may be changed.
        max_tokens: see :class:`RaggedDecoder`.

    Raises:
        InputError: when no decoder reproduces the model, which then is not causal, or when the
            model's logits are not finite.
    """
    model = copy_of.model
    probe = _Probe(model)
    original = model.config._attn_implementation
    try:
        model.set_attn_implementation(ATTENTION)
        reason = probe.objection(RaggedDecoder(model, max_tokens))
    except Exception as failure:  # whatever an unknown architecture trips over
        reason = _first_line(failure)
    if reason is None:
        return RaggedDecoder(model, max_tokens)
    model.set_attn_implementation(original)
    _log.warning(
        "%s does not work with the shared KV cache (%s); dialogues are encoded anew each turn",
        type(model).__name__,
        reason,
    )
    for carry in ("masked", "bare", "none"):
        try:
            reason = probe.objection(ReencodingDecoder(model, carry))
        except Exception as failure:
            reason = _first_line(failure)
        if reason is None:
            return ReencodingDecoder(model, carry)
    raise InputError(
        f"model: {type(model).__name__} does not generate as a causal language model: {reason}"
    )


class _Probe:
    """Two short rows that grow, and the logits that the plain model gives after each."""

    def __init__(self, model: Any) -> None:
        size = int(model.get_input_embeddings().num_embeddings)
        self._rows = [[(7 * i + 3) % size for i in range(n)] for n in (5, 3)]
        self._turns = [
            [[token % size for token in new] for new in turn]
            for turn in ([[11], [5, 2]], [[4], [9]], [[8], [6]])
        ]
        self._expected = []
        rows = self._rows
        for turn in self._turns:
            rows = [row + new for row, new in zip(rows, turn, strict=True)]
            self._expected += [_plain_logits(model, row) for row in rows]

    def objection(self, decoder: Decoder) -> str | None:
        """Say how the decoder's logits differ from the plain model's; None where they do not."""
        decoder.extend([0, 1], self._rows)
        found = [logits for turn in self._turns for logits in decoder.extend([0, 1], turn)]
        decoder.release([0, 1])
        error = max(
            float((a.float() - b.float()).abs().max() / b.float().std().clamp_min(1e-12))
            for a, b in zip(found, self._expected, strict=True)
        )
        near = error < (1e-2 if found[0].dtype == torch.float32 else 0.25)
        return None if near else f"its logits differ by {error:.2g} standard deviations"


def _first_line(failure: Exception) -> str:
    text = str(failure).strip()
    return text.splitlines()[0] if text else repr(failure)


def _plain_logits(model: Any, row: list[int]) -> Tensor:
    device = next(model.parameters()).device
    output = model(input_ids=torch.tensor([row], device=device), use_cache=False)
    logits: Tensor = output.logits[0, -1]
    if not torch.isfinite(logits).all():
        raise InputError(f"model: {type(model).__name__} gives logits that are not finite")
    return logits
