"""Does this revision give the same results as an earlier one: weights, texts, figures and keys?

    python benchmarks/same_results.py --record      # at the revision to compare with
    python benchmarks/same_results.py               # after a change: each difference; exit code 1 if any
    python benchmarks/same_results.py demo fsdp2    # only cases whose names begin with these words

Cases: the demo with seed 0 (10 minutes); a chain of each recipe on the tiny model; all training stages on two
ranks under fsdp2 and zero3; and the same killed in each stage and resumed, compared with the undisturbed run.
Each starts with an empty store. A record is valid for one machine only, and is saved in
benchmarks/.work/same.

Compared are each artifact's key, its summary metrics, and its files, logged metrics included. Times and
memory are left out (`CHANGING`, `NOT_COMPARED`). Keys are listed apart from results: a change in their
computation changes all of them at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
WORK = HERE / ".work" / "same"
RECORD = WORK / "record.json"
CHANGING = re.compile(r"time$|seconds|latency|memory|tokens_per|throughput")
"""Keys of figures that vary from run to run."""
NOT_COMPARED = re.compile(r"\.(md|html|png|svg|pdf)$|^manifest\.json$")
"""Files with times, or for display only; the manifest's content is compared separately."""
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Case:
    """A run to compare."""

    name: str
    overrides: tuple[str, ...]
    killed: tuple[str, ...] = ()
    """Stages that are killed after their first checkpoint; the same command continues them."""
    as_case: str | None = None
    """Case with which the results must agree; None for the case itself."""


TINY = (
    "model=tiny", "device=cpu", "launch.processes=1", "sft.epochs=0.1", "generate.num_prompts=8",
    "ppo.batch_episodes=8", "ppo.minibatch_episodes=4", "ppo.steps=2",
    "grpo.batch_episodes=8", "grpo.minibatch_episodes=8", "grpo.steps=2",
    "evaluate.num_prompts=4", "evaluate.num_references=4", "evaluate.best_of=2",
)  # fmt: skip
RULE = """def score(prompts, responses):
    return [float(sum(map(ord, each)) % 97) for each in responses]
"""
"""A judge for the random model's answers, which all get the same VADER score."""
RECIPES = {
    "rlhf": (),
    "dpo": (),
    "iterated_dpo": ("generate.num_prompts=60",),
    "grpo": (),
    "best_of_n": ("generate.num_prompts=60", "generate.samples_per_prompt=2"),
    "verifiable": (),
    "algorithms": ("generate@best.num_prompts=60", "generate@2.num_prompts=60"),
    "feedback": ("label.annotator=rule", "label.reward=python:rule:score", "generate@answers.num_prompts=60"),
}
"""Recipe -> overrides that make it small."""
TRAINS = ("sft", "reward", "ppo", "grpo", "dpo")
"""Training stages in the order of the chain."""
ON_TWO = (*TINY, "launch.processes=2", "stage=[ppo,dpo,grpo,merge,evaluate]", "checkpoint.every_steps=1")


def cases() -> Iterator[Case]:
    """All cases."""
    yield Case("demo", ())
    for recipe, small in RECIPES.items():
        yield Case(f"recipe-{recipe}", (*TINY, f"recipe={recipe}", *small))
    for zero in ("fsdp2", "zero3"):
        yield Case(zero, (*ON_TWO, f"zero={zero}"))
        yield Case(f"{zero}-killed", (*ON_TWO, f"zero={zero}"), TRAINS, zero)


