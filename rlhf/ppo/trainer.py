"""The loop of policy gradients: sample, score, learn, evaluate.

What is learned from one rollout is rlhf/ppo/update.py. Dimensions: B episodes, R response tokens (padded).
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from rlhf.config import ConfigError
from rlhf.data.schema import PromptRow
from rlhf.evaluation.held_out import FILE as HELD_OUT_ANSWERS
from rlhf.evaluation.held_out import write_answers
from rlhf.evaluation.intervals import mean
from rlhf.evaluation.sampled import Sampled
from rlhf.generation.policy_model import PolicyModel
from rlhf.pipeline.job import Job
from rlhf.ppo.config import PolicyConfig
from rlhf.ppo.metrics import Evaluation, evaluate_policy, rollout_metrics
from rlhf.ppo.ptx import PretrainingMix
from rlhf.ppo.update import BadStepError, ForwardPass, Objective, PolicyUpdater
from rlhf.rewards import combined
from rlhf.rewards.reward import Reward, RewardError, why_infinite, why_unusable, with_token_ids
from rlhf.rl.advantage import ScoreNormalizer
from rlhf.rl.group import group_spread, neighbours
from rlhf.rl.rollout import Experience, Rollout, make_experience
from rlhf.tracking.timer import StepTimer
from rlhf.training.engine import Engine

BY = {"whole": "whole", "layers": "layer by layer"}
TIMES_THE_BOUND = 10
"""`engine_mismatch` ends the run at so many times its gate's bound."""


class TooBadError(Exception):
    """The run must stop. Nothing was learned from the step, so that it can be repeated."""


