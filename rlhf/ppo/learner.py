"""The PPO loop: sample, score, learn, evaluate.

Dimensions: B episodes, R response tokens (padded), N response tokens of a micro-batch laid end to end.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from rlhf.config import ConfigError
from rlhf.data.batching import token_budget_batches
from rlhf.data.schema import PromptRow
from rlhf.generation.policy import Policy
from rlhf.job import Job
from rlhf.losses.policy import clipped_policy_loss
from rlhf.losses.value import clipped_value_loss
from rlhf.models.actor_critic import ActorCritic
from rlhf.models.policy import Sequences, pad_sequences, rollout_rows
from rlhf.ppo.config import PpoConfig
from rlhf.ppo.metrics import Evaluation, UpdateSums, evaluate_policy, rollout_metrics
from rlhf.ppo.mix import PretrainingMix
from rlhf.rewards.source import Exchange, Reward
from rlhf.rl.experience import RewardRule, make_experience
from rlhf.rl.kl import AdaptiveKL, FixedKL
from rlhf.rl.rollout import Experience, minibatches
from rlhf.rl.scores import ScoreNormalizer
from rlhf.training import WeightAverage, load_trainable, make_optimizer, make_schedule, trainable_state


class BadStepError(Exception):
    """A step that must not be learned from: something in it is not finite."""


class Learner:
    """Everything that changes while PPO runs."""

    def __init__(
        self,
        config: PpoConfig,
        *,
        policy: Policy,
        model: ActorCritic,
        reference: Policy,
        reward: Reward,
        normalizer: ScoreNormalizer,
        mix: PretrainingMix | None,
        job: Job,
    ) -> None:
        self.config, self.job, self.compute = config, job, job.compute
        self.policy, self.reference, self.reward, self.mix = policy, reference, reward, mix
        self.optimizer = make_optimizer([
            (model.policy.parameters(), config.optim), (model.critic.parameters(), config.critic.optim)
        ])  # fmt: skip
        self.schedule = make_schedule(self.optimizer, config.steps)
        self.model = model
        self.kl = (
            AdaptiveKL(config.kl.coef, config.kl.target, config.kl.horizon)
            if config.kl.controller == "adaptive"
            else FixedKL(config.kl.coef)
        )
        self.normalizer = normalizer
        self.average = WeightAverage(model.policy, config.ema_decay) if config.ema_decay is not None else None
        self.sampling = torch.Generator(self.compute.device).manual_seed(job.seed)
        self.shuffling = torch.Generator().manual_seed(job.seed)
        self.bad_steps = 0
        self.best: tuple[Evaluation, dict[str, Tensor]] | None = None

    def train(self, prompts: Sequence[PromptRow], held_out: Sequence[PromptRow]) -> dict[str, float]:
        """Run all steps; the policy ends with its best weights.

        Returns:
            The stage's summary metrics.
        """
        config, history = self.config, []
        first = self.evaluate(held_out, 0)
        last = first
        with self.job.progress.task("ppo: steps", config.steps) as task:
            for step, rows in enumerate(
                prompt_batches(prompts, config.batch_episodes, config.steps, self.job.seed), 1
            ):
                metrics = self.step(rows, step)
                history.append(metrics)
                if step % config.evaluate_every == 0 or step == config.steps:
                    last = self.evaluate(held_out, step)
                self.job.log(metrics, step)
                was_skipped = "score" not in metrics
                task.advance(
                    1, "skipped" if was_skipped else f"score {metrics['score']:+.2f} kl {metrics['kl']:.2f}"
                )
        done = [metrics for metrics in history if "policy_loss" in metrics]
        if not done:
            raise ConfigError(
                f"ppo.steps={config.steps}: every step had to be skipped, so nothing was learned. "
                f"Mend ppo.reward={config.reward}, or lower ppo.optim.lr."
            )
        assert self.best is not None
        best, weights = self.best
        load_trainable(self.model.policy, weights)
        late = done[-max(1, len(done) // 4) :]
        return {
            "first_ratio_deviation": done[0]["first_ratio_deviation"],
            "first_kl": done[0]["kl_k3"],
            "explained_variance": sum(metrics["explained_variance"] for metrics in late) / len(late),
            "kl": best.kl,
            "held_out_score_before": first.score,
            "held_out_score": best.score,
            "held_out_score_gain": best.score - first.score,
            "held_out_score_last": last.score,
            "held_out_length": best.length,
            "bad_steps": self.bad_steps,
            "steps": config.steps,
            "episodes": config.steps * config.batch_episodes,
        }

    def step(self, rows: Sequence[PromptRow], step: int) -> dict[str, float]:
        """Roll out, score, learn. What is not finite is not learned from, and counted.

        Raises:
            ConfigError: that happened in more than max_bad_steps steps.
        """
        start = time.monotonic()
        metrics = {"lr": float(self.schedule.get_last_lr()[0]), "beta": self.kl.coef}
        try:
            experience = self.experience(rows)
            metrics |= rollout_metrics(experience, self.compute.global_sum)
            sampled = time.monotonic()
            metrics |= self.learn(experience, critic_only=step <= self.config.critic.warmup_steps)
            metrics |= {"seconds_rollout": sampled - start, "seconds_update": time.monotonic() - sampled}
            self.kl.update(metrics["kl"], self.config.batch_episodes)
            if metrics["skipped_minibatches"] > 0:
                self.count_bad(step, "the gradient of a minibatch was not finite.")
        except BadStepError as bad:
            self.count_bad(step, str(bad))
        metrics["bad_steps"] = float(self.bad_steps)
        self.schedule.step()
        return metrics

    def count_bad(self, step: int, reason: str) -> None:
        """Tell and count a step of which something was skipped.

        Raises:
            ConfigError: there were too many.
        """
        self.bad_steps += 1
        self.job.progress.console.print(
            f"ppo: step {step} skipped: {reason}", highlight=False, style="yellow"
        )
        if self.bad_steps > self.config.max_bad_steps:
            raise ConfigError(
                f"ppo.max_bad_steps={self.config.max_bad_steps}: {self.bad_steps} steps had to be "
                f"skipped; the last because {reason} Nothing was learned from what was skipped. "
                f"Mend ppo.reward={self.config.reward}, or lower ppo.optim.lr."
            )

    def experience(self, rows: Sequence[PromptRow]) -> Experience:
        """Sample one response a prompt with the current policy, and score it."""
        config = self.config
        rollout, texts = self.policy.sample(
            [row.prompt for row in rows],
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            generator=self.sampling,
            batch_rows=len(rows),
        )
        score_B = self.reward([Exchange(row.prompt, text) for row, text in zip(rows, texts, strict=True)])
        if not bool(score_B.isfinite().all()):
            index = int((~score_B.isfinite()).nonzero()[0])
            raise BadStepError(f"the reward of {texts[index]!r} is {float(score_B[index])}.")

        def measure(batch: Sequences) -> tuple[Tensor, Tensor]:
            output = self.model(batch, config.temperature)
            return output.logp_N, output.value_N

        logp_BR, value_BR = rollout_rows(
            rollout, self.policy.pad_id, config.micro_batch_tokens, self.compute.device, measure
        )
        reference_BR = self.reference.log_probabilities(
            rollout, config.temperature, config.micro_batch_tokens
        )
        rule = RewardRule(
            self.normalizer, self.kl.coef, config.score.missing_stop, config.score.missing_stop_penalty
        )
        return make_experience(
            rollout,
            logp_BR=logp_BR,
            reference_logp_BR=reference_BR,
            value_BR=value_BR,
            score_B=score_B,
            rule=rule,
            gamma=config.gamma,
            lam=config.lam,
            global_sum=self.compute.global_sum,
        )

    def learn(self, experience: Experience, *, critic_only: bool) -> dict[str, float]:
        """All epochs over one rollout.

        Raises:
            BadStepError: no minibatch had a finite gradient, so no optimizer step was taken.
        """
        config, metrics = self.config, {}
        sums, norms, skipped = UpdateSums(), [], 0
        for epoch in range(config.epochs):
            epoch_sums = UpdateSums()
            for indices in minibatches(len(experience), config.minibatch_episodes, self.shuffling):
                deviation = self.accumulate(experience.select(indices), [sums, epoch_sums], critic_only)
                if "first_ratio_deviation" not in metrics:
                    metrics["first_ratio_deviation"] = deviation
                already_skipped = self.optimizer.skipped_steps
                self.optimizer.step()
                if self.optimizer.skipped_steps > already_skipped:
                    skipped += 1
                    continue
                norms.append(self.optimizer.grad_norms)
                if self.average is not None:
                    self.average.update()
            metrics["epochs"] = epoch + 1.0
            approximate_kl = epoch_sums.means(self.compute.global_sum)["approximate_kl"]
            if config.stop_epochs_kl is not None and approximate_kl > config.stop_epochs_kl:
                break
        if not norms:
            raise BadStepError("no gradient was finite.")
        policy_norms, critic_norms = zip(*norms, strict=True)
        return metrics | sums.means(self.compute.global_sum) | {
            "skipped_minibatches": float(skipped),
            "max_ratio": sums.max_ratio,
            "grad_norm": sum(policy_norms) / len(norms),
            "critic_grad_norm": sum(critic_norms) / len(norms),
        }  # fmt: skip

    def accumulate(self, minibatch: Experience, sums: Sequence[UpdateSums], critic_only: bool) -> float:
        """Add up one optimizer step's gradients over token-budget micro-batches.

        Returns:
            The mean |ratio - 1| over the minibatch's tokens; 0 before the first update, up to rounding.
        """
        config, device = self.config, self.compute.device
        total_tokens = float(self.compute.global_sum(minibatch.mask_BR.sum().double()))
        rollout = minibatch.rollout
        lengths = [len(p) + len(r) for p, r in zip(rollout.prompt_ids, rollout.response_ids, strict=True)]
        deviation = 0.0
        for group in token_budget_batches(lengths, config.micro_batch_tokens):
            part = minibatch.select(torch.tensor(group))
            batch = pad_sequences(
                part.rollout.prompt_ids, part.rollout.response_ids, self.policy.pad_id, device
            )
            output = self.model(batch, config.temperature)
            policy_loss = clipped_policy_loss(
                batch.to_rows(output.logp_N),
                part.logp_BR.to(device),
                part.advantage_BR.to(device),
                batch.mask_BR,
                clip=config.clip,
                clip_high=config.clip_high,
                dual_clip=config.dual_clip,
                total_tokens=total_tokens,
            )
            value_loss = clipped_value_loss(
                batch.to_rows(output.value_N),
                part.value_BR.to(device),
                part.return_BR.to(device),
                batch.mask_BR,
                clip=config.value_clip,
                total_tokens=total_tokens,
            )
            loss = value_loss.loss if critic_only else policy_loss.loss + value_loss.loss
            self.compute.accelerator.backward(loss)
            deviation += float(policy_loss.ratio_deviation)
            for each in sums:
                each.add(policy_loss, value_loss, output.entropy_N.sum(), len(output.logp_N), total_tokens)
        if self.mix is not None and not critic_only:
            self.compute.accelerator.backward(self.mix.loss(self.model.policy))
        return float(self.compute.global_sum(torch.tensor(deviation, dtype=torch.float64))) / total_tokens

    def evaluate(self, rows: Sequence[PromptRow], step: int) -> Evaluation:
        """Measure the policy on held-out prompts; keep its weights when it is the best so far."""
        with self.average.swapped_in() if self.average is not None else nullcontext():
            result, texts = evaluate_policy(
                self.policy,
                self.reference,
                self.reward,
                rows,
                max_new_tokens=self.config.max_new_tokens,
                temperature=self.config.temperature,
                seed=self.job.seed,
                micro_batch_tokens=self.config.micro_batch_tokens,
            )
            if self.best is None or result.score > self.best[0].score:
                self.best = (result, trainable_state(self.model.policy))
        self.job.log({f"held_out_{name}": value for name, value in result._asdict().items()}, step)
        for row, text in list(zip(rows, texts, strict=True))[:8]:
            self.job.sample(step=step, prompt=row.prompt, response=text)
        return result


def prompt_batches(
    rows: Sequence[PromptRow], size: int, num_batches: int, seed: int
) -> Iterator[list[PromptRow]]:
    """Batches of prompts, every prompt once before any comes again, newly shuffled each time round."""
    order = random.Random(seed)
    waiting: list[PromptRow] = []
    for _ in range(num_batches):
        while len(waiting) < size:
            waiting += order.sample(rows, len(rows))
        yield waiting[:size]
        waiting = waiting[size:]
