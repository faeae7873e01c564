"""Samples fit the model they are for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from normkit.errors import InputError
from normkit.surgery.reads import run
from normkit.surgery.samples import TEXT, real_inputs, sample_inputs
from tests.surgery import tiny


@pytest.mark.parametrize("name", ["gpt2-cross-attention", "opt", "dinov2", "whisper"])
def test_random_and_real_inputs_run(name):
    model = tiny.build(name)
    state = torch.get_rng_state()
    inputs = sample_inputs(model, batch=3, length=5)
    assert all(len(x) == 3 for x in inputs.values())
    assert torch.equal(state, torch.get_rng_state())
    real, what = real_inputs(model)
    assert what in ("the bytes of a text", "photographs")
    assert all(torch.isfinite(x).all() for x in run(model, {**inputs, **real}))


def test_seeds_differ_and_repeat():
    model = tiny.build("vit")
    one, two, again = (sample_inputs(model, seed=s)["pixel_values"] for s in (0, 1, 0))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)


def test_a_tokenizer_is_used():
    model = tiny.build("gpt2")
    inputs, what = real_inputs(model, lambda text: {"input_ids": [len(text) % 61, 5, 7]})
    assert inputs["input_ids"].tolist() == [[len(TEXT) % 61, 5, 7]] * 2
    assert what == "text"


def test_what_cannot_be_guessed_is_refused():
    with pytest.raises(InputError, match="cannot guess what Linear reads"):
        sample_inputs(nn.Linear(2, 2))
    model = tiny.build("vit")
    model.config = SimpleNamespace(num_channels=3)
    with pytest.raises(InputError, match="image_size"):
        sample_inputs(model)
    model.main_input_name = "smell"
    with pytest.raises(InputError, match="read 'smell'"):
        sample_inputs(model)
