"""What CI leaves out where nothing that it exercises has changed, and the night, which runs all.

    python3 tests/nightly.py left-out          # the tests that .ci/run leaves out now
    python3 tests/nightly.py is-due vllm       # exit code 0 or 1
    python3 tests/nightly.py night             # `make nightly`: everything, with the minutes of each part
    python3 tests/nightly.py night slow vllm   # a night in parts: these; the others as they ended before

When all parts have passed at one revision, with nothing uncommitted, the night writes it to .ci/nightly, to
be committed. A part of CI is due if one of its paths has changed since that revision, if that is more than 50
commits ago or unknown here, and always with CI_ALL=1. Needs git alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_COMMITS = 50


@dataclass(frozen=True)
class Part:
    """Slow tests that need more than Python, or an environment of their own."""

    tests: tuple[str, ...]
    paths: tuple[str, ...]
    """What they exercise, which other tests do not."""


_STARTS = (
    "launch", "rlhf/__main__.py", "rlhf/cli/app.py", "rlhf/cli/execute.py", "rlhf/cli/launcher.py",
    "rlhf/cli/worker.py", "rlhf/distributed", "tests/helpers/chains.py", "tests/helpers/hosts.py",
)  # fmt: skip
_PAGES = ("rlhf/label/page", "rlhf/report/page")
_PACKAGES = ("pyproject.toml", "constraints.txt", "Makefile")
PARTS = {
    "slurm": Part(("tests/launch/test_slurm.py",), (*_STARTS, "rlhf/cli/sweep", *_PACKAGES)),
    "two hosts": Part(("tests/launch/test_two_hosts.py",), (*_STARTS, *_PACKAGES)),
    "wheel": Part(
        ("tests/project/test_wheel.py",),
        (*_PACKAGES, "README.md", "conf", "data", "rlhf/__main__.py", "rlhf/cli", *_PAGES),
    ),
    "browser": Part(
        (
            "tests/report/test_browser.py", "tests/report/test_decision_browser.py",
            "tests/label/test_label_browser.py",
        ),
        ("rlhf/report", "rlhf/label", "stages/label.py", "tests/helpers/browser.py", *_PACKAGES),
    ),
    "vllm": Part(
        ("tests/generation/with_vllm", "tests/gpu/test_4_vllm.py"),
        (
            "rlhf/generation", "rlhf/pipeline/sampling_engine.py", "rlhf/models", "rlhf/distributed",
            "rlhf/training", "rlhf/rewards", "rlhf/cli/export.py", "tests/helpers", "benchmarks/gpu.py",
            "constraints-vllm.txt", *_PACKAGES,
        ),
    ),
}  # fmt: skip

NIGHT = {
    "fast": "make test",
    "docs": "make docs",
    "slow": "make test-slow",
    "nightly": "make test-nightly",
    "gpu": "make test-gpu",
    "vllm": "make test-vllm",
    "python3.13": "make test-fast PYTHON=/usr/bin/python3.13 VENV=.venv-3.13",
    "families": "make families",
    "kills": "make crash-test",
    "mutants": "make mutants",
}
"""Part of a night -> its command."""


def git(*words: str) -> str | None:
    """What it prints; None if it fails."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def due() -> list[str]:
    """Names of the parts that `.ci/run` has to run."""
    passed = PASSED.read_text(encoding="utf-8").strip() if PASSED.exists() else ""
    since = git("rev-list", "--count", f"{passed}..HEAD") if passed else None
    if os.environ.get("CI_ALL") == "1" or since is None or int(since) > MOST_COMMITS:
        return list(PARTS)
    return [
        name
        for name, part in PARTS.items()
        if git("diff", "--quiet", passed, "HEAD", "--", *part.tests, *part.paths) is None
    ]


def night(names: Sequence[str]) -> int:
    """Run these parts of the night, all without names; the exit code."""
    revision, is_clean = git("rev-parse", "HEAD"), git("status", "--porcelain") == ""
    ended: dict[str, dict[str, object]] = json.loads(ENDED.read_text("utf-8")) if ENDED.exists() else {}
    for name in names or NIGHT:
        print(f"== {name}: {NIGHT[name]}", flush=True)
        start = time.monotonic()
        code = subprocess.run(NIGHT[name], shell=True, cwd=ROOT, check=False).returncode
        same = is_clean and git("status", "--porcelain") == "" and git("rev-parse", "HEAD") == revision
        ended[name] = {
            "code": code, "minutes": (time.monotonic() - start) / 60, "revision": revision if same else None,
        }  # fmt: skip
        ENDED.write_text(json.dumps(ended, indent=2), encoding="utf-8")
    for name, each in ended.items():
        print(f"{name:<12}{each['minutes']:7.1f} min  {outcome(each, revision)}")
    if all(name in ended and outcome(ended[name], revision) == "passed" for name in NIGHT):
        PASSED.write_text(f"{revision}\n", encoding="utf-8")
        print(f"All passed: {revision} stands in .ci/nightly, which is to be committed.")
    return int(any(ended[name]["code"] != 0 for name in names or NIGHT))


def outcome(ended: Mapping[str, object], revision: str | None) -> str:
    """How a part ended, in words."""
    if ended["code"] != 0:
        return "FAILED"
    return "passed" if ended["revision"] == revision else "passed at another revision, or with changes"


PASSED = ROOT / ".ci" / "nightly"
ENDED = ROOT / ".ci" / ".ended.json"
"""How each part of a night ended last; not committed."""


def main(words: Sequence[str]) -> int:
    """The command line."""
    match words:
        case ["left-out"]:
            waiting = [part for name, part in PARTS.items() if name not in due() and name != "vllm"]
            print(*(test for part in waiting for test in part.tests))
            return 0
        case ["is-due", name] if name in PARTS:
            return int(name not in due())
        case ["night", *names] if set(names) <= NIGHT.keys():
            return night(names)
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
