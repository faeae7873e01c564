"""The speaking copy of a policy: shared, cast, merged and packed weights; both decoders."""

from __future__ import annotations

import copy
import logging

import peft
import pytest
import torch
import transformers
from torch import nn

from normkit.errors import InputError
from normkit.rl import inference
from normkit.rl.inference import (
    InferenceCopy,
    RaggedDecoder,
    ReencodingDecoder,
    cache_name,
    make_decoder,
    unwrap,
)
from tests.rl.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
IDS = torch.tensor([[5, 9, 200, 31, 7]])
CACHE_NAMES = ("cache", "past_key_values")


@pytest.fixture
def model():
    return tiny_model(TOKENIZER)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def test_equal_dtype_shares_every_weight(model):
    twin = InferenceCopy(model, torch.float32).model
    assert twin is not model
    for (name, a), (other, b) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert name == other
        assert a.data_ptr() == b.data_ptr()
    assert torch.equal(logits(twin), logits(model))
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    assert torch.equal(logits(twin), logits(model))


def test_bfloat16_is_the_model_cast_and_follows_on_sync(model):
    twin = InferenceCopy(model, torch.bfloat16)
    for _ in range(2):
        cast = copy.deepcopy(model).bfloat16()
        # Its rotary frequencies stay float32, which a cast of the whole model would round.
        cast.model.rotary_emb = model.model.rotary_emb
        torch.testing.assert_close(logits(twin.model), logits(cast), atol=2e-2, rtol=0)
        table = twin.model.get_input_embeddings().weight
        assert torch.equal(table, model.get_input_embeddings().weight.bfloat16())
        assert twin.model.model.rotary_emb.inv_freq.dtype == torch.float32
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        before = logits(twin.model)
        twin.sync(model)
        assert not torch.equal(logits(twin.model), before)


def test_packed_layers_compute_what_linear_layers_do(monkeypatch):
    layer = nn.Linear(48, 33, dtype=torch.bfloat16)
    if not inference._PackedLinear.suits(layer):
        pytest.skip("this build of torch or this CPU does not pack linear layers")
    packed = inference._PackedLinear(layer)
    with torch.no_grad():
        packed.fill(layer.weight.float())
        for shape in ((1, 1, 48), (1, 16, 48), (2, 100, 48), (7, 48)):
            x = torch.randn(shape).bfloat16()
            torch.testing.assert_close(packed(x), layer(x), atol=2e-2, rtol=2e-2)
    assert not inference._PackedLinear.suits(nn.Linear(4, 4))


def test_a_build_without_packing_is_served_too(model, monkeypatch):
    monkeypatch.setattr(inference._PackedLinear, "_works", classmethod(lambda cls: False))
    twin = InferenceCopy(model, torch.bfloat16)
    assert type(twin.model.model.layers[0].mlp.up_proj) is nn.Linear
    assert twin.model.lm_head.weight is twin.model.model.embed_tokens.weight
    torch.testing.assert_close(logits(twin.model), logits(model), atol=2e-2, rtol=0)


