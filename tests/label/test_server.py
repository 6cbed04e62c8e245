"""The labelling page, served for real on 127.0.0.1 and used by browsers without JavaScript."""

from __future__ import annotations

import html
import logging
import random
import socket
import sqlite3
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from queue import Queue
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.requests import Request

from helpers.labelling import LINK, Browser, answers_at, kill, many, output_of, pair, served, start
from rlhf.label import connection
from rlhf.label import server as label_server
from rlhf.label.connection import one_line_complaints
from rlhf.label.draw import DrawConfig
from rlhf.label.server import BURST, COOKIE, MAX_BODY_BYTES, Guard, RateLimit
from rlhf.label.votes import Vote, VotesFile, votes_in


def cast(path: Path) -> list[Vote]:
    return votes_in(path, "label")


def test_votes_are_on_the_disk_as_they_were_meant(tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    with served(path, many(12), "ada") as (_, links):
        ada = Browser(links["ada"])
        for _ in range(6):
            before = len(cast(path))
            ada.prefer("good")
            assert len(cast(path)) == before + 1, "before the next pair is shown"
        assert ada.vote("tie", "both the same").status_code == 200
        ada.vote("both_bad")
        ada.vote("skip")
    votes = cast(path)
    assert all("good" in getattr(vote.pair, vote.choice) for vote in votes[:6])
    assert [vote.choice for vote in votes[6:]] == ["tie", "both_bad", "skip"]
    assert votes[6].comment == "both the same"
    assert {vote.left for vote in votes} == {"first", "second"}, "places are drawn"
    assert len({vote.pair.id for vote in votes}) == 9


def test_a_vote_taken_back_is_asked_again_in_the_same_places(tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    with served(path, many(4), "ada") as (_, links):
        ada = Browser(links["ada"])
        first = ada.answers
        ada.vote("left", "so </textarea> kind")
        assert ada.answers != first and "kind" not in ada.text
        ada.undo()
        assert ada.answers == first and "taken back" in ada.text
        assert ">so &lt;/textarea&gt; kind</textarea>" in ada.text, "the comment is not lost"
        assert cast(path) == []
        ada.vote("right")
        assert "kind" not in ada.text
        ada.vote("left")
        ada.undo()
        ada.page = ada.client.get(str(ada.page.url))
        assert len(cast(path)) == 1, "a page that is loaded again takes nothing back"
        ada.undo()
        ada.undo()
        assert "no vote of yours" in ada.text
        assert cast(path) == []


def test_a_page_that_was_voted_on_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    with served(path, many(4), "ada", "ben") as (_, links):
        ada, ben = Browser(links["ada"]), Browser(links["ben"])
        old = ada.shown
        ada.vote("left")
        ada.vote("right", shown=old)
        assert "nothing was counted" in ada.text
        ben.vote("left", shown=ada.shown)
        assert len(cast(path)) == 1, "another's page is not theirs"
        for body in ({"choice": "left"}, {"choice": "best", "shown": ada.shown}, {"shown": "1" * 40}):
            assert ada.client.post("/vote", data=body).status_code == 400
        assert ada.client.post("/vote", content=b"\xff\xfe=%ff&choice=\x00").status_code == 400


def test_it_ends_at_the_wanted_votes_or_with_the_last_pair(tmp_path: Path) -> None:
    with served(tmp_path / "a.sqlite", many(12), "ada", wanted=3) as (desk, links):
        ada = Browser(links["ada"])
        for _ in range(3):
            ada.prefer("good")
        assert "enough votes" in ada.text and desk.is_done()
    alone = DrawConfig(random_share=0.5, overlap_share=1.0, overlap_people=2, check_share=0.0)
    with served(tmp_path / "b.sqlite", many(3), "ada", "ben", draw=alone) as (desk, links):
        ada, ben = Browser(links["ada"]), Browser(links["ben"])
        for _ in range(3):
            ada.prefer("good")
        assert "No pair is left for you" in ada.text and not desk.is_done()
        for _ in range(3):
            ben.prefer("good")
        assert desk.is_done()


def test_two_annotators_at_once(tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    with served(path, many(30), "ada", "ben") as (desk, links):
        ada, ben = Browser(links["ada"]), Browser(links["ben"])
        for _ in range(15):
            ada.prefer("good")
            ben.prefer("bad" if ben.answers[0].endswith("1") else "good")
        assert "ada: 15" in ada.text and "ben: 15" in ben.text
        assert "agreement (alpha)" in ada.client.get("/").text
        wanted = desk.draw.wanted
    votes = cast(path)
    assert Counter(vote.annotator for vote in votes) == {"ada": 15, "ben": 15}
    shown = Counter(vote.pair.id for vote in votes)
    assert all(count <= wanted[pair_id] for pair_id, count in shown.items())
    assert max(shown.values()) == 2
    assert len({(vote.annotator, vote.pair.id) for vote in votes}) == 30


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }} \u202eabc\u202c \u2028 \x07 ش"
LONG = "word " * 20_000


def test_hostile_text_is_text(tmp_path: Path) -> None:
    pairs = [pair(HOSTILE, f"{HOSTILE} one", f"{HOSTILE} two"), pair("long", LONG, "short")]
    path = tmp_path / "votes.sqlite"
    with served(path, pairs, "ada") as (_, links):
        ada = Browser(links["ada"])
        pages = [ada.text]
        first = ada.answers
        ada.vote("left", HOSTILE)
        pages.append(ada.text)
        second = ada.answers
    for page in pages:
        assert "<script>alert" not in page and "<img" not in page
    (hostile,) = (page for page in pages if "onerror" in page)
    assert html.escape("<script>alert(1)</script>") in hostile and "{{ 7*7 }}" in hostile
    assert sorted(map(sorted, (first, second))) == sorted(
        map(sorted, ([LONG, "short"], [f"{HOSTILE} one", f"{HOSTILE} two"]))
    )
    assert 'dir="auto"' in hostile
    assert cast(path)[0].comment == HOSTILE


def test_what_strangers_get(tmp_path: Path) -> None:
    with served(tmp_path / "votes.sqlite", many(4), "ada") as (desk, links):
        root = links["ada"].partition("/enter")[0]
        stranger = httpx.Client(base_url=root)
        assert "good" not in stranger.get("/").text
        assert stranger.get("/").status_code == 403
        assert stranger.post("/vote", data={"choice": "left", "shown": "1"}).status_code == 403
        assert stranger.post("/undo").status_code == 403
        assert stranger.get("/enter/guess").status_code == 403
        assert stranger.post("/enter", data={"token": "guess"}).status_code == 403
        assert stranger.get("/../votes.sqlite").status_code == 404
        assert stranger.get("/", headers={"host": "evil.example"}).status_code == 400

        token = links["ada"].rpartition("/")[2]
        entered = stranger.post("/enter", data={"token": token})
        cookie = entered.headers["set-cookie"]
        assert {"HttpOnly", "SameSite=strict"} <= {part.strip() for part in cookie.split(";")}
        assert stranger.get(links["ada"]).headers.get("set-cookie") is None, "a link alone enters nobody"
        page = stranger.get("/")
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        assert page.headers["cache-control"] == "no-store"
        assert "style=" not in page.text and "<style" not in page.text and "onclick" not in page.text
        for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}):
            assert stranger.post("/undo", headers=headers).status_code == 403
        assert stranger.post("/vote", content=b"comment=" + b"x" * MAX_BODY_BYTES).status_code == 413
        proxied = {"origin": "https://label.example.org"}
        assert stranger.post("/undo", headers=proxied).status_code == 403, "nobody named a proxy"
        many_fields = "&".join(f"field{number}=1" for number in range(30)).encode()
        assert stranger.post("/vote", content=many_fields).status_code == 400
        assert desk.file.invite("ada") is None


