"""`watch`: a run's page while it goes on, for this machine alone."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest

from helpers.pages import make_run
from rlhf.cli.runs import find_run
from rlhf.cli.watch import HOST, Pages, make_server, watch
from rlhf.config import ConfigError
from rlhf.exit_codes import DONE

DEFAULTS = {"runs_dir": "runs"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two runs, `old` and `new`, and the two trials of a sweep."""
    for number, name in enumerate(("old", "wide-0", "wide-1", "new")):
        run = make_run(tmp_path, name=name)
        for file in ("summary.json", "metrics.jsonl"):
            os.utime(run / file, (1000 + number, 1000 + number))
        if name.startswith("wide"):
            (run / "trial.json").write_text("{}")
    return tmp_path / "runs"


@pytest.fixture
def port(root: Path) -> Iterator[int]:
    """Of a server for these runs."""
    with make_server(root, "", "0") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    connection.request(method, path, headers={key.replace("_", "-"): each for key, each in headers.items()})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), text


def test_commands_on_one_run_name_a_sweeps_trials(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"run_name=wide is a sweep of 2 trials\. .* such as wide-0\."):
        find_run(root, "wide")
    assert find_run(root, "wide-1") == root / "wide-1"


def test_the_newest_run_is_shown_and_all_are_listed(port: int) -> None:
    status, headers, page = ask(port, "/")
    assert status == HTTPStatus.OK and "<title>Run new</title>" in page
    assert "connect-src &#39;self&#39;" in page and headers["X-Frame-Options"] == "DENY"
    assert "<title>Run old</title>" in ask(port, "/run/old")[2]
    listed = ask(port, "/runs")[2]
    places = [listed.index(f'href="/run/{name}"') for name in ("new", "wide-1", "wide-0", "old")]
    assert places == sorted(places)


def test_what_has_not_changed_is_not_sent_again(port: int, root: Path) -> None:
    _, headers, page = ask(port, "/run/old")
    assert f'data-stamp="{headers["ETag"]}"' in page
    assert ask(port, "/run/old", If_None_Match=headers["ETag"])[0] == HTTPStatus.NOT_MODIFIED
    with (root / "old" / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"stage": "ppo", "step": 1, "time": 1.0, "ppo/entropy": 0.25}) + "\n")
    status, _, page = ask(port, "/run/old", If_None_Match=headers["ETag"])
    assert status == HTTPStatus.OK and "ppo/entropy" in page


@pytest.mark.parametrize(
    "path", ["/run/none", "/etc/passwd", "/run/..%2F..%2Fetc", "/run/../runs", "/report.html", "/run/"]
)
def test_nothing_else_is_served(port: int, path: str) -> None:
    assert ask(port, path)[0] == HTTPStatus.NOT_FOUND


def test_only_this_machine_and_only_reading(port: int) -> None:
    assert ask(port, "/", Host=f"rebound.example:{port}")[0] == HTTPStatus.MISDIRECTED_REQUEST
    assert ask(port, "/", method="POST")[0] == HTTPStatus.NOT_IMPLEMENTED
    assert ask(port, "/", Host=f"localhost:{port}")[0] == HTTPStatus.OK


def test_a_run_that_begins_anew_is_asked_for_later(root: Path) -> None:
    (root / "new" / "summary.json").write_text('{"sta')
    assert Pages(root, "new").answer("/", "").status == HTTPStatus.SERVICE_UNAVAILABLE


def test_a_sweep_is_a_list_of_its_trials(root: Path) -> None:
    page = Pages(root, "wide").answer("/", "").page
    assert 'href="/run/wide-0"' in page and 'href="/run/wide-1"' in page and "/run/old" not in page
    os.utime(root / "wide-0" / "summary.json", (2000, 2000))
    assert "<title>Sweep wide</title>" in Pages(root, "").answer("/", "").page  # the newest run is its trial


def test_a_run_that_is_dead_is_said_so(root: Path) -> None:
    summary = json.loads((root / "new" / "summary.json").read_text())
    (root / "new" / "summary.json").write_text(json.dumps(summary | {"verdict": None}))
    page = Pages(root, "").answer("/", "").page
    assert '<span class="mark dead">dead</span>' in page and "Its process is gone." in page
    assert "The same command continues" in page


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run_name=nwe"], "run_name=nwe: there is no such run in {root}. Did you mean new?"),
        (["port=http"], "port=http: a port is a number from 0 to 65535."),
        (["prot=1"], "watch prot=1: it takes run_name=VALUE runs_dir=VALUE port=VALUE. Did you mean port?"),
    ],
)
def test_mistakes(root: Path, arguments: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        watch([f"runs_dir={root}", *arguments], DEFAULTS)
    assert complaint.format(root=root) in str(caught.value)


def test_a_decision_has_a_page_already(root: Path) -> None:
    (root / "choice").mkdir()
    (root / "choice" / "decision.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"run_name=choice is a decision: see .*choice/report\.html"):
        watch([f"runs_dir={root}", "run_name=choice"], DEFAULTS)


def test_a_port_that_is_taken(root: Path, port: int) -> None:
    with pytest.raises(ConfigError, match=f"port={port}: it cannot be used .* Use another, or port=0"):
        watch([f"runs_dir={root}", f"port={port}"], DEFAULTS)


def test_ctrl_c_ends_it_cleanly(root: Path) -> None:
    command = [sys.executable, "-m", "rlhf", "watch", f"runs_dir={root}", "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"{root}/new: http://{HOST}:")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (DONE, "")
