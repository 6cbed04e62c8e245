"""One step of a policy gradient: sample, score, learn. The loop around it is `Learner.fit`.

Dimensions: B episodes, R response tokens (padded), N response tokens of a micro-batch laid end to end.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf.config import ConfigError
from rlhf.data.schema import PromptRow
from rlhf.distributed.batching import Batches
from rlhf.evaluation.held_out import FILE as HELD_OUT_ANSWERS
from rlhf.evaluation.held_out import write_answers
from rlhf.evaluation.intervals import mean
from rlhf.evaluation.sampled import Sampled
from rlhf.models.logprobs import (
    Sequences,
    TokenStatistics,
    measure_responses,
    pack_sequences,
    response_batches,
)
from rlhf.pipeline.job import Job
from rlhf.pipeline.learner import Evaluations, HaltError
from rlhf.ppo.config import PolicyConfig
from rlhf.ppo.metrics import Evaluation, UpdateSums, evaluate_policy, rollout_metrics, update_sums
from rlhf.ppo.models import Models
from rlhf.ppo.objective import Objective, Scored
from rlhf.rewards import combined
from rlhf.rewards.reward import why_infinite, why_unusable, with_token_ids
from rlhf.rl.group import group_spread, neighbours
from rlhf.rl.rollout import Experience, Rollout, minibatches
from rlhf.tracking.timer import StepTimer

GATHERED = {"whole": "whole", "layers": "layer by layer"}
MISMATCH_LIMIT_FACTOR = 10
"""`engine_mismatch` above this factor times its gate's bound ends the run."""


class BadStepError(Exception):
    """The step has a value that is not finite, so nothing may be learned from it."""


class ForwardPass(NamedTuple):
    """A forward pass of policy and critic, with its graph."""

    batch: Sequences
    statistics: TokenStatistics
    value_N: Tensor | None
    """None without a critic."""


