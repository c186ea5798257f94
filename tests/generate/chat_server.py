"""A real HTTP server on this machine that stands in for a remote chat endpoint, with its faults."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

INPUT_TOKENS, OUTPUT_TOKENS = 20, 5
"""What every reply reports to have used."""


@dataclass(frozen=True)
class Step:
    """How one request is answered; `hang` keeps it waiting until the server closes, `drop` cuts the connection."""

    content: str | None = "fine"
    finish: str | None = "stop"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    refusal: str | None = None
    usage: bool = True
    drop: bool = False
    hang: bool = False

    def body(self) -> bytes:
        if self.raw is not None:
            return self.raw
        message = {"role": "assistant", "content": self.content, "refusal": self.refusal}
        payload: dict[str, Any] = {"choices": [{"index": 0, "message": message, "finish_reason": self.finish}]}
        if self.usage:
            payload["usage"] = {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS}
        return json.dumps(payload).encode()


class ChatServer(ThreadingHTTPServer):
    """Answers POST /v1/chat/completions with what `answer(messages, number)` says; `number` counts requests from 0.

    With `parties`, requests after the first are held until so many are there together.
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[list[dict[str, str]], int], Step], parties: int | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.barrier = threading.Barrier(parties) if parties else None
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []  # of arrival, in seconds
        self.in_flight = self.peak = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up waiting is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.headers.append({name.title(): value for name, value in self.headers.items()})
            server.times.append(time.monotonic())
            server.in_flight += 1
            server.peak = max(server.peak, server.in_flight)
        try:
            if server.barrier is not None and number:
                server.barrier.wait(timeout=20)
            step = server.answer(body["messages"], number) if self.path == "/v1/chat/completions" else Step(status=404)
        finally:
            with server.lock:
                server.in_flight -= 1
        if step.hang:
            server.closing.wait(timeout=60)
        if step.hang or step.drop:
            self.close_connection = True
            return
        payload = step.body()
        self.send_response(step.status)
        for name, value in step.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@contextmanager
def serving(answer: Callable[[list[dict[str, str]], int], Step], parties: int | None = None) -> Iterator[ChatServer]:
    server = ChatServer(answer, parties)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def echo(messages: list[dict[str, str]], number: int) -> Step:
    """Replies with what was said last."""
    return Step(messages[-1]["content"].upper())
