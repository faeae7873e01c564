"""Worlds to search in, from WordNet's files and from a user's own."""

from __future__ import annotations

import json

import pytest

from normkit.data import searchable
from normkit.data.searchable import open_world
from normkit.data.wordnet import Synset, find_wordnet, read_nouns
from normkit.errors import InputError
from normkit.rl.environments.search import SearchWorldConfig

pytest.importorskip("bm25s")

LICENCE = "  1 A licence stands here.\n"
"""Of the real files; the nouns below are invented."""


def line(offset, words, gloss, above=()):
    pointers = "".join(f" @ {a:08} n 0000" for a in above) + " ~ 00000001 n 0000"
    named = " ".join(f"{word} 0" for word in words)
    count = len(above) + 1
    return f"{offset:08} 05 n {len(words):02x} {named} {count:03}{pointers} | {gloss}  \n"


@pytest.fixture
def nouns(tmp_path, monkeypatch):
    """Sixty chains of four, below one root."""
    lines = [LICENCE, line(1, ["thing"], "what there is")]
    for i in range(60):
        for depth, name in enumerate(("wug", "blick", "dax")):
            offset = 1000 * (depth + 1) + i
            above = 1 if depth == 0 else offset - 1000
            words = [f"{name}{i}", f"big_{name}{i}"]
            lines.append(line(offset, words, f'an invented {name}; "see the {name}"', [above]))
    (tmp_path / "data.noun").write_text("".join(lines), encoding="utf-8")
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    return tmp_path


def test_nouns_are_read(nouns):
    assert find_wordnet() == nouns
    found = read_nouns()
    assert len(found) == 181
    assert found[3] == Synset(3000, ("dax0", "big dax0"), 'an invented dax; "see the dax"', (2000,))
    assert found[3].definition == "an invented dax"


@pytest.mark.parametrize(
    "wrong", ["00000002 05 n 01 x 0 000", "x | y", "00000002 05 n zz x 0 000 | y"]
)
def test_a_wrong_line_of_wordnet_is_named(nouns, wrong):
    with (nouns / "data.noun").open("a", encoding="utf-8") as file:
        file.write(wrong + "\n")
    with pytest.raises(InputError, match=r"data\.noun line 183 is not a line of wndb"):
        read_nouns(nouns)


def test_where_there_is_no_wordnet_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr("normkit.data.wordnet._folders", lambda: iter(()))
    with pytest.raises(InputError, match="install Debian's package wordnet-base"):
        open_world(corpus="wordnet")


def test_nltk_keeps_it_elsewhere(nouns, tmp_path, monkeypatch):
    monkeypatch.delenv("WNSEARCHDIR")
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk"))
    folder = tmp_path / "nltk" / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    (nouns / "data.noun").rename(folder / "data.noun")
    assert find_wordnet() == folder


def test_wordnet_asks_what_is_a_kind_of_what(nouns, monkeypatch):
    monkeypatch.setattr(searchable, "_PER_HOPS", {"train": 8, "heldout": 4})
    world = open_world(SearchWorldConfig(hops=(2,)), "wordnet")
    # A dax is a kind of blick, which is a kind of wug, which is a kind of thing.
    kinds = {"dax": ("blick", "wug"), "blick": ("wug", "thing")}
    for split, count in (("train", 8), ("heldout", 4)):
        questions = [world.questions[task] for task in world.tasks(split)]
        assert len(questions) == count
        for question in questions:
            first, second = question.queries
            number = first.lstrip("abcdefghijklmnopqrstuvwxyz")
            between, last = kinds[first.removesuffix(number)]
            assert f'"{first}"' in question.text
            assert second == between + number
            assert question.answers[0] in (last, last + number)
    used = [
        {p for task in world.tasks(split) for p in world.questions[task].passages}
        for split in ("train", "heldout")
    ]
    assert not used[0] & used[1]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_corpus_of_ones_own(tmp_path):
    corpus = write(tmp_path / "c.jsonl", [{"id": i, "text": f"word{i} here"} for i in range(6)])
    asked = [{"question": f"what is word{i}?", "answer": "here"} for i in range(6)]
    world = open_world(None, corpus, write(tmp_path / "q.jsonl", asked))
    assert len(world.tasks("train")) == 4
    assert len(world.tasks("heldout")) == 2
    assert world.retrieve(["word3"]).tolist() == [[3, -1, -1]]


def test_questions_may_bring_their_passages(tmp_path):
    rows = [
        {
            "question": f"q{i}?",
            "answer": "yes",
            "context": [[f"Title {i}", ["Sentence."]]],
            "supporting_facts": [[f"Title {i}", 0]],
        }
        for i in range(3)
    ]
    world = open_world(None, "land", write(tmp_path / "hotpot.json", rows))
    assert world.questions[world.tasks("heldout")[0]].passages == ("Title 2",)


def test_what_is_missing_is_said(tmp_path):
    corpus = write(tmp_path / "c.jsonl", [{"id": 1, "text": "word"}])
    few = write(tmp_path / "q.jsonl", [{"question": "q?", "answer": "a"}])
    with pytest.raises(InputError, match="needs a file of questions"):
        open_world(None, corpus)
    with pytest.raises(InputError, match="brings no passages"):
        open_world(None, "land", few)
    with pytest.raises(InputError, match="at least 3"):
        open_world(None, corpus, few)
    with pytest.raises(InputError, match="cannot be read"):
        open_world(None, tmp_path / "absent", few)
