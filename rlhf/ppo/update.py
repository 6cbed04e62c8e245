"""What a policy gradient learns from one rollout: epochs of minibatches of micro-batches.

Policy and critic are one module, so that one engine and one optimizer hold both. Dimensions: B episodes,
R response tokens (padded), N response tokens of a micro-batch laid end to end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.generation.policy_model import PolicyModel
from rlhf.losses.policy import PolicyLoss, clipped_policy_loss
from rlhf.losses.value import clipped_value_loss
from rlhf.models.logprobs import (
    Sequences,
    TokenStatistics,
    pack_sequences,
    passes_over,
    response_statistics,
    rollout_rows,
)
from rlhf.models.value_head import ScalarModel
from rlhf.pipeline.job import Job
from rlhf.ppo.config import PolicyConfig, PpoConfig
from rlhf.ppo.metrics import UpdateSums
from rlhf.ppo.ptx import PretrainingMix
from rlhf.rl.advantage import AdaptiveKL, FixedKL, ScoreNormalizer
from rlhf.rl.rollout import Advantages, Experience, RewardRule, Rollout, critic_advantages, minibatches
from rlhf.tracking.timer import StepTimer
from rlhf.training.engine import Engine
from rlhf.training.optimizer import WeightAverage


class BadStepError(Exception):
    """Nothing may be learned from the step: something in it is not finite."""


class ForwardPass(NamedTuple):
    """A forward pass of policy and critic, with its graph."""

    batch: Sequences
    statistics: TokenStatistics
    value_N: Tensor | None
    """None without a critic."""


class Objective(ABC):
    """What makes one algorithm differ from another: its advantages and its losses.

    PPO's is here; those without a critic are in rlhf/ppo/group_objective.py.
    """

    has_critic: ClassVar[bool]
    figures: tuple[str, ...] = ()
    """What it counts of every update, beside the policy's figures."""

    def __init__(self, config: PolicyConfig) -> None:
        self._score = config.score
        self.kl = (
            AdaptiveKL(config.kl.coef, config.kl.target, config.kl.horizon)
            if config.kl.controller == "adaptive"
            else FixedKL(config.kl.coef)
        )

    def rule(self, normalizer: ScoreNormalizer) -> RewardRule:
        """How scores become rewards."""
        score = self._score
        return RewardRule(normalizer, self.kl.coef, score.missing_stop, score.missing_stop_penalty)

    def rollout_metrics(self, experience: Experience) -> dict[str, float]:
        """Its own metrics of a scored rollout."""
        return {}

    @abstractmethod
    def estimator(self, value_BR: Tensor | None) -> Callable[[Tensor, Tensor], Advantages]:
        """What makes advantages of rewards: see `make_experience`. value_BR: the critic's."""

    @abstractmethod
    def policy_loss(
        self, logp_BR: Tensor, part: Experience, *, total_tokens: int, num_episodes: int
    ) -> tuple[PolicyLoss, Mapping[str, Tensor]]:
        """The policy's loss on a micro-batch, on logp_BR's device.

        Args:
            logp_BR: nats, of the policy that trains; carries the gradient.
            total_tokens: response tokens of the whole optimizer step, over all ranks.
            num_episodes: of the whole optimizer step, over all ranks.

        Returns:
            The loss; and those of `figures` that the policy has, as sums over tokens.
        """

    def critic_loss(
        self, value_BR: Tensor, part: Experience, *, total_tokens: int
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The critic's loss on a micro-batch, and its `figures`; called if there is a critic."""
        raise NotImplementedError


class PpoObjective(Objective):
    """PPO: advantages from a critic, the clipped policy loss, the critic's squared error."""

    has_critic: ClassVar[bool] = True
    figures = ("value_loss", "value_clip_fraction")

    def __init__(self, config: PpoConfig) -> None:
        super().__init__(config)
        self.config = config

    def estimator(self, value_BR: Tensor | None) -> Callable[[Tensor, Tensor], Advantages]:
        """GAE."""
        assert value_BR is not None
        return partial(critic_advantages, value_BR=value_BR, gamma=self.config.gamma, lam=self.config.lam)

    def policy_loss(
        self, logp_BR: Tensor, part: Experience, *, total_tokens: int, num_episodes: int
    ) -> tuple[PolicyLoss, Mapping[str, Tensor]]:
        """See rlhf/losses/policy.py."""
        config, device = self.config, logp_BR.device
        return clipped_policy_loss(
            logp_BR, part.logp_BR.to(device), part.advantage_BR.to(device), part.mask_BR.to(device),
            clip=config.clip, clip_high=config.clip_high, dual_clip=config.dual_clip,
            total_tokens=total_tokens,
        ), {}  # fmt: skip

    def critic_loss(
        self, value_BR: Tensor, part: Experience, *, total_tokens: int
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """See rlhf/losses/value.py."""
        device = value_BR.device
        found = clipped_value_loss(
            value_BR, part.value_BR.to(device), part.return_BR.to(device), part.mask_BR.to(device),
            clip=self.config.value_clip, total_tokens=total_tokens,
        )  # fmt: skip
        figures = {
            "value_loss": found.loss.detach() * total_tokens, "value_clip_fraction": found.clipped,
        }  # fmt: skip
        return found.loss, figures


class ActorCritic(nn.Module):
    """Policy and critic in one module. They read the same token ids, one after the other."""

    def __init__(self, policy: PreTrainedModel, critic: ScalarModel) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(
        self, half: Literal["policy", "critic"], batch: Sequences, temperature: float = 1.0
    ) -> TokenStatistics | Tensor:
        """Run one half on every response token.

        Returns:
            policy: log-probability and entropy in nats, at the sampling temperature.
            critic: V(prompt + y_<t) in units of the normalised reward, fp32 [N] (the response tokens of a
            micro-batch laid end to end).
        """
        if half == "policy":
            return response_statistics(self.policy, batch, temperature)
        return self.critic.values(batch)


class ActorAlone(nn.Module):
    """A policy without a critic, called as an ActorCritic's half."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, half: Literal["policy"], batch: Sequences, temperature: float = 1.0) -> TokenStatistics:
        """Log-probability and entropy of every response token, in nats, at the sampling temperature."""
        return response_statistics(self.policy, batch, temperature)


class PolicyUpdater:
    """Learns from a rollout. Holds what changes meanwhile, except the engine's state."""

    def __init__(
        self,
        config: PolicyConfig,
        objective: Objective,
        engine: Engine,
        policy: PolicyModel,
        mix: PretrainingMix | None,
        job: Job,
        phases: StepTimer,
    ) -> None:
        self.config, self.objective, self.mix = config, objective, mix
        self.engine, self.compute = engine, job.compute
        self.phases = phases
        self.average = WeightAverage(policy.model, config.ema_decay) if config.ema_decay is not None else None
        self.shuffling = torch.Generator().manual_seed(job.seed)

    def published_weights(self) -> AbstractContextManager[None]:
        """A context in which the policy has the weights to publish: the average, if there is one."""
        return self.average.swapped_in() if self.average is not None else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the engine's state."""
        return {
            "shuffling": self.shuffling.get_state(),
            "average": self.average and self.average.state_dict(),
            "mix": self.mix and self.mix.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        self.shuffling.set_state(state["shuffling"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.mix is not None:
            self.mix.load_state_dict(state["mix"])

    def score(self, rollout: Rollout) -> tuple[Tensor, Tensor | None, ForwardPass | None]:
        """Log-probabilities and (with a critic) values of a rollout by the current models: fp32 [B, R], on
        the CPU.

        If the rollout is one minibatch and fits into one forward pass, `learn` uses this pass as its first:
        it is returned with its graph.
        """
        config = self.config
        passes = len(list(passes_over(rollout, config.micro_batch_tokens, self.compute)))
        once = passes == 1 and len(rollout) == config.minibatch_episodes
        scored: list[ForwardPass] = []

        def measure(batch: Sequences) -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(once):
                statistics = self.engine.model("policy", batch, config.temperature)
                value_N = self.engine.model("critic", batch) if self.objective.has_critic else None
            if once:
                scored.append(ForwardPass(batch, statistics, value_N))
            return statistics.logp_N, *(() if value_N is None else (value_N,))

        logp_BR, *values = rollout_rows(rollout, config.micro_batch_tokens, self.compute, measure)
        return logp_BR, values[0] if values else None, scored[0] if once else None

    def learn(
        self, experience: Experience, scored: ForwardPass | None, *, critic_only: bool
    ) -> dict[str, float]:
        """All epochs over one rollout.

        Args:
            scored: what `score` returned for this rollout.

        Returns:
            Metrics. `first_ratio_deviation` compares the scoring pass with the first minibatch's,
            which has the same weights. It is 0 by construction if both are the same pass.

        Raises:
            BadStepError: no minibatch had a finite gradient, so no optimizer step was taken.
        """
        config, metrics = self.config, {}
        sums, norms, skipped = UpdateSums(self.objective.figures), [], 0
        for epoch in range(config.epochs):
            epoch_sums = UpdateSums()
            for indices in minibatches(
                len(experience), config.minibatch_episodes, self.shuffling, config.group_size
            ):
                minibatch = experience if scored is not None else experience.select(indices)
                with self.phases("update"):
                    deviation = self.accumulate(minibatch, [sums, epoch_sums], critic_only, scored)
                scored = None
                if "first_ratio_deviation" not in metrics:
                    metrics["first_ratio_deviation"] = deviation
                already_skipped = self.engine.skipped_steps
                with self.phases("optimizer"):
                    self.engine.step()
                if self.engine.skipped_steps > already_skipped:
                    skipped += 1
                    continue
                norms.append(self.engine.grad_norms)
                if self.average is not None:
                    self.average.update()
            metrics["epochs"] = epoch + 1.0
            approximate_kl = epoch_sums.means(self.compute)["approximate_kl"]
            if config.stop_epochs_kl is not None and approximate_kl > config.stop_epochs_kl:
                break
        if not norms:
            raise BadStepError("no gradient was finite.")
        policy_norms, *critic_norms = zip(*norms, strict=True)
        return metrics | sums.means(self.compute) | {
            "skipped_minibatches": float(skipped),
            "max_ratio": sums.max_ratio(self.compute),
            "grad_norm": sum(policy_norms) / len(norms),
        } | ({"critic_grad_norm": sum(critic_norms[0]) / len(norms)} if critic_norms else {})  # fmt: skip

    def accumulate(
        self,
        minibatch: Experience,
        sums: Sequence[UpdateSums],
        critic_only: bool,
        scored: ForwardPass | None = None,
    ) -> float:
        """Add up one optimizer step's gradients over token-budget micro-batches of all ranks.

        Args:
            scored: the forward pass over the minibatch, if there is one already.

        Returns:
            The mean |ratio - 1| over the minibatch's tokens: 0 before the first update, up to rounding.
        """
        config, objective, device = self.config, self.objective, self.compute.device
        total_tokens = int(minibatch.mask_BR.sum())
        if self.mix is not None and not critic_only:
            self.accumulate_mix(self.mix)
        deviation = 0.0
        passes = passes_over(minibatch.rollout, config.micro_batch_tokens, self.compute)
        for group, weight, last in passes:
            part = minibatch.select(torch.tensor(group))
            if scored is None:
                batch = pack_sequences(part.rollout.prompt_ids, part.rollout.response_ids, device)
                statistics = self.engine.model("policy", batch, config.temperature)
            else:
                batch, statistics = scored.batch, scored.statistics
            policy_loss, figures = objective.policy_loss(
                batch.to_rows(statistics.logp_N), part, total_tokens=total_tokens, num_episodes=len(minibatch)
            )
            if objective.has_critic:
                # sharding needs a gradient for each weight: zeros for the policy while only the critic learns
                self.engine.backward_part((0.0 if critic_only else weight) * policy_loss.loss)
                value_N = scored.value_N if scored is not None else self.engine.model("critic", batch)
                assert value_N is not None
                loss, of_critic = objective.critic_loss(
                    batch.to_rows(value_N), part, total_tokens=total_tokens
                )
                figures = {**figures, **of_critic}
            else:
                loss = policy_loss.loss
            self.engine.backward(weight * loss, last=last)
            if weight:
                deviation += float(policy_loss.ratio_deviation)
                entropy = statistics.entropy_N.sum()
                for each in sums:
                    each.add(policy_loss, entropy, len(statistics.logp_N), total_tokens, figures)
        return float(self.compute.global_sum(torch.tensor([deviation], dtype=torch.float64))) / total_tokens

    def accumulate_mix(self, mix: PretrainingMix) -> None:
        """Add the gradients of the pretraining mix, over all ranks."""
        drawn = mix.draw()
        total_tokens, lengths = int(drawn.learned.sum()), drawn.lengths.tolist()
        for group, weight, _ in self.compute.micro_batches(lengths, self.config.micro_batch_tokens):
            rows = [drawn[index] for index in group]
            batch = pack_sequences(
                [row.prompt for row in rows], [row.answer for row in rows], self.compute.device
            )
            logp_N = self.engine.model("policy", batch, 1.0).logp_N
            self.engine.backward_part(weight * mix.loss(logp_N, total_tokens))
