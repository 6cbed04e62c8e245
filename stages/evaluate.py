"""Compare the base, SFT and PPO policies on prompts that nothing was trained on.

Reads   the policies; evaluation prompts (`evaluate.prompts`); the learned reward and, where it is known, the
        gold one; plain sentences and questions that show what was forgotten.
Writes  responses.jsonl, comparison.jsonl (one prompt a line, all policies' answers), and the summary metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from rlhf.data.schema import PromptRow, Role
from rlhf.data.sources import SourceConfig
from rlhf.evaluation.comparison import bootstrap_interval, wins
from rlhf.evaluation.retention import question_accuracy, text_perplexity
from rlhf.generation.policy import Policy
from rlhf.job import Job
from rlhf.models.policy import check_head
from rlhf.plan.answering import answering_demand
from rlhf.plan.demand import Demand
from rlhf.plan.setting import Setting
from rlhf.rewards.learned import make_reward
from rlhf.rewards.source import Exchange, RewardSource, finite_scores, reward_digest
from rlhf.rl.kl import kl_k1
from rlhf.rl.rollout import Rollout
from rlhf.rl.statistics import distinct_n
from rlhf.stage import Stage

PolicyName = Literal["base", "sft", "ppo"]
CHAIN: tuple[PolicyName, ...] = get_args(PolicyName)
"""Every policy starts from the one before it."""
CHOICES = 4
"""Of a question, roughly."""


@dataclass
class Answers:
    """What one policy said, and how it was scored. Tensors have one entry a prompt."""

    rollout: Rollout
    texts: list[str]
    logp_BR: Tensor
    """Nats, under the policy itself at the sampling temperature."""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """By "score" (the learned reward) and "gold"."""

    def row(self, index: int) -> dict[str, Any]:
        """One answer as plain values."""
        return {
            "response": self.texts[index],
            "stopped": bool(self.rollout.stopped[index]),
            "tokens": len(self.rollout.response_ids[index]),
            **{name: round(float(score_B[index]), 4) for name, score_B in self.scores.items()},
        }


class EvaluateStage(Stage):
    """What `evaluate.*` can be told. Values: conf/stages/evaluate.yaml."""

    name: ClassVar[str] = "evaluate"
    version: ClassVar[int] = 3
    samples: ClassVar[bool] = True
    not_in_key: ClassVar[frozenset[str]] = frozenset(
        {"prompts", "retention_text", "retention_questions", "num_shown", "micro_batch_tokens"}
    )

    prompts: SourceConfig
    """Where it is a source that training reads too, `prepare` sets a share of it aside."""
    retention_text: SourceConfig
    """Plain sentences, for perplexity."""
    retention_questions: SourceConfig
    """Multiple-choice questions."""
    policies: list[PolicyName] = Field(min_length=1)
    """Win rate and gain need sft and ppo, KL needs sft, forgetting needs base; else they are left out."""
    reward: RewardSource | None
    """What PPO was trained on; null leaves it out."""
    gold: RewardSource | None
    """What the reward model stands for, where it is known; null leaves it out."""
    num_prompts: PositiveInt | None
    """The first so many evaluation prompts; null takes all."""
    max_new_tokens: PositiveInt
    temperature: PositiveFloat
    top_p: float = Field(gt=0, le=1)
    """Below 1, the KL is still that of the whole distribution's log-probabilities."""
    batch_rows: PositiveInt
    """Rows decoded together."""
    bootstrap_samples: PositiveInt
    num_shown: int = Field(ge=0)
    """Prompts whose answers the report shows side by side, from the first on."""
    micro_batch_tokens: PositiveInt
    """Tokens per forward pass that measures; lower it when memory runs out."""

    @model_validator(mode="after")
    def _gates_can_be_measured(self) -> Self:
        needs: dict[str, tuple[set[PolicyName], bool]] = {
            "win_rate": ({"sft", "ppo"}, self.gold is None and self.reward is None),
            "win_rate_learned": ({"sft", "ppo"}, self.reward is None),
            "gold_gain": ({"sft", "ppo"}, self.gold is None),
            "retention_perplexity_ratio": ({"base"}, False),
            "question_accuracy_change": ({"base"}, False),
        }
        for gate, (policies, no_reward) in needs.items():
            if self.gates.get(gate) is None:
                continue
            missing = sorted(policies - set(self.policies))
            if missing or no_reward:
                lacks = f"{' and '.join(missing)} in evaluate.policies" if missing else "a reward or gold"
                raise ValueError(f"gate {gate} needs {lacks}. Turn it off with evaluate.gates.{gate}=null")
        if len(set(self.policies)) < len(self.policies):
            raise ValueError(f"policies={self.policies} names one twice")
        return self

    def inputs(self) -> tuple[str, ...]:
        """The stages that made the policies, and the reward's where that is learned."""
        learned = ("reward",) if "learned" in (self.reward, self.gold) else ()
        return ("prepare", *(name for name in ("sft", "ppo") if name in self.policies), *learned)

    def roles(self) -> tuple[Role, ...]:
        """Reads the evaluation prompts and both retention sets."""
        return ("evaluate", "retention_text", "retention_questions")

    def reads_base_model(self) -> bool:
        """It is one of the policies."""
        return True

    def external(self) -> dict[str, str]:
        """The models or the code that score, where they are the user's."""
        return reward_digest(self.reward) | reward_digest(self.gold)

    def demand(self, on: Setting, chain: Mapping[str, Stage]) -> Demand:
        """Every policy answers, is read by itself, SFT and the rewards, and takes the retention tests."""
        prompts = on.sizes("evaluate", "evaluation").first(self.num_prompts)
        texts, questions = (
            on.sizes(role, "evaluation") for role in ("retention_text", "retention_questions")
        )
        rewards = [self.reward, self.gold].count("learned")
        return answering_demand(
            on, prompts, samples=1, new_tokens=self.max_new_tokens, batch_rows=self.batch_rows,
            micro_batch_tokens=self.micro_batch_tokens, policies=len(self.policies), readings=rewards,
            measures=2, models=1, others=[texts, questions._replace(rows=CHOICES * questions.rows)],
        )  # fmt: skip

    def run(self, job: Job) -> None:
        """Answer, measure what was forgotten, score, compare."""
        rows = job.data.rows("evaluate", "evaluation")[: self.num_prompts]
        answers: dict[PolicyName, Answers] = {}
        metrics: dict[str, float] = {"prompts": len(rows)}
        # One model in memory at a time; SFT last, as it also judges how far the others went from it.
        for name in sorted(self.policies, key=lambda name: name == "sft"):
            policy = self.load_policy(job, name)
            answers[name] = self.answer(job, name, policy, rows)
            metrics |= self.retention(job, name, policy)
            if name == "sft":
                metrics |= self.divergence(job, answers, reference=policy)
            del policy
        answers = {name: answers[name] for name in CHAIN if name in answers}
        self.score(job, rows, answers)
        for name, said in answers.items():
            metrics |= describe(name, said)
        if "sft" in answers and "ppo" in answers:
            metrics |= self.compare(answers["ppo"], answers["sft"], job.seed)
        metrics |= forgetting(metrics, list(answers))
        self.write(job, rows, answers)
        job.publish(metrics)

    def load_policy(self, job: Job, name: PolicyName) -> Policy:
        """One of the three, frozen."""
        if name == "base":
            tokenizer = job.base.load_tokenizer()
            policy = Policy.load(job.base.directory, job.base.config, job.compute, tokenizer, job.vllm)
            check_head(policy.model)
            return policy
        return Policy.load(job.inputs[name].path, job.base.config, job.compute, vllm=job.vllm)

    def answer(self, job: Job, name: PolicyName, policy: Policy, rows: Sequence[PromptRow]) -> Answers:
        """One sampled answer a prompt; every policy draws with the same seed."""
        with job.progress.task(f"evaluate: {name} answers", len(rows)) as task:
            rollout, texts = policy.sample(
                [row.prompt for row in rows],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                generator=torch.Generator().manual_seed(job.seed),
                batch_rows=self.batch_rows,
                on_rows=task.advance,
            )
        logp_BR = policy.log_probabilities(rollout, self.temperature, self.micro_batch_tokens)
        return Answers(rollout, texts, logp_BR)

    def retention(self, job: Job, name: PolicyName, policy: Policy) -> dict[str, float]:
        """Perplexity of plain sentences, accuracy on questions."""
        texts = job.data.rows("retention_text", "evaluation")
        questions = job.data.rows("retention_questions", "evaluation")
        with job.progress.task(f"evaluate: what {name} still knows", 2) as task:
            perplexity = text_perplexity(policy, texts, self.micro_batch_tokens)
            task.advance()
            accuracy = question_accuracy(policy, questions, self.micro_batch_tokens)
            task.advance()
        return {f"perplexity/{name}": perplexity, f"question_accuracy/{name}": accuracy}

    def divergence(
        self, job: Job, answers: Mapping[PolicyName, Answers], reference: Policy
    ) -> dict[str, float]:
        """KL of every other policy from SFT, in nats a sequence, by that policy's own answers."""
        others = {name: said for name, said in answers.items() if name != "sft"}
        metrics = {}
        for name, said in job.progress.track(others.items(), "evaluate: KL", len(others)):
            logp_BR = reference.log_probabilities(said.rollout, self.temperature, self.micro_batch_tokens)
            kl_BR = kl_k1(said.logp_BR, logp_BR, said.rollout.mask_BR)
            metrics[f"kl/{name}"] = float(kl_BR.sum(dtype=torch.float64)) / len(said.texts)
        return metrics

    def score(self, job: Job, rows: Sequence[PromptRow], answers: Mapping[PolicyName, Answers]) -> None:
        """Let the learned and the gold reward score every answer."""
        learned = job.inputs["reward"].path if "reward" in job.inputs else None
        for kind, key, source in (("score", "reward", self.reward), ("gold", "gold", self.gold)):
            if source is None:
                continue
            reward = make_reward(source, learned, job.base.config, job.compute, self.micro_batch_tokens)
            for said in job.progress.track(answers.values(), f"evaluate: {kind}", len(answers)):
                exchanges = [Exchange(row.prompt, text) for row, text in zip(rows, said.texts, strict=True)]
                said.scores[kind] = finite_scores(reward, exchanges, f"evaluate.{key}={source}")

    def compare(self, ppo: Answers, sft: Answers, seed: int) -> dict[str, float]:
        """PPO against SFT, prompt by prompt; the gold score decides where there is one."""
        metrics: dict[str, float] = {}
        if "score" in ppo.scores:
            metrics["win_rate_learned"] = float(wins(ppo.scores["score"], sft.scores["score"]).mean())
        if "gold" in ppo.scores:
            gain_B = ppo.scores["gold"].double() - sft.scores["gold"].double()
            metrics |= self.with_interval("gold_gain", gain_B, seed)
        judge = "gold" if "gold" in ppo.scores else "score"
        if judge in ppo.scores:
            metrics |= self.with_interval("win_rate", wins(ppo.scores[judge], sft.scores[judge]), seed)
        return metrics

    def with_interval(self, name: str, value_B: Tensor, seed: int) -> dict[str, float]:
        """A mean over prompts and its 95% bootstrap interval."""
        interval = bootstrap_interval(value_B, samples=self.bootstrap_samples, seed=seed)
        return {name: float(value_B.mean()), f"{name}_low": interval.low, f"{name}_high": interval.high}

    def write(self, job: Job, rows: Sequence[PromptRow], answers: Mapping[PolicyName, Answers]) -> None:
        """Every answer by itself, and side by side."""
        responses = [
            {"policy": name, "prompt": row.prompt, **said.row(index)}
            for name, said in answers.items()
            for index, row in enumerate(rows)
        ]
        for response in responses:
            job.sample(**response)
        job.write_rows("responses.jsonl", responses)
        job.write_rows(
            "comparison.jsonl",
            (
                {"prompt": row.prompt, **{name: said.row(index) for name, said in answers.items()}}
                for index, row in enumerate(rows)
            ),
        )


