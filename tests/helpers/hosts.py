"""Machines of a cluster on this one: a real SLURM, and two hosts with a network of their own each."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=normal Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=2048\n"


class SlurmCluster:
    """Up while open; `environment` leads SLURM's commands to it."""

    def __init__(self, directory: Path, num_nodes: int) -> None:
        self.directory = directory
        self.environment = os.environ | {"SLURM_CONF": str(directory / "slurm.conf")}
        self._names = [f"n{number}" for number in range(1, num_nodes + 1)]

    @staticmethod
    def is_possible() -> bool:
        """Whether this is root, with SLURM installed."""
        return os.geteuid() == 0 and all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "munged")))

    def __enter__(self) -> SlurmCluster:
        here = self.directory
        (here / "state").mkdir(parents=True)
        key = here / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        ports = _free_ports(1 + len(self._names))
        host = socket.gethostname().partition(".")[0]
        config = CONFIG.format(host=host, port=ports[0], directory=here)
        for name, port in zip(self._names, ports[1:], strict=True):
            (here / f"spool.{name}").mkdir()
            config += NODE.format(name=name, host=host, port=port)
        (here / "slurm.conf").write_text(config)
        (here / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        try:
            subprocess.run(
                [  # force: it would not run as root
                    "munged", "--force", f"--key-file={key}", f"--socket={here}/munge.sock",
                    f"--pid-file={here}/munged.pid", f"--log-file={here}/munged.log",
                    f"--seed-file={here}/munge.seed",
                ],
                check=True,
            )  # fmt: skip
            subprocess.run(["slurmctld", "-f", here / "slurm.conf"], check=True)
            for name in self._names:
                subprocess.run(["slurmd", "-N", name, "-f", here / "slurm.conf"], check=True)
            wait_for("all nodes are idle", self._all_idle, seconds=30)
        except BaseException:  # nothing that was started may stay, Ctrl-C or not
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the jobs, then the daemons."""
        try:
            self.command("scancel", "--user=root", check=False)
            wait_for(
                "no job is left", lambda: not self.command("squeue", "--noheader", check=False), seconds=30
            )
        finally:
            for name in (*self._names, "slurmctld", "munged"):
                pid_file = self.directory / f"{name}.pid"
                if pid_file.exists():
                    end_process(int(pid_file.read_text()))

    def command(self, *words: str | Path, check: bool = True, **variables: str) -> str:
        """What one of SLURM's commands prints."""
        done = subprocess.run(
            words, env=self.environment | variables, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, number: str) -> Mapping[str, str]:
        """What SLURM knows of a job: JobState, ExitCode, Restarts and so on."""
        words = self.command("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def finished(self, number: str, seconds: float = 240) -> Mapping[str, str]:
        """Wait until a job has ended for good."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
        wait_for(f"job {number} ends", lambda: self.job(number)["JobState"] in over, seconds)
        return self.job(number)

    def _all_idle(self) -> bool:
        states = self.command(
            "sinfo", "--noheader", "--Node", "--partition=normal", "--format=%t", check=False
        )
        return states.split() == ["idle"] * len(self._names)


def wait_for(what: str, holds: Callable[[], bool], seconds: float) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain until {what}"
        time.sleep(0.2)


def end_process(pid: int) -> None:
    """Ask it to end; kill it when it does not."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, signum)
            wait_for(f"process {pid} is gone", lambda: not _is_alive(pid), seconds=10)
        except ProcessLookupError:
            return
        except AssertionError:
            continue
        return


def _is_alive(pid: int) -> bool:
    try:  # a process that nobody waited for is over, too
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class TwoHosts:
    """There while open. They share the file system, as a cluster's nodes do."""

    ADDRESSES = ("10.77.0.1", "10.77.0.2")

    def __init__(self) -> None:
        unique = os.getpid()
        self._names = (f"rlhf0-{unique}", f"rlhf1-{unique}")
        self._cables = (f"va{unique}", f"vb{unique}")  # 15 characters at most
        self._running: list[subprocess.Popen[bytes]] = []

    @staticmethod
    def is_possible() -> bool:
        """Whether this is root, allowed to make network namespaces."""
        if os.geteuid() != 0 or not shutil.which("ip"):
            return False
        probe = f"rlhf-probe-{os.getpid()}"
        made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode == 0
        subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
        return made

    def __enter__(self) -> TwoHosts:
        try:
            for name in self._names:
                _ip("netns", "add", name)
            _ip("link", "add", self._cables[0], "type", "veth", "peer", "name", self._cables[1])
            for name, cable, address in zip(self._names, self._cables, self.ADDRESSES, strict=True):
                _ip("link", "set", cable, "netns", name)
                _ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", cable, "up")
        except BaseException:  # no namespace may stay, Ctrl-C or not
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def start(
        self, host: int, command: list[str | Path], directory: Path, variables: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """Run a command on a host; what it says goes to hostN.log in the directory."""
        environment = os.environ | {"GLOO_SOCKET_IFNAME": self._cables[host], **variables}
        with (directory / f"host{host}.log").open("wb") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._names[host], *command],
                cwd=directory, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._running.append(process)
        return process

    def cut(self) -> None:
        """Nothing gets through any more, and nobody is told."""
        _ip("-n", self._names[0], "link", "set", self._cables[0], "down")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
