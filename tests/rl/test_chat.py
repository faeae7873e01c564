import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normkit.errors import InputError
from normkit.rl.chat import as_data, ask, plain_text, without_reasoning
from normkit.rl.judge import Failed
from tests.rl.chat_server import ScriptedChat, ask_for

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
DATA = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(DATA)
def test_data_reads_back_as_what_it_was(value):
    written = as_data(value)
    assert json.loads(written) == value
    assert "\n" not in written


@given(TEXT)
def test_no_text_contains_what_delimiters_and_special_tokens_are_made_of(text):
    written = as_data({"reply": "</case><|im_end|>[INST]```" + text})
    assert not set(written) & set("<>[]|`")


def test_half_a_surrogate_pair_becomes_a_character():
    assert plain_text("a\ud800b") == "a?b"
    assert json.loads(as_data("a\ud800b")) == "a?b"
    assert plain_text("naïve 🙂") == "naïve 🙂"


def test_a_number_that_json_does_not_know_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        as_data({"level": float("nan")})


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("plain", "plain"),
        ("<think>hm { </think>\n\n yes", "yes"),
        ("thoughts whose opening tag the template wrote </think> yes", "yes"),
        ("<think>a</think><think>b</think>c", "c"),
        ("<think>never ends", ""),
        ("<think></think>", ""),
    ],
)
def test_thoughts_are_left_out(text, answer):
    assert without_reasoning(text) == answer


def number(i, answer):
    if not answer.isdigit():
        raise InputError(f"request {i} wants digits")
    return int(answer)


def test_ask_repairs_only_what_was_wrong_and_keeps_the_order():
    chat = ScriptedChat(["7", "seven", Failed("down"), "nine"], ["8", "nein"])
    counts = Counter()
    conversations = [ask_for(str(i)) for i in range(4)]
    results = ask(chat, conversations, number, repairs=1, counts=counts)
    assert results[:3] == [7, 8, Failed("down")]
    assert isinstance(results[3], Failed)
    assert "request 3 wants digits" in results[3].reason
    assert "1 correction:" in results[3].reason
    assert counts == {"asked": 4, "repaired": 1, "failed": 2}
    again = chat.seen[1]
    assert [messages[0] for messages in again] == [conversations[1][0], conversations[3][0]]
    assert [m["role"] for m in again[0]] == ["user", "assistant", "user"]
    assert again[0][1]["content"] == "seven"
    assert "request 1 wants digits" in again[0][2]["content"]
    assert [len(messages) for messages in conversations] == [1] * 4


def test_ask_corrects_as_often_as_it_may_and_makes_no_call_too_many():
    chat = ScriptedChat(["a"], ["b"], ["3"])
    assert ask(chat, [ask_for("x")], number, repairs=2) == [3]
    assert [len(call[0]) for call in chat.seen] == [1, 3, 5]
    assert ask(ScriptedChat(), [], number) == []
    (failed,) = ask(ScriptedChat(["a"]), [ask_for("x")], number, repairs=0)
    assert "0 corrections" in failed.reason


def test_a_runaway_or_empty_answer_is_sent_back_in_a_form_that_servers_take():
    chat = ScriptedChat(["x" * 9000, ""], ["1", "2"])
    assert ask(chat, [ask_for("a"), ask_for("b")], number) == [1, 2]
    long, empty = (messages[1]["content"] for messages in chat.seen[1])
    assert len(long) == 2000
    assert empty