class PolicyTrainer:
    """The steps, and everything that changes in them. All ranks have the same state."""

    def __init__(
        self, config: PolicyConfig, objective: Objective, models: Models, job: Job, *, mismatch_limit: float
    ) -> None:
        """Args:
        mismatch_limit: a step whose `engine_mismatch` is above it ends the run.
        """
        self.config, self.objective, self.job = config, objective, job
        self.learner, self.policy, self.reference, self.reward, self.normalizer, self.mix = models
        self.engine = self.learner.engine
        self.compute, self.kl, self.mismatch_limit = job.compute, objective.kl, mismatch_limit
        self.phases = StepTimer(job.compute.device)
        self.sampling = torch.Generator().manual_seed(job.seed)
        self.shuffling = torch.Generator().manual_seed(job.seed)
        self.prompts: Sequence[PromptRow] = []
        """Prompts to learn from."""
        self.held_out: Sequence[PromptRow] = []
        """Prompts to evaluate on."""
        self.evaluations = Evaluations(
            Evaluation,
            lambda: self.evaluate(self.held_out),
            is_better=lambda new, best: new.choice_score > best.choice_score,
            steps={*range(config.evaluate_every, config.steps, config.evaluate_every), config.steps},
        )
        self.rows: Sequence[PromptRow] = []
        self.texts: list[str] = []
        """Prompts and responses of the current step's last rollout, for the log of a bad step."""
        self.history: list[dict[str, float]] = []
        """The metrics of all steps."""

    def train(self, prompts: Sequence[PromptRow], held_out: Sequence[PromptRow]) -> dict[str, float]:
        """Take the remaining steps.

        Returns:
            The stage's summary metrics.

        Raises:
            ConfigError, RewardError, Stopped: as of `Learner.fit`.
        """
        config = self.config
        self.prompts, self.held_out = prompts, held_out
        self.learner.fit(
            prompt_batches(prompts, config.batch_episodes // config.group_size, config.steps, self.job.seed),
            lambda asked: self.step(repeated(asked, config.group_size)),
            rows=lambda asked: self.answers_as_json(),
            state=self,
            evaluations=self.evaluations,
            first_steps={0: config.warmup_steps},  # the policy's
            max_bad_steps=config.max_bad_steps,
            advice=self.advice,
            note=brief,
        )
        return self.summary()

    @property
    def advice(self) -> str:
        """The fix that the error about too many bad steps gives."""
        config, name = self.config, self.job.stage
        named = {"advantage": config.advantage, "policy_loss": config.policy_loss}
        own = [f"{name}.{key}={value}" for key, value in named.items() if value.startswith("python:")]
        return f"Fix {' or '.join([f'{name}.reward={config.reward}', *own])}, or lower {name}.optim.lr"

    def step(self, rows: Sequence[PromptRow]) -> dict[str, float]:
        """Sample, score, learn. A step with a value that is not finite is counted, and teaches nothing.

        Args:
            rows: the prompt of each episode.

        Returns:
            The step's metrics.

        Raises:
            HaltError: the KL passed max_kl, or the engine samples from another policy.
            RewardError: the reward does not answer.
        """
        config = self.config
        warm_up = self.compute.position["step"] <= config.warmup_steps
        metrics = {"kl_coef": self.kl.coef}
        self.phases.taken()
        try:
            answered = self.sample(rows)
            scored, graph = self.score(answered.rollout)
            with self.phases("advantages"):
                experience = self.objective.experience(
                    answered.rollout, answered.score_B, scored, self.normalizer
                )
            metrics |= self.measured(answered, experience)
            self.check_limits(metrics)
            metrics |= self.learn(experience, graph, critic_only=warm_up)
            if not warm_up:  # a policy that does not learn cannot follow the coefficient
                self.kl.update(metrics["kl"], config.batch_episodes)
            if metrics["skipped_minibatches"] > 0:
                self.learner.count_bad("the gradient of a minibatch was not finite.")
            metrics |= self.phases.taken()
        except BadStepError as bad:
            self.learner.count_bad(str(bad))
        metrics["bad_steps"] = float(self.learner.bad_steps)
        self.history.append(metrics)
        return metrics

    def sample(self, rows: Sequence[PromptRow]) -> Answered:
        """One response of the current policy to each row, with its score. A group of equal scores teaches
        nothing, so up to `max_resamples` times it is replaced by answers to another prompt.

        Raises:
            BadStepError: a score is infinite, or no response of the whole batch has one.
        """
        size = self.config.group_size
        answered = self.answer(rows)
        for attempt in range(self.config.resamples):
            spread_B = group_spread(answered.score_B, neighbours(len(answered.rows), size))
            flat = (spread_B == 0.0).nonzero().flatten().tolist()
            if not flat:
                break
            others = self.other_prompts(len(flat) // size, attempt)
            answered = answered.replaced(flat, self.answer(repeated(others, size)), len(others))
        self.rows, self.texts = answered.rows, answered.texts
        if (why := why_unusable(answered.score_B, answered.texts)) is not None:  # of replacements alone
            raise BadStepError(f"the reward {why}.")
        return answered

    def answer(self, rows: Sequence[PromptRow]) -> Answered:
        """Sample one response to each row, and ask the reward.

        Raises:
            BadStepError: a score is infinite.
        """
        config = self.config
        self.rows, self.texts = rows, []
        if self.policy.vllm is not None:
            with self.phases("sync"):
                self.policy.hand_over()
        with self.phases("generate"):
            rollout, texts = self.policy.sample(
                [row.prompt for row in rows],
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                generator=self.sampling,
                batch_rows=config.batch_rows or len(rows),
            )
        self.texts = texts
        with self.phases("reward"):
            found = combined.scored(self.reward, with_token_ids(rows, rollout.response_ids), texts)
        if (why := why_infinite(found.score_B, texts)) is not None:
            raise BadStepError(f"the reward {why}.")
        return Answered(rows, texts, rollout, *found)

    def other_prompts(self, count: int, attempt: int) -> list[PromptRow]:
        """Prompts for the groups that are replaced. The draw depends on seed, step and attempt alone, so a
        resumed run draws the same."""
        position = f"{self.job.seed} {self.compute.position['step']} {attempt}"
        return random.Random(position).choices(self.prompts, k=count)

    def score(self, rollout: Rollout) -> tuple[Scored, ForwardPass | None]:
        """Log-probabilities of policy and reference, and the critic's values, under the current weights.

        Returns:
            The scores. And the forward pass with its graph, if the rollout is one minibatch that fits into
            one pass: `learn` then starts from this pass.
        """
        config, model = self.config, self.engine.model
        with self.phases("reference"):
            reference_BR = self.reference.log_probabilities(
                rollout, config.temperature, config.micro_batch_tokens
            )
        passes = len(list(response_batches(rollout, config.micro_batch_tokens, self.compute)))
        once = passes == 1 and len(rollout) == config.minibatch_episodes
        graphs: list[ForwardPass] = []

        def measure(batch: Sequences) -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(once):
                statistics = model("policy", batch, config.temperature)
                value_N = model("critic", batch) if self.objective.has_critic else None
            if once:
                graphs.append(ForwardPass(batch, statistics, value_N))
            return statistics.logp_N, *(() if value_N is None else (value_N,))

        with self.phases("score"):
            logp_BR, *values = measure_responses(rollout, config.micro_batch_tokens, self.compute, measure)
        scored = Scored(logp_BR, reference_BR, values[0] if values else None)
        return scored, graphs[0] if once else None

    def measured(self, answered: Answered, experience: Experience) -> dict[str, float]:
        """Metrics of a scored rollout."""
        resampled = {"resampled_groups": float(answered.resampled)} if self.config.resamples else {}
        return {
            **rollout_metrics(experience),
            **self.objective.rollout_metrics(experience),
            **combined.Scores(answered.score_B, answered.parts, answered.usage).metrics(),
            **resampled,
            "special_token_rate": self.policy.special_token_rate(experience.rollout),
        }

    def check_limits(self, metrics: Mapping[str, float]) -> None:
        """Stop the run if its limits are passed.

        Raises:
            HaltError: with the limit.
        """
        config, name = self.config, self.job.stage
        if metrics.get("engine_mismatch", 0.0) > self.mismatch_limit:
            raise HaltError(
                "the responses are not sampled from the policy that learns: their log-probabilities are "
                f"{metrics['engine_mismatch']:.3g} nats per token off, more than "
                f"{self.mismatch_limit:.3g}, {MISMATCH_LIMIT_FACTOR} times {name}.gates.engine_mismatch.max. "
                "Use another generation=, or precision=fp32"
            )
        if config.max_kl is not None and metrics["kl"] > config.max_kl:
            raise HaltError(
                f"the policy is {metrics['kl']:.4g} nats per sequence from the SFT model, more than "
                f"{name}.max_kl={config.max_kl:g}. Raise {name}.kl.coef, or lower {name}.optim.lr"
            )

    def learn(
        self, experience: Experience, graph: ForwardPass | None, *, critic_only: bool
    ) -> dict[str, float]:
        """Train on one rollout: all epochs, one optimizer step per minibatch.

        Args:
            graph: what `score` returned for this rollout.

        Returns:
            Metrics. `first_ratio_deviation` compares the scoring pass with the first minibatch's pass, before
            any update. It is 0 by construction if both are the same pass.

        Raises:
            BadStepError: no minibatch had a finite gradient, so no optimizer step was taken.
        """
        config, engine, metrics = self.config, self.engine, dict[str, float]()
        sums, norms, skipped = UpdateSums(self.objective.figures), [], 0
        for epoch in range(config.epochs):
            epoch_sums = UpdateSums()
            for indices in minibatches(
                len(experience), config.minibatch_episodes, self.shuffling, config.group_size
            ):
                minibatch = experience if graph is not None else experience.select(indices)
                with self.phases("update"):
                    deviation = self.accumulate(minibatch, [sums, epoch_sums], critic_only, graph)
                graph = None
                metrics.setdefault("first_ratio_deviation", deviation)
                already_skipped = engine.skipped_steps
                with self.phases("optimizer"):
                    engine.step()
                if engine.skipped_steps > already_skipped:
                    skipped += 1
                    continue
                norms.append(engine.grad_norms)
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
        graph: ForwardPass | None = None,
    ) -> float:
        """Add up the gradients of one optimizer step, over the micro-batches of all ranks.

        Args:
            graph: the forward pass over the minibatch, if `score` already made it.

        Returns:
            The mean |ratio - 1| over the minibatch's tokens: 0 before the first update, up to rounding.
        """
        config, objective, engine = self.config, self.objective, self.engine
        total_tokens, deviation = int(minibatch.mask_BR.sum()), 0.0

        def part_of(episodes: Sequence[int]) -> tuple[Experience, Sequences]:
            part = minibatch.select(torch.tensor(episodes))
            if graph is not None:
                return part, graph.batch
            prompts, responses = part.rollout.prompt_ids, part.rollout.response_ids
            return part, pack_sequences(prompts, responses, self.compute.device)

        def policy_loss(micro_batch: tuple[Experience, Sequences]) -> tuple[Tensor, Mapping[str, Tensor]]:
            part, batch = micro_batch
            if graph is not None:
                statistics = graph.statistics
            else:
                statistics = engine.model("policy", batch, config.temperature)
            found, figures = objective.policy_loss(
                batch.to_rows(statistics.logp_N), part, total_tokens=total_tokens, num_episodes=len(minibatch)
            )
            # sharding needs a gradient for each weight: zeros for the policy while only the critic learns
            loss = 0.0 * found.loss if critic_only else found.loss
            return loss, {**update_sums(found, statistics, total_tokens), **figures}

        def critic_loss(micro_batch: tuple[Experience, Sequences]) -> tuple[Tensor, Mapping[str, Tensor]]:
            part, batch = micro_batch
            value_N = graph.value_N if graph is not None else engine.model("critic", batch)
            assert value_N is not None
            return objective.critic_loss(batch.to_rows(value_N), part, total_tokens=total_tokens)

        def count(weight: float, found: Mapping[str, Tensor]) -> None:
            nonlocal deviation
            if weight:
                deviation += float(found["ratio_deviation"])
                for each in sums:
                    each.add(found)

        if self.mix is not None and not critic_only:
            self.mix.accumulate(engine, self.compute, config.micro_batch_tokens)
        passes = response_batches(minibatch.rollout, config.micro_batch_tokens, self.compute)
        losses = [policy_loss, *([critic_loss] if objective.has_critic else [])]
        engine.accumulate(passes, part_of, *losses, count=count)
        return float(self.compute.global_sum(torch.tensor([deviation], dtype=torch.float64))) / total_tokens

    def evaluate(self, rows: Sequence[PromptRow]) -> Evaluation:
        """Measure the policy on held-out prompts, log the metrics and save its answers."""
        config, done = self.config, self.learner.done
        result, answers, of_parts = evaluate_policy(
            self.policy,
            self.reference,
            self.reward,
            rows,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=self.job.seed,
            batch_rows=config.batch_rows or len(rows),
            micro_batch_tokens=config.micro_batch_tokens,
        )
        if result.unscored:
            self.learner.warn(
                f"{result.unscored} of {len(rows)} held-out responses got no finite score after step {done}; "
                "held_out_score is the others' mean."
            )
        measured = result.metrics() | of_parts
        self.job.log({f"held_out_{name}": value for name, value in measured.items()}, done)
        for answer in answers[:8]:
            self.job.sample(step=done, prompt=answer["prompt"], response=answer["response"])
        self.job.checkpoints.save_file(answers_file(done), partial(write_answers, step=done, answers=answers))
        return result

    def summary(self) -> dict[str, float]:
        """The stage's summary metrics.

        Raises:
            ConfigError: nothing was learned.
        """
        config, name, found = self.config, self.job.stage, self.evaluations
        done = [metrics for metrics in self.history if "policy_loss" in metrics]
        if not done:
            raise ConfigError(
                f"{name}.steps={config.steps}: every step was skipped, so nothing was learned. {self.advice}."
            )
        mismatches = [each["engine_mismatch"] for each in self.history if "engine_mismatch" in each]
        return {
            "first_ratio_deviation": done[0]["first_ratio_deviation"],
            "first_kl": done[0]["kl_k3"],
            # Python's max drops a NaN, which must fail the gate
            "engine_mismatch": float(torch.tensor(mismatches, dtype=torch.float64).max()),
            **self.critic_metrics(done),
            **self.group_metrics(done),
            **mean(found.best.kl_B).metrics("kl"),
            "held_out_score_before": found.first.score,
            "held_out_score": found.best.score,
            **found.best.gain_over(found.first).metrics("held_out_score_gain"),
            "held_out_score_last": found.last.score,
            "held_out_kl_last": float(found.last.kl_B.mean()),
            "held_out_length": float(found.best.length_B.mean()),
            "best_step": found.best_step,
            "bad_steps": self.learner.bad_steps,
            "steps": config.steps,
            "episodes": config.steps * config.batch_episodes,
        }

    def critic_metrics(self, done: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Summary metrics of the critic, if there is one."""
        if not self.objective.has_critic:
            return {}
        return self.explained_variance(done).metrics("explained_variance")

    def group_metrics(self, done: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Summary metrics of the groups, if there are any."""
        found = {}
        if all("groups_without_spread" in metrics for metrics in done):
            found["groups_without_spread"] = sum(each["groups_without_spread"] for each in done) / len(done)
        if self.config.resamples:
            found["resampled_groups"] = sum(each["resampled_groups"] for each in done)
        return found

    def explained_variance(self, done: Sequence[Mapping[str, float]]) -> Sampled:
        """Its mean over the last quarter of the steps, with the interval of independent steps."""
        late = done[-max(1, len(done) // 4) :]
        value = sum(metrics["explained_variance"] for metrics in late) / len(late)
        half = math.hypot(*(metrics["explained_variance_error"] for metrics in late)) / len(late)
        return Sampled(value, value - half, value + half, len(late) * self.config.batch_episodes)

    def publish(self) -> dict[str, float]:
        """Write the best policy and the answers of all evaluations into the artifact.

        Returns:
            The published policy's metrics.
        """
        self.publish_answers()
        return self.learner.publish()

    def publish_answers(self) -> None:
        """Write the answers of all evaluations into the artifact."""
        steps = sorted({*range(0, self.config.steps, self.config.evaluate_every), self.config.steps})
        kept = {step: self.job.checkpoints.saved_file(answers_file(step)) for step in steps}
        if lost := [step for step, path in kept.items() if path is None]:
            self.learner.warn(
                f"the answers to held-out prompts of steps {lost} were kept, and are damaged or gone."
            )
        if self.compute.is_main:
            with (self.job.directory / HELD_OUT_ANSWERS).open("wb") as file:
                file.writelines(path.read_bytes() for path in kept.values() if path is not None)

    def answers_as_json(self) -> list[dict[str, Any]]:
        """The prompts of the current step with their responses; null where there is none yet."""
        texts = [*self.texts, *[None] * (len(self.rows) - len(self.texts))]
        return [{"prompt": row.prompt, "response": text} for row, text in zip(self.rows, texts, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes during training, except weights and optimizer."""
        return {
            "history": [*self.history],
            "kl": self.kl.state_dict(), "normalizer": self.normalizer.state_dict(),
            "sampling": self.sampling.get_state(), "shuffling": self.shuffling.get_state(),
            "mix": self.mix and self.mix.state_dict(), "local_sampling": self.job.local_sampling,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        self.history = state["history"]
        self.kl.load_state_dict(state["kl"])
        self.normalizer.load_state_dict(state["normalizer"])
        self.sampling.set_state(state["sampling"])
        self.shuffling.set_state(state["shuffling"])
        if self.mix is not None:
            self.mix.load_state_dict(state["mix"])
        if state["local_sampling"] != self.job.local_sampling:
            self.learner.warn(
                f"weights are gathered for sampling {GATHERED[self.job.local_sampling]} from here on, and "
                f"were {GATHERED[state['local_sampling']]} until step {self.learner.done}: answers may "
                "differ by rounding."
            )


class Answered(NamedTuple):
    """Prompts, a response to each, and its raw score."""

    rows: Sequence[PromptRow]
    texts: list[str]
    rollout: Rollout
    score_B: Tensor
    parts: dict[str, Tensor]
    """Reward -> its scores; empty for a single reward."""
    usage: dict[str, float]
    """Counts by the rewards, such as a judge's tokens."""
    resampled: int = 0
    """Number of groups that were replaced."""

    def replaced(self, indices: Sequence[int], others: Answered, groups: int) -> Answered:
        """A copy with the rows at `indices` replaced by the rows of `others`, in order."""
        order = torch.arange(len(self.rows))
        order[indices] = torch.arange(len(others.rows)) + len(self.rows)
        rows, texts = [*self.rows, *others.rows], self.texts + others.texts
        return Answered(
            [rows[index] for index in order.tolist()],
            [texts[index] for index in order.tolist()],
            Rollout.concatenate([self.rollout, others.rollout]).select(order),
            torch.cat([self.score_B, others.score_B])[order],
            {name: torch.cat([own_B, others.parts[name]])[order] for name, own_B in self.parts.items()},
            {name: value + others.usage[name] for name, value in self.usage.items()},
            self.resampled + groups,
        )


def brief(metrics: Mapping[str, float]) -> str:
    """One line about a step, for terminals without the panel."""
    return f"score {metrics['score']:+.2f} kl {metrics['kl']:.2f}" if "score" in metrics else "skipped"


def answers_file(step: int) -> str:
    """Name of the checkpointer's file with the answers of the evaluation after a step."""
    return f"{step}.{HELD_OUT_ANSWERS}"


def repeated(rows: Sequence[PromptRow], times: int) -> list[PromptRow]:
    """Each row `times` times, its copies next to each other."""
    return [row for row in rows for _ in range(times)]


def prompt_batches(rows: Sequence[PromptRow], size: int, num_batches: int, seed: int) -> Batches[PromptRow]:
    """Batches of prompts. They are shuffled anew for each pass over all prompts."""
    random_order, order = random.Random(seed), array("i")
    while len(order) < size * num_batches:
        order.extend(random_order.sample(range(len(rows)), len(rows)))
    ends = array("q", range(size, size * num_batches + 1, size))
    return Batches(rows, order, ends)
