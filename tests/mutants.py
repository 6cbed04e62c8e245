"""`make mutants`: break the code in small ways, one at a time, and count what the tests notice.

All mutations of rlhf/losses and rlhf/rl, and 100 of rlhf/ppo and rlhf/training/checkpoint.py, drawn with a
fixed seed.
Survivors with their reasons: CONTRIBUTING.md. Ends with 1 below 95%, or when one survives without a reason.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

ALL, SOME = ("rlhf.losses.", "rlhf.rl."), ("rlhf.ppo.", "rlhf.training.checkpoint.")
NUM_DRAWN, SEED, LEAST = 100, 0, 0.95
KILLED = ("killed", "timeout", "segfault")
REASONS = Path("CONTRIBUTING.md")


def mutmut(*arguments: str) -> str:
    """What it prints."""
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def results() -> dict[str, str]:
    """Mutant -> killed, survived, ..."""
    lines = [line.strip().rpartition(": ") for line in mutmut("results", "--all", "true").splitlines()]
    return {name: status for name, _, status in lines if name.startswith((*ALL, *SOME))}


def share(names: list[str]) -> float:
    """Run these and tell; the share that the tests noticed."""
    found = results()
    survivors = [name for name in names if found[name] not in KILLED]
    print(f"{len(names) - len(survivors)} of {len(names)} killed")
    for name in survivors:
        print(f"  {name}: {found[name]}")
    return 1 - len(survivors) / len(names)


def main() -> None:
    """Both sets."""
    mutmut("run", "--max-children", "2", *(f"{prefix}*" for prefix in ALL))
    known = results()
    everything = [name for name in known if name.startswith(ALL)]
    drawn = random.Random(SEED).sample(sorted(name for name in known if name.startswith(SOME)), NUM_DRAWN)
    mutmut("run", "--max-children", "2", *drawn)
    shares = [share(everything), share(drawn)]
    explained = REASONS.read_text(encoding="utf-8")
    found = results()
    unexplained = [n for n in (*everything, *drawn) if found[n] not in KILLED and n not in explained]
    if min(shares) < LEAST or unexplained:
        sys.exit(f"below {LEAST:.0%}, or without a reason in {REASONS}: {unexplained}")


if __name__ == "__main__":
    main()
