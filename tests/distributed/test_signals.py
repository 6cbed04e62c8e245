"""A rank that waits in a collective executes no Python, and hears signals all the same."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.chains import RealChain, children_of, ranks_of, wait_until
from rlhf.distributed import heartbeat as beating
from rlhf.distributed import signals as interrupt
from rlhf.distributed.compute import Compute
from rlhf.distributed.heartbeat import Heartbeat, bytes_moved
from rlhf.distributed.signals import ReceivedSignals, StopSignals

TORCHRUN = Path(__file__).parents[2] / "launch" / "torchrun.sh"
WAITING = """
import os, sys, threading
from pathlib import Path
from rlhf.distributed import signals as interrupt
from rlhf.distributed.compute import make_compute
from rlhf.distributed.heartbeat import Heartbeat
from rlhf.distributed.signals import ReceivedSignals, StopSignals

directory, interrupt.QUIET_SECONDS = Path(sys.argv[1]), float(sys.argv[2])
compute, _ = make_compute("cpu", "fp32", timeout=600)
signals = StopSignals()

def end(signum, is_second):
    print(f"{signum} {is_second}; {heartbeat.others()}")
    sys.stdout.flush()
    os._exit(75)

with Heartbeat(directory / "ranks", compute, print) as heartbeat, signals.installed(), signals.watchdog(end):
    signals.progress = heartbeat.progress
    with signals.deferred():
        compute.barrier()
        compute.position.update(stage="ppo", step=compute.rank)
        (directory / f"here{compute.rank}").touch()
        if compute.rank == 1:
            threading.Event().wait()
        while True:
            compute.barrier()
"""


@pytest.mark.parametrize(
    ("quiet", "is_second"), [("1", False), pytest.param("1e9", True, marks=pytest.mark.slow)]
)
def test_it_ends_without_the_others(tmp_path: Path, quiet: str, is_second: bool) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        subprocess.Popen(
            [sys.executable, "waiting.py", str(tmp_path), quiet], cwd=tmp_path, text=True,
            env={**os.environ, **meeting, "OMP_NUM_THREADS": "1", "RANK": str(rank)}, stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    wait_until(lambda: all((tmp_path / f"here{rank}").exists() for rank in range(2)), ranks[0])
    wait_until(lambda: json.loads((tmp_path / "ranks" / "rank1.json").read_text()).get("step") == 1, ranks[0])
    if is_second:
        ranks[0].send_signal(signal.SIGUSR1)  # the kernel makes one of two equal ones that are pending
    ranks[0].send_signal(signal.SIGTERM)
    said, _ = ranks[0].communicate(timeout=100)
    ranks[1].kill()
    ranks[1].communicate()
    assert ranks[0].returncode == 75
    assert re.fullmatch(rf"(15|10) {is_second}; rank 1 \(in ppo, step 1\)\n", said), said


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_only_a_run_without_progress_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "QUIET_SECONDS", 0.2)
    monkeypatch.setattr(interrupt, "CHECK_SECONDS", 0.01)
    signals, ended, states = StopSignals(), threading.Event(), iter(range(100))
    signals.progress = lambda: next(states, None)
    heard: list[tuple[int, bool, int | None]] = []

    def end(signum: int, is_second: bool) -> None:
        heard.append((signum, is_second, next(states, None)))
        ended.set()
        monkeypatch.setattr(interrupt, "QUIET_SECONDS", float("inf"))

    with signals.installed(), signals.watchdog(end), pytest.raises(interrupt.Stopped), signals.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert ended.wait(60)
    assert heard == [(signal.SIGUSR1, False, None)]  # none of the hundred states is left


def test_on_a_gpu_a_pass_may_take_as_long_as_steps_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing shows there that it goes on. It is simulated: no state changes while the step lasts."""
    monkeypatch.setattr(interrupt, "QUIET_SECONDS", 0.01)
    monkeypatch.setattr(interrupt, "FIRST_START_SECONDS", 0.02)
    monkeypatch.setattr(interrupt, "CHECK_SECONDS", 0.01)
    signals = StopSignals()
    assert signals.quiet_seconds == 0.01
    signals.on_gpu, signals.progress = True, list
    assert signals.quiet_seconds == 0.02
    signals.longest_step = 60.0
    assert signals.quiet_seconds == 180.0
    ended = threading.Event()
    heard = signals.watchdog(lambda *_: ended.set())
    with signals.installed(), heard, pytest.raises(interrupt.Stopped), signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert not ended.wait(0.2), "the step may finish, and be saved"
        signals.longest_step = 0.0
        assert ended.wait(60)


