"""Layer-normalized LSTM and GRU. Layer Normalization (Ba, Kiros, Hinton, 2016), arXiv 1607.06450.

Equations 20 to 29 of the supplement, with LN(a; g, b) = (a - mean) / sqrt(var + eps) * g + b:

    LSTM   a = LN(W_ih x; gain_ih, bias_ih) + LN(W_hh h; gain_hh, bias_hh)
           i, f, g, o = a
           c' = sigmoid(f) c + sigmoid(i) tanh(g)
           h' = sigmoid(o) tanh(LN(c'; gain_c, bias_c))
    GRU    r, z = sigmoid(LN(W_ih x) + LN(W_hh h)),  the rows of r and z
           n = tanh(LN(W_ih x) + r LN(W_hh h)),      the rows of n
           h' = (1 - z) n + z h

The statistics of one LN run over all gates that the paper stacks (i, f, g, o of the LSTM; r, z of
the GRU, whose n stands alone); ``per_gate=True`` gives each gate its own, as some libraries do.

Shapes: T steps, B batch, I input_size, H hidden_size, G gates (4 or 3), L layers x directions.
Differences from the authors' code (ryankiros/layer-norm): gates stand in torch's order; the
paper's bias b next to the two LNs is left out, since the shifts of the LNs add up to the same (the
code also adds it within the first LN, where the paper does not); the GRU's update gate weighs the
old state, as in torch and in the code; weights start uniform as torch's do, not orthogonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from normkit.errors import InputError
from normkit.functional.norms import check_normalized, layer_norm

State: TypeAlias = tuple[Tensor, ...]


class _Cell(nn.Module):
    """Weights, gains and shifts of one step; subclasses define :meth:`step`.

    Attributes:
        gates: gates that the weights stack.
        stacks: how many neighbouring gates share their statistics.
        states: tensors that are carried from step to step.
    """

    gates: int
    stacks: tuple[int, ...]
    states: int

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        per_gate: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if size < 1:
                raise InputError(f"{name} must be at least 1, got {size}")
        if not eps >= 0:
            raise InputError(f"eps must be at least 0, got {eps}")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.per_gate, self.eps = per_gate, eps
        stacks = (1,) * self.gates if per_gate else self.stacks
        self.sizes = [n * hidden_size for n in stacks]
        self._options = {"device": device, "dtype": dtype}
        rows = self.gates * hidden_size
        self.weight_ih = self._parameter(rows, input_size)
        self.weight_hh = self._parameter(rows, hidden_size)
        self.gain_ih, self.gain_hh = self._parameter(rows), self._parameter(rows)
        self.bias_ih = self._parameter(rows) if bias else None
        self.bias_hh = self._parameter(rows) if bias else None
        if self.states == 2:  # what the LSTM carries beside h is normalized where h reads it
            self.gain_c = self._parameter(hidden_size)
            self.bias_c = self._parameter(hidden_size) if bias else None
        self.reset_parameters()

    def _parameter(self, *size: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(size, **self._options))  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Draw weights uniformly within ``1 / sqrt(H)``; gains become one and shifts zero."""
        bound = 1 / math.sqrt(self.hidden_size)
        for name, p in self.named_parameters():
            if name.startswith("weight"):
                nn.init.uniform_(p, -bound, bound)
            else:
                nn.init.constant_(p, float(name.startswith("gain")))

    def project(self, x: Tensor) -> Tensor:
        """The input's share of the gates, ``LN(W_ih x)``: ``[*, I]`` to ``[*, G*H]``."""
        return self.norm(F.linear(x, self.weight_ih), self.gain_ih, self.bias_ih)

    def recur(self, h: Tensor) -> Tensor:
        """The state's share of the gates, ``LN(W_hh h)``: ``[B, H]`` to ``[B, G*H]``."""
        return self.norm(F.linear(h, self.weight_hh), self.gain_hh, self.bias_hh)

    def norm(self, a: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        """Normalize stacked gates, each stack by its own statistics."""
        if len(self.sizes) == 1:
            return layer_norm(a, self.sizes, gain, bias, self.eps)
        absent = [None] * len(self.sizes)
        parts = zip(
            torch.split(a, self.sizes, -1),
            torch.split(gain, self.sizes),
            absent if bias is None else torch.split(bias, self.sizes),
            strict=True,
        )
        return torch.cat([layer_norm(p, g.shape, g, b, self.eps) for p, g, b in parts], -1)

    def step(self, projected: Tensor, state: State) -> State:
        """One step from the input's share of the gates: the next state, h first."""
        raise InputError(f"{type(self).__name__} must define step(projected, state)")

    def initial(self, x: Tensor, given: Sequence[Tensor] | None) -> State:
        """The given state, checked, or zeros, for ``[B, I]`` inputs."""
        check_normalized(x, (self.input_size,))
        shape = (*x.shape[:-1], self.hidden_size)
        if given is None:
            zeros = x.new_zeros(shape)
            return (zeros,) * self.states
        for h in given:
            if h.shape != shape:
                raise InputError(f"a state must have shape {shape}, got {tuple(h.shape)}")
        return tuple(given)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        text = f"{self.input_size}, {self.hidden_size}, bias={self.bias_ih is not None}"
        return f"{text}, per_gate={self.per_gate}, eps={self.eps}"


class LNLSTMCell(_Cell):
    """One step of the layer-normalized LSTM; called as ``torch.nn.LSTMCell``.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: whether the norms have shifts.
        device: of the parameters.
        dtype: of the parameters.
        per_gate: give each gate statistics of its own; the paper's are over all four.
        eps: added to each variance.

    Raises:
        InputError: for a size below one or a negative eps.

    Source:
        arXiv 1607.06450, equations 20 to 22.
    """

    gates, stacks, states = 4, (4,), 2

    def step(self, projected: Tensor, state: State) -> State:
        """``[B, 4H]`` and (h, c) to the next (h, c)."""
        h, c = state
        i, f, g, o = (projected + self.recur(h)).chunk(4, -1)
        c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
        normed = layer_norm(c, (self.hidden_size,), self.gain_c, self.bias_c, self.eps)
        return o.sigmoid() * normed.tanh(), c

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> State:
        """Take one step.

        Args:
            x: ``[B, I]`` or ``[I]``.
            hx: h and c, each ``[B, H]`` or ``[H]``; zeros where absent.

        Returns:
            The next h and c.

        Raises:
            InputError: for integers or shapes that do not fit.
        """
        state = self.initial(x, hx)
        return self.step(self.project(x), state)


class LNGRUCell(_Cell):
    """One step of the layer-normalized GRU; called as ``torch.nn.GRUCell``.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: whether the norms have shifts.
        device: of the parameters.
        dtype: of the parameters.
        per_gate: give each gate statistics of its own; the paper's are over r and z together.
        eps: added to each variance.

    Raises:
        InputError: for a size below one or a negative eps.

    Source:
        arXiv 1607.06450, equations 26 to 29.
    """

    gates, stacks, states = 3, (2, 1), 1

    def step(self, projected: Tensor, state: State) -> State:
        """``[B, 3H]`` and (h,) to the next (h,)."""
        (h,) = state
        ours, theirs = projected.chunk(3, -1), self.recur(h).chunk(3, -1)
        r, z = (ours[0] + theirs[0]).sigmoid(), (ours[1] + theirs[1]).sigmoid()
        n = torch.addcmul(ours[2], r, theirs[2]).tanh()
        return (n + z * (h - n),)

    def forward(self, x: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step.

        Args:
            x: ``[B, I]`` or ``[I]``.
            hx: h ``[B, H]`` or ``[H]``; zeros where absent.

        Returns:
            The next h.

        Raises:
            InputError: for integers or shapes that do not fit.
        """
        state = self.initial(x, None if hx is None else (hx,))
        return self.step(self.project(x), state)[0]


class _Recurrent(nn.Module):
    """Layers and directions of cells over sequences; subclasses name the cell.

    The inputs of a whole sequence are projected and normalized at once; only the recurrence loops.
    """

    cell: type[_Cell]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        per_gate: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise InputError(f"num_layers must be at least 1, got {num_layers}")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        self.directions = 2 if bidirectional else 1
        self.cells = nn.ModuleList(
            self.cell(
                input_size if layer == 0 else self.directions * hidden_size,
                hidden_size,
                bias,
                device,
                dtype,
                per_gate=per_gate,
                eps=eps,
            )
            for layer in range(num_layers)
            for _ in range(self.directions)
        )

    def reset_parameters(self) -> None:
        """Reset every cell."""
        for cell in self.cells:
            cell.reset_parameters()  # type: ignore[operator]

    def _run(
        self, x: Tensor | PackedSequence, hx: Sequence[Tensor] | None
    ) -> tuple[Tensor | PackedSequence, list[Tensor]]:
        """Outputs, and every final state ``[L, B, H]``."""
        if isinstance(x, PackedSequence):
            given = None if hx is None else [_permuted(h, x.sorted_indices) for h in hx]
            sizes = x.batch_sizes.tolist()
            data, state = self._layers(x.data, sizes, sizes[0], given)
            out = PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
            return out, [_permuted(h, x.unsorted_indices) for h in state]
        check_normalized(x, (self.input_size,))
        if x.dim() not in (2, 3):
            raise InputError(f"x must have 2 or 3 dimensions, got shape {tuple(x.shape)}")
        single = x.dim() == 2
        time = 1 if self.batch_first and not single else 0
        if x.shape[time] == 0:
            raise InputError("x must have at least one step")
        whole = x.unsqueeze(1) if single else x.transpose(0, time)
        if hx is not None and single:
            hx = [h.unsqueeze(-2) for h in hx]
        y, state = self._layers(whole, None, whole.shape[1], hx)
        if single:
            return y.squeeze(1), [h.squeeze(1) for h in state]
        return y.transpose(0, time), state

    def _layers(
        self, x: Tensor, sizes: list[int] | None, batch: int, given: Sequence[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers over ``[T, B, I]``, or over packed ``[sum(sizes), I]``."""
        check_normalized(x, (self.input_size,))
        shape = (len(self.cells), batch, self.hidden_size)
        count = self.cell.states
        if given is None:
            given = [x.new_zeros(shape)] * count
        for h in given:
            if tuple(h.shape) != shape:
                raise InputError(f"a state must have shape {shape}, got {tuple(h.shape)}")
        ends: list[State] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for direction in range(self.directions):
                index = len(ends)
                cell: Any = self.cells[index]
                projected = cell.project(x)
                steps = projected.unbind(0) if sizes is None else projected.split(sizes)
                out, end = _scan(cell, steps, tuple(h[index] for h in given), direction == 1)
                outputs.append(torch.stack(out) if sizes is None else torch.cat(out))
                ends.append(end)
            x = outputs[0] if self.directions == 1 else torch.cat(outputs, -1)
        return x, [torch.stack([end[s] for end in ends]) for s in range(count)]

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, "
            f"batch_first={self.batch_first}, dropout={self.dropout}, "
            f"bidirectional={self.bidirectional}"
        )


class LNLSTM(_Recurrent):
    """Layer-normalized LSTM over sequences; called as ``torch.nn.LSTM``.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: layers, each reading the one below.
        bias: whether the norms have shifts.
        batch_first: whether inputs and outputs are ``[B, T, ...]``.
        dropout: probability of dropping an output between layers, in training.
        bidirectional: whether each layer also reads backwards.
        device: of the parameters.
        dtype: of the parameters.
        per_gate: give each gate statistics of its own; the paper's are over all four.
        eps: added to each variance.

    Raises:
        InputError: for sizes below one, a dropout outside [0, 1) or a negative eps.

    Source:
        arXiv 1607.06450, equations 20 to 22.
    """

    cell = LNLSTMCell

    def forward(
        self, x: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Read sequences.

        Args:
            x: ``[T, B, I]`` (``[B, T, I]`` with ``batch_first``), ``[T, I]``, or packed.
            hx: h and c at the start, each ``[L, B, H]`` (``[L, H]`` for one sequence).

        Returns:
            The outputs, shaped like ``x`` with ``H * directions`` features, and the final h and c.

        Raises:
            InputError: for integers, no steps, or shapes that do not fit.
        """
        out, (h, c) = self._run(x, hx)
        return out, (h, c)


class LNGRU(_Recurrent):
    """Layer-normalized GRU over sequences; called as ``torch.nn.GRU``.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: layers, each reading the one below.
        bias: whether the norms have shifts.
        batch_first: whether inputs and outputs are ``[B, T, ...]``.
        dropout: probability of dropping an output between layers, in training.
        bidirectional: whether each layer also reads backwards.
        device: of the parameters.
        dtype: of the parameters.
        per_gate: give each gate statistics of its own; the paper's are over r and z together.
        eps: added to each variance.

    Raises:
        InputError: for sizes below one, a dropout outside [0, 1) or a negative eps.

    Source:
        arXiv 1607.06450, equations 26 to 29.
    """

    cell = LNGRUCell

    def forward(
        self, x: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Read sequences.

        Args:
            x: ``[T, B, I]`` (``[B, T, I]`` with ``batch_first``), ``[T, I]``, or packed.
            hx: h at the start ``[L, B, H]`` (``[L, H]`` for one sequence).

        Returns:
            The outputs, shaped like ``x`` with ``H * directions`` features, and the final h.

        Raises:
            InputError: for integers, no steps, or shapes that do not fit.
        """
        out, (h,) = self._run(x, None if hx is None else (hx,))
        return out, h


def _scan(
    cell: _Cell, steps: Sequence[Tensor], initial: State, reverse: bool
) -> tuple[list[Tensor], State]:
    """Run a cell over time; step t holds the rows whose sequences are that long, longest first.

    Returns:
        The h of each step, in order of time, and the state ``[B, H]`` where each sequence ended.
    """
    outputs: list[Any] = [None] * len(steps)
    order = range(len(steps) - 1, -1, -1) if reverse else range(len(steps))
    rows = steps[order[0]].shape[0]
    state = tuple(s[:rows] for s in initial)
    ended: list[State] = []
    for t in order:
        now = steps[t].shape[0]
        if now < rows:
            ended.append(tuple(s[now:] for s in state))
            state = tuple(s[:now] for s in state)
        elif now > rows:
            state = tuple(
                torch.cat([s, start[rows:now]]) for s, start in zip(state, initial, strict=True)
            )
        rows = now
        state = cell.step(steps[t], state)
        outputs[t] = state[0]
    if ended:
        parts = [state, *reversed(ended)]
        state = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return outputs, state


def _permuted(h: Tensor, order: Tensor | None) -> Tensor:
    return h if order is None else h.index_select(1, order)
