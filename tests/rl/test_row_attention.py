"""Attention by products beside torch's, alone and inside of models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normkit.rl import row_attention
from normkit.rl.policy import token_logprobs
from normkit.rl.row_attention import ROW_ATTENTION, rows_attend
from tests.rl.tiny import tiny_batch, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def heads(length, queries=4, keys=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(3, number, length, 8, generator=generator, dtype=torch.float64)
        for number in (queries, keys, keys)
    ]


def by_torch(query, key, value, scale):
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    found = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return found.transpose(1, 2)


def ours(*states, scale=None):
    return row_attention.row_attention(nn.Module(), *states, None, scaling=scale)[0]


@given(
    st.integers(1, 150),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.sampled_from([None, 0.1]),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_are_those_of_torch(length, number, scale, seed):
    states = [x.requires_grad_() for x in heads(length, *number, seed)]
    found, expected = ours(*states, scale=scale), by_torch(*states, scale)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    slope = torch.randn(found.shape, dtype=found.dtype)
    # Sums over blocks are float32.
    for a, b in zip(
        torch.autograd.grad(found, states, slope),
        torch.autograd.grad(expected, states, slope),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_long_row_is_left_to_torch(monkeypatch):
    products = []
    monkeypatch.setattr(row_attention._ProductAttention, "apply", products.append)
    monkeypatch.setattr(row_attention, "_LONGEST", 20)
    states = heads(21, queries=2)
    torch.testing.assert_close(ours(*states), by_torch(*states, None))
    assert products == []


def test_under_autocast_products_are_bfloat16():
    states = [x.float() for x in heads(70)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(*states)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), by_torch(*states, None), atol=3e-2, rtol=3e-2)


def windowed_model():
    config = transformers.MistralConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
    )
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(config).eval()


@pytest.mark.parametrize("make", [lambda: tiny_model(TOKENIZER), windowed_model])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("recompute", [False, True])
def test_models_score_as_they_do_by_themselves(make, implementation, recompute):
    model, data = make(), tiny_batch()
    expected = model(data.input_ids, attention_mask=data.attention_mask).logits
    table = torch.log_softmax(expected[data.row, data.position - 1], -1)
    plain = table.gather(1, data.target[:, None])[:, 0]
    model.set_attn_implementation(implementation)
    found, _ = token_logprobs(model, data, recompute=recompute)
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    weights = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(found.sum(), weights),
        torch.autograd.grad(plain.sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_only_models_with_the_attention_of_torch_are_changed_and_only_for_a_while():
    model = tiny_model(TOKENIZER)
    with rows_attend(model):
        assert model.config._attn_implementation == ROW_ATTENTION
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with rows_attend(model):
        assert model.config._attn_implementation == "eager"
