"""`python -m rlhf.cli.worker RUN_DIR`: one of the ranks that the launcher starts."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from rlhf.cli.execute import end_rank, execute
from rlhf.distributed.signals import Stopped, StopSignals
from rlhf.exit_codes import INTERRUPTED, STOPPED
from rlhf.tracking.redaction import redacted_output


@redacted_output()
def main() -> None:
    """Run one rank."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: no rank outlives its launcher
    if os.getppid() != int(os.environ["RLHF_LAUNCHER"]):
        raise SystemExit("the launcher is gone")
    try:
        with StopSignals().installed():  # before torch is imported, which takes seconds
            code = execute(json.load(sys.stdin), Path(sys.argv[1]).name)
    except Stopped as stop:  # before the run began
        code = INTERRUPTED if stop.signum == signal.SIGINT else STOPPED
    end_rank(code)


if __name__ == "__main__":
    main()
