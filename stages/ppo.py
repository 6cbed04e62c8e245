"""Proximal policy optimization against a reward, held near the model it starts from by a KL penalty.

Reads   the SFT model, or what `ppo.init` names instead (policy and reference); a reward; prompts
        (`ppo.prompts`); the score's moments.
Writes  a plain causal-LM directory: the policy with the best held-out score, judged on other prompts; unless
        ppo.peft is none, its trained weights alone too, in `adapter/`; and its answers to held-out prompts,
        evaluation by evaluation, in held_out_answers.jsonl.
A step is rlhf/ppo/trainer.py; what is learned from a rollout is rlhf/ppo/objective.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from rlhf.config import Complaint
from rlhf.data.roles import TRAINING
from rlhf.models.peft.methods import METHODS, VIRTUAL_TOKEN_METHODS
from rlhf.models.peft.saved import adapter_config, origin_of
from rlhf.models.start import files_of
from rlhf.pipeline.fields import Reads
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import Metric, named
from rlhf.pipeline.stage import Stage, View
from rlhf.ppo.config import PpoConfig
from rlhf.ppo.stage import PolicyStage
from rlhf.rewards.kinds import critic_part, reward_directory, stage_of

if TYPE_CHECKING:
    from rlhf.ppo.objective import Objective


class PpoStage(PpoConfig, PolicyStage):
    """The keys `ppo.*`: rlhf/ppo/config.py. Values: conf/stages/ppo.yaml."""

    title, version = "PPO", 9
    metrics: ClassVar[Mapping[str, Metric]] = {**PolicyStage.metrics, **named("explained_variance")}

    @property
    def prompts_key(self) -> str:
        """The key with its value."""
        return f"ppo.prompts={self.prompts}"

    @property
    def moments_alternative(self) -> str:
        """Running normalization needs another critic: one on the reward model needs fixed units."""
        return f"{self.name}.score.normalize=running with {self.name}.critic.init=sft"

    def reads(self) -> Reads:
        """The rows of the pretraining mix only if there is one."""
        fields = super().reads()
        return fields if self.ptx.coef > 0 else fields._replace(roles=("ppo",))

    def complaints(self, view: View) -> Iterator[Complaint]:
        """The critic is compatible with the tuning methods, and can be built on its start."""
        has_tokens = self.virtual_tokens_of_reward(view.chain)
        if has_tokens and METHODS[self.peft.method].pads and self.critic.init == "reward":
            yield Complaint(
                "ppo.critic.init=reward",
                f"the reward model has virtual tokens ({has_tokens}), and a critic on it cannot get those of "
                f"ppo.peft={self.peft.method} too.",
                "Use ppo.critic.init=sft, or another ppo.peft.",
            )
        if view.base is not None:
            from rlhf.models.value_head import check_scorable

            check_scorable(files_of(self.init, view.base).architecture)
        yield from super().complaints(view)

    def virtual_tokens_of_reward(self, chain: Mapping[str, Stage]) -> str | None:
        """The key that gives the reward model virtual tokens; None if it has none."""
        part = critic_part(self.reward)
        if part is None:
            return None
        if stage := stage_of(part.source):
            method = dict(chain[stage])["peft"].method
            return f"{stage}.peft={method}" if METHODS[method].pads else None
        directory = reward_directory(part.source, {})
        if directory is None or origin_of(directory) is None:
            return None
        return (
            f"ppo.reward={self.reward}"
            if adapter_config(directory)["peft_type"] in VIRTUAL_TOKEN_METHODS
            else None
        )

    def objective(self) -> Objective:
        """A critic with the clipped loss."""
        from rlhf.ppo.objective import PpoObjective

        return PpoObjective(self)

    def run(self, job: Job) -> Mapping[str, float]:
        """Sample, score and learn, step by step (`PolicyTrainer.step`). Publish the policy with the best
        score on held-out prompts."""
        prompts, held_out = (job.data.rows("ppo", split) for split in TRAINING)
        trainer = self.trainer(job)
        metrics = trainer.train(prompts, held_out[: self.evaluate_prompts])
        return {**metrics, **trainer.publish()}
