"""A few steps of every tuning method in every training stage on SmolLM2: does it work, what does it cost?

    python benchmarks/methods.py                    # run what has not been run yet, then the tables
    python benchmarks/methods.py --stages sft       # of one stage
    python benchmarks/methods.py --table            # the tables alone

Each run is `python -m rlhf` in a fresh process; all start from the same SFT and reward model. There is no
search: one learning rate per method, one seed. Results are saved in benchmarks/.work/methods.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

WORK = Path(__file__).parent / ".work" / "methods"
RATES = {
    "none": 1e-4, "lora": 1e-3, "dora": 1e-3, "qlora": 1e-3, "ia3": 1e-2, "freeze": 1e-4, "adapter": 1e-3,
    "prefix": 1e-2, "prompt": 1e-2, "p_tuning": 1e-2,
}  # fmt: skip
START = ("sft.peft=lora", "sft.optim.lr=1e-3", "sft.epochs=0.25")
"""Overrides of the SFT model from which reward model and policy start."""
PAIRS = "reward.pairs={samples: pairs, limit: 256}"
COMMON = (
    "gates=warn",
    "prepare.held_out_fraction=0.2",
    "ppo.steps=2",
    "ppo.evaluate_every=2",
    "ppo.evaluate_prompts=24",
    PAIRS,
)
COLUMNS = {
    "sft": {"held-out loss": "held_out_loss"},
    "reward": {"accuracy": "accuracy", "longer wins": "longer_wins_accuracy"},
    "ppo": {"score before": "held_out_score_before", "score after": "held_out_score", "KL": "kl"},
}
"""Table heading -> key of the stage's summary."""


def overrides(stage: str, method: str) -> list[str]:
    """Overrides of one run."""
    own = [f"{stage}.peft={method}", f"{stage}.optim.lr={RATES[method]:g}"]
    if stage == "sft":
        return [*COMMON, *own, "sft.epochs=0.25"]
    if stage == "ppo":
        own.append(f"ppo.critic.optim.lr={RATES[method]:g}")
    return [*COMMON, *START, *own]


def run(stage: str, method: str) -> dict[str, Any]:
    """The stage's entry in summary.json."""
    name = f"{stage}-{method}"
    subprocess.run(
        [
            sys.executable, "-m", "rlhf", f"stage={stage}", f"run_name={name}", f"runs_dir={WORK / 'runs'}",
            f"store_dir={WORK / 'store'}", *overrides(stage, method),
        ],
        check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads((WORK / "runs" / name / "summary.json").read_text(encoding="utf-8"))
    return dict(found["stages"][stage])


def row(stage: str, method: str) -> str:
    """A row of the table."""
    file = WORK / f"{stage}-{method}.json"
    if not file.exists():
        return f"| `{method}` | not run |"
    entry = json.loads(file.read_text(encoding="utf-8"))
    found = {name.removeprefix(f"{stage}/"): value for name, value in entry["metrics"].items()}
    beside, base = found.get("token_seconds"), found.get("token_seconds_base")
    cells = [
        f"`{method}`", f"{RATES[method]:g}", f"{found['trained_parameters']:,.0f}",
        f"{found['adapter_bytes'] / 1e6:.2g}" if "adapter_bytes" in found else "",
        f"{1000 * beside:.0f}, {1000 * base:.0f}" if beside and base else "",
        *(f"{found[name]:.3g}" for name in COLUMNS[stage].values()), f"{entry['seconds']:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def table(stage: str) -> str:
    """A stage's table as Markdown."""
    heads = [
        f"`{stage}.peft=`", f"`{stage}.optim.lr`", "trained parameters", "`adapter/`, MB",
        "ms per token, with it and without", *COLUMNS[stage], "seconds",
    ]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *(row(stage, method) for method in RATES)])


def main() -> None:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--stages", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    for stage in [] if options.table else options.stages:
        for method in RATES:
            file = WORK / f"{stage}-{method}.json"
            if not file.exists() and (method != "qlora" or torch.cuda.is_available()):
                file.write_text(json.dumps(run(stage, method)), encoding="utf-8")
    for stage in options.stages:
        print(f"\n{table(stage)}")


if __name__ == "__main__":
    main()
