"""The contract of a layer, as checks that anyone can run on a layer of their own.

::

    from functools import partial
    from normkit.testing import check_layer

    check_layer(partial(MyNorm, 8), lambda n: torch.randn(n, 5, 8))

A layer keeps the contract when it is differentiated correctly, is captured by ``torch.compile`` and
``torch.export`` in one graph, works in bfloat16 and under autocast, takes any memory layout and any
batch, ignores what a mask hides, can be saved and copied, and refuses input it has no meaning for.
:data:`LAYER_CHECKS` lists the checks by name; each can be run alone, or skipped with a reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from normkit.errors import InputError
from normkit.testing.contract import run_checks

Inputs: TypeAlias = "Tensor | tuple[Tensor, ...]"
ROUNDING = 3e-2  # what bfloat16 may differ by, relative to the output's size


@dataclass(frozen=True)
class LayerCase:
    """A layer and what it needs to be checked.

    Attributes:
        name: shown in test ids and messages.
        factory: makes the layer in its initial state; takes ``device`` and ``dtype`` where the
            layer has tensors. A ``functools.partial`` of the class will do.
        example: float32 inputs for a batch size: the tensor x, or a tuple of x and what follows
            it. Dimension 0 of x is the batch. Gradients are checked in full: keep it small.
        mask: bool mask for a batch size, True where a value counts, with the leading dimensions of
            x or broadcastable to it; passed as ``mask=``. Absent for layers without a mask.
        features: the dimension of x whose size the layer fixes.
        channels_last: whether x is an image batch ``[B, C, H, W]`` whose layout must be kept.
        skip: reasons by name of check.
    """

    name: str
    factory: Callable[..., nn.Module]
    example: Callable[[int], Inputs]
    mask: Callable[[int], Tensor] | None = None
    features: int = -1
    channels_last: bool = False
    skip: Mapping[str, str] = field(default_factory=dict)

    def applies(self, check: str) -> bool:
        """Whether a check is meant for this layer and not skipped."""
        meant = {"mask": self.mask is not None, "channels_last": self.channels_last}
        return meant.get(check, True) and check not in self.skip

    def layer(self, train: bool = True, **options: Any) -> nn.Module:
        """A layer whose parameters are away from their special initial values."""
        torch.manual_seed(0)
        layer = self.factory(**options)
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.1 * torch.randn_like(p))
        return layer.train(train)

    def inputs(self, n: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Inputs for a batch of n; those of floating point require gradients."""
        torch.manual_seed(1)
        given = self.example(n)
        given = (given,) if isinstance(given, Tensor) else given
        return tuple(x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in given)


def check_layer(
    factory: Callable[..., nn.Module],
    example: Callable[[int], Inputs],
    *,
    mask: Callable[[int], Tensor] | None = None,
    features: int = -1,
    channels_last: bool = False,
    skip: Mapping[str, str] | None = None,
) -> None:
    """Run every check of the layer contract that applies.

    Args:
        factory: makes the layer; see :class:`LayerCase` for this and the other arguments.
        example: float32 inputs for a batch size.
        mask: bool mask for a batch size, for layers that take ``mask=``.
        features: the dimension of x whose size the layer fixes.
        channels_last: whether x is an image batch whose memory layout must be kept.
        skip: reasons by name of check (the keys of :data:`LAYER_CHECKS`).

    Raises:
        AssertionError: names each check that failed, and why.
        InputError: for the name of a check that does not exist.
    """
    case = LayerCase("layer", factory, example, mask, features, channels_last, skip or {})
    run_checks("layer", LAYER_CHECKS, case)


# ---------------------------------------------------------------------- derivatives


def check_gradients(case: LayerCase) -> None:
    """First derivatives by inputs and parameters are those of finite differences in float64."""
    function, arguments = _as_function(case)
    torch.autograd.gradcheck(function, arguments, nondet_tol=1e-12)


def check_second_gradients(case: LayerCase) -> None:
    """Second derivatives are those of finite differences in float64."""
    function, arguments = _as_function(case)
    torch.autograd.gradgradcheck(function, arguments, nondet_tol=1e-12)


# ---------------------------------------------------------------------- capture


def check_compile(case: LayerCase) -> None:
    """The layer is one graph with its derivative: ``torch.compile(fullgraph=True)`` as eager."""
    _compare_compiled(case, "aot_eager")