def test_behind_a_proxy_that_writes_another_host() -> None:
    """As nginx does by default: then the browser's origin is that of server.url."""

    async def app(*_: object) -> None: ...

    def refused(site: str | None, origin: bytes) -> bool:
        headers = [(b"host", b"127.0.0.1:8017"), (b"origin", origin)]
        scope = {"type": "http", "method": "POST", "path": "/vote", "query_string": b"", "headers": headers}
        return Guard(app, lambda _: "ada", site).refusal(Request(scope)) is not None

    assert not refused("label.example.org", b"https://label.example.org")
    assert refused(None, b"https://label.example.org")
    assert refused("label.example.org", b"https://evil.example")


def test_only_a_tokens_hash_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    with served(path, many(4), "ada") as (_, links):
        token = links["ada"].rpartition("/")[2]
        Browser(links["ada"]).vote("left")
    assert all(token.encode() not in file.read_bytes() for file in tmp_path.iterdir())
    with closing(VotesFile(path)) as file:
        assert file.annotator_of(token) == "ada" and file.invite("ada") is None
        again = file.invite("ada", again=True)
        assert again and file.annotator_of(again) == "ada" and file.annotator_of(token) is None
    with served(path, many(4), "ada") as (_, links):
        assert links == {}, "it is printed once"
    with served(path, many(4), "ben") as (_, links):
        old = httpx.get(links["ben"].partition("/enter")[0], cookies={COOKIE: again})
        assert old.status_code == 403, "who is no annotator of this run has no page"


