"""Log-probabilities of packed replies beside plain autograd through all logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normkit.errors import InputError
from normkit.rl import policy
from normkit.rl.dialogue import PackedRow
from normkit.rl.policy import collate, token_logprobs
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
