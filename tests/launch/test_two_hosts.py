"""launch/torchrun.sh over two hosts that have a network of their own each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.chains import SETTINGS, SOURCES, Chain
from helpers.hosts import TwoHosts, wait_for

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TwoHosts.is_possible(), reason="needs root, iproute2 and network namespaces"),
]


def start_on_both(hosts: TwoHosts, directory: Path, *overrides: str) -> list[subprocess.Popen[bytes]]:
    """The same run on both hosts, in the chain's directory."""
    command: list[str | Path] = [
        ROOT / "launch" / "torchrun.sh",
        *SETTINGS,
        *SOURCES,
        "precision=fp32",
        "gates=warn",
        *overrides,
    ]
    common = {
        "NNODES": "2", "MASTER_ADDR": hosts.ADDRESSES[0], "MASTER_PORT": "29501", "NPROC_PER_NODE": "1",
        "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    return [hosts.start(host, command, directory, {**common, "NODE_RANK": str(host)}) for host in (0, 1)]


def logs(directory: Path) -> list[str]:
    return [(directory / f"host{host}.log").read_text() for host in (0, 1)]


def ppo_steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count('"ppo/kl"') if file.exists() else 0


def test_two_hosts_train_together(tmp_path: Path) -> None:
    Chain(tmp_path)
    with TwoHosts() as hosts:
        runs = start_on_both(hosts, tmp_path, "zero=zero3", "stage=ppo", "run_name=both")
        codes = [run.wait(timeout=240) for run in runs]
    assert codes == [0, 0], logs(tmp_path)
    first, second = logs(tmp_path)
    assert "2 ranks, zero3" in first
    assert "Run in" not in second  # rank 0 talks, alone
    stages = json.loads((tmp_path / "runs" / "both" / "summary.json").read_text())["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == dict.fromkeys(
        ("prepare", "sft", "reward", "generate", "ppo"), "ran"
    )


def test_a_signal_on_one_host_stops_both_and_the_same_commands_go_on(tmp_path: Path) -> None:
    Chain(tmp_path)
    with TwoHosts() as hosts:
        command = ("ppo.steps=40", "stage=ppo", "run_name=both")
        runs = start_on_both(hosts, tmp_path, *command)
        wait_for("PPO takes steps", lambda: ppo_steps(tmp_path / "runs" / "both") >= 2, seconds=240)
        runs[1].terminate()
        codes = [run.wait(timeout=120) for run in runs]
        assert codes == [75, 75], logs(tmp_path)
        assert "then stopping" in logs(tmp_path)[0]

        codes = [run.wait(timeout=240) for run in start_on_both(hosts, tmp_path, *command)]
    assert codes == [0, 0], logs(tmp_path)
    assert "ppo: continues from step" in logs(tmp_path)[0]


def test_when_the_cable_is_cut_both_ends_fail_and_name_the_missing_rank(tmp_path: Path) -> None:
    Chain(tmp_path)
    with TwoHosts() as hosts:
        runs = start_on_both(
            hosts, tmp_path, "ppo.steps=2000", "stage=ppo", "run_name=cut", "distributed.timeout=8"
        )
        wait_for("PPO takes steps", lambda: ppo_steps(tmp_path / "runs" / "cut") >= 1, seconds=240)
        hosts.cut()
        start = time.monotonic()
        codes = [run.wait(timeout=120) for run in runs]
        took = time.monotonic() - start
    first, second = logs(tmp_path)
    assert codes == [1, 1], (first, second)
    assert took < 40, (first, second)
    assert "rank 0" in first.rpartition("Error: ppo, step")[2] and "rank 1" in first, first
    assert "rank 0" in second.rpartition("Error: ppo, step")[2], second
