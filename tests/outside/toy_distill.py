"""On-policy distillation: the student answers, and learns how likely the teacher finds each of its tokens.

Source: Agarwal et al. 2024, arXiv:2306.13649, with the reverse KL. Dimensions: B answers, R tokens.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor

from rlhf.data.schema import PromptRow
from rlhf.losses.policy import clipped_policy_loss
from rlhf.models.peft.config import Peft
from rlhf.pipeline.fields import Batch, Memory, Model, Reads, reads_of
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import TUNED, Metric
from rlhf.pipeline.stage import Stage
from rlhf.rl.rollout import Rollout
from rlhf.training.config import OptimConfig


class DistillStage(Stage):
    """The keys `distill.*`."""

    title, makes, samples = "Distilled", "policy", True
    metrics: ClassVar = {"kl_before": Metric("KL before", ".2f"), "kl": Metric("after", ".2f"), **TUNED}

    init: Model
    teacher: Model
    peft: Peft
    optim: OptimConfig
    epochs: PositiveInt
    batch_prompts: Batch
    max_new_tokens: PositiveInt
    micro_batch_tokens: Memory

    def reads(self) -> Reads:
        return reads_of(self)._replace(roles=("ppo",))

    def run(self, job: Job) -> Mapping[str, float]:
        learner = job.trainable(self.init, self.peft, self.optim)
        student, teacher = learner.sampler(), job.policy(job.start(self.teacher))
        size, budget = self.max_new_tokens, self.micro_batch_tokens

        def sampled(rows: Sequence[PromptRow], seed: int) -> tuple[Rollout, Tensor, Tensor]:
            generator = torch.Generator().manual_seed(seed)
            prompts = [row.prompt for row in rows]
            rollout, _ = student.sample(prompts, max_new_tokens=size, generator=generator)
            own_BR = learner.log_probabilities(rollout, budget)
            return rollout, own_BR, teacher.log_probabilities(rollout, 1.0, budget) - own_BR

        def step(rows: Sequence[PromptRow]) -> Mapping[str, float]:
            rollout, own_BR, gain_BR = sampled(rows, job.seed + learner.done)

            def loss(logp_BR: Tensor, mask_BR: Tensor, old_BR: Tensor, advantage_BR: Tensor) -> Tensor:
                return clipped_policy_loss(
                    logp_BR, old_BR, advantage_BR, mask_BR, clip=0.2, total_tokens=int(rollout.mask_BR.sum())
                ).loss

            return learner.learn(rollout, loss, own_BR, gain_BR, micro_batch_tokens=budget)

        def kl() -> float:
            return -float(sampled(job.data.rows("ppo", "held_out")[:64], 0)[2].sum(1).mean())

        before = learner.once("kl", kl)
        batches = job.batches(job.data.rows("ppo", "train"), self.batch_prompts, self.epochs)
        learner.fit(batches, step, rows=lambda rows: ({"prompt": row.prompt} for row in rows))
        return {"kl_before": before, "kl": kl(), **learner.publish()}
