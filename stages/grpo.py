"""Policy gradients without a critic, against a reward: GRPO, RLOO, REINFORCE++ and their variants.

Reads   the SFT model, or what `grpo.init` names instead (policy and reference); a reward; the prompts of
        `ppo.prompts`; the score's moments.
Writes  a plain causal-LM directory: the policy with the best held-out score, judged on other prompts; unless
        grpo.peft is none, its trained weights alone too, in `adapter/`; and its answers to held-out prompts,
        evaluation by evaluation, in held_out_answers.jsonl.
A step is PPO's, rlhf/ppo/trainer.py; what is learned from a rollout is rlhf/ppo/objective.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from rlhf.data.roles import TRAINING
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import Metric, named
from rlhf.ppo.group_config import GrpoConfig
from rlhf.ppo.stage import PolicyStage

if TYPE_CHECKING:
    from rlhf.ppo.objective import Objective


class GrpoStage(GrpoConfig, PolicyStage):
    """The keys `grpo.*`: rlhf/ppo/config.py and rlhf/ppo/group_config.py. Values: conf/stages/grpo.yaml."""

    title, version, in_chain, repeats_keys = "GRPO", 3, False, True
    metrics: ClassVar[Mapping[str, Metric]] = {
        **PolicyStage.metrics, **named("groups_without_spread", "resampled_groups")
    }  # fmt: skip

    def not_checked(self) -> dict[str, str]:
        """With a single answer per prompt, no answers are compared."""
        alone = "with grpo.samples_per_prompt=1 no two answers are compared"
        return super().not_checked() | (
            {"groups_without_spread": alone} if self.samples_per_prompt == 1 else {}
        )

    def objective(self) -> Objective:
        """Group advantages with the clipped loss."""
        from rlhf.ppo.objective import GroupObjective

        return GroupObjective(self)

    def run(self, job: Job) -> Mapping[str, float]:
        """Sample, score and learn, step by step (`PolicyTrainer.step`). Publish the policy with the best
        score on held-out prompts."""
        prompts, held_out = (job.data.rows("ppo", split) for split in TRAINING)
        trainer = self.trainer(job)
        metrics = trainer.train(prompts, held_out[: self.evaluate_prompts])
        return {**metrics, **trainer.publish()}