def test_an_old_page_takes_nothing_back(tmp_path: Path) -> None:
    """Such as the one to which a browser's Back leads after Undo."""
    path = tmp_path / "votes.sqlite"
    with served(path, many(4), "ada") as (_, links):
        ada = Browser(links["ada"])
        ada.vote("left")
        ada.vote("left")
        old = ada.shown
        ada.undo()
        ada.undo(shown=old)
        assert "That page was old, so nothing was taken back." in ada.text
        assert len(cast(path)) == 1
        ada.undo()
        assert cast(path) == []


def test_the_bar_counts_votes_that_can_be_cast(tmp_path: Path) -> None:
    twice = DrawConfig(random_share=1.0, overlap_share=1.0, overlap_people=2, check_share=0.0)
    with served(tmp_path / "votes.sqlite", many(5), "ada", "ben", wanted=300, draw=twice) as (_, links):
        ada = Browser(links["ada"])
        assert "0 of 10 votes" in ada.text
        ada.vote("skip")
        assert "0 of 10 votes" in ada.text
        ada.vote("left")
        assert "1 of 10 votes" in ada.text
    with served(tmp_path / "votes.sqlite", many(5), "ada", "ben", wanted=3, draw=twice) as (_, _):
        assert "0 of 3" not in ada.text