def check_inductor(case: LayerCase) -> None:
    """Generated code gives what eager gives."""
    _compare_compiled(case, "inductor")


def check_export(case: LayerCase) -> None:
    """``torch.export`` captures the layer in evaluation, and the program serves other batches."""
    layer = case.layer(train=False)
    inputs, keywords = _detached(case.inputs(3)), _keywords(case, 3)
    batch = {0: torch.export.Dim.DYNAMIC}
    every = tuple(batch if x.shape[:1] == (3,) else None for x in inputs)
    # Where the batch cannot be dynamic (a layer may read it) one size is still a program.
    dynamic = None if keywords else every
    try:
        program = torch.export.export(layer, inputs, keywords, dynamic_shapes=dynamic)
    except torch._dynamo.exc.UserError:
        dynamic = None
        program = torch.export.export(layer, inputs, keywords)
    for n in (3,) if dynamic is None else (3, 5):
        inputs, keywords = _detached(case.inputs(n)), _keywords(case, n)
        _close(program.module()(*inputs, **keywords), layer(*inputs, **keywords))


# ---------------------------------------------------------------------- precision


def check_autocast(case: LayerCase) -> None:
    """Under bfloat16 autocast outputs are close, and gradients arrive in each leaf's own dtype."""
    layer, inputs = case.layer(), case.inputs()
    keywords = _keywords(case)
    expected = copy.deepcopy(layer)(*inputs, **keywords)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(*inputs, **keywords)
    _close(out, expected, ROUNDING, dtype=False)
    _backward(out)
    for leaf in _leaves(layer, inputs):
        assert leaf.grad is not None, "a leaf has no gradient"
        assert leaf.grad.dtype == leaf.dtype, f"a {leaf.dtype} leaf got {leaf.grad.dtype}"
        assert leaf.grad.isfinite().all(), "a gradient is not finite"


def check_bfloat16(case: LayerCase) -> None:
    """A bfloat16 layer keeps bfloat16 and accumulates in float32."""
    layer = case.layer().bfloat16()
    inputs, keywords = case.inputs(dtype=torch.bfloat16), _keywords(case)
    wide = copy.deepcopy(layer).float()
    expected = wide(*(_floated(x) for x in inputs), **keywords)
    out = layer(*inputs, **keywords)
    first = tree_leaves(out)[0]
    assert first.dtype == torch.bfloat16, f"a bfloat16 layer returned {first.dtype}"
    _close(out, expected, ROUNDING, dtype=False)
    _backward(out)
    assert all(leaf.grad is not None for leaf in _leaves(layer, inputs))


def check_dtype(case: LayerCase) -> None:
    """The factory's ``dtype`` and ``device`` reach every floating parameter and buffer."""
    made = case.factory(dtype=torch.float64)
    state = [*made.parameters(), *made.buffers()]
    wrong = [t.dtype for t in state if t.is_floating_point() and t.dtype != torch.float64]
    assert not wrong, f"dtype=torch.float64 gave {wrong[0]}"
    on_meta = case.factory(device="meta")
    devices = {t.device.type for t in [*on_meta.parameters(), *on_meta.buffers()]}
    assert devices <= {"meta"}, f"device='meta' gave {sorted(devices)}"


# ---------------------------------------------------------------------- batches and layouts


def check_empty_batch(case: LayerCase) -> None:
    """A batch of none gives an output of none, and gradients of zero."""
    for train in (True, False):
        layer, inputs = case.layer(train), case.inputs(0)
        before = {name: t.clone() for name, t in layer.named_buffers()}
        out = layer(*inputs, **_keywords(case, 0))
        assert tree_leaves(out)[0].shape[0] == 0
        for name, t in layer.named_buffers():
            assert t.isfinite().all(), f"an empty batch made the buffer {name} not finite"
            assert not t.is_floating_point() or torch.equal(t, before[name]), (
                f"an empty batch moved the buffer {name}"
            )
        _backward(out)
        for p in layer.parameters():
            assert p.grad is None or not p.grad.any(), "an empty batch gave a gradient"


def check_batch_of_one(case: LayerCase) -> None:
    """A batch of one trains, and in evaluation a sample's output is its own affair."""
    layer, inputs = case.layer(), case.inputs(1)
    _backward(layer(*inputs, **_keywords(case, 1)))
    for leaf in _leaves(layer, inputs):
        assert leaf.grad is None or leaf.grad.isfinite().all(), "a gradient is not finite"
    layer, inputs = case.layer(train=False), _detached(case.inputs(3))
    keywords = _keywords(case)
    whole = tree_leaves(layer(*inputs, **keywords))[0]
    alone = tree_leaves(
        layer(*(x[:1] for x in inputs), **{name: m[:1] for name, m in keywords.items()})
    )[0]
    _close(alone, whole[:1])


