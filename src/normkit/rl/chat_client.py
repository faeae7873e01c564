"""Chat models behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, Ollama, hosted ones."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from normkit.errors import InputError, MissingDependencyError, NormkitError, check_least
from normkit.files import write_json
from normkit.rl.chat import Message, content_text, plain_text, without_reasoning
from normkit.rl.judge import Failed

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

_log = logging.getLogger(__name__)
_now = time.monotonic


class _RequestError(Exception):
    """A request that failed for good; ``shared`` where every other request would fail too."""

    def __init__(self, reason: str, shared: bool = False) -> None:
        super().__init__(reason)
        self.shared = shared


class _TransientError(_RequestError):
    """A request that may succeed when it is sent again."""


class _Request(NamedTuple):
    """A conversation, and the bytes that ask for its next message."""

    body: bytes
    messages: Sequence[Message]


class _Batch:
    """What the requests of one call share."""

    def __init__(self, concurrency: int) -> None:
        self.slots = asyncio.Semaphore(concurrency)
        self.resume_at = -math.inf
        self.broken: str | None = None

    async def wait_for_server(self) -> None:
        """Sleep until the time that the server last named, for whichever request it was."""
        while (delay := self.resume_at - _now()) > 0:
            await asyncio.sleep(delay)


@dataclass(eq=False)
class OpenAIChat:
    """A model behind an OpenAI-compatible ``/v1/chat/completions`` server.

    Requests run side by side. One that meets a time-out, a broken connection, HTTP 408, 409, 425,
    429 or 5xx, or an answer that is not what the protocol says, is sent again after an
    exponentially growing, jittered pause; a ``Retry-After`` holds back every request of the call.
    A wrong key, address or model is final, and the rest of the call is not sent.

    The key is read from the environment for every call, sent as a bearer token, and never logged,
    stored or repeated in a message.

    Attributes:
        url: address of the server, with or without ``/v1``, or of its chat completions.
        model: the name that the server knows the model by.
        api_key_env: environment variable that holds the key; no key is sent where it is unset.
        concurrency: requests in flight at once, per call of :meth:`complete`.
        timeout: seconds until an attempt is given up.
        retries: how often a request is sent again.
        wait: seconds before the first retry; doubles from one to the next.
        max_wait: longest pause in seconds; a server that asks for a longer one has failed.
        cache_dir: folder that keeps answers by the content of their request; None keeps none.
            With a cache, the same request always has the same answer.
        keep: says of a conversation and its answer whether the answer is worth keeping; one that is
            not is neither written to the cache nor taken from it. All are if None.
        temperature: sampling temperature; None leaves it to the server.
        max_tokens: longest answer in tokens; None leaves it to the server.
        seed: sampling seed, for servers that know it.
        extra: further fields of the request body, such as ``response_format``.
        counts: ``requests`` sent (retries included), ``retries``, ``cached`` (answered without a
            request), ``failed``.
    """

    url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 5
    wait: float = 1.0
    max_wait: float = 60.0
    cache_dir: str | Path | None = None
    keep: Callable[[Sequence[Message], str], bool] | None = None
    temperature: float | None = 0.0
    max_tokens: int | None = 512
    seed: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter, init=False, repr=False)

    def __post_init__(self) -> None:
        for package in ("httpx", "tenacity"):
            _require(package)
        self._endpoint = _endpoint(self.url)
        if not self.model:
            raise InputError("model must name a model of the server, got an empty string")
        check_least(self, 1, "concurrency")
        check_least(self, 0, "retries", "wait", "max_wait")
        if not self.timeout > 0:
            raise InputError(f"timeout must be more than 0 seconds, got {self.timeout}")
        if clash := {"model", "messages", "stream"} & set(self.extra):
            raise InputError(f"extra must not set {', '.join(sorted(clash))}")
        self._cache = None if self.cache_dir is None else _AnswerCache(Path(self.cache_dir))

    @property
    def name(self) -> str:
        """The model's name at the server."""
        return self.model

    def complete(self, conversations: Sequence[Sequence[Message]]) -> list[str | Failed]:
        """Return the next assistant message of each conversation, in order.

        May be called from any thread, whether or not an event loop runs in it.
        """
        bodies = [self._body(messages) for messages in conversations]
        if self._cache is None:
            # Without a cache, equal requests are sent each for itself: they may be meant to differ.
            keys = [str(i) for i in range(len(bodies))]
        else:
            keys = [hashlib.sha256(body).hexdigest() for body in bodies]
        work = {
            key: _Request(body, messages)
            for key, body, messages in zip(keys, bodies, conversations, strict=True)
        }
        answers: dict[str, str | Failed] = {}
        if self._cache is not None:
            for key, request in work.items():
                known = self._cache.get(key)
                if known is not None and self._worth_keeping(request, known):
                    answers[key] = known
        missing = {key: request for key, request in work.items() if key not in answers}
        self.counts["cached"] += len(bodies) - len(missing)
        if missing:
            answers.update(_run(self._send(missing)))
        results = [answers[key] for key in keys]
        self._report(results)
        return results

    def check(self) -> None:
        """Ask for one word, so that a wrong address, key or model is found before a run starts.

        Raises:
            NormkitError: with what is wrong.
        """
        # A run can wait for a server that is busy; who starts one should know soon.
        probe = replace(self, cache_dir=None, retries=min(self.retries, 2))
        messages: list[Message] = [{"role": "user", "content": "Answer with the word: ready"}]
        answer = _run(probe._send({"check": _Request(probe._body(messages), messages)}))["check"]
        if isinstance(answer, Failed):
            raise NormkitError(answer.reason)

    def _body(self, messages: Sequence[Message]) -> bytes:
        options = {
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            **self.extra,
        }
        body: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
        body["model"] = self.model
        body["messages"] = [{**m, "content": plain_text(m["content"])} for m in messages]
        try:
            return json.dumps(body, sort_keys=True, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise InputError(f"the request cannot be written as JSON: {error}") from None

    def _worth_keeping(self, request: _Request, answer: str) -> bool:
        return self.keep is None or self.keep(request.messages, answer)

    async def _send(self, work: Mapping[str, _Request]) -> dict[str, str | Failed]:
        """Send requests by key; keep the answers, and return them by key."""
        import httpx

        host = urlsplit(self._endpoint).hostname
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        batch = _Batch(self.concurrency)
        async with httpx.AsyncClient(
            headers=headers,
            timeout=self.timeout,
            limits=httpx.Limits(max_connections=self.concurrency),
            trust_env=host not in ("localhost", "127.0.0.1", "::1"),  # no proxy leads back here
        ) as client:

            async def answer(key: str, request: _Request) -> str | Failed:
                found = await self._answer(client, batch, request.body)
                if (
                    self._cache is not None
                    and isinstance(found, str)
                    and self._worth_keeping(request, found)
                ):
                    # At once, so that an interrupted call loses nothing that was answered.
                    self._cache.put(key, self.model, found)
                return found

            found = await asyncio.gather(*(answer(key, request) for key, request in work.items()))
        return dict(zip(work, found, strict=True))

    async def _answer(self, client: httpx.AsyncClient, batch: _Batch, body: bytes) -> str | Failed:
        from tenacity import (
            AsyncRetrying,
            retry_if_exception_type,
            stop_after_attempt,
            wait_exponential_jitter,
        )

        retrying = AsyncRetrying(
            stop=stop_after_attempt(self.retries + 1),
            wait=wait_exponential_jitter(initial=self.wait, max=self.max_wait, jitter=self.wait),
            retry=retry_if_exception_type(_TransientError),
            before_sleep=lambda _: self.counts.update(retries=1),
            reraise=True,
        )
        # A request keeps its slot while it waits: a server in trouble is asked less, not more.
        async with batch.slots:
            if batch.broken is not None:
                return Failed(batch.broken)
            try:
                return await retrying(self._attempt, client, batch, body)
            except _RequestError as error:
                if error.shared:
                    batch.broken = str(error)
                return Failed(str(error))

    async def _attempt(self, client: httpx.AsyncClient, batch: _Batch, body: bytes) -> str:
        import httpx

        await batch.wait_for_server()
        self.counts["requests"] += 1
        try:
            # httpx times each read; a server that drips its answer would never time out.
            response = await asyncio.wait_for(
                client.post(self._endpoint, content=body), self.timeout
            )
        except (asyncio.TimeoutError, httpx.TimeoutException):
            raise _TransientError(
                f"no answer from {self._endpoint} within {self.timeout:g} s"
            ) from None
        except httpx.ConnectError as error:
            raise _TransientError(
                f"{self._endpoint} cannot be reached ({error}); is the server running?", shared=True
            ) from None
        except httpx.RequestError as error:
            raise _TransientError(
                f"the connection to {self._endpoint} broke ({type(error).__name__})"
            ) from None
        if response.status_code == httpx.codes.OK:
            return self._text(response)
        raise self._refusal(response, batch)

    def _text(self, response: httpx.Response) -> str:
        try:
            message = response.json()["choices"][0]["message"]
            content, calls = message.get("content"), _written(message.get("tool_calls"))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise _TransientError(
                f"{self._endpoint} answered with something other than a chat completion"
            ) from None
        said = without_reasoning(plain_text(content_text(content)))
        return "\n".join(filter(None, (said, *calls)))

    def _refusal(self, response: httpx.Response, batch: _Batch) -> _RequestError:
        """Say what a response other than 200 means for this request and for the others."""
        status = response.status_code
        what = f"HTTP {status} from {self._endpoint}"
        if status in (401, 403):
            # Servers like to repeat the key they refuse, so their words are left out here.
            given = "refuses the key in" if self._key() else "wants a key, and none is set in"
            return _RequestError(f"{what}: the server {given} {self.api_key_env}", shared=True)
        detail, code = self._detail(response)
        what = f"{what}: {detail}" if detail else what
        if status == 404:
            hint = f"check the address and that the server has the model {self.model!r}"
            return _RequestError(f"{what}; {hint}", shared=True)
        if code == "insufficient_quota":
            return _RequestError(what, shared=True)
        if status not in (408, 409, 425, 429) and status < 500:
            return _RequestError(what)
        pause = _retry_after(response.headers.get("Retry-After")) if status in (429, 503) else 0.0
        if pause > self.max_wait:
            longer = f"the server asks to wait {pause:.0f} s, longer than {self.max_wait:g} s"
            return _RequestError(f"{what}; {longer}", shared=True)
        batch.resume_at = max(batch.resume_at, _now() + pause)
        return _TransientError(what)

    def _detail(self, response: httpx.Response) -> tuple[str, str]:
        """Return the server's explanation, short and without the key, and its error code."""
        code = ""
        try:
            error = response.json()
        except (ValueError, RecursionError):
            error = response.text
        if isinstance(error, dict):
            error = error.get("error") or error.get("detail") or error.get("message") or ""
        if isinstance(error, dict):
            code = str(error.get("code") or "")
            error = error.get("message") or code
        text = " ".join(str(error).split())
        if key := self._key():
            text = text.replace(key, "***")
        return text[:200], code

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""
        if not (key.isascii() and key.isprintable()):
            raise InputError(
                f"{self.api_key_env} must hold a key of printable ASCII characters, got others"
            )
        return key

    def _report(self, results: Sequence[str | Failed]) -> None:
        lost = [result.reason for result in results if isinstance(result, Failed)]
        self.counts["failed"] += len(lost)
        if lost:
            _log.warning("%d of %d requests failed: %s", len(lost), len(results), lost[0])


class _AnswerCache:
    """Answers on disk, one small JSON file each, named by the hash of the request.

    Requests are not kept. A file that cannot be read, or is not what it should be, is a miss.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> str | None:
        """Return the kept answer of a request, or None."""
        try:
            entry = json.loads(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(entry, dict) or entry.get("key") != key:
            return None
        answer = entry.get("answer")
        return answer if isinstance(answer, str) else None

    def put(self, key: str, model: str, answer: str) -> None:
        """Keep an answer; one that cannot be written is only lost to the cache."""
        try:
            write_json(self._path(key), {"key": key, "model": model, "answer": answer})
        except OSError as error:
            _log.warning("an answer was not kept in %s: %s", self.folder, error)


def _written(tool_calls: Any) -> list[str]:
    """Tool calls that the server took out of the reply, as Qwen and Hermes write them in it."""
    calls = tool_calls if isinstance(tool_calls, list) else []
    bodies = [call.get("function", call) if isinstance(call, dict) else call for call in calls]
    return [f"<tool_call>{json.dumps(body)}</tool_call>" for body in bodies]


def _endpoint(url: str) -> str:
    try:
        parts = urlsplit(url.strip())
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # raises where it is not a number of a port
    except ValueError:
        valid = False
    if not valid:
        raise InputError(f"url must look like http://host:port or https://host/v1, got {url!r}")
    if parts.username is not None or parts.password is not None:
        raise InputError(
            "url must not hold a user name or password; set the key's variable instead"
        )
    if parts.query or parts.fragment:
        raise InputError(f"url must end with its path, got a query or fragment in {url!r}")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions" if re.search(r"/v\d+$", path) else "/v1/chat/completions"
    return parts._replace(path=path).geturl()


def _retry_after(value: str | None) -> float:
    """Seconds that a ``Retry-After`` header asks for (RFC 9110, 10.2.3); 0 where it is unclear."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return 0.0
        date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
        seconds = (date - datetime.now(timezone.utc)).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end, in a thread of its own where this one already runs a loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, work).result()


def _require(package: str) -> None:
    try:
        __import__(package)
    except ImportError:
        raise MissingDependencyError(package, "rl") from None
