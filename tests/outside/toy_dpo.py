"""A stage from outside the package: DPO on the prepared pairs, from the SFT model.

Reads   the SFT model (policy and reference); preference pairs (`reward.pairs`).
Writes  a plain causal-LM directory, and how often held-out pairs are ranked right.

Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7. Dimensions: B pairs, N response tokens, R columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

from rlhf.data.chat_template import exchange_ids
from rlhf.data.schema import PairRow
from rlhf.evaluation.intervals import share
from rlhf.models.logprobs import pack_sequences
from rlhf.models.peft.config import Peft
from rlhf.pipeline.fields import Batch, Memory, Reads
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import TUNED, Metric, named
from rlhf.pipeline.stage import Stage
from rlhf.training.config import OptimConfig
from rlhf.training.engine import Engine


def dpo_loss(margin_B: Tensor, beta: float, total_pairs: int) -> Tensor:
    """A micro-batch's part of the mean of -log sigmoid(beta * margin). A margin is how much more likely, in
    nats, the policy makes the chosen answer than the rejected one, beyond what the reference does."""
    return -logsigmoid(beta * margin_B).sum() / total_pairs


class Pair:
    """A preference pair as token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, row: PairRow) -> None:
        sides = [exchange_ids(tokenizer, row.prompt, text) for text in (row.chosen, row.rejected)]
        self.row, self.tokens = row, sum(len(ids) for ids, _ in sides)
        self.prompts = [torch.tensor(ids[:begin]) for ids, begin in sides]
        self.answers = [torch.tensor(ids[begin:]) for ids, begin in sides]
        self.reference = 0.0
        """The margin under the SFT model, nats."""


class DpoStage(Stage):
    """The keys `toy.*`. Values: conf/stages/toy.yaml."""

    title: ClassVar[str] = "DPO"
    makes: ClassVar[Literal["policy"]] = "policy"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric("ranks right", ".2f"),
        **TUNED,
        **named("skipped_steps"),
    }
    role: ClassVar[str] = "pairs"

    optim: OptimConfig
    peft: Peft
    beta: PositiveFloat
    epochs: PositiveInt
    batch_pairs: Batch
    micro_batch_tokens: Memory

    def reads(self) -> Reads:
        """Preference pairs, and the SFT model."""
        return Reads(roles=(self.role,), stages=("sft",))

    def run(self, job: Job) -> Mapping[str, float]:
        """Measure the reference, train, and publish."""
        learner = job.trainable("sft", self.peft, self.optim)
        engine = learner.engine
        train, held_out = (
            [Pair(learner.tokenizer, self.pair(row)) for row in job.data.rows(self.role, split)]
            for split in ("train", "held_out")
        )
        everything = [*train, *held_out]
        reference_B = learner.once("reference_B", lambda: self.margins(job, engine, everything))
        for pair, margin in zip(everything, reference_B.tolist(), strict=True):
            pair.reference = margin
        learner.fit(
            job.batches(train, self.batch_pairs, self.epochs),
            lambda batch: self.step(job, engine, batch),
            rows=lambda batch: map(self.as_json, batch),
        )
        gain_B = self.margins(job, engine, held_out) - torch.tensor([pair.reference for pair in held_out])
        right = share((gain_B > 0).double()).metrics("accuracy")
        return {**learner.publish(), **right, "skipped_steps": engine.skipped_steps}

    def pair(self, row: Any) -> PairRow:
        """The pair that a prepared row stands for."""
        assert isinstance(row, PairRow)
        return row

    def step(self, job: Job, engine: Engine, pairs: Sequence[Pair]) -> dict[str, float]:
        """One optimizer step: the mean over all pairs of the batch, over all ranks."""

        def loss(part: list[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
            reference_B = torch.tensor([pair.reference for pair in part], device=job.compute.device)
            mean = dpo_loss(self.margin(job, engine, part) - reference_B, self.beta, len(pairs))
            return mean, {"loss": mean}

        lengths = [pair.tokens for pair in pairs]
        return engine.learn(
            lengths, lambda places: [pairs[place] for place in places], loss, self.micro_batch_tokens
        )

    def margin(self, job: Job, engine: Engine, pairs: Sequence[Pair]) -> Tensor:
        """Of each pair, log p(chosen) - log p(rejected) under the model as it is, nats."""
        prompts, answers = ([t for p in pairs for t in getattr(p, side)] for side in ("prompts", "answers"))
        batch = pack_sequences(prompts, answers, job.compute.device)
        logp_2BR = batch.to_rows(engine.model(batch, temperature=1.0).logp_N.float())
        return logp_2BR.sum(-1).view(-1, 2) @ logp_2BR.new_tensor([1.0, -1.0])

    @torch.no_grad()
    def margins(self, job: Job, engine: Engine, pairs: Sequence[Pair]) -> Tensor:
        """The same of many pairs, on the CPU; ranks share the work."""
        found_B = torch.zeros(len(pairs))
        for indices, weight, _ in job.compute.micro_batches(
            [pair.tokens for pair in pairs], self.micro_batch_tokens
        ):
            margin_B = self.margin(job, engine, [pairs[index] for index in indices])
            if weight:
                found_B[indices] = margin_B.cpu()
        return job.compute.global_sum(found_B)

    @staticmethod
    def as_json(pair: Pair) -> dict[str, Any]:
        """The pair as the user knows it."""
        return {"prompt": pair.row.prompt, "chosen": pair.row.chosen, "rejected": pair.row.rejected}
