"""The invented land, its questions, and files of a user's own."""

from __future__ import annotations

import json
import re

import pytest

from normkit.errors import InputError
from normkit.rl.answers import normalize_answer
from normkit.rl.environments import search_index
from normkit.rl.environments.search_files import read_passages, read_questions
from normkit.rl.environments.search_index import Passage, Searcher
from normkit.rl.environments.search_land import SPLITS, entities, named, passages, relations
from normkit.rl.environments.search_questions import HOPS, Question, make_questions, solved

pytest.importorskip("bm25s")

QUESTIONS = {split: make_questions(split) for split in SPLITS}
ALL = [question for split in SPLITS for question in QUESTIONS[split]]


@pytest.fixture(scope="module")
def searcher():
    return Searcher(passages())


# ---------------------------------------------------------------------- the land


def test_the_halves_of_the_land_know_nothing_of_each_other():
    names = {split: {entity.name for entity in entities(split)} for split in SPLITS}
    texts = {
        split: " ".join(p.title + ". " + p.text for p in passages() if p.id.startswith(split))
        for split in SPLITS
    }
    assert not names["train"] & names["heldout"]
    assert not [name for name in names["train"] if name in texts["heldout"]]
    assert not [name for name in names["heldout"] if name in texts["train"]]


def test_a_passage_tells_every_fact_of_its_entity_and_is_named_by_it():
    found = {passage.id: passage for passage in passages()}
    assert len(found) == sum(len(entities(split)) for split in SPLITS) == 328
    for split in SPLITS:
        for entity in entities(split):
            text = found[entity.id].text
            assert entity.title in text
            assert all(named(value) in text for value in entity.facts.values())
            assert len(entity.facts) == len(re.findall(r"\.(?: |$)", text))
    texts = " ".join(p.text for p in passages())
    assert not re.search(r"[{}]|  |\ba [aeiou]|\.\.", texts)


def test_facts_make_sense():
    for split in SPLITS:
        for entity in entities(split):
            facts = entity.facts
            assert entity not in facts.values()
            if "teacher" in facts:
                assert int(facts["teacher"].facts["birthyear"]) + 15 <= int(facts["birthyear"])
            if entity.kind == "town":
                assert facts["founder"].facts["birthplace"] is not entity
            if "capital" in facts:
                assert facts["capital"].facts["region"] is entity


def test_every_relation_can_be_told_asked_and_followed():
    for relation in relations():
        assert "{s}" in relation.sentences[0]
        assert all("{v}" in sentence for sentence in relation.sentences)
        assert all("{x}" in text for text in (*relation.asks, *relation.phrases))
        assert bool(relation.target) == bool(relation.phrases)
        assert [bool(relation.target), bool(relation.text), relation.year].count(True) == 1


# ---------------------------------------------------------------------- the questions


def test_there_are_enough_questions_of_each_kind():
    for split, count in (("train", 120), ("heldout", 40)):
        assert [sum(q.hops == n for q in QUESTIONS[split]) for n in HOPS] == [count] * 3
    assert len({q.id for q in ALL}) == len({q.text for q in ALL}) == len(ALL) == 480


def test_the_reference_searcher_answers_every_question(searcher):
    assert [q.id for q in ALL if not solved(q, searcher)] == []


def test_only_the_first_entity_is_named_and_the_answer_is_not():
    title = {passage.id: passage.title for passage in passages()}
    for question in ALL:
        asked = normalize_answer(question.text)
        assert normalize_answer(title[question.passages[0]]) in asked
        assert not [p for p in question.passages[1:] if normalize_answer(title[p]) in asked]
        assert normalize_answer(question.answers[0]) not in asked


def test_the_splits_share_no_entity():
    used = {s: {p for q in QUESTIONS[s] for p in q.passages} for s in SPLITS}
    assert all(p.startswith(split) for split in SPLITS for p in used[split])


