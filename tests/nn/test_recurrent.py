"""Layer-normalized recurrent layers against NumPy, and against torch's way of calling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from normkit.errors import InputError
from normkit.nn import LNGRU, LNLSTM, LNGRUCell, LNLSTMCell
from tests.reference.layernorm import ln_gru, ln_lstm

T, B, F, H = 5, 3, 4, 6
KINDS = {"lstm": (LNLSTM, torch.nn.LSTM), "gru": (LNGRU, torch.nn.GRU)}


def made(kind, *arguments, **options):
    """A float64 layer whose gains and shifts are not trivial."""
    torch.manual_seed(0)
    layer = kind(*arguments, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


def start(name, layers=1, batch=B):
    """An initial state, as the layer takes it."""
    h = torch.randn(layers, batch, H, dtype=torch.float64)
    return (h, h.flip(-1)) if name == "lstm" else h


def states(name, state):
    """The tensors of a state."""
    return state if name == "lstm" else (state,)


def parameters(cell):
    return {name: p.detach().numpy() for name, p in cell.named_parameters()}


@pytest.mark.parametrize("per_gate", [False, True])
def test_lstm_values_are_the_oracle_s(per_gate):
    x, (h, c) = torch.randn(T, B, F, dtype=torch.float64), start("lstm")
    layer = made(LNLSTM, F, H, per_gate=per_gate)
    out, (h_end, c_end) = layer(x, (h, c))
    stacks = (1,) * 4 if per_gate else (4,)
    expected = ln_lstm(x.numpy(), h[0].numpy(), c[0].numpy(), parameters(layer.cells[0]), stacks)
    for got, want in zip((out, h_end[0], c_end[0]), expected, strict=True):
        np.testing.assert_allclose(got.detach(), want, atol=1e-12)


@pytest.mark.parametrize("per_gate", [False, True])
def test_gru_values_are_the_oracle_s(per_gate):
    x, h = torch.randn(T, B, F, dtype=torch.float64), start("gru")
    layer = made(LNGRU, F, H, per_gate=per_gate)
    out, end = layer(x, h)
    stacks = (1,) * 3 if per_gate else (2, 1)
    expected = ln_gru(x.numpy(), h[0].numpy(), parameters(layer.cells[0]), stacks)
    for got, want in zip((out, end[0]), expected, strict=True):
        np.testing.assert_allclose(got.detach(), want, atol=1e-12)


def test_layers_and_directions_are_stacked_as_by_torch():
    x = torch.randn(T, B, F, dtype=torch.float64)
    layer = made(LNGRU, F, H, num_layers=2, bidirectional=True)
    h = start("gru", 4)
    out, end = layer(x, h)
    below, ends = x.numpy(), []
    for level in range(2):
        sides = []
        for direction in range(2):
            index = 2 * level + direction
            given = below[::-1] if direction else below
            side, last = ln_gru(given, h[index].numpy(), parameters(layer.cells[index]))
            sides.append(side[::-1] if direction else side)
            ends.append(last)
        below = np.concatenate(sides, -1)
    np.testing.assert_allclose(out.detach(), below, atol=1e-12)
    np.testing.assert_allclose(end.detach(), np.stack(ends), atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_shapes_are_those_of_torch(name, bidirectional, num_layers):
    ours, theirs = (
        kind(F, H, num_layers, bidirectional=bidirectional, batch_first=True)
        for kind in KINDS[name]
    )
    for x in (torch.randn(B, T, F), torch.randn(T, F)):
        (a, a_end), (b, b_end) = ours(x), theirs(x)
        assert a.shape == b.shape
        assert [s.shape for s in states(name, a_end)] == [s.shape for s in states(name, b_end)]


@pytest.mark.parametrize("name", KINDS)
def test_layouts_agree(name):
    x, h = torch.randn(T, B, F, dtype=torch.float64), start(name)
    time_first, batch_first = (
        made(KINDS[name][0], F, H),
        made(KINDS[name][0], F, H, batch_first=True),
    )
    out, end = time_first(x, h)
    torch.testing.assert_close(batch_first(x.transpose(0, 1), h)[0].transpose(0, 1), out)
    first = tuple(s[:, 0] for s in states(name, h))
    single, single_end = time_first(x[:, 0], first if name == "lstm" else first[0])
    torch.testing.assert_close(single, out[:, 0])
    for a, b in zip(states(name, single_end), states(name, end), strict=True):
        torch.testing.assert_close(a, b[:, 0])


@pytest.mark.parametrize("name", KINDS)
def test_packed_sequences_are_each_sequence_alone(name):
    layer = made(KINDS[name][0], F, H, num_layers=2, bidirectional=True)
    sequences = [torch.randn(n, F, dtype=torch.float64) for n in (2, 5, 1, 5)]
    h = start(name, 4, 4)
    packed = pack_sequence(sequences, enforce_sorted=False)
    out, end = layer(packed, h)
    padded, lengths = pad_packed_sequence(out)
    assert lengths.tolist() == [2, 5, 1, 5]
    for i, sequence in enumerate(sequences):
        own = tuple(s[:, i] for s in states(name, h))
        alone, alone_end = layer(sequence, own if name == "lstm" else own[0])
        torch.testing.assert_close(padded[: len(sequence), i], alone)
        for a, b in zip(states(name, end), states(name, alone_end), strict=True):
            torch.testing.assert_close(a[:, i], b)


@pytest.mark.parametrize(("kind", "cell"), [(LNLSTM, LNLSTMCell), (LNGRU, LNGRUCell)])
def test_a_layer_is_its_cell_step_by_step(kind, cell):
    x = torch.randn(T, B, F, dtype=torch.float64)
    layer, one = made(kind, F, H), made(cell, F, H)
    one.load_state_dict(layer.cells[0].state_dict())
    state = None
    for step, expected in zip(x, layer(x)[0], strict=True):
        state = one(step, state)
        torch.testing.assert_close(state[0] if cell is LNLSTMCell else state, expected)


@pytest.mark.parametrize("name", KINDS)
def test_the_scale_of_the_weights_does_not_matter(name):
    layer = made(KINDS[name][0], F, H, eps=0.0)
    x = torch.randn(T, B, F, dtype=torch.float64)
    h = start(name)
    before = layer(x, h)[0]
    with torch.no_grad():
        layer.cells[0].weight_ih.mul_(7)
        layer.cells[0].weight_hh.mul_(0.01)
    torch.testing.assert_close(layer(x, h)[0], before)
    torch.testing.assert_close(layer(1e3 * x, h)[0], before)


def test_dropout_is_between_layers_and_in_training_only():
    x = torch.randn(T, B, F)
    single = LNGRU(F, H, dropout=0.5)
    assert torch.equal(single(x)[0], single(x)[0])
    double = LNGRU(F, H, 2, dropout=0.5)
    assert not torch.equal(double(x)[0], double(x)[0])
    double.eval()
    assert torch.equal(double(x)[0], double(x)[0])


def test_bad_input_is_refused():
    layer = LNLSTM(F, H)
    for x in (torch.ones(T, B, F + 1), torch.ones(T, B, F).long(), torch.ones(F)):
        with pytest.raises(InputError):
            layer(x)
    with pytest.raises(InputError, match="at least one step"):
        layer(torch.ones(0, B, F))
    with pytest.raises(InputError, match=r"state must have shape \(1, 3, 6\)"):
        layer(torch.ones(T, B, F), (torch.ones(1, B, H), torch.ones(1, B, H + 1)))
    with pytest.raises(InputError, match=r"state must have shape \(3, 6\)"):
        LNGRUCell(F, H)(torch.ones(B, F), torch.ones(B + 1, H))
    for options in ({"num_layers": 0}, {"dropout": 1.0}, {"eps": -1.0}):
        with pytest.raises(InputError, match=next(iter(options))):
            LNGRU(F, H, **options)
    with pytest.raises(InputError, match="hidden_size"):
        LNLSTMCell(F, 0)
