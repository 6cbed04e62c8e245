"""Train the reward model on preference pairs.

Reads   the SFT model; preference pairs (`reward.pairs`).
Writes  a sequence-classification model with one label, and how well it ranks held-out pairs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config import ConfigError, OptimConfig, Peft
from rlhf.data.batching import chunks, token_budget_batches
from rlhf.data.chat import exchange_ids
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import PairRow, Role
from rlhf.data.sources import SourceConfig
from rlhf.estimate import TRAINED, Work
from rlhf.evaluation.ranking import Ranking, rank_quality
from rlhf.job import Job
from rlhf.losses.pairwise import bradley_terry_loss
from rlhf.models.adapters import attach, count_parameters
from rlhf.models.load import load_tokenizer
from rlhf.models.scalar import ScalarModel, load_scalar_model, reset_head, save_scalar_model
from rlhf.stage import Stage
from rlhf.training import MasterAdamW, make_optimizer, make_schedule


class RewardStage(Stage):
    """What `reward.*` can be told. Values: conf/stages/reward.yaml."""

    name: ClassVar[str] = "reward"
    not_in_key: ClassVar[frozenset[str]] = frozenset({"pairs", "micro_batch_tokens"})

    pairs: SourceConfig
    """Rows with a prompt, a chosen and a rejected answer; prepared by `prepare`."""
    optim: OptimConfig
    peft: Peft
    epochs: PositiveInt
    """One is the rule: reward models overfit in the second (Ouyang et al. 2022, C.2)."""
    batch_pairs: PositiveInt
    """Pairs per optimizer step, over all ranks."""
    micro_batch_tokens: PositiveInt
    """Padded tokens per forward pass; lower it when memory runs out."""
    max_tokens: PositiveInt
    """Pairs with a longer side are left out, and counted."""
    center: NonNegativeFloat
    """Weight that pulls scores towards 0 (Eisenstein et al. 2023)."""

    def inputs(self) -> tuple[str, ...]:
        """It starts from the SFT model."""
        return ("prepare", "sft")

    def roles(self) -> tuple[Role, ...]:
        """Reads preference pairs."""
        return ("reward",)

    def work(self, data: PreparedData) -> Work:
        """Both sides of every pair."""
        pairs, tokens = data.size("reward", "train")
        held_out, _ = data.size("reward", "held_out")
        return Work(
            trained=TRAINED[self.peft.method] * self.epochs * 2 * pairs * tokens, read=2 * held_out * tokens
        )

    def run(self, job: Job) -> None:
        """Train, publish, and measure what was published."""
        tokenizer = load_tokenizer(job.inputs["sft"].path, job.base.config)
        assert isinstance(tokenizer.pad_token_id, int)
        model = load_scalar_model(job.inputs["sft"].path, job.base.config, job.compute.dtype, new_head=True)
        model.to(job.compute.device)
        reset_head(model)
        adapter = attach(model.model, self.peft)
        model.head.requires_grad_(True)
        model.offset.requires_grad_(False)

        def encode(rows: Sequence[PairRow]) -> list[EncodedPair]:
            return [EncodedPair(tokenizer, row) for row in rows]

        pairs = {split: encode(job.data.rows("reward", split)) for split in ("train", "held_out")}
        train, held_out = (
            [pair for pair in pairs[split] if pair.longest <= self.max_tokens]
            for split in ("train", "held_out")
        )
        if not train or not held_out:
            raise ConfigError(f"reward.max_tokens={self.max_tokens}: no pair is that short. Raise it.")
        trained, _ = count_parameters(model)
        skipped = self.train(job, model, train, tokenizer.pad_token_id)

        adapter.merge()
        save_scalar_model(model, tokenizer, job.directory)
        published = load_scalar_model(job.directory, job.base.config, job.compute.dtype).to(
            job.compute.device
        )
        ranking = self.rank(job, published, held_out, tokenizer.pad_token_id)
        too_long = sum(map(len, pairs.values())) - len(train) - len(held_out)
        job.publish({
            **rank_quality(ranking),
            "trained_parameters": trained,
            "skipped_steps": skipped,
            "train_pairs": len(train),
            "pairs_too_long": too_long,
        })  # fmt: skip

    def train(self, job: Job, model: ScalarModel, pairs: Sequence[EncodedPair], pad_id: int) -> int:
        """Bradley-Terry training; each optimizer step is one mean over batch_pairs pairs.

        Returns:
            The number of steps skipped for a gradient that was not finite.
        """
        optimizer = make_optimizer([(model.parameters(), self.optim)])
        batches = [
            batch
            for epoch in range(self.epochs)
            for batch in chunks(random.Random(job.seed + epoch).sample(pairs, len(pairs)), self.batch_pairs)
        ]
        schedule = make_schedule(optimizer, len(batches))
        with job.progress.task("reward: training", len(batches)) as task:
            for step, batch in enumerate(batches, 1):
                metrics = self.step(job, model, optimizer, batch, pad_id)
                metrics["lr"] = float(schedule.get_last_lr()[0])
                schedule.step()
                job.log(metrics, step)
                task.advance(1, f"loss {metrics['loss']:.3f} accuracy {metrics['train_accuracy']:.2f}")
        return optimizer.skipped_steps

    def step(
        self, job: Job, model: ScalarModel, optimizer: MasterAdamW, batch: Sequence[EncodedPair], pad_id: int
    ) -> dict[str, float]:
        """One optimizer step."""
        totals = job.compute.global_sum(torch.tensor([float(len(batch))], device=job.compute.device))
        sums = torch.zeros(2, device=job.compute.device)  # loss, right rankings
        for group in token_budget_batches([2 * pair.longest for pair in batch], self.micro_batch_tokens):
            pairs = [batch[index] for index in group]
            score_2B = model.last_values([*(p.chosen for p in pairs), *(p.rejected for p in pairs)], pad_id)
            chosen_B, rejected_B = score_2B.chunk(2)
            loss = bradley_terry_loss(chosen_B, rejected_B, total_pairs=float(totals[0]), center=self.center)
            job.compute.accelerator.backward(loss)
            sums += torch.stack([loss.detach(), (chosen_B > rejected_B).sum() / totals[0]])
        optimizer.step()
        loss_sum, accuracy = job.compute.global_sum(sums).tolist()
        return {"loss": loss_sum, "train_accuracy": accuracy, "grad_norm": optimizer.grad_norm}

    def rank(self, job: Job, model: ScalarModel, pairs: Sequence[EncodedPair], pad_id: int) -> Ranking:
        """Score both sides of every pair."""
        rows = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
        chosen_B, rejected_B = model.score(rows, pad_id, self.micro_batch_tokens).chunk(2)
        return Ranking(
            chosen_B,
            rejected_B,
            torch.tensor([pair.chosen_length for pair in pairs]),
            torch.tensor([pair.rejected_length for pair in pairs]),
            torch.tensor([pair.gold_gap for pair in pairs]),
        )


class EncodedPair:
    """A preference pair as token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, row: PairRow) -> None:
        self.chosen, self.chosen_length = self._encode(tokenizer, row, row.chosen)
        self.rejected, self.rejected_length = self._encode(tokenizer, row, row.rejected)
        self.longest = max(len(self.chosen), len(self.rejected))
        self.gold_gap = float("nan")
        if row.chosen_gold is not None and row.rejected_gold is not None:
            self.gold_gap = row.chosen_gold - row.rejected_gold

    @staticmethod
    def _encode(tokenizer: PreTrainedTokenizerBase, row: PairRow, response: str) -> tuple[Tensor, int]:
        ids, prompt_length = exchange_ids(tokenizer, row.prompt, response)
        return torch.tensor(ids), len(ids) - prompt_length