def test_several_hops_are_needed(searcher):
    """The passages that the question itself finds seldom hold the answer, but for one hop."""
    share = {}
    for hops in HOPS:
        asked = [q for q in ALL if q.hops == hops]
        rows = searcher.retrieve([q.text for q in asked])
        hits = [
            any(q.answers[0] in searcher.passages[i].text for i in row if i >= 0)
            for q, row in zip(asked, rows, strict=True)
        ]
        share[hops] = sum(hits) / len(hits)
    assert share[1] > 0.9
    assert share[2] < 0.2
    assert share[3] < 0.2


def test_what_does_not_lead_to_the_answer_is_not_solved(searcher):
    question = next(q for q in ALL if q.hops == 2)
    swapped = (question.queries[1], question.queries[0])
    for changes in (
        {"answers": ("nobody at all",)},
        {"queries": swapped},
        {"queries": ("xyzzy", question.queries[1])},
        {"passages": question.passages[::-1]},
    ):
        assert not solved(Question(**{**question.__dict__, **changes}), searcher)


# ---------------------------------------------------------------------- the index

ANIMALS = [
    Passage("1", "Cat", "A cat sleeps on the mat."),
    Passage("2", "Dog", "A dog chases the cat."),
    Passage("3", "Cat", "A cat sleeps on the mat."),
    Passage("4", "Owl", "An owl flies."),
]


def test_the_best_come_first_equals_in_order_and_what_shares_no_word_never():
    rows = Searcher(ANIMALS, 3).retrieve(["cat", "owl dog", "xyzzy", "", "the", "Owl"])
    assert rows.tolist() == [
        [0, 2, 1],
        [3, 1, -1],
        [-1, -1, -1],
        [-1, -1, -1],
        [-1, -1, -1],
        [3, -1, -1],
    ]


def test_scores_are_those_of_bm25():
    """Lucene's formula by hand: idf tf / (tf + k1 (1 - b + b l / L))."""
    import bm25s
    import numpy as np

    texts = [re.findall(r"\w\w+", f"{p.title} {p.text}".lower()) for p in ANIMALS]
    texts = [[w for w in text if w not in ("on", "the", "an")] for text in texts]
    mean = sum(map(len, texts)) / len(texts)
    n = sum("cat" in text for text in texts)
    idf = np.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
    expected = [
        idf * t.count("cat") / (t.count("cat") + 1.5 * (0.25 + 0.75 * len(t) / mean)) for t in texts
    ]
    index = Searcher(ANIMALS)._index
    assert isinstance(index, bm25s.BM25)
    assert index.get_scores(["cat"]) == pytest.approx(expected, rel=1e-5)


def test_a_batch_is_its_queries_one_by_one(searcher, monkeypatch):
    queries = [query for q in ALL[::7] for query in (*q.queries, q.text)]
    alone = Searcher(passages())
    monkeypatch.setattr(search_index, "_KEPT", 5)  # forgets all the time
    rows = searcher.retrieve([*queries, *queries])
    assert rows.tolist() == [alone.retrieve([query])[0].tolist() for query in [*queries, *queries]]
    assert alone.retrieve([]).shape == (0, 3)


def test_a_long_query_is_searched(searcher):
    assert searcher.retrieve(["Kesmarrow " * 10_000]).shape == (1, 3)


def test_fewer_passages_than_hits():
    assert Searcher(ANIMALS[:2], 5).retrieve(["cat"]).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([],), "at least one, with different ids"),
        ((ANIMALS + ANIMALS,), "at least one, with different ids"),
        ((ANIMALS, 0), "hits must be at least 1"),
        (([Passage("1", "The", "a an the")],), "stop words alone"),
    ],
)
def test_what_cannot_be_searched(arguments, words):
    with pytest.raises(InputError, match=words):
        Searcher(*arguments)