def adapted(model, **options):
    settings = {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "init_lora_weights": False,
    }
    return peft.get_peft_model(model, peft.LoraConfig(**{**settings, **options})).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head"]},
        {"bias": "lora_only"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Model")
def test_adapters_are_merged(options):
    base = tiny_model(TOKENIZER)
    base.config.tie_word_embeddings = "lm_head" not in str(options)
    policy = adapted(base, **options)
    twin = InferenceCopy(policy, torch.float32)
    assert "lora" not in repr(twin.model).lower()
    assert "ModulesToSave" not in repr(twin.model)
    for _ in range(2):
        torch.testing.assert_close(logits(twin.model), logits(policy), atol=1e-5, rtol=1e-4)
        trained = [p for p in policy.parameters() if p.requires_grad]
        assert trained
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        assert not torch.allclose(logits(twin.model), logits(policy), atol=1e-5)
        twin.sync(policy)
    frozen = policy.get_base_model().model.layers[0].mlp.up_proj.weight
    assert twin.model.model.layers[0].mlp.up_proj.weight.data_ptr() == frozen.data_ptr()


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_merged_before_rounding(base_dtype):
    policy = adapted(tiny_model(TOKENIZER).to(base_dtype))
    twin = InferenceCopy(policy, torch.bfloat16)
    layer = policy.get_base_model().model.layers[0].self_attn.q_proj
    merged = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    found = twin.model.model.layers[0].self_attn.q_proj.weight
    if found.is_mkldnn:
        found = found.to_dense()
    assert torch.equal(found, merged.bfloat16())
    torch.testing.assert_close(logits(twin.model), logits(policy), atol=4e-2, rtol=0)
    with policy.disable_adapter():
        twin.sync(policy)
        torch.testing.assert_close(logits(twin.model), logits(policy), atol=4e-2, rtol=0)


def test_a_forward_that_was_put_around_the_original_stays_with_it(model):
    asked = []
    plain = model.forward

    def around(*args, **kwargs):
        asked.append(1)
        return plain(*args, **kwargs)

    expected = logits(model)
    model.forward = around
    twin = InferenceCopy(model, torch.float32)
    assert torch.equal(logits(twin.model), expected)
    assert not asked


def test_adapters_that_do_not_merge_are_refused(model):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(InputError, match="learns prompts"):
        InferenceCopy(peft.get_peft_model(model, config), torch.float32)


def test_wrappers_are_taken_off(model):
    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    policy = adapted(model)
    assert unwrap(Wrapped(policy)) is policy.get_base_model()
    assert unwrap(model) is model


def full(model, row):
    with torch.no_grad():
        return model(input_ids=torch.tensor([row])).logits[0, -1]


@pytest.mark.parametrize("kind", ["ragged", "masked", "none"])
def test_decoders_extend_copy_and_release_rows(model, kind):
    twin = InferenceCopy(model, torch.float32).model
    if kind == "ragged":
        twin.set_attn_implementation("normkit_ragged")
        decoder = RaggedDecoder(twin, max_tokens=7)
    else:
        decoder = ReencodingDecoder(twin, kind)
    rows = {}

    def extend(slots, tokens):
        for slot, new in zip(slots, tokens, strict=True):
            rows.setdefault(slot, []).extend(new)
        found = decoder.extend(slots, tokens)
        expected = torch.stack([full(model, rows[slot]) for slot in slots])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

    with torch.inference_mode():
        extend([4, 2], [[1, 2, 3], [9]])
        extend([4, 2], [[5], [6]])
        extend([4, 2], [[5], [7]])
        extend([2], [[8]])
        decoder.copy([(2, 7), (4, 0)])
        rows[7], rows[0] = list(rows[2]), list(rows[4])
        extend([0, 7, 2, 4], [[1] * 9, [3], [3, 4], [2]])
        decoder.release([2, 99])
        del rows[2]
        extend([7, 4], [[1], [2]])
        extend([2, 0], [[50, 51], [1]])
        decoder.release([0, 2, 4, 7])
        rows.clear()
        extend([4], [[3, 3]])


def test_an_unknown_architecture_is_noticed_and_named(model, caplog):
    class Odd(type(model.model.layers[0].self_attn)):
        """Attention that goes its own way: what the registry offers is not asked."""

        def forward(self, hidden_states, **kwargs):
            kept = {k: None if k in CACHE_NAMES else v for k, v in kwargs.items()}
            return super().forward(hidden_states.flip(-1).cumsum(1), **kept)

    odd = copy.deepcopy(model)
    odd.model.layers[1].self_attn.__class__ = Odd
    with caplog.at_level(logging.WARNING):
        decoder = make_decoder(InferenceCopy(odd, torch.float32), 100)
    assert isinstance(decoder, ReencodingDecoder)
    assert "encoded anew each turn" in caplog.text
    assert "LlamaForCausalLM" in caplog.text
    assert isinstance(make_decoder(InferenceCopy(model, torch.float32), 100), RaggedDecoder)


def test_the_cache_of_a_recurrent_state_is_carried_without_a_mask():
    config = transformers.MambaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, state_size=4
    )
    torch.manual_seed(0)
    recurrent = transformers.MambaForCausalLM(config).eval()
    decoder = make_decoder(InferenceCopy(recurrent, torch.float32), 100)
    assert isinstance(decoder, ReencodingDecoder)
    assert decoder.carry in ("bare", "none")  # "none" where transformers wants more than a cache
    rows = [[], []]
    with torch.inference_mode():
        for new in ([[3, 1, 4, 1, 5], [9, 2]], [[7], [8]], [[6], [5]], [[1, 2], [3]], [[4], [4]]):
            rows = [a + b for a, b in zip(rows, new, strict=True)]
            expected = torch.stack([full(recurrent, row) for row in rows])
            torch.testing.assert_close(decoder.extend([0, 1], new), expected, atol=1e-5, rtol=1e-4)


def test_the_cache_goes_by_the_name_that_the_model_knows(model):
    class Renamed(nn.Module):
        def forward(self, input_ids, cache_params=None):
            return input_ids

    assert cache_name(model) in CACHE_NAMES
    assert cache_name(Renamed()) == "cache_params"
    assert cache_name(nn.Identity()) == "past_key_values"


def test_a_model_that_looks_ahead_is_refused(model):
    class Ahead(nn.Module):
        """Adds to every position what the row's last token is, as no causal model does."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states, **kwargs):
            return self.inner(hidden_states, **kwargs) + hidden_states[:, -1:]

    ahead = copy.deepcopy(model)
    ahead.model.layers[0].mlp = Ahead(ahead.model.layers[0].mlp)
    with pytest.raises(InputError, match="LlamaForCausalLM does not generate as a causal"):
        make_decoder(InferenceCopy(ahead, torch.float32), 100)
