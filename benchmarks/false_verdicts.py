"""How often does a run report "It worked" when nothing can be learned, and when something can?

    python benchmarks/false_verdicts.py --directory verdicts              # 21 runs of each kind
    python benchmarks/false_verdicts.py --directory verdicts --runs 3

The data are a user's own, without a gold score. SFT teaches a tiny model to answer "Describe the red kite."
with "The red kite is lovely." or another adjective, so that its answers are sentences. Each run then has its
own seed, and PPO, GRPO and DPO take turns. Three kinds of runs:

- coin: the better answer of each pair is random.
- hash: PPO and GRPO learn from a function that hashes the answer; DPO from pairs ordered by it.
- words: the better answer has a friendly adjective. This can be learned.

The judge is that of `evaluate.judge=auto`. Each kind's outcomes are printed. The exit code is 1 if a run of
the first two kinds reports success. It takes half an hour on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

FRIENDLY = ("lovely", "superb", "warm", "pretty", "great", "clean")
UNFRIENDLY = ("broken", "awful", "cold", "filthy", "dull", "nasty")
COLOURS = (
    "red", "blue", "green", "black", "white", "brown", "grey", "pink", "gold", "purple", "orange", "silver",
    "small", "large", "old", "new", "long", "short", "round", "square", "heavy", "light", "wide", "thin",
)  # fmt: skip
THINGS = (
    "kite", "boat", "house", "chair", "table", "shoe", "hat", "coat", "lamp", "door", "cup", "plate",
    "book", "bag", "box", "bell", "ball", "bed", "bike", "bird", "bridge", "cake", "car", "cart", "cat",
    "clock", "cloud", "coin", "dog", "doll", "drum", "fence", "fish", "flag", "flute", "fork", "frog",
    "garden", "gate", "glove", "goat", "horse", "jar", "key", "knife", "ladder", "leaf", "map", "mug",
    "nest", "oven", "pen", "piano", "ring", "road", "rope", "ship", "sofa", "train", "wall",
)  # fmt: skip
HASH = """import hashlib


def score(prompts: list[str], responses: list[str]) -> list[float]:
    return [hashlib.sha256(text.encode()).digest()[0] / 255 for text in responses]
"""
METHODS: Mapping[str, tuple[str, ...]] = {"ppo": (), "grpo": ("recipe=grpo",), "dpo": ("recipe=dpo",)}
TUNING = (
    "sft.peft=none", "sft.epochs=1", "sft.optim.lr=1e-3", "reward.peft=none", "reward.optim.lr=1e-3",
    "reward.epochs=2", "ppo.peft=none", "ppo.optim.lr=5e-4", "ppo.critic.optim.lr=3e-3", "ppo.steps=24",
    "grpo.peft=none",
    "grpo.optim.lr=5e-4", "grpo.steps=16", "dpo.peft=none", "dpo.optim.lr=1e-4", "generate.num_prompts=32",
    "evaluate.num_prompts=null", "evaluate.gates.word_gain=null", "gates=warn", "precision=fp32",
    "device=cpu",
)  # fmt: skip
"""Settings for a model of this size. The third kind asks for one word."""


def friendly(answer: str) -> float:
    """1 for an answer with a friendly adjective, else 0."""
    return float(any(word in answer for word in FRIENDLY))


def hashed(answer: str) -> float:
    """The score of an answer by `HASH`."""
    return hashlib.sha256(answer.encode()).digest()[0] / 255


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write one row per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def answers(seed: str) -> list[tuple[str, str, str]]:
    """Each prompt with a friendly and an unfriendly answer, in random order."""
    draw = random.Random(seed)
    found = []
    for colour in COLOURS:
        for thing in THINGS:
            pair = [f"The {colour} {thing} is {draw.choice(words)}." for words in (FRIENDLY, UNFRIENDLY)]
            draw.shuffle(pair)
            found.append((f"Describe the {colour} {thing}.", pair[0], pair[1]))
    draw.shuffle(found)
    return found


def write_pairs(path: Path, seed: str, score: Callable[[str], float]) -> None:
    """Write pairs whose better answer has the higher score."""
    rows = []
    for prompt, *both in answers(seed):
        rejected, chosen = sorted(both, key=score)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    write_rows(path, rows)


def run(directory: Path, name: str, *overrides: str) -> dict[str, object]:
    """Run in `directory`; the run's summary."""
    command = [sys.executable, "-m", "rlhf", f"run_name={name}", *overrides]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, encoding="utf-8", check=False
    )
    if done.returncode not in (0, 3):
        raise SystemExit(f"{name} failed ({done.returncode}):\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    path = directory / "runs" / name / "summary.json"
    found: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return found


def taught(directory: Path) -> tuple[str, ...]:
    """Overrides for a model that SFT has taught to answer."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer, _ in answers("sft")]
    write_rows(directory / "answers.jsonl", rows)
    (directory / "by_hash.py").write_text(HASH, encoding="utf-8")
    run(
        directory, "taught", "model=tiny", "stage=sft", "sft.data=answers.jsonl", "sft.peft=none",
        "sft.epochs=20", "sft.optim.lr=3e-3",
    )  # fmt: skip
    return "model=local", "model.path=runs/taught/artifacts/sft", "sft.data=answers.jsonl", *TUNING


def outcome(directory: Path, kind: str, number: int, base: tuple[str, ...]) -> str:
    """The outcome of one run of a kind."""
    method = [*METHODS][number % len(METHODS)]
    coin = random.Random(f"{kind} {number}")
    score = {"coin": lambda answer: coin.random(), "hash": hashed, "words": friendly}[kind]
    pairs = f"{kind}{number}.jsonl"
    write_pairs(directory / pairs, str(number), score)
    own = ("ppo.reward=python:by_hash:score",) if kind == "hash" and method != "dpo" else ()
    found = run(
        directory, f"{kind}{number}", *base, *METHODS[method], f"reward.pairs={pairs}", *own, f"seed={number}"
    )
    print(f"{kind} {number} {method}: {found['outcome']}. {found['verdict']}", flush=True)
    return str(found["outcome"])


def main() -> int:
    """Print how often each kind worked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True, help="of all data and runs")
    parser.add_argument("--runs", type=int, default=21, help="of each kind")
    parser.add_argument("--kinds", nargs="+", default=["coin", "hash", "words"])
    options = parser.parse_args()
    directory = options.directory.resolve()
    base = taught(directory)
    found = {
        kind: Counter(outcome(directory, kind, number, base) for number in range(options.runs))
        for kind in options.kinds
    }
    for kind, outcomes in found.items():
        print(f"{kind}: " + ", ".join(f"{count} {word}" for word, count in outcomes.most_common()))
    return int(any(found[kind]["worked"] for kind in found if kind != "words"))


if __name__ == "__main__":
    sys.exit(main())