# ---------------------------------------------------------------------- files


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_corpus_is_read(tmp_path):
    path = write(
        tmp_path / "corpus.jsonl",
        [{"id": 7, "text": "A cat."}, {"id": "b", "title": "Dog", "text": "A dog.", "url": "x"}],
    )
    assert read_passages(path) == [Passage("7", "", "A cat."), Passage("b", "Dog", "A dog.")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": "2", "title": "x"}', "line 2: text must be a text"),
        ('{"id": "2", "text": 3}', "line 2: text must be a text"),
        ('{"id": "1", "text": "x"}', "line 2: id must be an id that no other passage has"),
        ('{"text": "x"}', "line 2: id must be a text"),
        ('{"id": true, "text": "x"}', "line 2: id must be an integer"),
        ('{"id": "2", "text": "x"', "line 2 is not JSON"),
        ('"x"', "line 2: it must be an object"),
    ],
)
def test_a_wrong_line_of_a_corpus_is_named(tmp_path, line, words):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "1", "text": "A cat."}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        read_passages(path)
    assert str(path) in str(caught.value)


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "x").write_text("\n", encoding="utf-8")
    with pytest.raises(InputError, match="at least one passage"):
        read_passages(tmp_path / "x")
    with pytest.raises(InputError, match="at least one question"):
        read_questions(tmp_path / "x")


def test_questions_of_the_forms_of_natural_questions(tmp_path):
    path = write(
        tmp_path / "nq.jsonl",
        [
            {"question": "who?", "answer": ["Ada", "Ada L."]},
            {"id": "t-1", "question": "where?", "golden_answers": ["here"]},
            {"id": 3, "question": "what?", "answers": "it", "queries": ["q"], "passages": [7]},
        ],
    )
    questions, none = read_questions(path)
    assert none == []
    assert questions == [
        Question("question-000000", "who?", ("Ada", "Ada L.")),
        Question("t-1", "where?", ("here",)),
        Question("3", "what?", ("it",), ("q",), ("7",)),
    ]
    assert [q.hops for q in questions] == [0, 0, 1]


HOTPOT = {
    "_id": "5a",
    "question": "Where was the author born?",
    "answer": "Kes",
    "type": "bridge",
    "context": [["Book", ["A book.", " By Ada."]], ["Ada", ["Born in Kes."]]],
    "supporting_facts": [["Book", 0], ["Ada", 0], ["Book", 1]],
}


def test_hotpot_is_read_in_both_of_its_shapes(tmp_path):
    hub = {
        **{key: value for key, value in HOTPOT.items() if key != "_id"},
        "id": "5a",
        "context": {
            "title": ["Book", "Ada"],
            "sentences": [["A book.", " By Ada."], ["Born in Kes."]],
        },
        "supporting_facts": {"title": ["Book", "Ada", "Book"], "sent_id": [0, 0, 1]},
    }
    (tmp_path / "list.json").write_text(json.dumps([HOTPOT]), encoding="utf-8")
    for path in (tmp_path / "list.json", write(tmp_path / "hub.jsonl", [hub])):
        (question,), found = read_questions(path)
        assert question == Question(
            "5a", HOTPOT["question"], ("Kes",), (), ("Book", "Ada"), "bridge"
        )
        assert found == [
            Passage("Book", "Book", "A book. By Ada."),
            Passage("Ada", "Ada", "Born in Kes."),
        ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"question": ""}, "line 2: question must be"),
        ({"answer": []}, "line 2: answers must be|line 2: answer must be a list that is not"),
        ({"answer": None}, "line 2: answers must be"),
        ({"answer": [""]}, r"line 2: answer\[0\] must be"),
        ({"_id": "1"}, "line 2: _id must be an id that no other question has"),
        ({"context": [["Book"]]}, r"line 2: context\[0\] must be a pair"),
        ({"context": [["Ada", ["Other."]]]}, "line 2: context must be one text for 'Ada'"),
        ({"supporting_facts": "Book"}, "line 2: supporting_facts must be a list"),
    ],
)
def test_a_wrong_question_is_named(tmp_path, changes, words):
    path = write(tmp_path / "q.jsonl", [{**HOTPOT, "_id": "1"}, {**HOTPOT, "_id": "2", **changes}])
    with pytest.raises(InputError, match=words):
        read_questions(path)
