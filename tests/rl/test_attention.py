"""The cache without holes: what its rows see, and what moves when rows move."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.rl.attention import ATTENTION, RaggedCache, ragged_attention, ragged_mask

CPU = torch.device("cpu")


def dense(queries, keys, values, scale):
    """Causal attention of one row, its queries at the end, with a loop over heads."""
    heads, count, _ = queries.shape
    groups = heads // keys.shape[0]
    outputs = []
    for head in range(heads):
        k, v = keys[head // groups], values[head // groups]
        scores = queries[head] @ k.T * scale
        length = len(k)
        hidden = torch.arange(length)[None] > torch.arange(length - count, length)[:, None]
        outputs.append(torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v)
    return torch.stack(outputs)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(1, 5), min_size=3, max_size=3),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.integers(0, 1000),
)
def test_every_row_attends_to_itself_and_nothing_else(turns, heads, seed):
    H, K = heads
    D, E = 8, 6
    generator = torch.Generator().manual_seed(seed)
    cache = RaggedCache(CPU)
    cache.resize(3)
    rows = [[torch.empty(K, 0, D), torch.empty(K, 0, E)] for _ in range(3)]
    for counts in turns:
        new = [
            [torch.randn(h, n, d, generator=generator) for h, d in ((H, D), (K, D), (K, E))]
            for n in counts
        ]
        query, key, value = (torch.cat([row[i] for row in new], 1)[None] for i in range(3))
        with cache.step((0, 3), counts) as step:
            mask = ragged_mask()
            keys, values = cache.update(key, value, 0)
            found, _ = ragged_attention(None, query, keys, values, mask, scaling=0.3)
        assert found.shape == (1, sum(counts), H, E)
        expected = []
        for row, (q, k, v) in zip(rows, new, strict=True):
            row[0], row[1] = torch.cat([row[0], k], 1), torch.cat([row[1], v], 1)
            expected.append(dense(q, row[0], row[1], 0.3).transpose(0, 1))
        torch.testing.assert_close(found[0], torch.cat(expected), atol=1e-5, rtol=1e-4)
        ends = torch.tensor(counts).cumsum(0) - 1
        assert step.last.tolist() == ends.tolist()
        assert step.positions[ends].tolist() == [row[0].shape[1] - 1 for row in rows]
    assert cache.lengths == [row[0].shape[1] for row in rows]


def fill(cache, rows, counts, heads=2, width=4):
    total = sum(counts)
    key = torch.randn(1, heads, total, width)
    with cache.step(rows, counts):
        return cache.update(key, -key, 0), key


def held(cache, row):
    keys, values = cache._buffers[0]
    length = cache.lengths[row]
    assert torch.equal(keys[row, :, :length], -values[row, :, :length])
    return keys[row, :, :length].clone()


def test_rows_keep_their_content_when_they_move_grow_or_leave():
    cache = RaggedCache(CPU)
    cache.resize(3)
    fill(cache, (0, 3), [2, 70, 5])
    a, b, c = (held(cache, row) for row in range(3))
    cache.swap(0, 1)
    assert cache.lengths == [70, 2, 5]
    assert torch.equal(held(cache, 0), b)
    assert torch.equal(held(cache, 1), a)
    _, new = fill(cache, (0, 2), [300, 1])
    assert torch.equal(held(cache, 0), torch.cat([b, new[0, :, :300]], 1))
    assert torch.equal(held(cache, 1), torch.cat([a, new[0, :, 300:]], 1))
    cache.resize(9)
    assert cache.lengths == [370, 3, 5, 0, 0, 0, 0, 0, 0]
    assert torch.equal(held(cache, 2), c)
    cache.copy_row(2, 8)
    assert torch.equal(held(cache, 8), c)
    cache.resize(3)
    assert torch.equal(held(cache, 2), c)
    assert cache._buffers[0][0].shape[0] == 3


def test_a_row_that_is_used_anew_has_forgotten_the_old_one():
    cache = RaggedCache(CPU)
    cache.resize(2)
    fill(cache, (0, 2), [40, 40])
    cache.resize(1)
    cache.resize(2)
    assert cache.lengths == [40, 0]
    (_, _), new = fill(cache, (1, 2), [3])
    assert torch.equal(held(cache, 1), new[0])


def test_a_step_that_fails_adds_nothing():
    cache = RaggedCache(CPU)
    cache.resize(1)
    fill(cache, (0, 1), [4])
    before = held(cache, 0)
    with pytest.raises(KeyError), cache.step((0, 1), [2]):
        raise KeyError
    assert cache.lengths == [4]
    assert torch.equal(held(cache, 0), before)
    with pytest.raises(RuntimeError, match="outside"):
        cache.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), 0)


def test_masks_are_evaluated_at_true_positions():
    cache = RaggedCache(CPU)
    cache.resize(2)
    fill(cache, (0, 2), [5, 1])
    with cache.step((0, 2), [1, 2]):
        mask = ragged_mask(
            mask_function=lambda row, head, q, k: (k <= q) & (k > q - 2), dtype=torch.float64
        )
    visible = (mask == 0)[:, 0]
    assert mask.dtype == torch.float64
    assert visible[0, 0].tolist() == [False, False, False, False, True, True]
    assert visible[1].tolist() == [
        [True, True, False, False, False, False],
        [False, True, True, False, False, False],
    ]


def test_features_that_would_change_the_result_are_refused():
    cache = RaggedCache(CPU)
    cache.resize(1)
    query = torch.randn(1, 2, 1, 4)
    with cache.step((0, 1), [1]):
        keys, values = cache.update(query, query, 0)
        with pytest.raises(NotImplementedError, match="softcap"):
            ragged_attention(None, query, keys, values, ragged_mask(), softcap=30.0)
        with pytest.raises(NotImplementedError):
            ragged_attention(None, query, keys, values, None)


def test_outside_of_a_step_it_is_ordinary_attention():
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(50, (2, 7))
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    with torch.no_grad():
        expected = model(ids, attention_mask=padding).logits[:, -1]
        model.set_attn_implementation(ATTENTION)
        torch.testing.assert_close(model(ids, attention_mask=padding).logits[:, -1], expected)
