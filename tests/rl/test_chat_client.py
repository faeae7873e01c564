import asyncio
import json
import logging
import threading
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from normkit.errors import InputError, NormkitError
from normkit.rl import chat_client
from normkit.rl.chat_client import OpenAIChat
from normkit.rl.judge import Failed
from tests.rl.chat_server import Answer, ask_for, chat_server, free_port, last_user


def client(url, **options):
    return OpenAIChat(url, "m", **{"wait": 0.001, "timeout": 20.0, "retries": 2, **options})


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def clock(monkeypatch):
    """Sleeping takes no time and is written down."""
    slept = []
    real_sleep = asyncio.sleep

    async def sleep(delay, result=None):
        slept.append(delay)
        return await real_sleep(0, result)

    monkeypatch.setattr(chat_client, "_now", lambda: sum(slept))
    monkeypatch.setattr(asyncio, "sleep", sleep)
    return slept


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_every_form_of_the_address_reaches_the_same_path(suffix):
    with chat_server(["hello"]) as server:
        assert client(server.url + suffix).complete([ask_for("hi")]) == ["hello"]
    assert server.paths == ["/v1/chat/completions"]


def test_the_request_says_what_was_configured():
    with chat_server(["a"]) as server:
        chat = client(server.url, temperature=0.5, max_tokens=9, seed=3, extra={"top_p": 0.9})
        chat.complete([ask_for("hi")])
        client(server.url, temperature=None, max_tokens=None).complete([ask_for("hi")])
    full, bare = server.bodies
    assert full == {
        "model": "m",
        "messages": ask_for("hi"),
        "temperature": 0.5,
        "max_tokens": 9,
        "seed": 3,
        "top_p": 0.9,
    }
    assert bare == {"model": "m", "messages": ask_for("hi")}
    assert chat.name == "m"


def test_answers_come_back_in_order_from_many_requests_at_once():
    with chat_server(lambda body, n: f"re: {last_user(body)}") as server:
        chat = client(server.url, concurrency=5)
        texts = [f"message {i}" for i in range(23)]
        assert chat.complete([ask_for(t) for t in texts]) == [f"re: {t}" for t in texts]
        assert chat.complete([]) == []
    assert chat.counts["requests"] == 23


def test_no_more_requests_are_in_flight_than_allowed_and_no_fewer():
    # Four must arrive together before any is answered, and eight come in two such waves.
    gate = threading.Barrier(4)
    with chat_server(lambda body, n: Answer(wait_for=gate)) as server:
        answers = client(server.url, concurrency=4, retries=0).complete([ask_for("x")] * 8)
    assert answers == ["ok"] * 8
    assert server.most_in_flight == 4