def test_a_full_disk_is_told_and_the_vote_can_be_cast_again(tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    with served(path, many(40), "ada") as (desk, links):
        ada, run = Browser(links["ada"]), desk.file._connection.execute
        run(f"PRAGMA max_page_count = {run('PRAGMA page_count').fetchone()[0]}")
        while ada.page.status_code == 200:
            page = ada.page
            ada.vote("left", "why " * 1000)
        assert ada.page.status_code == 507
        assert "Not saved: database or disk is full. Free some space" in ada.text
        run("PRAGMA max_page_count = 4294967294")
        before, ada.page = len(cast(path)), page
        assert ada.vote("left", "why " * 1000).status_code == 200
        assert len(cast(path)) == before + 1


def test_connections_that_ask_nothing_lock_nobody_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither many nor few: all are ended in the end, and a connection that is used is not."""
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 2.0)
    with served(tmp_path / "votes.sqlite", many(4), "ada") as (_, links), ExitStack() as opened:
        address = urlsplit(links["ada"])
        idle = [
            opened.enter_context(socket.create_connection((address.hostname, address.port), timeout=30))
            for _ in range(connection.MAX_CONNECTIONS + 300)
        ]
        for each in idle[-5:]:
            each.sendall(b"GET / HTTP/1.1\r\nHost: local")
        ada = Browser(links["ada"])
        assert ada.vote("left").status_code == 200
        for each in idle:
            with suppress(ConnectionResetError):
                assert each.recv(1) == b""
        assert ada.vote("left").status_code == 200
    assert capfd.readouterr() == ("", "")


def test_a_body_that_does_not_come_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_server, "BODY_SECONDS", 0.2)
    with served(tmp_path / "votes.sqlite", many(4), "ada") as (_, links):
        address = urlsplit(links["ada"])
        with socket.create_connection((address.hostname, address.port), timeout=30) as slow:
            slow.sendall(b"POST /enter HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\ntoken")
            assert slow.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_complaint_is_one_line_and_not_said_again() -> None:
    said: list[str] = []
    with one_line_complaints(said.append):
        for _ in range(5):
            try:
                raise OSError(24, "Too many open files")
            except OSError:
                logging.getLogger("asyncio").exception("socket.accept() out of\nsystem resource")
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
        logging.getLogger("uvicorn.error").info("Started")
    assert said == [
        "socket.accept() out of: OSError: [Errno 24] Too many open files", "Invalid HTTP request received."
    ]  # fmt: skip


def test_too_many_requests_wait() -> None:
    now = 0.0
    limit = RateLimit(lambda: now)
    assert [limit.allows("ada") for _ in range(BURST + 1)] == [True] * BURST + [False]
    assert limit.allows("ben")
    now = 1.0
    assert limit.allows("ada")


def test_a_stranger_with_many_guesses_is_slowed(tmp_path: Path) -> None:
    with served(tmp_path / "votes.sqlite", many(4), "ada") as (_, links):
        root = links["ada"].partition("/enter")[0]
        with httpx.Client(base_url=root) as client:
            codes = {
                client.get("/enter/guess", headers={"cookie": f"{COOKIE}=guess{n}"}).status_code
                for n in range(BURST + 30)
            }
        assert codes == {403, 429}
        assert Browser(links["ada"]).page.status_code in (200, 429)


def test_sqlite_writes_each_vote_to_the_disk_before_it_says_so(tmp_path: Path) -> None:
    """A killed process cannot show this: what it wrote is in the system's memory. A power cut would."""
    with closing(VotesFile(tmp_path / "votes.sqlite")) as file:
        run = file._connection.execute
        assert run("PRAGMA synchronous").fetchone() == (2,), "FULL"
        assert run("PRAGMA journal_mode").fetchone() == ("wal",)


def test_killed_between_votes_none_is_lost(tmp_path: Path, port: int) -> None:
    path, confirmed = tmp_path / "votes.sqlite", 0
    process = start(path, port, "ada")
    links = dict(LINK.findall(output_of(process).readline() + output_of(process).readline()))
    answers_at(f"http://127.0.0.1:{port}/")
    ada = Browser(links["ada"])
    for _ in range(3):
        for _ in range(4):
            ada.prefer("good")
            confirmed += 1
        on_page = ada.answers
        kill(process)
        process = start(path, port, "ada")
        answers_at(f"http://127.0.0.1:{port}/")
        assert len(cast(path)) == confirmed
        ada.page = ada.client.get("/")
        assert ada.answers == on_page, "the same pair, in the same places"
    kill(process)
    assert all("good" in getattr(vote.pair, vote.choice) for vote in cast(path))


def vote_until_killed(browser: Browser, confirmed: Queue[str]) -> None:
    """As fast as the server answers. It begins with the page that is open, also if that was voted on."""
    with suppress(httpx.TransportError):
        while (shown := browser.shown) is not None:
            form = {"choice": "left", "comment": shown, "shown": shown}
            if browser.client.post("/vote", data=form, follow_redirects=False).status_code == 303:
                confirmed.put(shown)
            browser.page = browser.client.get("/")


def test_killed_among_votes_no_confirmed_one_is_lost_and_none_counts_twice(tmp_path: Path, port: int) -> None:
    path, people, draw = tmp_path / "votes.sqlite", ("ada", "ben", "eve"), random.Random(0)
    browsers: list[Browser] = []
    confirmed: Queue[str] = Queue()
    known: list[str] = []
    for kills in range(1, 4):
        process = start(path, port, *people, pairs=400)
        try:
            answers_at(f"http://127.0.0.1:{port}/")
            if not browsers:
                lines = "".join(output_of(process).readline() for _ in range(len(people) + 1))
                browsers = [Browser(link) for _, link in LINK.findall(lines)]
            threads = [
                threading.Thread(target=vote_until_killed, args=(browser, confirmed)) for browser in browsers
            ]
            for thread in threads:
                thread.start()
            known += [confirmed.get(timeout=30) for _ in range(draw.randint(10, 50))]
            time.sleep(draw.uniform(0, 0.01))
        finally:
            kill(process)
        for thread in threads:
            thread.join()
        known += [confirmed.get() for _ in range(confirmed.qsize())]
        votes = cast(path)
        assert len({*known}) == len(known), "a page that was voted on is not confirmed again"
        assert {*known} <= {vote.comment for vote in votes}
        assert len(votes) - len(known) <= kills * len(people), "each waited for one answer"
        assert max(Counter((vote.annotator, vote.pair.id) for vote in votes).values()) == 1
    with closing(sqlite3.connect(path)) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
