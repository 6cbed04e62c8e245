"""A server that speaks OpenAI's protocol, on a real socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Endpoint:
    """Answers /v1/chat/completions with what `says` makes of the user's message; keeps what it was asked."""

    def __init__(self) -> None:
        self.says: Callable[[str], str] = lambda question: "7"
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.failing = 0
        self.finish_reason = "stop"
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                endpoint.asked.append(body)
                endpoint.keys.append(self.headers.get("Authorization"))
                if endpoint.failing:
                    endpoint.failing -= 1
                    self.send_error(503)
                    return
                text = endpoint.says(body["messages"][-1]["content"])
                answer = {
                    "choices": [
                        {
                            "message": {"role": "assistant", "content": text},
                            "finish_reason": endpoint.finish_reason,
                        }
                    ],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 2},
                }
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.source = f"judge:{self.url}"


@contextmanager
def served_endpoint() -> Iterator[Endpoint]:
    """An endpoint that answers while it is open."""
    endpoint = Endpoint()
    thread = threading.Thread(target=endpoint.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.http.shutdown()
        endpoint.http.server_close()
        thread.join()
