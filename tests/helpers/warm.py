"""Processes forked from one that has imported the slow libraries, which a cold process does for four seconds.

The start itself (imports, `-m`, the interpreter's options, the locale) is not tried here: tests of it start
the real command with `subprocess`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

import psutil
import pytest

TESTS = Path(__file__).parents[1]
PRELOADED = "helpers.preloaded"


def context() -> ForkServerContext:
    """multiprocessing with such processes. The server, their parent, lives as long as this process."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([PRELOADED])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS), prepend=os.pathsep)  # Python 3.11 does not tell it sys.path
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return found


def check_warm() -> None:
    """The server goes on, cold, without a module that it cannot import."""
    assert PRELOADED in sys.modules


@dataclass(frozen=True)
class KillAt:
    """SIGKILL for a run and all its ranks, as if the machine crashed, when a file gets its final name."""

    pattern: str
    """Regular expression, searched for in that name."""
    count: int = 1
    """Which of these renames, from 1."""
    is_before: bool = False
    """Whether it comes right before the rename instead of right behind it."""

    def arm(self) -> None:
        """Watch this process and those that are forked from it."""
        rename, run, seen = os.rename, os.getpid(), 0

        def armed(source: Any, target: Any, **options: Any) -> None:
            nonlocal seen
            seen += re.search(self.pattern, os.fspath(target)) is not None
            if seen == self.count and self.is_before:
                kill_tree(run)
            rename(source, target, **options)
            if seen == self.count:
                kill_tree(run)

        vars(os)["rename"] = armed


def kill_tree(pid: int) -> None:
    """SIGKILL for a process and all that it started, this process last."""
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        if each.pid != os.getpid():
            each.kill()
    os.kill(os.getpid(), signal.SIGKILL)


class Command:
    """`python -m rlhf ARGUMENTS` in a process group of its own. The names are those of `subprocess.Popen`."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        environment: Mapping[str, str],
        kill_at: KillAt | None = None,
        log: IO[Any] | None = None,
    ) -> None:
        """`log`: takes what it prints, in place of `communicate`."""
        self._output = [log or tempfile.TemporaryFile() for _ in ("out", "err")]  # noqa: SIM115
        passed = [_Passed(file.fileno()) for file in self._output]
        self._process = context().Process(
            target=_command, args=(list(arguments), cwd, dict(environment), kill_at, *passed)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it printed."""
        self.wait(timeout)
        out, err = self.printed()
        return out, err

    def printed(self) -> list[str]:
        """What it has printed so far, to stdout and to stderr."""
        descriptors = [file.fileno() for file in self._output]
        return [os.pread(each, os.fstat(each).st_size, 0).decode() for each in descriptors]

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)


class _Passed:
    """A file descriptor, on its way to the process that is started."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> Any:
        return _received, (DupFd(self._descriptor),)


def _received(passed: Any) -> int:
    descriptor: int = passed.detach()
    return descriptor


def _command(
    arguments: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    kill_at: KillAt | None,
    out: int,
    err: int,
) -> NoReturn:
    check_warm()
    from rlhf.__main__ import main
    from rlhf.cli import launcher

    if kill_at is not None:
        kill_at.arm()
    os.setsid()
    os.chdir(cwd)
    vars(launcher)["subprocess"] = SimpleNamespace(Popen=_Rank, PIPE=subprocess.PIPE)
    sys.path.insert(0, str(cwd))
    _become(main, ["rlhf", *arguments], environment, {0: os.open(os.devnull, os.O_RDONLY), 1: out, 2: err})


class _Rank(subprocess.Popen[bytes]):
    """What the launcher starts, forked from it, as it too has imported what a rank needs.

    Only the start differs: `subprocess` does the rest."""

    def _execute_child(
        self, args: Sequence[str], executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any,
        env: Mapping[str, str], startupinfo: Any, creationflags: Any, shell: Any,
        p2cread: int, p2cwrite: int, c2pread: int, c2pwrite: int, errread: int, errwrite: int, *rest: Any,
    ) -> None:  # fmt: skip
        from rlhf.cli.worker import main

        assert list(args[:3]) == [sys.executable, "-m", "rlhf.cli.worker"]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.close(p2cwrite)
            Path("/proc/self/comm").write_text(f"RANK={env['RANK']}")  # for ranks_of
            given = {0: p2cread, 1: c2pwrite, 2: errwrite}
            _become(main, args[2:], env, {number: each for number, each in given.items() if each != -1})
        self._child_created = True
        theirs: Any = self  # types do not tell what `subprocess` itself calls here
        theirs._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def _become(
    main: Callable[[], None],
    arguments: Sequence[str],
    environment: Mapping[str, str],
    descriptors: Mapping[int, int],
) -> NoReturn:
    """Turn this process into one that was just started; call `main`, and end as Python does."""
    for signum in signal.valid_signals():  # as exec does it
        if callable(signal.getsignal(signum)):
            signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    for number, passed in descriptors.items():
        os.dup2(passed, number)
        os.close(passed)
    out, err = sys.__stdout__, sys.__stderr__
    assert out is not None and err is not None
    sys.argv, sys.stdin, sys.stdout, sys.stderr = [*arguments], open(0, closefd=False), out, err  # noqa: SIM115
    code: Any = 0
    try:
        main()
    except SystemExit as ending:
        code = ending.code
    except BaseException:  # whatever it is: the interpreter would show it too
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=err)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter calls at its end
    atexit._run_exitfuncs()
    out.flush()
    err.flush()
    os._exit(code or 0)
