"""Checks that may never end, in a process that can be stopped: `python -m rlhf.rewards.checker KIND`.

It reads one JSON list [wanted, response] per line, and answers each with true or false.
Responses are parsed, never run.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Callable

START_SECONDS = 120.0
"""Longest wait until the process has imported its packages."""


class Checker:
    """Runs checks in a separate process. The first check starts it; after a check that took too long, the
    next one starts it again."""

    def __init__(self, kind: str, seconds: float) -> None:
        """Args:
        kind: `math` or `json_schema`.
        seconds: longest wait for an answer.
        """
        self.kind, self.seconds = kind, seconds
        self._process: subprocess.Popen[str] | None = None

    def check(self, wanted: str, response: str) -> bool:
        """Whether a response is right. False if the check takes too long or ends the process."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([wanted, response]) + "\n")
            process.stdin.flush()
            answer = self._answer(process, self.seconds)
        except BrokenPipeError:
            answer = ""
        if not answer:
            process.kill()
            process.communicate()
            self._process = None
        return answer == "true"

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, self.kind],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        if not self._answer(process, START_SECONDS):
            process.kill()
            raise RuntimeError(
                f"python -m {__name__} {self.kind} does not start (exit code {process.wait()})"
            )
        return process

    @staticmethod
    def _answer(process: subprocess.Popen[str], seconds: float) -> str:
        """The next line; "" if none comes within `seconds`."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline().strip() if ready else ""


def math_check() -> Callable[[str, str], bool]:
    """Whether a response's result equals the wanted one."""
    from math_verify import parse, verify

    def check(wanted: str, response: str) -> bool:
        # without time limits: the caller stops this process instead
        gold = parse(wanted, parsing_timeout=None) or parse(f"${wanted}$", parsing_timeout=None)
        return bool(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))

    return check


def schema_check() -> Callable[[str, str], bool]:
    """Whether a response is JSON that follows a schema."""
    import jsonschema

    def check(wanted: str, response: str) -> bool:
        schema = json.loads(wanted)
        validator = jsonschema.validators.validator_for(schema)(schema)
        try:
            return bool(validator.is_valid(json.loads(response)))
        except (ValueError, RecursionError):
            return False

    return check


def main(kind: str) -> None:
    """Answer each line until the input ends."""
    check = {"math": math_check, "json_schema": schema_check}[kind]()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(check(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
