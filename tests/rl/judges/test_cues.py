"""Cues: what is counted in words, and what tells broken text."""

from __future__ import annotations

import pytest

from normkit.rl.judges import cues


@pytest.mark.parametrize(
    ("cue", "hit", "miss"),
    [
        ("sympathy", "I am so sorry.", "I am so tall."),
        ("advice", "You should talk to him.", "You talked to him."),
        ("platitude", "Everything happens for a reason.", "He gave a reason."),
        ("dismissal", "You are overreacting.", "You are reacting."),
        ("order", "You must do it right now.", "You kept it."),
        ("flattery", "You are such an amazing person.", "You are the one who stayed."),
        ("machine", "As an AI language model, I cannot.", "I am here."),
        ("open_question", "What did he say then?", "He said it then."),
        ("strength", "That took courage.", "That took an hour."),
        ("imperative", "Call him. Then write it down.", "He called me."),
        ("feeling_of_yours", "That must be so painful.", "The weather is mild."),
    ],
)
def test_cues_count_what_they_name(cue, hit, miss):
    assert cues.count_cues(hit)[cue] >= 1
    assert cues.count_cues(miss)[cue] == 0


def test_counts_are_capped_and_ignore_case_and_curly_quotes():
    assert cues.count_cues("SORRY, so sorry. " * 20)["sympathy"] == 3
    assert cues.count_cues("I’m so sorry.") == cues.count_cues("I'm so sorry.")


def test_the_self_is_counted_outside_phrases_of_sympathy():
    assert cues.count_cues("I am sorry, I hear you.")["self"] == 0
    assert cues.count_cues("My boat and I won our race.")["self"] == 3


def test_broken_text():
    assert cues.count_cues("the of whose under a the is")["broken"] >= 2
    assert cues.count_cues("He kept the letter in a drawer.")["broken"] == 0
    assert cues.count_cues("{}[]<>")["foreign"] == 1.0


def test_sentences():
    assert cues.split_sentences("One. Two? Three") == ["One.", "Two?", "Three"]
    assert cues.split_sentences('He said "no." Why?') == ['He said "no."', "Why?"]
    assert cues.split_sentences("...") == ["..."]
    assert cues.split_sentences("") == [""]


def test_content_words_are_stems_without_function_words():
    assert cues.content_words("The bridges and the bridge") == cues.content_words("bridge")
    assert cues.content_words("it is what it is") == set()


def test_lists_are_counted_by_their_lines():
    assert cues.list_items("1. one\n2) two\n- three\n• four") == 4
    assert cues.list_items("In 1990. Then 2. again - so") == 0


@pytest.mark.parametrize("text", ["so it goes " * 3, "ha ha ha ha ha ha ha ha ha ha ha ha"])
def test_loops(text):
    assert cues.loops(cues.words(text))


def test_plain_text_is_no_loop():
    assert not cues.loops(cues.words("You kept that house through worse, and it kept you too."))


def test_copied_words_are_found_though_the_person_changes():
    said = cues.words("I lost my mother in spring")
    assert cues.copied_share(cues.words("you lost your mother in spring"), said) == 1.0
    assert cues.copied_share(cues.words("a mother is lost"), said) == 0.0
    assert cues.copied_share([], said) == 0.0