def test_whoever_ends_by_itself_is_left_alone() -> None:
    signals = StopSignals()
    with pytest.raises(interrupt.Stopped), signals.installed(), signals.watchdog(lambda *_: os._exit(1)):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the handler ran")
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(("first", "second", "counts"), [
    (signal.SIGTERM, signal.SIGTERM, False),  # a control group's, and the launcher that passes its own on
    (signal.SIGTERM, signal.SIGUSR1, True),
])  # fmt: skip
@pytest.mark.parametrize("is_heard", [True, False])
def test_the_same_signal_again_at_once_is_the_same_stop(
    first: signal.Signals, second: signal.Signals, counts: bool, is_heard: bool
) -> None:
    signals = StopSignals()
    ends = signals.watchdog(lambda *_: os._exit(1)) if is_heard else nullcontext()
    came = threading.Event()

    def work() -> None:
        """A step: what is awaited outlasts the first signal, as its handler does not end it."""
        with signals.deferred():
            for signum in (first, second):
                os.kill(os.getpid(), signum)
            assert signals.received == first
            came.wait(60 if counts else 0.1)  # for the thread's judgement
            came.set()

    with signals.installed(), ends, pytest.raises(interrupt.Stopped) as stopped:
        work()
    assert came.is_set() != counts
    assert stopped.value.signum == (second if counts else first)


def test_the_same_signal_later_is_another_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "REPETITION_SECONDS", 0.0)
    signals = StopSignals()
    ends = signals.watchdog(lambda *_: os._exit(1))
    with signals.installed(), ends, pytest.raises(interrupt.Stopped), signals.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(60)
        pytest.fail("the second one ends the wait")


def test_it_ends_before_a_process_that_it_forked() -> None:
    """The child holds the sockets too. The thread would wait for it, and it ends last here."""
    signals, (reader, writer) = StopSignals(), os.pipe()
    with signals.watchdog(lambda signum, is_second: None):
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)  # returns when the test is over
            os._exit(0)
        os.close(reader)
        ending = threading.Timer(30, os.kill, (child, signal.SIGKILL))
        ending.start()
    ending.cancel()
    os.close(writer)
    assert os.waitpid(child, 0)[1] == 0


