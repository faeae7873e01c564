"""Log-probabilities of sampled replies: one forward pass over packed dialogues.

Where the model's attention is torch's, the pass is over the nodes of the rows' tree: what dialogues
of a group begin with is encoded once, and padding never.

Shapes: B rows, L tokens of the longest row, T nodes of their tree, M sampled tokens of the batch,
D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normkit.errors import InputError
from normkit.rl.dialogue import PackedRow
from normkit.rl.inference import unwrap
from normkit.rl.row_attention import rows_attend
from normkit.rl.row_tree import RowTree

_KEPT = 1 << 27
"""Logits of a batch up to this many are kept for the backward pass; more are made anew there."""

_CHUNK = 256
"""Positions whose logits are made at once where they are not kept."""

_BLOCK = 32
"""Positions whose logits go through float32 at once: few enough to stay in a CPU's cache."""


@dataclass(frozen=True)
class TokenBatch:
    """Packed rows, right-padded, and the flat list of their sampled tokens.

    Attributes:
        input_ids: ``[B, L]``.
        attention_mask: ``[B, L]``, 1 on tokens and 0 on padding.
        row: row of each sampled token ``[M]``.
        position: position of each sampled token in its row ``[M]``; always at least 1.
        turn_row: row of the turn table each token belongs to ``[M]``.
        logprob: log-probability at sampling ``[M]``.
        tree: the rows as a tree.
    """

    input_ids: Tensor
    attention_mask: Tensor
    row: Tensor
    position: Tensor
    turn_row: Tensor
    logprob: Tensor
    tree: RowTree

    @property
    def target(self) -> Tensor:
        """The sampled tokens ``[M]``."""
        return self.input_ids[self.row, self.position]


def collate(rows: Sequence[PackedRow], device: torch.device | str = "cpu") -> TokenBatch:
    """Right-pad rows into one batch (the padding token is irrelevant: it is masked everywhere).

    Args:
        rows: B packed rows; of their tokens M are sampled in all.
        device: where the batch goes.

    Returns:
        Tokens ``[B, L]``, and for the M sampled ones where they stand and their log-probabilities.

    Raises:
        InputError: where a sampled token is the first of its row: nothing predicts it.
    """
    pad = nn.utils.rnn.pad_sequence
    input_ids = pad([row.token_ids for row in rows], batch_first=True)
    turn_row = pad([row.turn_row for row in rows], batch_first=True, padding_value=-1)
    logprob = pad([row.logprob for row in rows], batch_first=True)
    lengths = torch.tensor([len(row.token_ids) for row in rows])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    at = torch.nonzero(turn_row >= 0)
    row, position = at[:, 0], at[:, 1]
    if (position == 0).any():
        raise InputError("rows: a sampled token cannot be the first token of its row")
    return TokenBatch(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        row=row.to(device),
        position=position.to(device),
        turn_row=turn_row[row, position].to(device),
        logprob=logprob[row, position].to(device),
        tree=RowTree.of([row.token_ids for row in rows], device),
    )


