"""PPO by this project, which answers held-out prompts between timed steps; `ppo_learning.py` starts it.

    python benchmarks/learn_rlhf.py work.json

Input and output are those of the peers (peer_work.py); the loop is that of run_rlhf.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peer_work import Report
from run_rlhf import make_trainer, take_step

from rlhf.data.schema import PromptRow
from rlhf.ppo.trainer import PolicyTrainer

PACKAGES = ["rlhf", "transformers", "torch"]


def measure(work: dict[str, Any]) -> Report:
    """Train on work's prompts; answer the held-out ones before, at the given steps, and at the end."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer, precision = make_trainer(work, Path(scratch))
        report = Report(precision=precision)
        for done, prompts in enumerate(work["prompts"]):
            if done % work["evaluate_every"] == 0:
                evaluate(trainer, work, report, done)
            report.ask()
            learn(trainer, [PromptRow(prompt) for prompt in prompts], report)
        report.ask()
        evaluate(trainer, work, report, len(work["prompts"]))
    return report


def learn(trainer: PolicyTrainer, batch: list[PromptRow], report: Report) -> None:
    """One step of the product's loop."""
    metrics = take_step(trainer, batch, len(report.asked))
    if metrics["bad_steps"]:
        sys.exit(f"step {len(report.asked)} was skipped: these figures would not be those of all steps")
    report.new_tokens.append(int(metrics["response_tokens"]))
    report.score_mean.append(metrics["score"])
    report.kl.append(metrics["kl"])


def evaluate(trainer: PolicyTrainer, work: dict[str, Any], report: Report, done: int) -> None:
    """Answer the held-out prompts with a separate random generator."""
    with report.paused():
        rollout, _ = trainer.policy.sample(
            work["held_out_prompts"],
            max_new_tokens=work["new_tokens"],
            temperature=work["temperature"],
            generator=torch.Generator().manual_seed(work["seed"]),
            batch_rows=len(work["held_out_prompts"]),
        )
        report.evaluations.append((done, [ids.tolist() for ids in rollout.response_ids]))


def main() -> None:
    """Run the work and print the measurements."""
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(work["threads"])
    report = measure(work)
    print(report.as_json([len(prompts) for prompts in work["prompts"]], PACKAGES))


if __name__ == "__main__":
    main()