def test_it_may_be_called_where_an_event_loop_runs_and_from_threads():
    with chat_server(lambda body, n: last_user(body)) as server:
        chat = client(server.url)

        async def inside():
            return chat.complete([ask_for("loop")])

        assert asyncio.run(inside()) == ["loop"]
        found = {}
        threads = [
            threading.Thread(target=lambda i=i: found.update({i: chat.complete([ask_for(str(i))])}))
            for i in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {i: [str(i)] for i in range(3)}


# ------------------------------------------------------------------ trouble that may pass


@pytest.mark.parametrize(
    "trouble",
    [
        Answer("busy", status=500),
        Answer("busy", status=502),
        Answer("busy", status=408),
        Answer("busy", status=429),
        Answer("busy", status=503, headers={"Retry-After": "soon"}),
        Answer(raw=b'{"choices": [{"mess'),
        Answer(raw=b"<html>a proxy's page</html>"),
        Answer(raw=b"[]"),
        Answer(raw=b'{"choices": []}'),
        Answer(raw=b"[" * 100_000),
        Answer(raw=b"[" * 100_000, status=500),
        Answer(hang_up=True),
    ],
    ids=lambda a: f"{a.status}-{(a.raw or b'')[:9].decode()}{'hang-up' * a.hang_up}",
)
def test_trouble_is_retried_until_it_passes(trouble):
    with chat_server([trouble, trouble, "fine"]) as server:
        chat = client(server.url)
        assert chat.complete([ask_for("x")]) == ["fine"]
    assert (chat.counts["requests"], chat.counts["retries"]) == (3, 2)


def test_trouble_that_stays_is_a_failure_after_all_retries():
    with chat_server([Answer("engine is on fire", status=500)]) as server:
        chat = client(server.url, retries=3)
        (failed,) = chat.complete([ask_for("x")])
    assert isinstance(failed, Failed)
    assert "HTTP 500" in failed.reason
    assert "engine is on fire" in failed.reason
    assert len(server.bodies) == 4
    assert chat.counts["failed"] == 1


def test_one_bad_request_does_not_spoil_the_others():
    def answer(body, n):
        return Answer("no", status=500) if last_user(body) == "bad" else "good"

    with chat_server(answer) as server:
        found = client(server.url, retries=1).complete([ask_for(t) for t in ("a", "bad", "b")])
    assert (found[0], found[2]) == ("good", "good")
    assert isinstance(found[1], Failed)


def test_a_server_that_is_too_slow_times_out_and_is_asked_again():
    never = threading.Event()
    with chat_server([Answer(wait_for=never), "in time"]) as server:
        chat = client(server.url, timeout=0.5, retries=9)
        assert chat.complete([ask_for("x")]) == ["in time"]
        never.set()
    assert chat.counts["retries"] >= 1


@pytest.mark.parametrize("drips", [False, True])
def test_a_server_that_never_ends_its_answer_fails(drips):
    never = threading.Event()
    with chat_server([Answer(wait_for=None if drips else never, drips=drips)]) as server:
        chat = client(server.url, timeout=0.2, retries=1)
        (failed,) = chat.complete([ask_for("x")])
        never.set()
    assert "within 0.2 s" in failed.reason
    assert chat.counts["requests"] == 2


def test_a_server_that_is_down_fails_with_its_address_and_spares_the_rest_of_the_batch():
    url = f"http://127.0.0.1:{free_port()}"
    chat = client(url, retries=1, concurrency=2)
    found = chat.complete([ask_for(str(i)) for i in range(10)])
    assert all(isinstance(f, Failed) and url in f.reason and "running" in f.reason for f in found)
    # The two that were in flight, twice each; the eight behind them were not sent.
    assert chat.counts["requests"] == 4
    assert chat.counts["failed"] == 10


def test_pauses_grow_and_are_jittered(clock):
    with chat_server([Answer("busy", status=500)]) as server:
        client(server.url, wait=1.0, retries=4, max_wait=6.0).complete([ask_for("x")])
    pauses = [p for p in clock if p > 0]
    assert len(pauses) == 4
    for pause, least in zip(pauses[:3], (1.0, 2.0, 4.0), strict=True):
        assert least <= pause <= least + 1.0
    assert pauses[3] == 6.0
    assert len({p % 1 for p in pauses[:3]}) == 3


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_waited_for_by_every_request_of_the_call(clock, status):
    def answer(body, n):
        return Answer("later", status=status, headers={"Retry-After": "30"}) if n == 0 else "ok"

    with chat_server(answer) as server:
        chat = client(server.url, concurrency=1)
        assert chat.complete([ask_for("a"), ask_for("b")]) == ["ok", "ok"]
    assert sum(clock) >= 30.0
    assert len(server.bodies) == 3


def test_retry_after_may_be_a_date(clock):
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=40), usegmt=True)
    with chat_server([Answer("", status=429, headers={"Retry-After": date}), "ok"]) as server:
        assert client(server.url).complete([ask_for("a")]) == ["ok"]
    assert 20.0 <= sum(clock) <= 42.0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0.0),
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("nan", 0.0),
        ("soon", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 -0000", 0.0),
    ],
)
def test_retry_after_header(header, seconds):
    assert chat_client._retry_after(header) == seconds