def run(case: Case, directory: Path) -> None:
    """Run a case to its end in an empty directory."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "rule.py").write_text(RULE, encoding="utf-8")
    line = [sys.executable, "-m", "rlhf", "run_name=run", *case.overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # sums of several threads round differently
    for stage in case.killed:
        process = start(line, directory, environment)
        while process.poll() is None and not checkpoints(directory, stage):
            time.sleep(POLL_SECONDS)
        if process.poll() is not None:
            raise SystemExit(
                f"{case.name}: {stage} wrote no checkpoint before it ended: {directory}/said.txt"
            )
        ranks = psutil.Process(process.pid).children(recursive=True)
        for each in (process, *ranks):
            each.kill()
        process.wait()
        psutil.wait_procs(ranks)
    if start(line, directory, environment).wait():
        raise SystemExit(f"{case.name}: see {directory}/said.txt")


def start(line: list[str], directory: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a run; its output goes to a file."""
    with (directory / "said.txt").open("ab") as said:
        return subprocess.Popen(line, cwd=directory, env=environment, stdout=said, stderr=said)


def checkpoints(directory: Path, stage: str) -> list[Path]:
    """Finished checkpoints of a stage."""
    return [*(directory / "store" / stage).glob(".*.checkpoints/step-*[0-9]")]


def found(directory: Path) -> dict[str, dict[str, Any]]:
    """Key, summary and file digests of each stage of the run."""
    stages: dict[str, dict[str, Any]] = {}
    for link in sorted((directory / "runs" / "run" / "artifacts").iterdir()):
        manifest = json.loads((link / "manifest.json").read_text(encoding="utf-8"))
        files = {
            str(path.relative_to(link)): digest(path)
            for path in sorted(link.rglob("*"))
            if path.is_file() and not NOT_COMPARED.search(str(path.relative_to(link)))
        }
        stages[link.name] = {"key": manifest["key"], "metrics": steady(manifest["metrics"]), "files": files}
    return stages


def digest(path: Path) -> str:
    """Digest of a file; JSON rows and values count without the keys that vary."""
    if path.suffix == ".jsonl":
        rows = [steady(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        content = json.dumps(rows, sort_keys=True).encode()
    elif path.suffix == ".json":
        content = json.dumps(steady(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True).encode()
    else:
        content = path.read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def steady(value: Any) -> Any:
    """The value without the keys that vary from run to run."""
    if isinstance(value, dict):
        return {key: steady(each) for key, each in value.items() if not CHANGING.search(key)}
    return [steady(each) for each in value] if isinstance(value, list) else value


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(keys, results) that differ from the record, one line each."""
    keys, results = [], []
    for stage in sorted(before.keys() | now.keys()):
        if stage not in before or stage not in now:
            results.append(f"{stage}: {'is new' if stage in now else 'is gone'}")
            continue
        was, is_now = before[stage], now[stage]
        if was["key"] != is_now["key"]:
            keys.append(f"{stage}: {was['key']} -> {is_now['key']}")
        for kind in ("metrics", "files"):
            for name in sorted(was[kind].keys() | is_now[kind].keys()):
                first, second = was[kind].get(name, "none"), is_now[kind].get(name, "none")
                if json.dumps(first, sort_keys=True) != json.dumps(
                    second, sort_keys=True
                ):  # NaN equals NaN here
                    results.append(f"{stage}/{name}: {first} -> {second}")
    return keys, results


def main() -> int:
    """Run the cases; record, or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="beginnings of the cases' names")
    parser.add_argument("--record", action="store_true", help="keep what they make, to compare with")
    options = parser.parse_args()
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    chosen = [case for case in cases() if not options.names or case.name.startswith(tuple(options.names))]
    failed = False
    for case in chosen:
        begun = time.monotonic()
        run(case, WORK / case.name)
        now, wanted = found(WORK / case.name), case.as_case or case.name
        if options.record and case.as_case is None:
            record[case.name] = now
            RECORD.write_text(json.dumps(record, indent=1), encoding="utf-8")
        if wanted not in record:
            raise SystemExit(f"{wanted} is not recorded: --record first.")
        keys, results = differences(record[wanted], now)
        failed |= bool(results)
        said = f"{len(keys)} other keys, {len(results)} other results" if keys or results else "the same"
        print(f"{case.name}: {said} ({time.monotonic() - begun:.0f} s)", flush=True)
        for line in (*keys, *results):
            print(f"  {line}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
