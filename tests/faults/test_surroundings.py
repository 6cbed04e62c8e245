"""Disks, servers, ranks and other runs that fail: one clear error or a resume, nothing finished is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from helpers.chains import Chain, RealChain, kill, ranks_of, wait_until
from rlhf.tracking import tracker

NEEDS_MOUNT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
BY_SERVER = ("ppo.critic.init=sft", "ppo.score.normalize=none", "stage=ppo", "checkpoint.every_minutes=null")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> RealChain:
    return RealChain(tmp_path_factory.mktemp("surroundings"))


@contextmanager
def small_disk(directory: Path, size: str) -> Iterator[None]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@NEEDS_MOUNT
@pytest.mark.slow
def test_a_full_disk_is_one_error_and_with_room_the_same_command_goes_on(chain: RealChain) -> None:
    disk = chain.store("full")
    with small_disk(disk, "4m"):
        _, err = chain.run("full", "checkpoint.every_steps=1", code=2)
        assert "MiB are free" in err and "checkpoint.keep" in err and "preflight=warn" in err
        _, err = chain.run("full", "checkpoint.every_steps=1", "preflight=warn", code=2)
        assert err.count("Error:") == 1 and "Traceback" not in err
        assert "No space left" in err or "could not be written" in err
        done = sorted(path.parent.parent.name for path in disk.glob("*/[!.]*/manifest.json"))
        assert done[:2] == ["base", "prepare"]
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        chain.run("full", "checkpoint.every_steps=1")
        summary = json.loads((chain.directory / "runs" / "full" / "summary.json").read_text())
        assert summary["stages"]["prepare"]["status"] == "reused"
        assert summary["stages"]["ppo"]["status"] == "ran"


@NEEDS_MOUNT
@pytest.mark.slow
def test_a_store_that_became_read_only_still_serves_what_is_finished(chain: RealChain) -> None:
    disk = chain.store("frozen")
    with small_disk(disk, "64m"):
        chain.run("frozen", "stage=sft")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        _, err = chain.run("frozen", "stage=reward", code=2)
        assert err.count("Error:") == 1 and "Read-only file system" in err and "store_dir=" in err
        out, _ = chain.run("frozen", "stage=sft")
        assert "sft reused" in out
        assert len([*disk.glob("sft/[!.]*/model.safetensors")]) == 1


@pytest.mark.slow
def test_files_are_utf_8_whatever_the_locale_is(chain: RealChain) -> None:
    word, directory = "Größe", chain.directory
    (directory / "words.jsonl").write_text(f'{{"prompt": "{word}?"}}\n' * 6, encoding="utf-8")
    asked = "{% if message.role == 'user' %}Größe {% endif %}"
    template = (
        f"{{% for message in messages %}}{asked}{{{{ message.content }}}}{{{{ eos_token }}}}{{% endfor %}}"
    )
    (directory / "words.jinja").write_text(template, encoding="utf-8")
    (directory / "experiment").mkdir()
    advice = f"# @package _global_\nsft: {{gates: {{skipped_steps: {{advice: {word}}}}}}}"
    (directory / "experiment" / "words.yaml").write_text(advice, encoding="utf-8")
    command = chain.command(
        "locale", "stage=evaluate", "evaluate.policies=[base]", "evaluate.reward=null",
        "evaluate.prompts=words.jsonl", "evaluate.max_new_tokens=4", "evaluate.gates.win_rate=null",
        "model.chat_template=words.jinja", "+experiment=words",
    )  # fmt: skip
    command[3:3] = ["--config-dir", str(directory)]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, cwd=directory, env={**os.environ, **ascii_only}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    run = directory / "runs" / "locale"
    for name in ("config.yaml", "samples.jsonl", "artifacts/evaluate/samples.jsonl",
                 "artifacts/evaluate/manifest.json"):  # fmt: skip
        assert word in (run / name).read_text(encoding="utf-8"), name


class Scorer(BaseHTTPRequestHandler):
    """Scores by length; a class attribute tells it to fail."""

    answered = 0

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).answered += 1
        answer = json.dumps({"scores": [len(text) / 10 for text in body["responses"]]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def reward_server(port: int = 0) -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", port), Scorer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.slow
def test_a_reward_server_that_goes_away_costs_nothing(chain: RealChain) -> None:
    with reward_server() as server:
        port = server.server_port
        reward = f"ppo.reward='http://127.0.0.1:{port}/score'"
        chain.run("served", reward, *BY_SERVER)
        process = chain.start("away", reward, *BY_SERVER)
        Scorer.answered = 0
        wait_until(lambda: Scorer.answered >= 4, process)  # the first evaluation, and a few steps
    out, err = process.communicate()
    assert process.returncode == 2, out + err
    assert err.count("Error:") == 1 and "the server does not answer, asked 4 times" in err
    with reward_server(port):
        out, _ = chain.run("away", reward, *BY_SERVER)
    assert "ppo: continues from step " in out
    assert chain.weights("away", "ppo") == chain.weights("served", "ppo")


@pytest.mark.slow
def test_a_tracker_that_cannot_be_reached_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "INIT_TIMEOUT_SECONDS", 5)  # for so long wandb tries
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    outcome = Chain(tmp_path).run("stage=sft", "tracker=wandb", "tracker.mode=online")
    assert outcome.code == 2, outcome.err
    assert "wandb cannot start" in outcome.err and "tracker.mode=offline" in outcome.err
    assert not list(tmp_path.glob("store/sft/[!.]*"))
    assert "WANDB_SERVICE" not in os.environ, "later runs, of this process or started by it, have their own"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "words"),
    [
        (signal.SIGKILL, "Rank 1 was killed by SIGKILL"),
        (signal.SIGSTOP, "rank 0 waited for rank 1 (last seen "),
    ],
)
def test_a_rank_that_dies_or_hangs_ends_the_run_within_half_a_minute(
    chain: RealChain, signum: signal.Signals, words: str
) -> None:
    name, overrides = f"rank_{signum.name}", ("launch.processes=2", "checkpoint.every_steps=1", "stage=sft")
    process = chain.start_until("sft", 1, name, *overrides, "sft.epochs=300", "distributed.timeout=12")
    begin = time.monotonic()
    os.kill(ranks_of(process.pid)[1], signum)
    _, err = process.communicate()
    assert process.returncode == 1
    assert words in err and "Traceback" not in err
    assert time.monotonic() - begin < 6 + 30


@pytest.mark.slow
def test_two_runs_in_one_directory_are_refused(chain: RealChain) -> None:
    first = chain.start_until("sft", 1, "same", "stage=sft", "checkpoint.every_steps=1", "sft.epochs=500")
    _, err = chain.run("same", "stage=sft", code=2)
    kill(first)
    assert f"another run is writing runs/same (pid {first.pid} on host " in err and err.count("Error:") == 1


@pytest.mark.slow
def test_a_clock_that_goes_backwards_changes_nothing(chain: RealChain) -> None:
    kill(chain.start_until("sft", 4, "clock", "stage=sft", "checkpoint.every_steps=1"))
    newest, *older = sorted(chain.store("clock").glob("sft/.*.checkpoints/step-*"), reverse=True)
    for path in (newest, *newest.iterdir()):  # as if it had been written a day before the others
        os.utime(path, (time.time() - 86400,) * 2)
    assert older
    out, _ = chain.run("clock", "stage=sft", "checkpoint.every_steps=1")
    assert f"continues from step {int(newest.name.removeprefix('step-'))} " in out


def test_a_store_of_another_version_is_refused_by_name(as_finished: Path, tmp_path: Path) -> None:
    shutil.copytree(as_finished, tmp_path, symlinks=True, dirs_exist_ok=True)
    (manifest,) = tmp_path.glob("store/prepare/[!.]*/manifest.json")
    manifest.write_text(manifest.read_text().replace('"format": 3', '"format": 99'))
    refused = Chain(tmp_path).run("stage=prepare")
    assert refused.code == 2
    assert "written in store format 99, this version reads 3" in refused.err
