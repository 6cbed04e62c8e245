"""Runs the same small chain again and again on a disk of which a share of all calls fails, until it is done.

Started with the library of eio.c preloaded: `python bad_disk.py DIRECTORY SHARE [override ...]`. Each attempt
is a fork of this process, so that torch is imported once; prints a JSON line an attempt.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

MOST_ATTEMPTS = 400


def attempt(directory: Path, number: int, share: float, arguments: list[str]) -> int:
    """One run in a process of its own, whose output goes to out-NUMBER and err-NUMBER; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(directory / f"{name}-{number}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    shim = ctypes.CDLL(None)
    shim.eio_arm.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_double]
    shim.eio_arm(bytes(directory / "store"), bytes(directory / "runs"), number, share)
    sys.argv = ["rlhf", *arguments]
    from rlhf.__main__ import main

    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    shim.eio_arm(b"-", b"-", 0, 0.0)
    (directory / f"failures-{number}").write_text(str(shim.eio_failures()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def main() -> None:
    """All attempts."""
    directory, share = Path(sys.argv[1]), float(sys.argv[2])
    import rlhf.models.peft.attach  # noqa: F401
    import rlhf.pipeline.runner  # noqa: F401  both before the forks

    os.chdir(directory)
    for number in range(MOST_ATTEMPTS):
        code = attempt(directory, number, share, sys.argv[3:])
        failures = int((directory / f"failures-{number}").read_text())
        print(json.dumps({"attempt": number, "code": code, "failures": failures}), flush=True)
        if code == 0:
            return
    sys.exit("not done")


if __name__ == "__main__":
    main()