def check_non_contiguous(case: LayerCase) -> None:
    """The layout of the input's memory changes neither output nor gradients."""
    layer, inputs = case.layer(), case.inputs()
    twin = copy.deepcopy(layer)
    strided = tuple(_strided(x) for x in inputs)
    _same_run(layer, inputs, twin, strided, _keywords(case))


def check_channels_last(case: LayerCase) -> None:
    """An image batch in channels-last memory comes out in it, with the same values."""
    layer, inputs = case.layer(), case.inputs()
    twin = copy.deepcopy(layer)
    last = tuple(
        x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        if x.dim() == 4
        else x
        for x in inputs
    )
    out = _same_run(layer, inputs, twin, last, _keywords(case))
    first = tree_leaves(out)[0]
    assert first.is_contiguous(memory_format=torch.channels_last), "channels-last memory was lost"


# ---------------------------------------------------------------------- mask


def check_mask(case: LayerCase) -> None:
    """What stands under the mask, NaN among it, reaches no output, gradient or statistic."""
    for train in (True, False):
        runs = []
        for fill in (7.0, torch.nan):
            layer, inputs = case.layer(train), case.inputs()
            keywords = _keywords(case)
            counts = _expanded(keywords["mask"], inputs[0])
            x = inputs[0].detach().masked_fill(~counts, fill).requires_grad_()
            out = tree_leaves(layer(x, *inputs[1:], **keywords))[0]
            visible = _expanded(keywords["mask"], out)
            (out.masked_fill(~visible, 0) * _weights(out)).sum().backward()
            assert x.grad is not None, "the input has no gradient"
            assert not x.grad[~counts].any(), "a masked value has a gradient"
            grads = [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
            runs.append([out.detach()[visible], *grads, *layer.buffers()])
        for a, b in zip(*runs, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text: f"under the mask: {text}")


# ---------------------------------------------------------------------- state


def check_state_dict(case: LayerCase) -> None:
    """The state loads strictly into a new layer, which then gives the same output."""
    layer, inputs = case.layer(), _detached(case.inputs())
    keywords = _keywords(case)
    layer(*inputs, **keywords)  # moves the statistics, where there are any
    torch.manual_seed(2)
    twin = case.factory()
    twin.load_state_dict(layer.state_dict())
    _close(twin.eval()(*inputs, **keywords), layer.eval()(*inputs, **keywords), 0)


def check_deepcopy(case: LayerCase) -> None:
    """A copy gives the same output and shares no memory."""
    layer, inputs = case.layer(train=False), _detached(case.inputs())
    keywords = _keywords(case)
    twin = copy.deepcopy(layer)
    _close(twin(*inputs, **keywords), layer(*inputs, **keywords), 0)
    mine = {t.data_ptr() for t in layer.state_dict().values() if t.numel()}
    theirs = {t.data_ptr() for t in twin.state_dict().values() if t.numel()}
    assert not mine & theirs, "a deep copy shares memory with its original"


def check_reset_parameters(case: LayerCase) -> None:
    """``reset_parameters`` restores the initial state."""
    torch.manual_seed(0)
    fresh = case.factory()
    layer = case.layer()
    layer(*_detached(case.inputs()), **_keywords(case))
    torch.manual_seed(0)
    layer.reset_parameters()  # type: ignore[operator]
    for name, value in fresh.state_dict().items():
        torch.testing.assert_close(
            layer.state_dict()[name], value, rtol=0, atol=0, msg=f"{name} was not reset"
        )


def check_extra_repr(case: LayerCase) -> None:
    """``extra_repr`` says how the layer was made."""
    layer = case.factory()
    assert layer.extra_repr(), "extra_repr is empty"
    assert layer.extra_repr() in repr(layer)


# ---------------------------------------------------------------------- refusals


def check_integer_input(case: LayerCase) -> None:
    """Integers are refused with InputError."""
    x, *others = _detached(case.inputs())
    with _refused("integer input"):
        case.layer()(x.long(), *others, **_keywords(case))


def check_wrong_shape(case: LayerCase) -> None:
    """One feature too many, and a scalar, are refused with InputError."""
    x, *others = _detached(case.inputs())
    wide = torch.cat([x, x.narrow(case.features, 0, 1)], case.features)
    with _refused(f"input of shape {tuple(wide.shape)}"):
        case.layer()(wide, *others, **_keywords(case))
    with _refused("a scalar"):
        case.layer()(torch.tensor(1.0), *others)


LAYER_CHECKS: dict[str, Callable[[LayerCase], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (
        check_gradients,
        check_second_gradients,
        check_compile,
        check_inductor,
        check_export,
        check_autocast,
        check_bfloat16,
        check_dtype,
        check_empty_batch,
        check_batch_of_one,
        check_non_contiguous,
        check_channels_last,
        check_mask,
        check_state_dict,
        check_deepcopy,
        check_reset_parameters,
        check_extra_repr,
        check_integer_input,
        check_wrong_shape,
    )
}
"""The checks by name, in the order in which they run."""


# ---------------------------------------------------------------------- parts


def _as_function(case: LayerCase) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The layer as a pure function of inputs and parameters, in float64."""
    layer, inputs = case.layer().double(), case.inputs(2, torch.float64)
    keywords = _keywords(case, 2)
    names = [name for name, _ in layer.named_parameters()]
    parameters = tuple(p.detach().clone().requires_grad_() for p in layer.parameters())
    buffers = dict(layer.named_buffers())

    def function(*arguments: Tensor) -> Any:
        state = {name: t.clone() for name, t in buffers.items()}
        state |= dict(zip(names, arguments[len(inputs) :], strict=True))
        out = torch.func.functional_call(layer, state, arguments[: len(inputs)], keywords)
        return tuple(t for t in tree_leaves(out) if t.requires_grad)

    return function, (*inputs, *parameters)


def _compare_compiled(case: LayerCase, backend: str) -> None:
    for train in (True, False):
        torch.compiler.reset()
        layer, inputs = case.layer(train), case.inputs()
        twin = copy.deepcopy(layer)
        compiled = torch.compile(twin, fullgraph=True, backend=backend)
        again = tuple(x.detach().requires_grad_(x.requires_grad) for x in inputs)
        _same_run(layer, inputs, twin, again, _keywords(case), compiled)
    torch.compiler.reset()


def _same_run(
    layer: nn.Module,
    inputs: tuple[Tensor, ...],
    twin: nn.Module,
    others: tuple[Tensor, ...],
    keywords: dict[str, Any],
    call: Callable[..., Any] | None = None,
) -> Any:
    """Assert equal outputs, gradients and buffers of two layers; return the twin's output."""
    call = twin if call is None else call
    out, other = layer(*inputs, **keywords), call(*others, **keywords)
    _close(other, out)
    _backward(out)
    _backward(other)
    for a, b in zip(_leaves(layer, inputs), _leaves(twin, others), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5)
    for a, b in zip(layer.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, a)
    return other


def _close(actual: Any, expected: Any, tolerance: float = 1e-5, dtype: bool = True) -> None:
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        scale = float(b.detach().abs().amax()) if b.numel() else 0.0
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance * max(scale, 1.0), check_dtype=dtype
        )


def _backward(out: Any) -> None:
    total = sum(
        ((t * _weights(t)).sum() for t in tree_leaves(out) if t.requires_grad), torch.zeros(())
    )
    total.backward()


def _weights(out: Tensor) -> Tensor:
    """Fixed cotangents, so that no symmetry of a sum hides an error."""
    return torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)


def _keywords(case: LayerCase, n: int = 3) -> dict[str, Tensor]:
    return {} if case.mask is None else {"mask": case.mask(n)}


def _leaves(layer: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return [t for t in (*inputs, *layer.parameters()) if t.requires_grad]


def _detached(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.detach() for x in inputs)


def _floated(x: Tensor) -> Tensor:
    return x.detach().float() if x.is_floating_point() else x


def _strided(x: Tensor) -> Tensor:
    """The same values with a gap after each in memory."""
    gapped = torch.stack([x.detach(), torch.zeros_like(x)], -1)[..., 0]
    return gapped.requires_grad_(x.requires_grad)


def _expanded(mask: Tensor, x: Tensor) -> Tensor:
    return mask[(..., *[None] * (x.dim() - mask.dim()))].expand(x.shape)


@contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        return
    raise AssertionError(f"{what} was not refused with InputError")
