import pytest
import torch

from normkit.errors import InputError
from normkit.rl.chat_local import LocalChat
from normkit.rl.judge import Failed
from tests.rl.chat_server import ask_for

transformers = pytest.importorskip("transformers")

WORDS = ["<pad>", "<eos>", "<unk>", "system", "user", "assistant", "a", "b", "c", "d", "e", "f"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + TEMPLATE
)


def build_tokenizer(template=TEMPLATE):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=template,
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        attention_dropout=0.5,
    )
    return transformers.LlamaForCausalLM(config)


def prompts():
    return [ask_for(t) for t in ("a", "b c d e f a b", "c c", "", "f e d c b a f e d c", "a b c")]


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_answers_do_not_depend_on_the_batch_they_were_generated_in(model, batch_size):
    tokenizer = build_tokenizer()
    chat = LocalChat(model, tokenizer, batch_size=batch_size, max_tokens=12)
    answers = chat.complete(prompts())
    for prompt, answer in zip(prompts(), answers, strict=True):
        ids = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(ids, return_tensors="pt").input_ids
        for _ in range(12):  # greedy decoding by hand, no padding and no cache
            with torch.no_grad():
                token = model.eval()(ids).logits[0, -1].argmax()
            ids = torch.cat([ids, token[None, None]], dim=1)
            if token == 1:
                break
        said = tokenizer.decode(ids[0], skip_special_tokens=True).split("assistant ", 1)
        start = len(tokenizer(prompt[0]["content"]).input_ids) + 2
        assert answer == tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()
        assert len(said) == 2
    assert len(set(answers)) > 1


def test_model_and_random_state_are_left_as_they_were(model):
    chat = LocalChat(model, build_tokenizer(), temperature=1.0, max_tokens=8)
    for training in (True, False):
        model.train(training)
        state = torch.random.get_rng_state()
        chat.complete(prompts())
        assert model.training is training
        assert torch.equal(torch.random.get_rng_state(), state)
    assert chat.complete([]) == []


def test_sampling_depends_on_the_seed_and_the_batch_alone(model):
    tokenizer = build_tokenizer()
    options = {"temperature": 1.5, "max_tokens": 16}
    first = LocalChat(model, tokenizer, seed=1, **options).complete(prompts())
    torch.manual_seed(99)
    assert LocalChat(model, tokenizer, seed=1, **options).complete(prompts()) == first
    assert LocalChat(model, tokenizer, seed=2, **options).complete(prompts()) != first


def test_a_prompt_that_does_not_fit_fails_alone(model):
    chat = LocalChat(model, build_tokenizer(), max_tokens=10)
    fits = "a " * 51  # with two role words and the answer: 63 of 64 positions
    found = chat.complete([ask_for("a " * 53), ask_for(fits), ask_for("b")])
    assert isinstance(found[0], Failed)
    assert "64 tokens" in found[0].reason
    assert isinstance(found[1], str)
    assert isinstance(found[2], str)


def test_a_template_without_a_system_role_gets_its_words_in_the_first_message(model):
    tokenizer = build_tokenizer(NO_SYSTEM)
    with_system = [{"role": "system", "content": "a b"}, *ask_for("c d")]
    merged = ask_for("a b\n\nc d")
    chat = LocalChat(model, tokenizer, max_tokens=8)
    assert chat._encode(with_system) == chat._encode(merged)
    assert with_system[0]["content"] == "a b"
    assert chat.complete([with_system]) == chat.complete([merged])


def test_name_is_the_last_part_of_the_model_s_path(model):
    model.config.name_or_path = "/some/where/little-model"
    assert LocalChat(model, build_tokenizer()).name == "little-model"
    model.config.name_or_path = ""
    assert LocalChat(model, build_tokenizer()).name == "LlamaForCausalLM"


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_tokens": 0}, {"temperature": -0.1}])
def test_bad_options_are_named(model, options):
    with pytest.raises(InputError, match=next(iter(options))):
        LocalChat(model, build_tokenizer(), **options)


def test_a_base_model_s_tokenizer_is_refused(model):
    with pytest.raises(InputError, match="chat template"):
        LocalChat(model, build_tokenizer(template=None))
