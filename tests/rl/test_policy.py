"""Log-probabilities of packed replies beside plain autograd through all logits."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from normkit.errors import InputError
from normkit.rl import policy, row_attention
from normkit.rl.dialogue import PackedRow
from normkit.rl.models import with_lora
from normkit.rl.policy import collate, takes_trees, token_logprobs, token_states
from tests.rl.tiny import tiny_batch, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def by_autograd(model, batch, temperature):
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    scaled = logits[batch.row, batch.position - 1].float() / temperature
    table = torch.log_softmax(scaled, -1)
    return table.gather(1, batch.target[:, None])[:, 0], -(table.exp() * table).sum(-1)


def gradients(model, logprob, entropy, of_entropy):
    torch.manual_seed(1)
    loss = (torch.randn(len(logprob)) * logprob).sum()
    if of_entropy:
        loss = loss + (torch.randn(len(logprob)) * entropy).sum()
    weights = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, weights)


@pytest.mark.parametrize(("kept", "chunk", "block"), [(1 << 27, 9, 5), (0, 1, 32), (0, 7, 3)])
@pytest.mark.parametrize("of_entropy", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_values_and_gradients_are_those_of_autograd(
    monkeypatch, kept, chunk, block, of_entropy, tied
):
    for name, value in (("_KEPT", kept), ("_CHUNK", chunk), ("_BLOCK", block)):
        monkeypatch.setattr(policy, name, value)
    model = tiny_model(TOKENIZER)
    if not tied:
        model.lm_head = nn.Linear(32, len(TOKENIZER))
    data = tiny_batch()
    expected = by_autograd(model, data, 0.7)
    found = token_logprobs(model, data, 0.7, entropy=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    ours = gradients(model, *found, of_entropy)
    plain = gradients(model, *expected, of_entropy)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    only, nothing = token_logprobs(model, data, 0.7)
    assert nothing is None
    torch.testing.assert_close(only, found[0])


def test_a_frozen_projection_gets_no_gradient_and_passes_it_on():
    model = tiny_model(TOKENIZER)
    model.requires_grad_(False)
    norm = model.model.norm.weight.requires_grad_()
    data = tiny_batch()
    (found,) = torch.autograd.grad(token_logprobs(model, data)[0].sum(), norm)
    (expected,) = torch.autograd.grad(by_autograd(model, data, 1.0)[0].sum(), norm)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kept", "calls"), [(1 << 27, 1), (0, 2)])
def test_under_autocast_the_backward_pass_computes_as_the_forward_pass_did(
    monkeypatch, kept, calls
):
    monkeypatch.setattr(policy, "_KEPT", kept)
    model, data = tiny_model(TOKENIZER), tiny_batch()
    seen = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprob, _ = token_logprobs(model, data)
    logprob.sum().backward()
    assert logprob.dtype == torch.float32
    assert seen == [torch.bfloat16] * calls
    torch.testing.assert_close(logprob, by_autograd(model, data, 1.0)[0], atol=5e-2, rtol=0)


@pytest.mark.parametrize("kept", [1 << 27, 0])
def test_a_graph_that_is_retained_gives_its_gradients_again(monkeypatch, kept):
    monkeypatch.setattr(policy, "_KEPT", kept)
    model = tiny_model(TOKENIZER)
    logprob, _ = token_logprobs(model, tiny_batch())
    weights = list(model.parameters())
    first = torch.autograd.grad(logprob.sum(), weights, retain_graph=True)
    again = torch.autograd.grad(2 * logprob.sum(), weights)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_without_gradient_nothing_is_kept():
    with torch.no_grad():
        logprob, entropy = token_logprobs(tiny_model(TOKENIZER), tiny_batch(), entropy=True)
    assert not logprob.requires_grad
    assert not entropy.requires_grad
    assert (entropy > 0).all()


def test_rows_without_replies_have_no_scores_and_still_train():
    model = tiny_model(TOKENIZER)
    silent = collate([PackedRow(torch.arange(5), torch.full((5,), -1), torch.zeros(5))])
    logprob, entropy = token_logprobs(model, silent, entropy=True)
    assert logprob.shape == entropy.shape == (0,)
    logprob.sum().backward()
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters())


def test_what_cannot_be_scored_is_named():
    first = PackedRow(torch.arange(3), torch.tensor([0, -1, -1]), torch.zeros(3))
    with pytest.raises(InputError, match="first token of its row"):
        collate([first])
    model = tiny_model(TOKENIZER)
    model.config.logit_scale = 0.5
    with pytest.raises(InputError, match="logit_scale"):
        token_logprobs(model, tiny_batch())


def begun(*rows):
    """Rows of tokens with everything but the first three sampled."""
    return collate(
        [
            PackedRow(torch.tensor(r), torch.arange(len(r)).sub(3).clamp(-1), torch.zeros(len(r)))
            for r in rows
        ]
    )


HEAD = [7, 3, 9, 4, 8]
BATCHES = {
    "a group": begun([*HEAD, 1, 2, 3, 4], [*HEAD, 1, 5], [*HEAD, 6, 6, 6]),
    "two groups": begun([*HEAD, 1, 2], [*HEAD, 3], [7, 3, 5, 5, 5], [7, 3, 5, 5, 6, 6]),
    "all the same": begun([*HEAD, 1, 2], [*HEAD, 1, 2], [*HEAD, 1]),
    "nothing alike": begun([1, 2, 3, 4, 5], [2, 2, 3, 4], [3, 2, 3, 4, 5, 6]),
    "one": begun([*HEAD, 1, 2]),
}


SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def windowed():
    config = transformers.MistralConfig(**SIZES, sliding_window=4)
    return transformers.MistralForCausalLM(config)


def numbered():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48}
    config = transformers.GPT2Config(vocab_size=len(TOKENIZER), **sizes)
    return transformers.GPT2LMHeadModel(config)


def exact():
    # Its norms, unlike those of most, compute in the dtype of the model.
    return transformers.Starcoder2ForCausalLM(transformers.Starcoder2Config(**SIZES)).double()


MODELS = {
    "llama": lambda: tiny_model(TOKENIZER),
    "lora": lambda: with_lora(tiny_model(TOKENIZER), 2),
    "sliding window": windowed,
    "learned positions": numbered,
    "float64": exact,
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("recompute", [False, True])
def test_as_a_tree_states_and_gradients_are_those_of_rows(monkeypatch, batch, make, recompute):
    torch.manual_seed(0)
    model = make().eval()
    assert takes_trees(model)
    tolerance = 1e-5
    if model.dtype == torch.float64:
        # The products sum gradients in float32; the attention of torch does not.
        monkeypatch.setattr(row_attention, "_LONGEST", 0)
        tolerance = 1e-12
    found = [token_states(model, batch, recompute)[0]]
    monkeypatch.setattr(policy, "takes_trees", lambda _: False)
    found.append(token_states(model, batch, recompute)[0])
    torch.testing.assert_close(*found, atol=tolerance, rtol=tolerance)
    slope = torch.randn_like(found[0])
    trained = [p for p in model.parameters() if p.requires_grad]
    ours, plain = (torch.autograd.grad(f, trained, slope, allow_unused=True) for f in found)
    pairs = [pair for pair in zip(ours, plain, strict=True) if pair != (None, None)]
    assert len(pairs) >= len(trained) - 1  # the projection has no part in the states
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=20 * tolerance, rtol=20 * tolerance)


def test_each_distinct_token_is_encoded_once():
    model, batch = tiny_model(TOKENIZER), BATCHES["two groups"]
    assert takes_trees(model)
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda _m, i, _o: seen.append(i[0].shape))
    token_logprobs(model, batch)
    assert [shape[:2] for shape in seen] == [(1, 5 + 2 + 1 + 2 + 1 + 1 + 1)]


def mixing():
    """A model whose tokens also meet where they stand side by side."""
    model = tiny_model(TOKENIZER)

    def mix(_module, _inputs, out):
        return out + torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], 1)

    model.model.layers[0].mlp.register_forward_hook(mix)
    return model


def convolved():
    torch.manual_seed(0)
    config = transformers.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])
    return transformers.Lfm2ForCausalLM(config).eval()


def unfit():
    model = tiny_model(TOKENIZER)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("make", [mixing, convolved, unfit])
def test_a_model_that_takes_no_trees_is_given_rows(make):
    model = make()
    assert not takes_trees(model)
    data = BATCHES["a group"]
    found, _ = token_logprobs(model, data)
    torch.testing.assert_close(found, by_autograd(model, data, 1.0)[0], atol=1e-5, rtol=1e-5)
