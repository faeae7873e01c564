"""Text as bytes: what is read, split and cut."""

from __future__ import annotations

import pydoc

import pytest
import torch

from normkit.data.text import VOCABULARY, corpus, decode, encode, reference, windows
from normkit.errors import InputError


def test_the_reference_is_what_help_prints():
    text = decode(reference())
    assert 'The "assert" statement' in text
    assert text.count("\n\n") > len(pydoc.Helper.topics)
    assert 300_000 < len(reference()) < 2_000_000
    assert int(reference().max()) < VOCABULARY


def test_bytes_give_the_text_back():
    text = "naïve ∑ \n"
    assert decode(encode(text)) == text
    assert len(encode(text)) == len(text) + 1 + 2
    assert decode(encode("∑")[:1]) == "\N{REPLACEMENT CHARACTER}"


def test_the_end_of_a_text_is_held_out(tmp_path):
    (tmp_path / "text.txt").write_text("0123456789", encoding="utf-8")
    train, held_out = corpus(tmp_path / "text.txt", 0.25)
    assert (decode(train), decode(held_out)) == ("01234567", "89")
    train, held_out = corpus()
    assert torch.equal(torch.cat([train, held_out]), reference())


def test_targets_follow_inputs():
    tokens = torch.arange(50)
    inputs, targets = windows(tokens, 64, 7, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (64, 7)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs[:, 1:], inputs[:, :-1] + 1)
    whole, _ = windows(tokens, 3, 49)
    assert torch.equal(whole, tokens[:-1].expand(3, -1))


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin").write_bytes(b"\xff\xfe\xff")
    for path in (tmp_path / "absent", tmp_path / "latin"):
        with pytest.raises(InputError, match="path must be a UTF-8 text file"):
            corpus(path)
    with pytest.raises(InputError, match="held_out"):
        corpus(held_out=1.0)
    with pytest.raises(InputError, match="more than length 3"):
        windows(torch.arange(3), 1, 3)
