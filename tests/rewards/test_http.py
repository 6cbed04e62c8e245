"""`ppo.reward=http://...`: what is sent, what may come back, and a server that does not answer."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from helpers.jobs import user
from rlhf.data.schema import PromptRow
from rlhf.rewards import http as remote
from rlhf.rewards.http import RewardServerConfig, ask, remote_reward
from rlhf.rewards.reward import RewardError

PROMPTS = [
    PromptRow(user("Say hi"), columns={"answer": "hi", "level": 2}),
    PromptRow(user("Say nothing"), columns={"answer": ""}),
]
ROWS = (PROMPTS, ["hi", ""])

ASKED = RewardServerConfig(timeout=5.0, retries=3)


class Server:
    """Answers what a test puts into `answers`, one a request; keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any]] = []
        self.asked: list[Any] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.asked.append(json.loads(body))
                status, answer = server.answers.pop(0)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, format: str, *args: object) -> None:
                """Quiet."""

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.0)
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def test_prompts_and_responses_are_sent_and_scores_come_back(server: Server) -> None:
    server.answers = [(200, {"scores": [1, -0.5]})]
    assert remote_reward(server.url, ASKED)(*ROWS).tolist() == [1.0, -0.5]
    assert server.asked == [
        {
            "prompts": ["Say hi", "Say nothing"], "responses": ["hi", ""],
            "columns": {"answer": ["hi", ""], "level": [2, None]},
        }
    ]  # fmt: skip


def test_a_server_that_fails_once_is_asked_again(server: Server) -> None:
    server.answers = [(503, {}), (200, {"scores": [1, 2]})]
    assert remote_reward(server.url, ASKED)(*ROWS).tolist() == [1.0, 2.0]


def test_a_score_that_is_null_is_not_a_number(server: Server) -> None:
    server.answers = [(200, {"scores": [None, 2]})]
    scores = remote_reward(server.url, ASKED)(*ROWS)
    assert scores.isnan().tolist() == [True, False]


@pytest.mark.parametrize("answer", [{"scores": [1]}, {"score": [1, 2]}, [1, 2], {"scores": ["a", "b"]}])
def test_an_answer_of_another_form_is_told(server: Server, answer: Any) -> None:
    server.answers = [(200, answer)]
    with pytest.raises(RewardError, match="It must answer"):
        remote_reward(server.url, ASKED)(*ROWS)


def test_a_server_that_is_not_there_is_told(server: Server) -> None:
    server.http.server_close()
    with pytest.raises(RewardError, match="does not answer, asked 4 times"):
        remote_reward(server.url, ASKED)(*ROWS)


def test_an_answer_cut_short_is_asked_for_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers = [(200, {"scores": [1, 2]}), (200, {"scores": [1, 2]})]
    handler: Any = server.http.RequestHandlerClass
    end_headers = handler.end_headers

    def promises_more(self: Any) -> None:
        if len(server.asked) == 1:
            self.send_header("Content-Length", "1000")
        end_headers(self)

    monkeypatch.setattr(handler, "end_headers", promises_more)
    assert remote_reward(server.url, ASKED)(*ROWS).tolist() == [1.0, 2.0]
    assert len(server.asked) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_another_try_cannot_change_is_told_at_once_with_what_the_server_said(
    server: Server, status: int
) -> None:
    server.answers = [(status, {"detail": "who are you?"})]
    with pytest.raises(RewardError, match=f"status {status}, .*who are you"):
        remote_reward(server.url, ASKED)(*ROWS)
    assert len(server.asked) == 1


def test_the_last_answer_is_shown_and_retries_are_counted(server: Server) -> None:
    server.answers = [(500, "boom")] * 2
    with pytest.raises(RewardError, match=r"asked 2 times \(status 500, .*boom.*reward_server.retries=1"):
        remote_reward(server.url, RewardServerConfig(timeout=5.0, retries=1))(*ROWS)
    assert len(server.asked) == 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(server: Server, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """A key that was meant for one host would go to another."""
    server.answers = [(status, {"scores": [1, 2]})]
    handler: Any = server.http.RequestHandlerClass
    end_headers = handler.end_headers

    def leads_elsewhere(self: Any) -> None:
        self.send_header("Location", server.url + "?elsewhere")
        end_headers(self)

    monkeypatch.setattr(handler, "end_headers", leads_elsewhere)
    with pytest.raises(RewardError, match=rf"refuses: status {status}, 'to http://.*are not followed"):
        ask(server.url, b"{}", ASKED, {"Authorization": "Bearer secret"})
    assert len(server.asked) == 1


def test_only_the_first_line_of_an_error_is_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "dumps", lambda said: said if isinstance(said, str) else "{}")
    server.answers = [(404, "no such model\nTraceback ...\n")]
    with pytest.raises(RewardError, match=r"status 404, 'no such model'\. Fix"):
        remote_reward(server.url, ASKED)(*ROWS)


@pytest.mark.parametrize(
    "scores",
    ["1" + "0" * 400, "1" + "0" * 5000, "[" * 200_000, "[]", '"1"', "1e999"],
    ids=lambda said: said[:9],
)
def test_garbage_is_told(server: Server, monkeypatch: pytest.MonkeyPatch, scores: str) -> None:
    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda said: said if isinstance(said, str) else dumps(said))
    server.answers = [(200, f'{{"scores": [{scores}, 1]}}')]
    ask_once = RewardServerConfig(timeout=5.0, retries=0)
    if scores == "1e999":  # inf, which whoever uses the scores refuses
        assert remote_reward(server.url, ask_once)(*ROWS).isinf().tolist() == [True, False]
        return
    with pytest.raises(RewardError, match=r"must answer|is no JSON, asked 1 times"):
        remote_reward(server.url, ask_once)(*ROWS)


def test_a_page_in_place_of_scores_is_shown(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "dumps", lambda said: said if isinstance(said, str) else "{}")
    server.answers = [(200, "<!doctype html>\n<title>Log in</title>")]
    with pytest.raises(RewardError, match=r"is no JSON, asked 1 times: '<!doctype html>' .* Fix the URL or"):
        remote_reward(server.url, RewardServerConfig(timeout=5.0, retries=0))(*ROWS)


@pytest.mark.parametrize("head", ["", "HTTP/1.1 200 OK\r\n\r\n"], ids=["headers", "body"])
def test_a_server_that_drips_is_not_waited_for_longer(head: str) -> None:
    """Each byte comes within the time."""
    stopped = threading.Event()

    def drip(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, suppress(OSError):
            connection.sendall(head.encode())
            while not stopped.wait(0.02):
                connection.sendall(b"H")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip, args=(listening,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/score"
        with pytest.raises(RewardError, match=r"asked 1 times \(timed out\).*timeout=0\.3"):
            remote_reward(url, RewardServerConfig(timeout=0.3, retries=0))(*ROWS)
        stopped.set()
        thread.join()


def test_an_answer_without_end_is_not_kept(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_ANSWER_BYTES", 1 << 20)
    server.answers = [(200, {"scores": [0.125] * 1_000_000})]
    with pytest.raises(RewardError, match="its answer is larger than 1 MiB"):
        remote_reward(server.url, RewardServerConfig(timeout=5.0, retries=0))(*ROWS)


def test_a_silent_server_is_waited_for_as_long_as_the_timeout_says() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/score"
        with pytest.raises(RewardError, match=r"asked 1 times \(timed out\).*timeout=0\.1"):
            remote_reward(url, RewardServerConfig(timeout=0.1, retries=0))(*ROWS)