def test_a_launcher_passes_one_on_for_two(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = ReceivedSignals()
    assert [heard.is_new(signal.SIGTERM), heard.is_new(signal.SIGTERM), heard.is_new(signal.SIGINT)] == [
        True, False, True,
    ]  # fmt: skip
    monkeypatch.setattr(interrupt, "REPETITION_SECONDS", 0.0)
    assert heard.is_new(signal.SIGINT)
    assert heard.signums == [signal.SIGTERM, signal.SIGINT, signal.SIGINT]


def test_only_signals_that_stop_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may have a handler of its own, such as one for SIGCHLD."""
    monkeypatch.setattr(interrupt, "SECOND_SIGNAL_SECONDS", 0.0)
    ended: list[tuple[int, bool]] = []
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        with StopSignals().watchdog(lambda *how: ended.append(how)):
            for _ in range(3):
                signal.raise_signal(signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert ended == []


def test_progress_is_what_a_rank_that_hangs_does_not_do(tmp_path: Path) -> None:
    compute = Compute("cuda", "float32", world_size=2)
    heartbeat = Heartbeat(tmp_path, compute, pytest.fail)

    def read() -> None:
        Path(__file__).read_bytes()

    with ThreadPoolExecutor(1) as other:  # the thread that says it may not count itself

        def said() -> dict[str, Any]:
            return other.submit(heartbeat._report).result()

        before = said()
        other.submit(read).result()
        assert said() == before
        for do in (read, compute.count_progress, lambda: list(compute.micro_batches([1], 1))):
            before = said()
            do()
            assert said() != before
        with compute.busy():
            assert said() != said()
        assert said() == said()
    before_read = bytes_moved(threading.main_thread())
    read()
    assert bytes_moved(threading.main_thread()) >= before_read + Path(__file__).stat().st_size


def test_a_disk_that_refuses_stops_no_heart(tmp_path: Path) -> None:
    directory = tmp_path / "ranks"
    heartbeat = Heartbeat(directory, Compute("cpu", "float32", world_size=2), pytest.fail)
    heartbeat._over.set()  # after each beat
    heartbeat._beat()  # as on a full disk
    directory.mkdir()
    heartbeat._beat()
    assert heartbeat.progress()[0]


def test_only_a_limited_wait_ends_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beating, "INTERVAL_SECONDS", 0.01)
    compute, hung, said = Compute("cpu", "float32", world_size=2, timeout=0.5), threading.Event(), []
    compute.position.update(stage="ppo", step=3)

    def beats(count: int, do: Callable[[], object] = lambda: None) -> None:
        """Wait for so many more beats, and do something in between."""
        with compute.busy():
            start = heartbeat._beats
            while heartbeat._beats < start + count:
                do()

    def end(why: str) -> None:
        said.append(why)
        hung.set()

    with Heartbeat(tmp_path, compute, end) as heartbeat:
        beats(80)
        with compute.limited():
            beats(80, compute.count_progress)
        assert not said
        with compute.limited():
            assert hung.wait(60)
            beats(80)
        compute.count_progress()
        beats(80)
    assert said == ["ppo, step 3: rank 0 waited for rank 1 (never seen) in vain."]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_gpu_a_missing_rank_is_named_before_nccl_aborts(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait inside NCCL knows no `limited`. A rank that others hear of is not missing, whatever it does."""
    monkeypatch.setattr(beating, "INTERVAL_SECONDS", 0.01)
    compute, hung, said = Compute(device, "float32", world_size=2, timeout=0.5), threading.Event(), []
    compute.position.update(stage="ppo", step=3)
    other = tmp_path / "rank1.json"

    def beats(count: int, do: Callable[[], object]) -> None:
        """Wait until the file was written so often."""
        file = tmp_path / "rank0.json"
        seen: set[int] = set()
        while len(seen) < count:
            do()
            with suppress(OSError):
                seen.add(file.stat().st_mtime_ns)

    def end(why: str) -> None:
        said.append(why)
        hung.set()

    def beat() -> None:
        other.write_text('{"stage": "ppo", "step": 2}')

    with Heartbeat(tmp_path, compute, end):
        beats(80, beat)
        assert not said
        ago = time.time() - 60
        os.utime(other, (ago, ago))
        if device == "cuda":
            assert hung.wait(60)
        beats(80, lambda: None)
    assert said == ["ppo, step 3: rank 0 waited for rank 1 (last seen 60 s ago in ppo, step 2) in vain."] * (
        device == "cuda"
    )


def test_on_a_cpu_computing_is_progress(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, Compute("cpu", "float32", world_size=2), pytest.fail)
    said, start = heartbeat._report(), time.thread_time()
    while time.thread_time() < start + 1.0:
        pass
    assert heartbeat._report()["cpu"] > said["cpu"]


SLOW_TORCHRUN = """#!{python}
import signal, subprocess, sys, threading

rank = subprocess.Popen([sys.executable, "-c", '''
import sys, threading
from pathlib import Path
from rlhf.distributed.signals import Stopped, StopSignals, leave_exit_code

signals = StopSignals()
try:
    with signals.installed(), signals.watchdog(sys.exit), signals.deferred():
        Path("ready").touch()
        threading.Event().wait()
except Stopped:
    print("ended at once", flush=True)
    leave_exit_code(75)
'''])

def pass_on(signum, frame):
    threading.Event().wait(0.5)
    rank.send_signal(signum)

signal.signal(signal.SIGTERM, pass_on)
sys.exit(rank.wait() or 1)
"""


@pytest.mark.slow
def test_a_second_signal_counts_where_torchrun_passes_the_first_on_late(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(SLOW_TORCHRUN.format(python=sys.executable))
    python.chmod(0o755)
    run = subprocess.Popen(
        [TORCHRUN, "stage=ppo"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "NPROC_PER_NODE": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    wait_until(lambda: (tmp_path / "ready").exists(), run)
    run.send_signal(signal.SIGTERM)
    wait_until(lambda: len(children_of(run.pid)) > 1, run)  # it has heard the first
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 75
    assert said == "ended at once\n"


@pytest.mark.slow
@pytest.mark.parametrize("by", ["launcher", "torchrun"])
def test_a_hanging_run_ends_after_a_signal(tmp_path: Path, by: str) -> None:
    chain = RealChain(tmp_path)
    command = chain.command("hung", "ppo.steps=1000", "checkpoint.every_steps=1", "launch.processes=2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if by == "torchrun":
        command[:3] = [str(TORCHRUN)]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment |= {"NPROC_PER_NODE": "2", "PATH": path}
    run = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    wait_until(lambda: any(chain.store("hung").glob("ppo/.*.checkpoints/step-*")), run)
    launcher = run.pid
    if by == "torchrun":
        (launcher,) = children_of(run.pid)
    ranks = ranks_of(launcher)
    listening = [each.laddr.ip for pid in (launcher, *ranks.values()) for each in
                 psutil.Process(pid).net_connections() if each.status == "LISTEN"]  # fmt: skip
    assert listening and set(listening) == {"127.0.0.1"}
    with socket.socket() as stranger:  # any user of this host may try
        port = int(psutil.Process(ranks[0]).environ()["MASTER_PORT"])
        assert stranger.connect_ex(("127.0.0.1", port)) != 0, "the ranks meet where nobody else can"
    os.kill(ranks[1], signal.SIGSTOP)
    run.send_signal(signal.SIGTERM)
    if by == "torchrun":  # which waits for its ranks, whatever another signal says
        wait_until(lambda: len(children_of(run.pid)) > 1, run)  # it has heard the first
        run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=100)
    assert run.returncode == 75, err
    if by == "launcher":
        assert "SIGTERM came, and no rank has made progress for 30 s: ppo, step " in err
        assert "rank 1 (last seen " in err
    else:
        assert "Rank 0 ends at once: a second signal (SIGTERM) came" in err
