import pytest
import torch

from normkit.errors import InputError
from normkit.rl.chat_format import ChatFormat
from normkit.rl.evaluation.likelihood import AnswerLikelihood
from tests.reference import evaluation as reference
from tests.rl.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer)


@pytest.mark.parametrize("answers", [["a", "bc", "a longer answer"], ["x"], ["é", "好", "ok"]])
def test_likelihoods_are_those_of_separate_forward_passes(model, tokenizer, answers):
    found = AnswerLikelihood(model, tokenizer)("Which one?", answers)
    prompt = ChatFormat(tokenizer).opening("", "Which one?")
    for value, text in zip(found, answers, strict=True):
        answer = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        expected = reference.answer_logprob_per_byte(logits.numpy(), prompt, answer, text)
        assert value == pytest.approx(expected, abs=1e-5)


def test_a_prompt_that_does_not_fit_is_refused(model, tokenizer):
    with pytest.raises(InputError, match="do not fit into the context of 1024 tokens"):
        AnswerLikelihood(model, tokenizer)("x" * 1020, ["a", "b"])