def token_logprobs(
    model: nn.Module,
    batch: TokenBatch,
    temperature: float = 1.0,
    entropy: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""Log-probability of every sampled token, with logits only where replies are.

    Args:
        model: a causal language model of transformers, wrapped or not.
        batch: the packed rows.
        temperature: temperature the replies were sampled at.
        entropy: also return the entropy of each token's distribution.
        recompute: keep only the inputs of the model's layers for the backward pass.

    Returns:
        Log-probabilities ``[M]`` in float32, in the order of ``batch``, and the entropies ``[M]``
        in nats or None.
    """
    hidden, head = token_states(model, batch, recompute)
    return state_logprobs(hidden, head, batch.target, temperature, entropy)


def token_states(
    model: nn.Module, batch: TokenBatch, recompute: bool = False
) -> tuple[Tensor, nn.Module]:
    """Hidden states that the sampled tokens follow from, and the vocabulary projection.

    They are of the position before each token: what :func:`state_logprobs` predicts it from, and
    what a critic (:mod:`normkit.rl.critic`) judges.

    Args:
        model: a causal language model of transformers, wrapped or not.
        batch: the packed rows.
        recompute: keep only the inputs of the model's layers for the backward pass.

    Returns:
        Hidden states ``[M, D]`` and the projection.
    """
    tree = batch.tree if takes_trees(model) else None
    hidden, head = _encode(model, batch, tree, recompute)
    return hidden[batch.row, batch.position - 1], head


def takes_trees(model: nn.Module) -> bool:
    """Whether a model computes the same over the nodes of a tree of rows as over the rows.

    So it is where tokens meet in attention alone and that attention is torch's. The model is tried
    on a few tokens, once, so that one which does not fit (recurrent state, positions of its own
    counting) is found out here.

    Args:
        model: a causal language model of transformers, wrapped or not.
    """
    inner = unwrap(model)
    if inner.config.get_text_config()._attn_implementation != "sdpa":
        return False
    if inner not in _FITS:
        _FITS[inner] = _fits(inner)
    return _FITS[inner]


_FITS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def _fits(model: Any) -> bool:
    """Compare the hidden states of two rows that begin alike."""
    device = next(model.parameters()).device
    size = int(model.get_input_embeddings().num_embeddings)
    rows = [torch.tensor(row).remainder(size) for row in ([7, 3, 9, 4, 8, 2], [7, 3, 9, 5])]
    batch = collate(
        [PackedRow(r, torch.full_like(r, -1), torch.zeros(len(r))) for r in rows], device
    )
    with torch.autocast(device.type, enabled=False):
        rows_alone, _ = _encode(model, batch, None)
        try:
            as_nodes, _ = _encode(model, batch, batch.tree)
        except Exception:  # whatever an unknown architecture trips over
            return False
    real = batch.attention_mask.bool()
    expected, found = rows_alone[real].float(), as_nodes[real].float()
    error = float((found - expected).abs().max() / expected.std().clamp_min(1e-12))
    return error < (1e-3 if rows_alone.dtype == torch.float32 else 0.25)


def _encode(
    model: nn.Module, batch: TokenBatch, tree: RowTree | None, recompute: bool = False
) -> tuple[Tensor, nn.Module]:
    """Hidden states of the rows ``[B, L, D]``, found over their nodes if there is a tree."""
    inner = unwrap(model)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if tree is not None:
        ids = tree.fold(batch.input_ids)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["position_ids"] = tree.position[None]
    with (
        _hidden_states_only(inner) as head,
        _recomputed_layers(inner, recompute, tree),
        rows_attend(inner, tree),
    ):
        hidden = model(**inputs, use_cache=False).logits
    return hidden if tree is None else tree.unfold(hidden), head


def state_logprobs(
    hidden: Tensor,
    head: nn.Module,
    target: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    r"""Log-probability of a token after each hidden state.

    ``log softmax(z / temperature)[token]``, z the projection of the state. Logits are made and
    dropped in chunks, forward and backward.

    Args:
        hidden: ``[M, D]``.
        head: the vocabulary projection.
        target: the tokens ``[M]``.
        temperature: divides the logits.
        entropy: also return the entropy of each distribution.

    Returns:
        As :func:`token_logprobs`.
    """
    weights = tuple(weight for weight in head.parameters() if weight.requires_grad)
    apply: Callable[..., tuple[Tensor, Tensor]] = _TokenScores.apply
    logprob, spread = apply(head, target, temperature, entropy, hidden, *weights)
    return logprob, spread if entropy else None


class _TokenScores(torch.autograd.Function):
    r"""Log-probabilities and entropies of tokens, with the logits of one chunk at a time.

    With ``p = softmax(z)``: ``d log p_k / dz = e_k - p`` and ``dH / dz = -p (log p + H)``. The
    backward pass projects each chunk anew and turns its logits into their gradient in place, where
    autograd through a log-softmax holds half a dozen arrays of that size.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: Any,
        target: Tensor,
        temperature: float,
        entropy: bool,
        hidden: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Score ``target [M]`` after ``hidden [M, D]``; the entropies are zeros if not asked for.

        ``weights`` are those of ``head`` that train, named so that autograd sees them.
        """
        kind = hidden.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.head, ctx.temperature = head, temperature
        ctx.save_for_backward(target, hidden, *weights)
        ctx.set_materialize_grads(False)
        vocabulary = max(len(parameter) for parameter in head.parameters())
        keep = any(ctx.needs_input_grad) and len(target) * vocabulary <= _KEPT
        ctx.kept = []
        logprob, spread = hidden.new_zeros(2, len(target), dtype=torch.float32)
        for part in _parts(len(target), max(len(target), 1) if keep else _CHUNK):
            states, logits = _project(head, hidden[part], keep)
            for block in _parts(len(logits), _BLOCK):
                rows = slice(part.start + block.start, part.start + block.stop)
                shifted = _shift(logits[block], temperature)
                chosen = shifted.gather(-1, target[rows, None])[:, 0]
                powers = shifted.exp() if entropy else shifted.exp_()
                total = powers.sum(-1)
                logprob[rows] = chosen - total.log()
                if entropy:
                    spread[rows] = _entropy(powers, shifted, total)
            if keep:
                ctx.kept.append((part, states, logits))
        return logprob, spread

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the hidden states ``[M, D]`` and of the weights."""
        target, hidden, *weights = ctx.saved_tensors
        of_logprob, of_entropy = gradients
        if of_logprob is None:
            of_logprob = hidden.new_zeros(len(target), dtype=torch.float32)
        slopes = [torch.zeros_like(tensor) for tensor in (hidden, *weights)]
        kind, dtype, enabled = ctx.autocast
        with torch.autocast(kind, dtype=dtype, enabled=enabled):
            anew = (
                (part, *_project(ctx.head, hidden[part], True))
                for part in _parts(len(target), _CHUNK)
            )
            for part, states, logits in ctx.kept or anew:
                slope = torch.empty_like(logits)
                for block in _parts(len(logits), _BLOCK):
                    rows = slice(part.start + block.start, part.start + block.stop)
                    slope[block] = _logit_slope(
                        _shift(logits[block].detach(), ctx.temperature),
                        target[rows],
                        of_logprob[rows] / ctx.temperature,
                        None if of_entropy is None else of_entropy[rows] / ctx.temperature,
                    )
                # A second backward pass through the scores goes through the same projection.
                found = torch.autograd.grad(logits, (states, *weights), slope, retain_graph=True)
                slopes[0][part] = found[0]
                for total, more in zip(slopes[1:], found[1:], strict=True):
                    total.add_(more)
        return None, None, None, None, *slopes


def _parts(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _project(head: nn.Module, hidden: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    """States cut loose from what made them, and their logits."""
    with torch.set_grad_enabled(differentiable):
        states = hidden.detach().requires_grad_(differentiable)
        return states, head(states)


def _shift(logits: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature in float32, each row less its largest."""
    scaled = logits.float() / temperature
    return scaled.sub_(scaled.amax(-1, keepdim=True))


def _entropy(powers: Tensor, shifted: Tensor, total: Tensor) -> Tensor:
    expected: Tensor = torch.linalg.vecdot(powers, shifted)
    return total.log() - expected / total


def _logit_slope(
    shifted: Tensor, target: Tensor, of_logprob: Tensor, of_entropy: Tensor | None
) -> Tensor:
    """Gradient with respect to logits over the temperature ``[m, V]``; overwrites them."""
    powers = shifted.exp_() if of_entropy is None else shifted.exp()
    total = powers.sum(-1)
    if of_entropy is None:
        slope = powers.mul_((-of_logprob / total)[:, None])
    else:
        offset = of_entropy * (_entropy(powers, shifted, total) - total.log()) + of_logprob
        factor = shifted.mul_(of_entropy[:, None]).add_(offset[:, None])
        slope = powers.mul_(factor).div_(-total[:, None])
    return slope.scatter_add_(-1, target[:, None], of_logprob[:, None])


@contextmanager
def _hidden_states_only(inner: Any) -> Iterator[Any]:
    """Let the model return what its vocabulary projection is given; yield the projection.

    Replacing the projection for one call leaves every wrapper (PEFT, DDP) and its hooks in place,
    where calling the inner decoder would go around them.
    """
    config = inner.config
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise InputError(
                f"model: {type(inner).__name__} rescales its logits ({name}); "
                "normkit gathers hidden states before the projection and cannot do that"
            )
    head = inner.get_output_embeddings()
    if head is None:
        raise InputError(f"model: {type(inner).__name__} has no vocabulary projection")
    with_identity = nn.Identity()
    inner.set_output_embeddings(with_identity)
    try:
        yield head
    finally:
        inner.set_output_embeddings(head)


@contextmanager
def _recomputed_layers(model: nn.Module, recompute: bool, tree: RowTree | None) -> Iterator[None]:
    """Let every layer of the stack forget its activations until the backward pass.

    transformers' own switch works in training mode only, which would turn dropout on.
    """
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList)] if recompute else []
    if recompute and not stacks:
        raise InputError(f"recompute: {type(model).__name__} has no list of layers")
    layers = max(stacks, key=lambda s: sum(p.numel() for p in s.parameters()), default=())
    for layer in layers:
        # The backward pass computes them when this block is over, with the attention they had.
        forward = rows_attend(model, tree)(layer.forward)
        layer.forward = partial(checkpoint, forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