def test_a_server_that_asks_for_an_hour_has_failed_and_is_left_alone(clock):
    hour = Answer("quota", status=429, headers={"Retry-After": "3600"})
    with chat_server([hour]) as server:
        found = client(server.url, concurrency=1).complete([ask_for("a"), ask_for("b")])
    assert all("3600 s" in f.reason for f in found)
    assert len(server.bodies) == 1
    assert sum(clock) == 0


# ------------------------------------------------------------------ trouble that stays


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer("invalid key", status=401), ["HTTP 401", "OPENAI_API_KEY"]),
        (Answer("no", status=403), ["HTTP 403", "OPENAI_API_KEY"]),
        (Answer("The model `m` does not exist", status=404), ["HTTP 404", "'m'", "does not exist"]),
        (Answer(raw=b"Not Found", status=404), ["HTTP 404", "address"]),
        (
            Answer(
                raw=json.dumps(
                    {"error": {"message": "pay first", "code": "insufficient_quota"}}
                ).encode(),
                status=429,
            ),
            ["pay first"],
        ),
    ],
)
def test_what_cannot_get_better_is_not_retried_and_stops_the_batch(answer, words):
    with chat_server([answer]) as server:
        found = client(server.url, concurrency=1).complete([ask_for(str(i)) for i in range(5)])
    assert len(server.bodies) == 1
    assert len(found) == 5
    for failed in found:
        assert isinstance(failed, Failed)
        assert all(word in failed.reason for word in words)


@pytest.mark.parametrize("raw", [b'{"detail": "too long"}', b'{"error": "too long"}', b"too long"])
def test_a_request_that_the_server_rejects_is_final_but_only_for_itself(raw):
    def answer(body, n):
        return Answer(raw=raw, status=400) if last_user(body) == "long" else "ok"

    with chat_server(answer) as server:
        found = client(server.url, concurrency=1).complete([ask_for("long"), ask_for("b")])
    assert "HTTP 400" in found[0].reason
    assert "too long" in found[0].reason
    assert found[1] == "ok"
    assert len(server.bodies) == 2


def test_a_redirect_is_not_followed():
    away = Answer("", status=307, headers={"Location": "http://127.0.0.1:9/"})
    with chat_server([away]) as server:
        (failed,) = client(server.url).complete([ask_for("x")])
    assert "HTTP 307" in failed.reason


def test_check_finds_a_wrong_server_before_the_run(tmp_path):
    with chat_server(["ready"]) as server:
        chat = client(server.url, cache_dir=tmp_path)
        chat.check()
        chat.check()
    assert len(server.bodies) == 2
    with (
        chat_server([Answer("nope", status=404)]) as server,
        pytest.raises(NormkitError, match="HTTP 404"),
    ):
        client(server.url).check()


# ------------------------------------------------------------------ the key


