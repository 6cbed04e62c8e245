"""The reward model's training against TRL's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import rlhf.models.value_head
from helpers.encoded import pairs_of
from helpers.experiments import build_stage
from helpers.jobs import TINY, run_in, small_job, tiny_base, user
from rlhf.data.schema import PairRow
from rlhf.distributed.batching import shuffled_batches
from rlhf.models.base import load_tokenizer
from rlhf.models.value_head import ScalarModel
from rlhf.stages.reward import RewardStage

SETTINGS = (
    "model=tiny", "reward.peft=none", "reward.optim.lr=3e-3", "reward.batch_pairs=4", "reward.epochs=2",
    "reward.optim.warmup_fraction=0", "reward.optim.eps=1e-8", "reward.micro_batch_tokens=120",
)  # fmt: skip


def pair(number: int) -> PairRow:
    prompt = user(f"Rate {number}{' please' * (number % 3)}")
    return PairRow(prompt, f"I love it{'!' * number}", f"No{' way' * (number % 4)}.")


def test_trl_comes_to_the_same_weights(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our stage in micro-batches of its own; TRL 1.16's trainer on whole batches, with the same head."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    head = 0.1 * torch.randn(1, 64, generator=torch.Generator().manual_seed(1))

    def given_head(scalar: ScalarModel) -> None:
        with torch.no_grad():
            scalar.head.weight.copy_(head)

    monkeypatch.setattr(rlhf.models.value_head, "reset_head", given_head)
    stage = build_stage(RewardStage, *SETTINGS)
    pairs = [pair(number) for number in range(12)]
    job = small_job("reward", tmp_path / "job", tiny_base(tiny_model), {"sft": tiny_model})
    job.data.write("pairs", "train", pairs)
    job.data.write("pairs", "held_out", [pair(number) for number in range(20, 24)])
    run_in(stage, job)

    tokenizer = load_tokenizer(tiny_model, TINY)
    batches = shuffled_batches(pairs_of(tokenizer, pairs), stage.batch_pairs, stage.epochs, job.seed)
    examples = [
        {"chosen_ids": each.chosen.tolist(), "rejected_ids": each.rejected.tolist()}
        for batch in batches
        for each in batch
    ]
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        model.score.weight.copy_(head)
    arguments = RewardConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, num_train_epochs=1, learning_rate=3e-3,
        per_device_train_batch_size=4, max_grad_norm=1.0, report_to="none", save_strategy="no",
        max_length=None, disable_tqdm=True, gradient_checkpointing=False, logging_steps=1,
        center_rewards_coefficient=0.01, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = RewardTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(examples), processing_class=tokenizer
    )
    trainer.train()

    lines = [json.loads(line) for line in (job.directory / "metrics.jsonl").read_text().splitlines()]
    ours = [line["reward/loss"] for line in lines if "reward/loss" in line and "summary" not in line]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert ours == pytest.approx(losses, abs=2e-4)
    published = AutoModelForSequenceClassification.from_pretrained(job.directory, dtype=torch.float32)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    moved = []
    for one, other, before in zip(published.parameters(), model.parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
        moved.append(float((one - before).detach().abs().max()))
    assert sorted(moved)[1] > 5e-3  # but for the head, which is another one there
