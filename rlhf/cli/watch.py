"""`python -m rlhf watch`: serve a run's page during the run, from the files that it writes. Needs no torch.

The server answers only this machine and only GET. It sends no files, only pages that it makes.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from hashlib import sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

from rlhf.cli.command import read
from rlhf.cli.runs import RunState, no_such_run, runs_in, state_of, sweep_of
from rlhf.config import ConfigError
from rlhf.exit_codes import DONE
from rlhf.report.page.collect import read_run
from rlhf.report.page.write import Live, RunLine, list_page, run_page
from rlhf.tracking.progress import clock

HOST, PORT = "127.0.0.1", 8765
HELP = f"""python -m rlhf watch [run_name=NAME] [runs_dir=DIR] [port={PORT}]

Serves the page of a run on {HOST} while the run goes on: curves, answers, where it is, how long it will take.
Without a name: the newest run; of a sweep, the list of its trials. Ctrl-C ends watch, not the run.
"""
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Type": "text/html; charset=utf-8",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def watch(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """Serve pages until Ctrl-C.

    Raises:
        ConfigError: there is no such run, or the port cannot be used.
    """
    known = {"run_name": "", "runs_dir": defaults["runs_dir"], "port": str(PORT)}
    keys = read("watch", arguments, known, HELP)
    if keys is None:
        return DONE
    root, name = Path(keys["runs_dir"]), keys["run_name"]
    path = shown_path(root, name)
    try:
        with make_server(root, name, keys["port"]) as server:
            address = f"http://{HOST}:{server.server_port}/"
            print(f"{path}: {address} (Ctrl-C ends the watch, not the run)", flush=True)
            server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        print()
    return DONE


def make_server(root: Path, name: str, port: str) -> ThreadingHTTPServer:
    """A server for the runs of a directory. It does not serve yet.

    Args:
        name: the run or sweep that `/` shows; empty for the newest.
        port: 0 takes a free port.

    Raises:
        ConfigError: the port cannot be used.
    """
    if not (port.isascii() and port.isdigit() and int(port) < 2**16):
        raise ConfigError(f"port={port}: a port is a number from 0 to 65535.")
    try:
        server = ThreadingHTTPServer((HOST, int(port)), partial(Handler, Pages(root, name)))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise ConfigError(
            f"port={port}: it cannot be used ({error.strerror}). Use another, or port=0."
        ) from None
    server.daemon_threads = True
    return server


def shown_path(root: Path, name: str) -> Path:
    """What `/` shows: the directory of a run, or the common name of a sweep's trials in this directory.

    Raises:
        ConfigError: there is no such run.
    """
    runs = runs_in(root)
    if not runs:
        raise ConfigError(f"runs_dir={root}: there is no run.")
    if not name:
        sweep = sweep_of(runs[0])
        return runs[0] if sweep is None else root / sweep
    names = [*(path.name for path in runs), *(sweep for path in runs if (sweep := sweep_of(path)))]
    if name not in names:
        raise no_such_run(root, name, names)
    return root / name


class Response(NamedTuple):
    """The response to a request."""

    status: HTTPStatus
    stamp: str = ""
    page: str = ""


class Pages:
    """The pages of a directory of runs."""

    def __init__(self, root: Path, name: str) -> None:
        self._root, self._name = root, name

    def answer(self, path: str, stamp: str) -> Response:
        """A page. Without text if nothing changed since `stamp`.

        Args:
            path: `/`, `/runs` or `/run/NAME`.
            stamp: ETag of the page that the browser has, or empty.
        """
        try:
            return self._answer(path, stamp)
        except (OSError, ValueError, KeyError, ConfigError):  # the run starts again while its files are read
            return Response(HTTPStatus.SERVICE_UNAVAILABLE)

    def _answer(self, path: str, stamp: str) -> Response:
        runs = {each.name: each for each in runs_in(self._root)}
        if path == "/runs":
            return self._list(f"Runs in {self._root}", [*runs.values()], stamp)
        if path == "/":
            name = shown_path(self._root, self._name).name
        elif path.startswith("/run/"):
            name = unquote(path.removeprefix("/run/"))
        else:
            return Response(HTTPStatus.NOT_FOUND)
        if name in runs:
            return self._run(runs[name], stamp)
        trials = [each for each in runs.values() if sweep_of(each) == name]
        return self._list(f"Sweep {name}", trials, stamp) if trials else Response(HTTPStatus.NOT_FOUND)

    def _run(self, directory: Path, stamp: str) -> Response:
        state = state_of(directory)
        lines = [*lines_of(state)]
        files = [directory / name for name in ("summary.json", "metrics.jsonl")]
        new = _stamp(state.status, *lines, *map(_written, files))
        if new == stamp:
            return Response(HTTPStatus.NOT_MODIFIED, new)
        return Response(HTTPStatus.OK, new, run_page(read_run(directory), Live(state.status, lines, new)))

    def _list(self, title: str, runs: Sequence[Path], stamp: str) -> Response:
        states = [state_of(path) for path in runs]
        rows = [
            RunLine(
                state.directory.name, f"/run/{quote(state.directory.name, safe='')}", state.status,
                f"{datetime.fromtimestamp(_summary_time(state.directory)):%Y-%m-%d %H:%M}",
                ", ".join(state.stages), state.activity or state.verdict or "",
            )
            for state in states
        ]  # fmt: skip
        new = _stamp(*(text for row in rows for text in row))
        if new == stamp:
            return Response(HTTPStatus.NOT_MODIFIED, new)
        return Response(HTTPStatus.OK, new, list_page(title, rows, Live("", [], new)))


def lines_of(state: RunState) -> Iterator[str]:
    """Lines about the state of a run."""
    if state.activity:
        yield state.activity
    if state.status == "silent":
        yield "It runs on another host and has not written for long: it may be dead."
    if state.status == "dead":
        yield "Its process is gone."
    yield from state.ending
    if state.unfinished and state.status != "done":
        yield f"Left: {', '.join(state.unfinished)}."
    if state.seconds_left is not None:
        end = datetime.fromtimestamp(time.time() + state.seconds_left)
        yield f"About {clock(state.seconds_left)} to go, until {end:%H:%M}."


class Handler(BaseHTTPRequestHandler):
    """Answers GET requests."""

    server_version, sys_version = "rlhf", ""

    def __init__(self, pages: Pages, *arguments: Any) -> None:
        self._pages = pages
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Send one page."""
        assert isinstance(self.server, ThreadingHTTPServer)
        own_hosts = (f"{HOST}:{self.server.server_port}", f"localhost:{self.server.server_port}")
        if self.headers.get("Host") not in own_hosts:  # DNS rebinding by a foreign page
            self._send(Response(HTTPStatus.MISDIRECTED_REQUEST))
            return
        stamp = self.headers.get("If-None-Match", "")
        self._send(self._pages.answer(urlsplit(self.path).path, stamp))

    def _send(self, response: Response) -> None:
        text = response.page
        if not text and response.status is not HTTPStatus.NOT_MODIFIED:
            text = f"<!doctype html><title>rlhf</title><p>{response.status.phrase}</p>"
        body = text.encode()
        self.send_response(response.status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        if response.stamp:
            self.send_header("ETag", response.stamp)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: the page asks every two seconds."""


def _stamp(*parts: object) -> str:
    return sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]


def _written(path: Path) -> str:
    if not path.exists():
        return ""
    status = path.stat()
    return f"{status.st_mtime_ns} {status.st_size}"


def _summary_time(directory: Path) -> float:
    return (directory / "summary.json").stat().st_mtime