class PolicyTrainer:
    """The loop and everything that changes in it. All ranks have the same state."""

    def __init__(
        self,
        config: PolicyConfig,
        objective: Objective,
        *,
        engine: Engine,
        policy: PolicyModel,
        reference: PolicyModel,
        reward: Reward,
        normalizer: ScoreNormalizer,
        mix: PretrainingMix | None,
        job: Job,
        trained_parameters: int,
        mismatch_limit: float,
    ) -> None:
        """Args:
        engine: trains an ActorCritic, whose policy is that of `policy`.
        trained_parameters: how many weights of the policy train; a metric.
        mismatch_limit: a step whose `engine_mismatch` is above it ends the run.
        """
        self.trained_parameters, self.mismatch_limit = trained_parameters, mismatch_limit
        self.config, self.job, self.compute, self.engine = config, job, job.compute, engine
        self.policy, self.reference, self.reward = policy, reference, reward
        self.objective, self.kl = objective, objective.kl
        self.normalizer = normalizer
        self.phases = StepTimer(self.compute.device)
        self.update = PolicyUpdater(config, objective, engine, policy, mix, job, self.phases)
        self.sampling = torch.Generator().manual_seed(job.seed)
        self.bad_steps, self.done, self.evaluated, self.best_step = 0, 0, 0, 0
        self.last_bad = ""
        """Why the last bad step was bad."""
        self.prompts: Sequence[PromptRow] = []
        """What it learns from."""
        self.rows: Sequence[PromptRow] = []
        self.texts: list[str] = []
        """What was asked last in the current step, and the responses."""
        self.resampled = 0
        """Groups of the current step that were replaced."""
        self.of_parts: dict[str, float] = {}
        """Mean and deviation of each of several rewards, in the current step."""
        self.history: list[dict[str, float]] = []
        self.first: Evaluation | None = None
        self.last: Evaluation | None = None
        self.best: Evaluation | None = None
        """Of the policy whose weights `job.checkpoints` keeps."""

    def train(self, prompts: Sequence[PromptRow], held_out: Sequence[PromptRow]) -> dict[str, float]:
        """Run the steps that are left; the result is in `job.checkpoints.best`.

        Returns:
            The stage's summary metrics.

        Raises:
            ConfigError: too much went wrong; what was learned before is in the newest checkpoint.
            Stopped: a signal came; a checkpoint is written.
        """
        config, checkpoints, name = self.config, self.job.checkpoints, self.job.stage
        if not self.restore():
            self.first = self.last = self.evaluate(held_out)
        elif self.bad_steps > config.max_bad_steps:
            raise ConfigError(
                f"{name}.max_bad_steps={config.max_bad_steps}: {self.bad_steps} steps were skipped, "
                f"the last one was step {self.done}. Raise it to continue after them."
            )
        self.prompts = prompts
        num_prompts = config.batch_episodes // config.group_size
        batches = prompt_batches(prompts, num_prompts, config.steps, self.job.seed)
        steps = self.job.progress.task(f"{self.job.stage}: steps", config.steps, is_main=True)
        with steps as task, checkpoints.training(config.steps):
            task.skip(self.done)
            self.evaluate_if_due(held_out)  # it may be what stopped the run before
            for step, asked in enumerate(batches, 1):
                if step <= self.done:
                    continue
                rows = repeated(asked, config.group_size)
                sampling, normalizer = self.sampling.get_state(), self.normalizer.state_dict()
                try:
                    metrics = self.step(rows, step)
                except (TooBadError, RewardError) as bad:  # nothing was learned: the step is repeated
                    self.sampling.set_state(sampling)
                    self.normalizer.load_state_dict(normalizer)
                    checkpoints.save(self.done, self.engine, self.state_dict())
                    if isinstance(bad, RewardError):
                        raise
                    self.stop(step, str(bad), "takes this step again, with the same answers")
                self.history.append(metrics)
                self.job.log(metrics, step)
                self.done = step
                if self.bad_steps > config.max_bad_steps:
                    checkpoints.save(self.done, self.engine, self.state_dict())
                    reason = (
                        f"{self.bad_steps} steps were skipped, more than "
                        f"{name}.max_bad_steps={config.max_bad_steps}; the last because {self.last_bad} Fix "
                        f"{name}.reward={config.reward}, or lower {name}.optim.lr"
                    )
                    self.stop(step, reason, "continues after this step")
                self.evaluate_if_due(held_out)
                was_skipped = "score" not in metrics
                task.advance(
                    1, "skipped" if was_skipped else f"score {metrics['score']:+.2f} kl {metrics['kl']:.2f}"
                )
                checkpoints.after_step(step, self.engine, self.state_dict())
        return self.summary()

    def summary(self) -> dict[str, float]:
        """The stage's summary metrics."""
        config, name = self.config, self.job.stage
        best, first, last = self.best, self.first, self.last
        assert best is not None and first is not None and last is not None
        done = [metrics for metrics in self.history if "policy_loss" in metrics]
        if not done:
            raise ConfigError(
                f"{name}.steps={config.steps}: every step was skipped, so nothing was learned. "
                f"Fix {name}.reward={config.reward}, or lower {name}.optim.lr."
            )
        mismatches = [each["engine_mismatch"] for each in self.history if "engine_mismatch" in each]
        return {
            "first_ratio_deviation": done[0]["first_ratio_deviation"],
            "first_kl": done[0]["kl_k3"],
            # Python's max drops a NaN, which must fail the gate
            "engine_mismatch": float(torch.tensor(mismatches, dtype=torch.float64).max()),
            **self.of_critic(done),
            **self.of_groups(done),
            **mean(best.kl_B).metrics("kl"),
            "held_out_score_before": first.score,
            "held_out_score": best.score,
            **best.gain_over(first).metrics("held_out_score_gain"),
            "held_out_score_last": last.score,
            "held_out_kl_last": float(last.kl_B.mean()),
            "held_out_length": float(best.length_B.mean()),
            "best_step": self.best_step,
            "bad_steps": self.bad_steps,
            "steps": config.steps,
            "episodes": config.steps * config.batch_episodes,
            "trained_parameters": self.trained_parameters,
        }

    def of_critic(self, done: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Its summary metrics, if there is one."""
        if not self.objective.has_critic:
            return {}
        return self.explained_variance(done).metrics("explained_variance")

    def of_groups(self, done: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Summary metrics of groups, if there are any."""
        found = {}
        if all("groups_without_spread" in metrics for metrics in done):
            found["groups_without_spread"] = sum(each["groups_without_spread"] for each in done) / len(done)
        if self.config.resamples:
            found["resampled_groups"] = sum(each["resampled_groups"] for each in done)
        return found

    def explained_variance(self, done: Sequence[Mapping[str, float]]) -> Sampled:
        """The mean over the last quarter of the steps; steps are independent samples."""
        late = done[-max(1, len(done) // 4) :]
        value = sum(metrics["explained_variance"] for metrics in late) / len(late)
        half = math.hypot(*(metrics["explained_variance_error"] for metrics in late)) / len(late)
        return Sampled(value, value - half, value + half, len(late) * self.config.batch_episodes)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the engine's state."""
        return {
            "best_step": self.best_step, "done": self.done, "evaluated": self.evaluated,
            "bad_steps": self.bad_steps, "history": self.history,
            "kl": self.kl.state_dict(), "normalizer": self.normalizer.state_dict(),
            "sampling": self.sampling.get_state(), "update": self.update.state_dict(),
            "first": tuple(self.first or ()), "last": tuple(self.last or ()), "best": tuple(self.best or ()),
            "local_sampling": self.job.local_sampling,
        }  # fmt: skip

    def restore(self) -> bool:
        """Continue from the newest checkpoint; False if there is none. Its file is closed."""
        state = self.job.checkpoints.restore(self.engine)
        if state is not None:
            self.load_state_dict(state)
        return state is not None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        self.best_step, self.done, self.evaluated = state["best_step"], state["done"], state["evaluated"]
        self.bad_steps, self.history = state["bad_steps"], state["history"]
        self.kl.load_state_dict(state["kl"])
        self.normalizer.load_state_dict(state["normalizer"])
        self.sampling.set_state(state["sampling"])
        self.update.load_state_dict(state["update"])
        if state["local_sampling"] != self.job.local_sampling:
            self.warn(
                f"weights are gathered for sampling {BY[self.job.local_sampling]} from here on, and were "
                f"{BY[state['local_sampling']]} until step {self.done}: answers may differ by rounding."
            )
        self.first, self.last, self.best = (
            Evaluation(*(each_B.clone() for each_B in state[name])) for name in ("first", "last", "best")
        )

    def step(self, rows: Sequence[PromptRow], step: int) -> dict[str, float]:
        """Sample, score, learn. Values that are not finite are counted, and nothing is learned from them.

        Raises:
            TooBadError: the KL passed max_kl, or the engine samples from another policy.
        """
        config, name = self.config, self.job.stage
        self.phases.taken()
        self.compute.position["step"] = step
        warm_up = step <= config.warmup_steps
        first_steps = {0: config.warmup_steps}  # the policy's
        rates = self.engine.set_rates(step - 1, config.steps, first_steps=first_steps)
        metrics = {"lr": rates[0], "kl_coef": self.kl.coef}
        self.rows, self.texts = rows, []
        try:
            experience, scored = self.experience(rows)
            metrics |= rollout_metrics(experience) | self.objective.rollout_metrics(experience)
            metrics |= self.of_parts
            if config.resamples:
                metrics["resampled_groups"] = float(self.resampled)
            metrics["special_token_rate"] = self.policy.special_token_rate(experience.rollout)
            if metrics.get("engine_mismatch", 0.0) > self.mismatch_limit:
                raise TooBadError(
                    "the responses are not sampled from the policy that learns: their log-probabilities are "
                    f"{metrics['engine_mismatch']:.3g} nats per token off, more than "
                    f"{self.mismatch_limit:.3g}, {TIMES_THE_BOUND} times {name}.gates.engine_mismatch.max. "
                    "Use another generation=, or precision=fp32"
                )
            if config.max_kl is not None and metrics["kl"] > config.max_kl:
                raise TooBadError(
                    f"the policy is {metrics['kl']:.4g} nats per sequence from the SFT model, more than "
                    f"{name}.max_kl={config.max_kl:g}. Raise {name}.kl.coef, or lower {name}.optim.lr"
                )
            metrics |= self.update.learn(experience, scored, critic_only=warm_up)
            metrics |= self.phases.taken()
            if not warm_up:  # a policy that does not learn cannot follow the coefficient
                self.kl.update(metrics["kl"], config.batch_episodes)
            if metrics["skipped_minibatches"] > 0:
                self.count_bad(step, "the gradient of a minibatch was not finite.")
        except BadStepError as bad:
            self.count_bad(step, str(bad))
        metrics["bad_steps"] = float(self.bad_steps)
        return metrics

    def count_bad(self, step: int, reason: str) -> None:
        """Report and count a step of which something was skipped."""
        self.bad_steps += 1
        self.last_bad = reason
        self.warn(f"step {step} skipped: {reason}")

    def warn(self, text: str) -> None:
        """Print it. It may quote a response, so brackets are no markup."""
        self.job.progress.console.print(
            f"{self.job.stage}: {text}", highlight=False, markup=False, style="yellow"
        )

    def stop(self, step: int, reason: str, then: str) -> NoReturn:
        """Write the batch to a file and end. `then` says what the same command does with a higher limit.

        Raises:
            ConfigError: always.
        """
        texts = [*self.texts, *[None] * (len(self.rows) - len(self.texts))]
        path = self.job.dump(
            f"step{step}",
            [{"prompt": row.prompt, "response": text} for row, text in zip(self.rows, texts, strict=True)],
        )
        raise ConfigError(
            f"{self.job.stage}: step {step}: {reason}. Its batch is in {path}. All that was learned so far "
            f"is kept: the same command stops here again; with a higher limit it {then}."
        )

    def experience(self, rows: Sequence[PromptRow]) -> tuple[Experience, ForwardPass | None]:
        """Sample one response to each row with the current policy, and score it (`PolicyUpdater.score`).

        Raises:
            BadStepError: a score is infinite, or no response of the whole batch has one.
        """
        config = self.config
        answered = self.answers(rows)
        self.resampled = 0
        for attempt in range(config.resamples):
            spread_B = group_spread(answered.score_B, neighbours(len(answered.rows), config.group_size))
            flat = (spread_B == 0.0).nonzero().flatten().tolist()
            if not flat:
                break
            others = self.other_prompts(len(flat) // config.group_size, attempt)
            self.resampled += len(others)
            answered = answered.replaced(flat, self.answers(repeated(others, config.group_size)))
        self.rows, self.texts, rollout, score_B, parts, usage = answered
        if (why := why_unusable(score_B, self.texts)) is not None:  # replacements alone may have no score
            raise BadStepError(f"the reward {why}.")
        self.of_parts = combined.Scores(score_B, parts, usage).metrics()
        with self.phases("reference"):
            reference_BR = self.reference.log_probabilities(
                rollout, config.temperature, config.micro_batch_tokens
            )
        with self.phases("score"):
            logp_BR, value_BR, scored = self.update.score(rollout)
        with self.phases("advantages"):
            experience = make_experience(
                rollout,
                logp_BR=logp_BR,
                reference_logp_BR=reference_BR,
                score_B=score_B,
                rule=self.objective.rule(self.normalizer),
                advantages=self.objective.estimator(value_BR),
            )
        return experience, scored

    def answers(self, rows: Sequence[PromptRow]) -> Answered:
        """Sample one response to each row with the current policy, and ask the reward.

        Raises:
            BadStepError: a score is infinite.
        """
        config = self.config
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
        self.rows, self.texts = rows, texts
        with self.phases("reward"):
            found = combined.scored(self.reward, with_token_ids(rows, rollout.response_ids), texts)
        if (why := why_infinite(found.score_B, texts)) is not None:
            raise BadStepError(f"the reward {why}.")
        return Answered(rows, texts, rollout, *found)

    def other_prompts(self, count: int, attempt: int) -> list[PromptRow]:
        """Prompts for groups that are replaced: a draw that depends on seed, step and attempt alone, so that
        a resumed run draws the same."""
        position = f"{self.job.seed} {self.compute.position['step']} {attempt}"
        return random.Random(position).choices(self.prompts, k=count)

    def evaluate_if_due(self, rows: Sequence[PromptRow]) -> None:
        """Evaluate the policy of the last step, if that is due and not done.

        Raises:
            RewardError: the reward does not answer. The step is kept; the next start evaluates first.
        """
        due = self.done % self.config.evaluate_every == 0 or self.done == self.config.steps
        if not due or self.evaluated == self.done:
            return
        try:
            self.last = self.evaluate(rows)
        except RewardError:
            self.job.checkpoints.save(self.done, self.engine, self.state_dict())
            raise
        self.evaluated = self.done

    def evaluate(self, rows: Sequence[PromptRow]) -> Evaluation:
        """Measure the policy on held-out prompts. Keep its weights if the choosing half scores the best."""
        with self.update.published_weights():
            result, answers, of_parts = evaluate_policy(
                self.policy,
                self.reference,
                self.reward,
                rows,
                max_new_tokens=self.config.max_new_tokens,
                temperature=self.config.temperature,
                seed=self.job.seed,
                batch_rows=self.config.batch_rows or len(rows),
                micro_batch_tokens=self.config.micro_batch_tokens,
            )
            if self.best is None or result.choice_score > self.best.choice_score:
                self.job.checkpoints.keep_best(self.engine, self.policy.model)
                self.best, self.best_step = result, self.done
        if result.unscored:
            self.warn(
                f"{result.unscored} of {len(rows)} held-out responses got no finite score after step "
                f"{self.done}; held_out_score is the others' mean."
            )
        measured = result.metrics() | of_parts
        self.job.log({f"held_out_{name}": value for name, value in measured.items()}, self.done)
        for answer in answers[:8]:
            self.job.sample(step=self.done, prompt=answer["prompt"], response=answer["response"])
        self.job.checkpoints.keep(
            kept_answers(self.done), partial(write_answers, step=self.done, answers=answers)
        )
        return result

    def publish_answers(self) -> None:
        """Put the answers of all evaluations into the artifact."""
        steps = sorted({*range(0, self.config.steps, self.config.evaluate_every), self.config.steps})
        kept = {step: self.job.checkpoints.kept(kept_answers(step)) for step in steps}
        if lost := [step for step, path in kept.items() if path is None]:
            self.warn(f"the answers to held-out prompts of steps {lost} were kept, and are damaged or gone.")
        if self.compute.is_main:
            with (self.job.directory / HELD_OUT_ANSWERS).open("wb") as file:
                file.writelines(path.read_bytes() for path in kept.values() if path is not None)


class Answered(NamedTuple):
    """Prompts, a response to each, and its raw score."""

    rows: Sequence[PromptRow]
    texts: list[str]
    rollout: Rollout
    score_B: Tensor
    parts: dict[str, Tensor]
    """Of several rewards, each one's scores."""
    usage: dict[str, float]
    """What the rewards counted, such as a judge's tokens."""

    def replaced(self, indices: Sequence[int], others: Answered) -> Answered:
        """With the others at these indices, in order."""
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
        )


def kept_answers(step: int) -> str:
    """The name of the file that the checkpointer keeps of an evaluation."""
    return f"{step}.{HELD_OUT_ANSWERS}"


def repeated(rows: Sequence[PromptRow], times: int) -> list[PromptRow]:
    """Each row so many times, side by side."""
    return [row for row in rows for _ in range(times)]


def prompt_batches(
    rows: Sequence[PromptRow], size: int, num_batches: int, seed: int
) -> Iterator[list[PromptRow]]:
    """Batches of prompts. Each pass over all prompts shuffles them anew."""
    order = random.Random(seed)
    waiting = array("q")  # indices: the texts may be more than memory holds
    for _ in range(num_batches):
        while len(waiting) < size:
            waiting.extend(order.sample(range(len(rows)), len(rows)))
        yield [rows[index] for index in waiting[:size]]
        del waiting[:size]
