"""Starts one process per rank on this machine, and ends them all when one fails.

Inside torchrun, srun or a Kubernetes job it starts nothing: the environment says which rank this is. Each
rank runs `python -m rlhf.cli.worker RUN_DIR`. It gets the composed config, so that all ranks have the same
one, and gets it through a pipe, because secrets in it must not be written to a file.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import psutil

from rlhf.config import ConfigError
from rlhf.costs.memory import amount
from rlhf.distributed.device import has_gpu
from rlhf.distributed.signals import ReceivedSignals, handled_by
from rlhf.exit_codes import CONFIG_ERROR, INTERRUPTED, STOPPED
from rlhf.pipeline.run import Run
from rlhf.pipeline.settings import LaunchConfig

GRACE_SECONDS = 5.0
"""Seconds that the other ranks get after the first one failed. They may fail for the same reason."""
MAX_ERROR_LINES = 100
RANK_BYTES = 0.25 * 2**30
"""Bytes that a rank needs after importing torch and transformers."""


def ranks_wanted(config: LaunchConfig, device: str) -> int:
    """Number of processes to start here. 1 means none: this process does the work."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return 1
    num_gpus, memory = _visible_gpus(device), psutil.virtual_memory().total
    if config.processes is not None and config.processes * RANK_BYTES > memory:
        raise ConfigError(
            f"launch.processes={config.processes}: a rank needs about {amount(RANK_BYTES)} before it loads a "
            f"model, and this machine has {amount(memory)}. Use fewer ranks."
        )
    if config.processes is None:
        return max(1, num_gpus)
    if config.processes > num_gpus > 0:
        raise ConfigError(
            f"launch.processes={config.processes}: this machine has {num_gpus} visible GPU(s), and each rank "
            "needs its own. Use fewer ranks, or device=cpu."
        )
    return config.processes


def _visible_gpus(device: str) -> int:
    """Number of GPUs that a run may use with this `device=`."""
    if device == "cpu" or not has_gpu():
        return 0
    import torch

    return torch.cuda.device_count()


def launch(resolved: Mapping[str, Any], run_directory: Path, processes: int, *, quiet: bool = False) -> int:
    """Run the experiment on several ranks. Returns 0, or the exit code of the first rank that failed.

    Rank 0 prints to the terminal. The output of the others and the errors of all ranks go to RUN_DIR/ranks/.
    Signals are passed on to all ranks.

    Args:
        quiet: print nothing. Rank 0's output goes to RUN_DIR/ranks/ too.
    """
    run = Run(run_directory)
    # the launcher holds its lock all the time; the ranks take the run's own lock when they are up
    with run.locked(".launcher.lock"):
        with run.locked():  # otherwise the files of a running run's ranks would be deleted below
            pass
        with TemporaryDirectory(prefix="rlhf-") as rendezvous:  # only this user can read it
            return _launch(resolved, run_directory, processes, rendezvous, quiet)


def _launch(
    resolved: Mapping[str, Any], run_directory: Path, processes: int, rendezvous: str, quiet: bool
) -> int:
    directory = run_directory / "ranks"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    environment = os.environ | {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",  # DeepSpeed requires them; nothing listens there
        "RLHF_MEETING": rendezvous,
    }  # fmt: skip
    config = json.dumps(resolved).encode()
    ranks = [_start(rank, config, directory, run_directory, environment, quiet) for rank in range(processes)]

    received = ReceivedSignals()

    def forward(signum: int, frame: FrameType | None) -> None:
        if received.is_new(signum):
            for rank in ranks:
                if rank.poll() is None:
                    rank.send_signal(signum)

    with handled_by(forward):
        try:
            while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
                if len(received.signums) > 1:  # a second signal: the ranks end at once, or are killed
                    break
                time.sleep(0.05)
            ended = _end(ranks)
        finally:
            for rank in ranks:
                rank.kill()
    codes = {number: rank.wait() for number, rank in enumerate(ranks) if number not in ended}
    if not codes:
        print("No rank ended by itself after a second signal; all were killed.", file=sys.stderr)
        return INTERRUPTED if received.signums[-1] == signal.SIGINT else STOPPED
    return _exit_code(codes, directory, quiet)


def _start(
    rank: int,
    config: bytes,
    directory: Path,
    run_directory: Path,
    environment: Mapping[str, str],
    quiet: bool,
) -> subprocess.Popen[bytes]:
    errors = (directory / f"rank{rank}.err").open("wb")
    output = None if rank == 0 and not quiet else (directory / f"rank{rank}.out").open("wb")
    with errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf.cli.worker", str(run_directory)],
            env={
                **environment,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "RLHF_LAUNCHER": str(os.getpid()),
            },
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=errors,
            start_new_session=True,  # Ctrl-C reaches only the launcher, which passes it on
        )
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin:  # a rank that died reports it itself
        process.stdin.write(config)
    return process


def _end(ranks: list[subprocess.Popen[bytes]]) -> set[int]:
    """Wait for the ranks to end. End those that still run after the grace time, and return their numbers."""
    ended: set[int] = set()
    deadline = time.monotonic() + GRACE_SECONDS
    for signum in (signal.SIGTERM, signal.SIGKILL):
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
        for number, rank in enumerate(ranks):
            if rank.poll() is None:
                rank.send_signal(signum)
                ended.add(number)
        deadline = time.monotonic() + GRACE_SECONDS / 2
    return ended


def _exit_code(codes: Mapping[int, int], directory: Path, quiet: bool) -> int:
    """Print the first error of the ranks that ended by themselves. Returns the exit code."""
    failed = [rank for rank, code in codes.items() if code != 0]
    if not failed:
        return 0

    def failure_time(rank: int) -> float:
        """Time at which a rank failed. A rank without a time was killed, and counts as the first: 0."""
        note = directory / f"rank{rank}.failed"
        return float(note.read_text(encoding="utf-8")) if note.exists() else 0.0

    first = min(failed, key=failure_time)
    if quiet:
        return codes[first] if codes[first] > 0 else 1
    text = (directory / f"rank{first}.err").read_text(errors="replace", encoding="locale").strip()
    shown = "\n".join(text.splitlines()[-MAX_ERROR_LINES:])
    if codes[first] < 0:
        name = signal.Signals(-codes[first]).name
        print(f"Rank {first} was killed by {name}; the others were ended.", file=sys.stderr)
    elif first != 0 and codes[first] not in (CONFIG_ERROR, STOPPED, INTERRUPTED):
        print(f"Rank {first} failed first; the others were ended.", file=sys.stderr)
    if shown:
        print(shown, file=sys.stderr)
    return codes[first] if codes[first] > 0 else 1
