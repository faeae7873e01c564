"""Features: what is seen of a reply, and the encoder behind them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from normkit.rl.judge import JudgeRequest
from normkit.rl.judges.encoder import SentenceEncoder
from normkit.rl.judges.features import LEVELS, FeatureReader, load_exemplars
from normkit.rl.rubric import AXES
from tests.rl.fakes import scenario

TEXTS = [
    "The bridge is gone.",
    "What happened then?",
    "He left the cat behind, of all things.",
    "a",
]


def test_the_exemplars_are_complete():
    found = load_exemplars()
    for axis in AXES:
        assert tuple(found[axis]) == LEVELS
        texts = [text for level in LEVELS for text in found[axis][level]]
        assert len(set(texts)) == len(texts) >= 20


@pytest.fixture(scope="module")
def encoder():
    return SentenceEncoder()


@pytest.fixture(scope="module")
def reader(encoder):
    return FeatureReader(encoder)


def read(reader, reply, history=(), message="They tore down my bridge."):
    case = scenario(situation="His bridge was torn down.", opening="They tore down my bridge.")
    return reader.read([JudgeRequest(case, tuple(history), message, reply)])[0]


@pytest.mark.model
def test_embeddings_are_those_of_the_whole_model(encoder):
    for text, vector in zip(TEXTS, encoder(TEXTS), strict=True):
        tokens = encoder.tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            mean = encoder.model(**tokens).last_hidden_state.mean(1)
        whole = torch.nn.functional.normalize(mean, dim=-1)[0]
        torch.testing.assert_close(vector, whole, atol=1e-4, rtol=0)


@pytest.mark.model
def test_embeddings_are_remembered_and_forgotten():
    encoder = SentenceEncoder(remember=2)
    first = encoder(TEXTS)
    assert len(encoder._known) == 2
    assert torch.equal(encoder(TEXTS), first)
    assert encoder([]).shape == (0, encoder.width)
    assert torch.equal(encoder([TEXTS[0], TEXTS[0]]), first[[0, 0]])


@pytest.mark.model
def test_words_of_this_person_are_told_from_words_for_anyone(reader):
    assert read(reader, "I am so sorry to hear that.").grounded == 0
    own = read(reader, "So they tore your bridge down.")
    assert own.grounded >= 2
    other = read(reader, "Your parrot escaped through an open skylight yesterday.")
    assert other.grounded == 0
    assert other.strange >= 4


@pytest.mark.model
def test_repetition_is_seen_in_words_and_in_meaning(reader):
    earlier = [("It is gone.", "That must be so very painful for you.")]
    assert read(reader, "That must be so very painful for you.", earlier).verbatim
    assert read(reader, "That must be very painful for you!", earlier).repeated > 0.8
    fresh = read(reader, "Which part of it did you build first?", earlier)
    assert fresh.repeated == 0
    assert fresh.generic_before


@pytest.mark.model
def test_numbers_are_finite_and_named(reader):
    for reply in ("", "!", "So they tore your bridge down. How cruel.", "x" * 9999):
        features = read(reader, reply)
        for axis in AXES:
            assert np.isfinite(features.vector(axis)).all()
