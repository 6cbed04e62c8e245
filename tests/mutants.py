"""`make mutants`: break the code in small ways, one at a time, and count what the tests notice.

All mutations of rlhf/losses and rlhf/rl: it ends with 1 if less than 95% are noticed, or if one survives
without a reason in CONTRIBUTING.md. And 100 of rlhf/ppo and rlhf/training/checkpoint.py, drawn with a fixed
seed; which ones, changes with the code. Of these only the fast tests beside them are asked, and one in four
is noticed by slow tests alone, or is a word of a message: it ends with 1 if less than 60% are noticed, which
says that the tests beside the code became worse.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

ALL, SOME = ("rlhf.losses.", "rlhf.rl."), ("rlhf.ppo.", "rlhf.training.checkpoint.")
NUM_DRAWN, SEED = 100, 0
LEAST, LEAST_DRAWN = 0.95, 0.6
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
    of_all, of_drawn = share(everything), share(drawn)
    explained = REASONS.read_text(encoding="utf-8")
    found = results()
    unexplained = [name for name in everything if found[name] not in KILLED and name not in explained]
    if of_all < LEAST or unexplained:
        sys.exit(f"below {LEAST:.0%}, or without a reason in {REASONS}: {unexplained}")
    if of_drawn < LEAST_DRAWN:
        sys.exit(f"of the drawn ones below {LEAST_DRAWN:.0%}")


if __name__ == "__main__":
    main()
