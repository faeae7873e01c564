"""A real HTTP server on 127.0.0.1 that speaks, and misspeaks, the chat completions protocol."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    """What the server does with one request: text and calls of the model, or else a raw body."""

    text: str | None = "ok"
    calls: list | None = None
    status: int = 200
    raw: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    wait_for: threading.Event | threading.Barrier | None = None
    hang_up: bool = False
    drips: bool = False

    def body(self) -> bytes:
        if self.raw is not None:
            return self.raw
        if self.status != 200:
            return json.dumps({"error": {"message": self.text, "code": None}}).encode()
        message = {"role": "assistant", "content": self.text, "tool_calls": self.calls}
        return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()


class ChatServer:
    """Answers request n (from 0) with ``answer(body, n)`` and remembers what it was sent."""

    def __init__(self, answer):
        self.answer = answer
        self.bodies, self.paths, self.headers = [], [], []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                server.handle(self)

            def log_message(self, *_):
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def handle(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            n = len(self.bodies)
            self.bodies.append(body)
            self.paths.append(handler.path)
            self.headers.append(dict(handler.headers))
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        answer = self.answer(body, n)
        answer = Answer(answer) if isinstance(answer, str) else answer
        try:
            if answer.wait_for is not None:
                answer.wait_for.wait(timeout=20)
        finally:
            with self.lock:
                self.in_flight -= 1
        if answer.hang_up:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        content = answer.body()
        try:
            handler.send_response(answer.status)
            for name, value in answer.headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(content) + 10**6 * answer.drips))
            handler.end_headers()
            if answer.drips:
                self.drip(handler)
            handler.wfile.write(content)
        except OSError:
            handler.close_connection = True  # the client has given up

    def drip(self, handler):
        """Send white space, a little at a time, until the client gives up."""
        while not self.closing.wait(0.02):
            handler.wfile.write(b" ")


@contextmanager
def chat_server(answer):
    """Serve while the block runs; ``answer`` is a function, or a list with one item a request."""
    items = answer if callable(answer) else (lambda body, n: answer[min(n, len(answer) - 1)])
    server = ChatServer(items)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.http.shutdown()
        server.http.server_close()
        thread.join()


def free_port() -> int:
    """A port of 127.0.0.1 where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def last_user(body) -> str:
    """What the request asked last."""
    return body["messages"][-1]["content"]


def ask_for(text):
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


class ScriptedChat:
    """A chat model of a table: answers in order, per call and conversation."""

    name = "scripted"

    def __init__(self, *batches):
        self.batches = list(batches)
        self.seen = []

    def complete(self, conversations):
        self.seen.append([list(messages) for messages in conversations])
        return self.batches.pop(0)
