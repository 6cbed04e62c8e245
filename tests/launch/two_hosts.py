"""Two hosts on this machine: network namespaces joined by a cable (a veth pair) that can be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType


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
