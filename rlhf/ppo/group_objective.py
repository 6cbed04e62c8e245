"""What GRPO and its relatives learn from a rollout: groups of answers instead of a critic.

The estimators are in rlhf/rl/group.py, the losses in rlhf/losses/policy.py.
Dimensions: B episodes, R response tokens (padded), G groups, n answers of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from rlhf.losses.policy import PolicyLoss, clipped_policy_loss, kl_loss, loss_weights
from rlhf.ppo.group_config import GrpoConfig
from rlhf.ppo.update import Objective
from rlhf.rl.advantage import OverlongPenalty, ScoreNormalizer
from rlhf.rl.group import (
    batch_advantage,
    group_advantage,
    group_spread,
    leave_one_out_advantage,
    neighbours,
)
from rlhf.rl.rollout import Advantages, Experience, RewardRule


class GroupObjective(Objective):
    """Advantages from the answers to the same prompt, and a clipped policy loss."""

    has_critic = False

    def __init__(self, config: GrpoConfig) -> None:
        super().__init__(config)
        self.config = config
        self.kl_in_loss = config.kl.place == "loss"
        self.figures = ("kl_loss",) if self.kl_in_loss else ()

    def rule(self, normalizer: ScoreNormalizer) -> RewardRule:
        """Long answers may lose something; the KL penalty may be in the loss instead."""
        config, overlong = self.config, None
        if config.overlong.buffer is not None:
            longest = config.max_new_tokens
            overlong = OverlongPenalty(longest, config.overlong.buffer, config.overlong.penalty)
        rule = replace(super().rule(normalizer), overlong=overlong, kl_estimator=config.kl.estimator)
        return replace(rule, kl_coef=0.0) if self.kl_in_loss else rule

    def estimator(self, value_BR: Tensor | None) -> Callable[[Tensor, Tensor], Advantages]:
        """`grpo.advantage`. Groups are neighbours."""
        config = self.config

        def advantages(reward_BR: Tensor, mask_BR: Tensor) -> Advantages:
            group_B = neighbours(len(reward_BR), config.samples_per_prompt)
            if config.advantage == "grpo":
                found_BR = group_advantage(
                    reward_BR, mask_BR, group_B, divide_by_deviation=config.divide_by_deviation
                )
            elif config.advantage == "rloo":
                found_BR = leave_one_out_advantage(reward_BR, mask_BR, group_B)
            else:
                with_baseline = config.advantage == "reinforce_plus_plus_baseline"
                found_BR = batch_advantage(reward_BR, mask_BR, group_B if with_baseline else None)
            return Advantages(found_BR, values=None)

        return advantages

    def rollout_metrics(self, experience: Experience) -> dict[str, float]:
        """Whether the groups teach anything, by their raw scores."""
        if self.config.samples_per_prompt == 1:
            return {}
        size, score_B = self.config.samples_per_prompt, experience.score_B.double()
        spread_B = group_spread(score_B, neighbours(len(score_B), size))
        scores = [score_n[~score_n.isnan()] for score_n in score_B.view(-1, size)]
        deviations = [float(each.std()) for each in scores if len(each) > 1]
        return {
            "groups_without_spread": float((spread_B == 0.0).double().mean()),
            "group_deviation": sum(deviations) / max(1, len(deviations)),
        }

    def policy_loss(
        self, logp_BR: Tensor, part: Experience, *, total_tokens: int, num_episodes: int
    ) -> tuple[PolicyLoss, Mapping[str, Tensor]]:
        """The clipped loss, and the KL to the reference where it is paid in the loss."""
        config, device, mask_BR = self.config, logp_BR.device, part.mask_BR.to(logp_BR.device)
        weight_B = loss_weights(
            mask_BR.sum(1), config.loss_mean, total_tokens=total_tokens, num_episodes=num_episodes,
            longest=config.max_new_tokens,
        )  # fmt: skip
        found = clipped_policy_loss(
            logp_BR, part.logp_BR.to(device), part.advantage_BR.to(device), mask_BR,
            clip=config.clip, clip_high=config.clip_high, dual_clip=config.dual_clip,
            total_tokens=total_tokens, weight_B=weight_B, ratio=config.ratio,
        )  # fmt: skip
        if not self.kl_in_loss:
            return found, {}
        scored_BR = mask_BR & ~part.score_B.isnan().to(device)[:, None]  # of others nothing is learned
        reference_BR = part.reference_logp_BR.to(device)
        kl = kl_loss(logp_BR, reference_BR, scored_BR, total_tokens=total_tokens, weight_B=weight_B)
        return found._replace(loss=found.loss + self.kl.coef * kl), {"kl_loss": kl.detach() * total_tokens}