def describe(name: PolicyName, said: Answers) -> dict[str, float]:
    """Scores, lengths and variety of one policy's answers."""
    ids = [response.tolist() for response in said.rollout.response_ids]
    metrics = {
        "length_mean": float(said.rollout.response_lengths.double().mean()),
        "stop_rate": float(said.rollout.stopped.double().mean()),
        "distinct_1": distinct_n(ids, 1),
        "distinct_2": distinct_n(ids, 2),
    }
    for kind, score_B in said.scores.items():
        metrics[f"{kind}_mean"] = float(score_B.double().mean())
        metrics[f"{kind}_deviation"] = float(score_B.double().std(correction=0))
    return {f"{metric}/{name}": value for metric, value in metrics.items()}


def forgetting(metrics: Mapping[str, float], policies: Sequence[PolicyName]) -> dict[str, float]:
    """Each policy's perplexity and accuracy against the base model's; without a name, the last policy's."""
    if "base" not in policies:
        return {}
    ratios = {name: metrics[f"perplexity/{name}"] / metrics["perplexity/base"] for name in policies}
    change = metrics[f"question_accuracy/{policies[-1]}"] - metrics["question_accuracy/base"]
    return {
        **{f"retention_perplexity_ratio/{name}": ratio for name, ratio in ratios.items()},
        "retention_perplexity_ratio": ratios[policies[-1]],
        "question_accuracy_change": change,
    }
