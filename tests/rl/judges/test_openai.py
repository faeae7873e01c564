import json

import pytest

from normkit.errors import InputError, NormkitError
from normkit.rl.chat_client import OpenAIChat
from normkit.rl.judge import Failed, Judge, JudgeRequest
from normkit.rl.judges.openai import OpenAIJudge
from normkit.rl.judges.prompt import judge_messages
from tests.rl.chat_server import Answer, chat_server, free_port, last_user
from tests.rl.fakes import filled, scenario


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def judge(url, **options):
    return OpenAIJudge(url, "m", **{"wait": 0.001, "timeout": 20.0, "retries": 1, **options})


def requests(*replies):
    return [JudgeRequest(scenario(), (), "My test broke.", reply) for reply in replies]


GOOD = filled(affective=(1, 0))
TEXT = json.dumps(GOOD.to_json())


def by_reply(table):
    """Answer by the reply that is judged; a list has one item for each time it is asked."""

    def answer(body, n):
        # Everything after the system message tells the requests apart, repairs included.
        case = json.loads(body["messages"][1]["content"].splitlines()[1])
        item = table[case["reply"]]
        return item[(len(body["messages"]) - 2) // 2] if isinstance(item, list) else item

    return answer


def test_every_kind_of_answer_in_one_batch():
    table = {
        "fine": TEXT,
        "fenced": f"Sure!\n```json\n{TEXT}\n```",
        "half": [TEXT[:-20], TEXT],
        "wrong": [TEXT.replace('"progress": 1', '"progress": 7'), TEXT],
        "hopeless": ["no", "still no"],
        "broken": Answer("oops", status=500),
    }
    with chat_server(by_reply(table)) as server:
        openai = judge(server.url)
        found = dict(zip(table, openai.judge(requests(*table)), strict=True))
    assert isinstance(openai, Judge)
    assert openai.name == "openai:m"
    for name in ("fine", "fenced", "half", "wrong"):
        assert found[name] == GOOD, name
    assert isinstance(found["hopeless"], Failed)
    assert "no complete JSON object" in found["hopeless"].reason
    assert isinstance(found["broken"], Failed)
    assert "HTTP 500" in found["broken"].reason
    assert openai.counts == {"asked": 6, "repaired": 2, "failed": 2, "evidence_dropped": 0}
    # Four once, half, wrong and hopeless twice, broken once more by the retry.
    assert len(server.bodies) == 6 + 3 + 1


def test_the_repair_request_shows_the_wrong_answer_and_names_the_mistake():
    wrong = TEXT.replace('"progress": 1', '"progress": 7')
    with chat_server([wrong, TEXT]) as server:
        assert judge(server.url).judge(requests("x")) == [GOOD]
    first, second = (body["messages"] for body in server.bodies)
    assert second[:2] == first
    assert second[2] == {"role": "assistant", "content": wrong}
    assert "progress must be 0, 1 or 2, got 7" in second[3]["content"]


def test_all_failing_is_a_batch_of_failures():
    found = judge(f"http://127.0.0.1:{free_port()}", retries=0).judge(requests("a", "b", "c"))
    assert len(found) == 3
    assert all(isinstance(f, Failed) and "cannot be reached" in f.reason for f in found)


def test_judging_again_from_the_cache_asks_nobody(tmp_path):
    with chat_server(by_reply({"a": TEXT, "b": TEXT})) as server:
        first = judge(server.url, cache_dir=tmp_path).judge(requests("a", "b"))
    again = judge(f"http://127.0.0.1:{free_port()}", cache_dir=tmp_path).judge(requests("a", "b"))
    assert again == first == [GOOD, GOOD]
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    "useless",
    [
        "?",
        "",
        TEXT[:-20],
        TEXT.replace('"progress": 1', '"progress": 3'),
        TEXT.replace('"progress": 1', '"progress": "1"'),
        TEXT.replace("proactive", "practical"),
    ],
)
def test_only_usable_verdicts_are_kept(tmp_path, useless):
    with chat_server(by_reply({"a": TEXT, "b": useless})) as server:
        good, bad = judge(server.url, cache_dir=tmp_path).judge(requests("a", "b"))
    assert good == GOOD
    assert isinstance(bad, Failed)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    # The next run asks again, and only for what is missing.
    with chat_server(by_reply({"b": TEXT})) as server:
        assert judge(server.url, cache_dir=tmp_path).judge(requests("a", "b")) == [GOOD, GOOD]
    assert len(server.bodies) == 1


def test_an_unusable_verdict_that_lies_in_a_cache_is_asked_for_again(tmp_path):
    with chat_server(["nonsense", TEXT]) as server:
        plain = OpenAIChat(server.url, "m", cache_dir=tmp_path)
        assert plain.complete([judge_messages(requests("a")[0])]) == ["nonsense"]
        assert judge(server.url, cache_dir=tmp_path).judge(requests("a")) == [GOOD]


def test_the_simulated_user_is_kept_in_the_same_cache(tmp_path):
    with chat_server(["I am so tired."]) as server:
        chat = judge(server.url, cache_dir=tmp_path).chat
        said = [chat.complete([[{"role": "user", "content": "Speak."}]]) for _ in range(2)]
    assert said == [["I am so tired."]] * 2
    assert len(server.bodies) == 1


def test_options_reach_the_client_and_unknown_ones_are_refused():
    openai = judge("http://host/v1", concurrency=3, repairs=4, extra={"top_p": 1.0})
    assert openai.chat.concurrency == 3
    assert openai.repairs == 4
    assert openai.chat.extra == {"top_p": 1.0}
    with pytest.raises(TypeError, match="tiemout"):
        judge("http://host/v1", tiemout=3)
    with pytest.raises(InputError, match="url"):
        judge("host")


def test_check():
    with chat_server([Answer("", status=401)]) as server:
        with pytest.raises(NormkitError, match="OPENAI_API_KEY"):
            judge(server.url).check()
        assert "ready" in last_user(server.bodies[0])