def test_the_key_is_sent_and_shown_nowhere(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", " sk-secret-123\n")

    def answer(body, n):
        return [
            "ok",
            Answer("bad key sk-secret-123", status=401),
            Answer("key sk-secret-123 is odd", status=400),
        ][n]

    with chat_server(answer) as server:
        chat = client(server.url, api_key_env="MY_KEY", retries=0)
        found = [chat.complete([ask_for("x")])[0] for _ in range(3)]
    assert server.headers[0]["Authorization"] == "Bearer sk-secret-123"
    assert found[0] == "ok"
    assert "MY_KEY" in found[1].reason
    assert "key *** is odd" in found[2].reason
    shown = caplog.text + repr(chat) + repr(found) + str(vars(chat))
    assert "failed" in caplog.text
    assert "sk-secret-123" not in shown


def test_no_key_no_header_and_a_hint_where_one_is_wanted():
    with chat_server(["ok", Answer("", status=401)]) as server:
        assert client(server.url).complete([ask_for("x")]) == ["ok"]
        (failed,) = client(server.url).complete([ask_for("x")])
    assert "Authorization" not in server.headers[0]
    assert "none is set in OPENAI_API_KEY" in failed.reason


def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sécret")
    with pytest.raises(InputError, match="OPENAI_API_KEY") as caught:
        client("http://127.0.0.1:9").complete([ask_for("x")])
    assert "sécret" not in str(caught.value)


def test_a_local_server_is_reached_around_the_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with chat_server(["direct"]) as server:
        assert client(server.url).complete([ask_for("x")]) == ["direct"]


# ------------------------------------------------------------------ the cache


def test_a_cached_answer_makes_no_request_even_at_another_address(tmp_path):
    with chat_server(lambda body, n: f"answer {n}") as server:
        first = client(server.url, cache_dir=tmp_path)
        assert first.complete([ask_for("a"), ask_for("b")]) in (
            ["answer 0", "answer 1"],
            ["answer 1", "answer 0"],
        )
        known = first.complete([ask_for("a"), ask_for("b")])
    second = client(f"http://127.0.0.1:{free_port()}", cache_dir=str(tmp_path))
    assert second.complete([ask_for("a"), ask_for("b")]) == known
    assert len(server.bodies) == 2
    assert second.counts == {"cached": 2, "failed": 0}


def test_the_cache_knows_requests_by_everything_that_is_in_them(tmp_path):
    with chat_server(lambda body, n: f"answer {n}") as server:
        variants = [
            client(server.url, cache_dir=tmp_path),
            client(server.url, cache_dir=tmp_path, temperature=0.1),
            client(server.url, cache_dir=tmp_path, seed=1),
            client(server.url, cache_dir=tmp_path, max_tokens=7),
            client(server.url, cache_dir=tmp_path, extra={"top_p": 0.5}),
            OpenAIChat(server.url, "other", cache_dir=tmp_path),
        ]
        answers = [chat.complete([ask_for("a")])[0] for chat in variants]
    assert answers == [f"answer {n}" for n in range(6)]


def test_equal_requests_of_a_batch_are_sent_once_with_a_cache_and_each_without(tmp_path):
    same = [ask_for("a")] * 3
    with chat_server(lambda body, n: f"answer {n}") as server:
        assert client(server.url, cache_dir=tmp_path).complete(same) == ["answer 0"] * 3
        assert len(server.bodies) == 1
        assert set(client(server.url).complete(same)) == {"answer 1", "answer 2", "answer 3"}


def damage_half(path):
    path.write_bytes(path.read_bytes()[:20])


def damage_empty(path):
    path.write_bytes(b"")


def damage_bytes(path):
    path.write_bytes(b"\xff\xfe\x00")


def damage_type(path):
    entry = json.loads(path.read_text())
    path.write_text(json.dumps({**entry, "answer": 3}))


def damage_other(path):
    entry = json.loads(path.read_text())
    path.write_text(json.dumps({**entry, "key": "0" * 64}))


def damage_list(path):
    path.write_text("[" * 100_000)


@pytest.mark.parametrize(
    "damage",
    [damage_half, damage_empty, damage_bytes, damage_type, damage_other, damage_list],
)
def test_a_damaged_entry_is_a_miss_and_is_mended(tmp_path, damage):
    with chat_server(lambda body, n: f"answer {n}") as server:
        chat = client(server.url, cache_dir=tmp_path)
        assert chat.complete([ask_for("a")]) == ["answer 0"]
        (entry,) = tmp_path.rglob("*.json")
        damage(entry)
        assert chat.complete([ask_for("a")]) == ["answer 1"]
        assert chat.complete([ask_for("a")]) == ["answer 1"]
    assert len(server.bodies) == 2


def test_failures_and_questions_are_not_kept(tmp_path):
    with chat_server([Answer("", status=500), "ok"]) as server:
        chat = client(server.url, cache_dir=tmp_path, retries=0)
        (failed,) = chat.complete([ask_for("a private matter")])
        assert isinstance(failed, Failed)
        assert list(tmp_path.rglob("*")) == []
        assert chat.complete([ask_for("a private matter")]) == ["ok"]
    (entry,) = tmp_path.rglob("*.json")
    assert "private" not in entry.read_text()


def test_what_was_answered_is_kept_when_the_call_is_interrupted(tmp_path):
    def answer(body, n):
        return "kept" if last_user(body) == "a" else "\x00not reached"

    class StopError(Exception):
        pass

    with chat_server(answer) as server:
        chat = client(server.url, cache_dir=tmp_path, concurrency=1)
        attempt = chat._attempt

        async def stop_at_b(http, batch, body):
            if b'"b"' in body:
                raise StopError
            return await attempt(http, batch, body)

        chat._attempt = stop_at_b
        with pytest.raises(StopError):
            chat.complete([ask_for("a"), ask_for("b")])
        del chat._attempt
        assert chat.complete([ask_for("a")]) == ["kept"]
    assert len(server.bodies) == 1


def test_a_cache_that_cannot_be_written_costs_nothing_but_the_cache(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with chat_server(["ok"]) as server:
        chat = client(server.url, cache_dir=tmp_path / "file")
        assert chat.complete([ask_for("a")]) == ["ok"]
    assert "not kept" in caplog.text


# ------------------------------------------------------------------ answers


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("plain", "plain"),
        (None, ""),
        ([{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}], "in parts"),
        ("<think>hm</think> yes", "yes"),
        ("half a pair \ud800", "half a pair ?"),
    ],
)
def test_content_in_all_its_forms(tmp_path, content, text):
    raw = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})
    with chat_server([Answer(raw=raw.encode())]) as server:
        chat = client(server.url, cache_dir=tmp_path)
        assert chat.complete([ask_for("x")]) == [text]
        assert chat.complete([ask_for("x")]) == [text]


