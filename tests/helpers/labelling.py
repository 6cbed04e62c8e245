"""The labelling page, for real: served in this process or in another one, and a browser without a screen."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

import httpx

from rlhf.data.schema import Message
from rlhf.label.desk import Desk
from rlhf.label.draw import Draw, DrawConfig
from rlhf.label.pairs import Answer, Pair, pair_of
from rlhf.label.server import serve
from rlhf.label.server_config import ServerConfig
from rlhf.label.votes import VotesFile

TESTS = Path(__file__).parents[1]
DRAW = DrawConfig(random_share=0.5, overlap_share=0.5, overlap_people=2, check_share=0.0)
LINK = re.compile(r"label: (\w+): (http://\S+)")


def pair(prompt: str, one: str, other: str, gap: float | None = None) -> Pair:
    """A pair of two answers."""
    asked = [Message(role="user", content=prompt)]
    return pair_of(asked, Answer(one, "", None), Answer(other, "", None))._replace(predicted=gap)


def many(count: int) -> list[Pair]:
    """Pairs of a good and a bad answer; as often the one as the other is `first`."""
    return [pair(f"Rate {n}", f"good {n}", f"{('awfully', 'very')[n % 2]} bad {n}") for n in range(count)]


class Browser:
    """One annotator's, without JavaScript."""

    def __init__(self, link: str) -> None:
        """Follow the link, and press its button."""
        self.client = httpx.Client(base_url=link.partition("/enter")[0], follow_redirects=True, timeout=30.0)
        self.page = self.client.get(link)
        if self.page.status_code == 200:
            self.page = self.client.post("/enter", data={"token": link.rpartition("/")[2]})

    @property
    def text(self) -> str:
        """What the page says, markup and all."""
        return self.page.text

    @property
    def shown(self) -> str | None:
        """The number of the pair on the page."""
        found = re.search(r'name="shown" value="(\d+)"', self.text)
        return found and found[1]

    @property
    def answers(self) -> list[str]:
        """Left and right, as text."""
        found = re.findall(r"Answer [AB]</h2>\n<div [^>]*>(.*?)</div>\n</section>", self.text, re.DOTALL)
        return [html.unescape(each) for each in found]

    def vote(self, choice: str, comment: str = "", shown: str | None = None) -> httpx.Response:
        """Press a button."""
        data = {"choice": choice, "comment": comment, "shown": shown or self.shown or ""}
        self.page = self.client.post("/vote", data=data)
        return self.page

    def prefer(self, word: str) -> None:
        """Vote for the answer with this word."""
        assert self.vote("left" if word in self.answers[0] else "right").status_code == 200

    def undo(self, shown: str | None = None) -> None:
        """Take the last vote back."""
        self.page = self.client.post("/undo", data={"shown": shown or self.shown or ""})


@contextmanager
def served(
    path: Path, pairs: Sequence[Pair], *people: str, wanted: int = 1000, draw: DrawConfig = DRAW
) -> Iterator[tuple[Desk, dict[str, str]]]:
    """The page, in a thread of this process; and each annotator's link."""
    links: dict[str, str] = {}
    with closing(VotesFile(path)) as file:
        desk = Desk(file, Draw(pairs, draw, 0, len(people)), "label", people, wanted)
        ready, ended = threading.Event(), threading.Event()

        def log(text: str) -> None:
            links.update(LINK.findall(text))
            if f"label: {people[-1]}:" in text:
                ready.set()

        config = ServerConfig(host="127.0.0.1", port=0, url=None, new_links=[])
        thread = threading.Thread(target=serve, args=(desk, config, log), kwargs={"stop": ended})
        thread.start()
        try:
            assert ready.wait(20)
            yield desk, links
        finally:
            ended.set()
            thread.join()


def main() -> None:
    """Serve in a process of its own: VOTES_FILE PORT PAIRS ANNOTATOR...

    No pair goes to two annotators: what computes their agreement takes seconds to load.
    """
    path, port, count, *people = sys.argv[1:]
    config = ServerConfig(host="127.0.0.1", port=int(port), url=None, new_links=[])
    draw = Draw(many(int(count)), DRAW.model_copy(update={"overlap_share": 0.0}), 0, len(people))
    desk = Desk(VotesFile(Path(path)), draw, "label", people, 1000)
    serve(desk, config, lambda text: print(text, flush=True))


def start(path: Path, port: int, *people: str, pairs: int = 40) -> subprocess.Popen[str]:
    """A server in a process of its own."""
    command = [sys.executable, "-m", "helpers.labelling", str(path), str(port), str(pairs), *people]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=TESTS, env=environment)


def output_of(process: subprocess.Popen[str]) -> IO[str]:
    """What it prints."""
    assert process.stdout is not None
    return process.stdout


def kill(process: subprocess.Popen[str]) -> None:
    """With SIGKILL."""
    process.kill()
    process.wait()
    output_of(process).close()


def answers_at(url: str) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            httpx.get(url)
        except httpx.TransportError:
            continue
        return
    raise AssertionError(f"nothing answers at {url}")


if __name__ == "__main__":
    main()
