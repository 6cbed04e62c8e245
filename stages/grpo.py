"""Policy gradients without a critic, against a reward: GRPO, RLOO, REINFORCE++ and their variants.

Reads   the SFT model, or what `grpo.init` names instead (policy and reference); a reward; the prompts of
        `ppo.prompts`; the score's moments.
Writes  a plain causal-LM directory: the policy with the best held-out score, judged on other prompts; with
        another grpo.peft than none also what was trained of it alone, in `adapter/`; held_out_answers.jsonl,
        its answers to held-out prompts, evaluation by evaluation.
The loop is PPO's, rlhf/ppo/trainer.py; what is learned from a rollout is rlhf/ppo/group_objective.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import Metric, named
from rlhf.ppo.group_config import GrpoConfig
from rlhf.ppo.stage import PolicyStage

if TYPE_CHECKING:
    from rlhf.ppo.trainer import PolicyTrainer


class GrpoStage(GrpoConfig, PolicyStage):
    """The keys `grpo.*`: rlhf/ppo/config.py and rlhf/ppo/group_config.py. Values: conf/stages/grpo.yaml."""

    title: ClassVar[str] = "GRPO"
    repeats_keys: ClassVar[bool] = True
    in_chain: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, Metric]] = {
        **PolicyStage.metrics, **named("groups_without_spread", "resampled_groups")
    }  # fmt: skip
    version: ClassVar[int] = 3

    def not_checked(self) -> dict[str, str]:
        """A single answer to a prompt has nothing to differ from."""
        alone = "with grpo.samples_per_prompt=1 no two answers are compared"
        return super().not_checked() | (
            {"groups_without_spread": alone} if self.samples_per_prompt == 1 else {}
        )

    def trainer(self, job: Job) -> PolicyTrainer:
        """The loop with its three models, before its first step."""
        from rlhf.ppo.build import build_loop
        from rlhf.ppo.group_objective import GroupObjective

        return build_loop(self, GroupObjective(self), job, self.mismatch_limit)