@pytest.mark.parametrize(
    ("calls", "text"),
    [
        (None, "Wait."),
        ([], "Wait."),
        ("x", "Wait."),
        (
            [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}, 3],
            'Wait.\n<tool_call>{"name": "f", "arguments": "{}"}</tool_call>\n'
            "<tool_call>3</tool_call>",
        ),
    ],
)
def test_calls_that_the_server_took_out_of_a_reply_stand_in_it_again(calls, text):
    with chat_server([Answer("Wait.", calls=calls)]) as server:
        assert client(server.url).complete([ask_for("x")]) == [text]


def test_half_a_surrogate_pair_in_a_message_is_sent_as_a_character():
    with chat_server(["ok"]) as server:
        assert client(server.url).complete([ask_for("a\ud800")]) == ["ok"]
    assert last_user(server.bodies[0]) == "a?"


# ------------------------------------------------------------------ bad options


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://host/v1",
        "http://",
        "",
        "http://host:port/",
        "http://[::1",
        "http://user:word@host/v1",
        "http://host/v1?key=1",
    ],
)
def test_bad_addresses_are_named(url):
    with pytest.raises(InputError, match="url must"):
        OpenAIChat(url, "m")


def test_a_password_in_the_address_is_not_repeated():
    with pytest.raises(InputError) as caught:
        OpenAIChat("http://user:word@host/v1", "m")
    assert "word@" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": 0},
        {"retries": -1},
        {"wait": -1.0},
        {"max_wait": -1.0},
        {"timeout": 0.0},
        {"timeout": float("nan")},
        {"extra": {"messages": []}},
        {"extra": {"stream": True}},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises(InputError, match=next(iter(options))):
        OpenAIChat("http://host", "m", **options)


def test_a_model_must_be_named():
    with pytest.raises(InputError, match="model"):
        OpenAIChat("http://host", "")


def test_extra_that_json_cannot_carry_is_refused():
    chat = OpenAIChat("http://host", "m", extra={"top_p": float("nan")})
    with pytest.raises(InputError, match="JSON"):
        chat.complete([ask_for("x")])
