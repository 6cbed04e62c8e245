"""Sample several answers to each prompt and score them.

Reads   the model that PPO starts from, or what `generate.policy` names instead; the training prompts
        (`ppo.prompts`); a reward.
Writes  responses.jsonl; best_of_n.jsonl (usable as `sft.data`); pairs.jsonl (usable as `reward.pairs`); and
        the score's mean and deviation, which PPO normalises with.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from rlhf.config import Complaint, ConfigError
from rlhf.costs.sampling import max_virtual_tokens, sampling_cost
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost
from rlhf.data.prepared import LengthStats, PreparedData
from rlhf.data.schema import PromptRow
from rlhf.pipeline.abilities import MakesRows
from rlhf.pipeline.checks import length_complaints
from rlhf.pipeline.costing import starting
from rlhf.pipeline.fields import UNKEYED, Memory, Model, Reads, Score, peft_of, reads_of
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import Metric, named
from rlhf.pipeline.stage import Stage, View
from rlhf.rewards.kinds import models_of
from rlhf.rewards.reward import RewardError, with_token_ids

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf.evaluation.sampled import Sampled
    from rlhf.rewards.combined import Scores

SCORE_GATES = ("score_deviation", "within_prompt_share", "score_reliability")
"""Gates that need scores."""


class GenerateStage(MakesRows):
    """The keys `generate.*`. Values: conf/stages/generate.yaml."""

    version, samples, repeats_keys = 11, True, True
    metrics: ClassVar[Mapping[str, Metric]] = {
        "score_mean": Metric("score", "+z.2f"),
        "score_deviation": Metric("deviation", "z.2f"),
        "stop_rate": Metric("stops", ".0%"),
        "unscored": Metric("answers without a score", ",.0f", is_shown_at_zero=False),
        **named(
            "responses", "echo_rate", "length_mean", "distinct_2", "score_mean/*", "score_deviation/*",
            "within_prompt_share", "score_reliability", "judge_*", "raised", "best_of_n_mean",
            "pairs",
        ),
    }  # fmt: skip
    offers: ClassVar[Mapping[str, str]] = {
        "sft": "best_of_n.jsonl", "replay": "best_of_n.jsonl", "ptx": "best_of_n.jsonl",
        "pairs": "pairs.jsonl", "dpo": "pairs.jsonl",
    }  # fmt: skip

    policy: Model
    """The model that answers: `base`, any stage that makes a policy (`sft`, `dpo`, `ppo`, ...), or a
    `save_pretrained` directory."""
    reward: Score | None
    """The reward that scores the answers; null writes responses only."""
    splits: list[Literal["train", "held_out"]] = Field(min_length=1)
    """Splits of `ppo.prompts` that are answered."""
    num_prompts: PositiveInt | None
    """Number of prompts over all splits, the first ones of each split; null uses all."""
    samples_per_prompt: PositiveInt
    """Responses to each prompt."""
    max_new_tokens: PositiveInt
    """Longest response, in tokens; longer ones are cut off."""
    temperature: PositiveFloat
    """Sampling temperature; divides the logits."""
    pair_min_gap: NonNegativeFloat
    """Smallest difference of two scores for which a pair is written."""
    max_unscored: Annotated[float, UNKEYED] = Field(ge=0, lt=1)
    """Largest share of answers for which a function of yours (`python:`, `trl:`) may raise; these have no
    score. With more the stage fails, and its answers are saved in the run's directory."""
    batch_rows: PositiveInt
    """Rows that are decoded together."""
    micro_batch_tokens: Memory
    """Tokens per forward pass of the reward model."""

    def reads(self) -> Reads:
        """The prompts of `ppo.prompts`."""
        return reads_of(self)._replace(roles=("ppo",))

    def suffices(self, metrics: Mapping[str, float]) -> bool:
        """The reward raised for no more answers than `max_unscored` allows now."""
        return metrics.get("raised", 0.0) <= self.max_raised(int(metrics["responses"]))

    def max_raised(self, answers: int) -> int:
        """Largest number of answers for which a function may raise."""
        # exact: in floats 0.29 x 100 is less than 29
        return math.floor(Fraction(str(self.max_unscored)) * answers)

    def not_checked(self) -> dict[str, str]:
        """Without a reward there are no scores; a single answer to a prompt has no other to differ from."""
        if self.reward is None:
            return dict.fromkeys(SCORE_GATES, f"{self.name}.reward=null")
        reasons = {}
        if self.samples_per_prompt == 1:
            reasons["within_prompt_share"] = f"{self.name}.samples_per_prompt=1"
        if models_of(self.reward):
            reasons["score_reliability"] = f"a model scores in {self.name}.reward"
        return reasons

    def complaints(self, view: View) -> Iterator[Complaint]:
        """Every prompt leaves room for an answer."""
        yield from super().complaints(view)
        if (data := view.data) is not None:
            yield from length_complaints(
                view, f"{self.name}.policy", self.policy, "ppo.prompts", lambda: self.rows(data),
                reserved_tokens=self.max_new_tokens,
                fix=f"Lower {self.name}.max_new_tokens={self.max_new_tokens}, leave out the longest "
                "prompts, or take a model with a longer context.",
            )  # fmt: skip

    def rows(self, data: PreparedData) -> Iterator[PromptRow]:
        """The prompts that are answered."""
        splits = [data.rows("ppo", split) for split in self.splits]
        total = sum(map(len, splits))
        wanted = total if self.num_prompts is None else self.num_prompts
        for rows in splits:
            yield from rows[: math.ceil(Fraction(wanted * len(rows), total))]

    def offer_advice(self) -> str:
        """How to get more rows of each split."""
        return (
            f"{self.name} makes these rows: raise {self.name}.num_prompts or {self.name}.samples_per_prompt. "
            "A prompt gives a pair only if two of its answers have different scores."
        )

    def check_offers(self, said: str, chain: Mapping[str, Stage]) -> None:
        """Held-out prompts are answered too, so that there are held-out rows."""
        if "held_out" not in self.splits:
            raise ConfigError(
                f"{said}: {self.name}.splits=[{','.join(self.splits)}] answers no held-out prompts, so there "
                f"are no held-out rows. Set {self.name}.splits=[train,held_out]."
            )

    def offered_lengths(self, on: CostContext, chain: Mapping[str, Stage]) -> LengthStats:
        """The pairs of every prompt, with answers of the largest length."""
        prompts = self.prompts(on)
        return prompts._replace(
            rows=prompts.rows * max(1, self.samples_per_prompt // 2),
            mean=prompts.mean + self.max_new_tokens,
            longest=prompts.longest + self.max_new_tokens,
        )

    def prompts(self, on: CostContext) -> LengthStats:
        """The prompts that are answered."""
        sizes = [on.sizes("ppo", split) for split in self.splits]
        return sizes[0]._replace(rows=sum(size.rows for size in sizes)).first(self.num_prompts)

    def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
        """Every sample is decoded, and read once by each reward model."""
        on = starting(self, on, chain)
        maker = chain.get(self.policy)
        prompts = self.prompts(on)
        scoring = len(models_of(self.reward))
        return sampling_cost(
            on, prompts, samples=self.samples_per_prompt, new_tokens=self.max_new_tokens,
            batch_rows=self.batch_rows, micro_batch_tokens=self.micro_batch_tokens,
            policies=1, readings=scoring, measures=0, models=1 + scoring,
            added=max_virtual_tokens(on, [peft_of(maker)] if maker else []),
        )  # fmt: skip

    def run(self, job: Job) -> Mapping[str, float]:
        """Sample, score, and write three views of the result."""
        import torch

        from rlhf.evaluation.intervals import share
        from rlhf.rl.statistics import distinct_n

        rows = list(self.rows(job.data))
        repeated = [row for row in rows for _ in range(self.samples_per_prompt)]
        policy = job.policy(job.start(self.policy))
        with job.progress.task(f"{self.name}: sampling", len(repeated)) as task:
            rollout, texts = policy.sample(
                [row.prompt for row in repeated],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                generator=torch.Generator().manual_seed(job.seed),
                batch_rows=self.batch_rows,
                on_rows=task.advance,
            )
        del policy  # its memory is needed for the reward model
        answered = with_token_ids(repeated, rollout.response_ids)
        answers = [
            {"prompt": row.prompt, "response": text, "stopped": bool(stopped), "tokens": len(ids)}
            for row, text, stopped, ids in zip(
                repeated, texts, rollout.stopped, rollout.response_ids, strict=True
            )
        ]
        reliability: Sampled | None = None
        try:
            scored = self.score(job, answered, texts)
            if scored is not None and not models_of(self.reward):  # a model scores each answer by itself
                reliability = self.reliability(job, answered, texts, scored.score_B)
        except ConfigError as error:
            path = job.run_directory / f"{self.name}.unscored.jsonl"
            lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in answers)
            job.compute.main_only(lambda: path.write_text(lines, encoding="utf-8"))
            kind = RewardError if isinstance(error, RewardError) else ConfigError
            raise kind(f"{error} The answers are in {path}.") from error
        scores = None if scored is None else scored.score_B.tolist()
        stopped_BS = rollout.stopped.double().view(len(rows), self.samples_per_prompt)
        echoes = [repeats_question(row, text) for row, text in zip(repeated, texts, strict=True)]
        echoes_BS = torch.tensor(echoes, dtype=torch.float64).view_as(stopped_BS)
        metrics = {
            "responses": len(texts),
            **share(echoes_BS.mean(-1)).metrics("echo_rate"),
            # one mean per prompt: its samples are not independent
            **share(stopped_BS.mean(-1)).metrics("stop_rate"),
            "length_mean": float(rollout.response_lengths.float().mean()),
            "distinct_2": distinct_n([ids.tolist() for ids in rollout.response_ids], 2),
        }
        if scores is not None:
            answers = [
                {**row, "score": None if math.isnan(score) else score}
                for row, score in zip(answers, scores, strict=True)
            ]
        job.write_rows("responses.jsonl", answers)
        for answer in answers:
            job.sample(policy=self.policy, **answer)
        if scores is not None:
            metrics |= self.write_ranked(job, rows, texts, scores)
        if scored is not None:
            metrics |= scored.metrics()
        if reliability is not None:
            metrics |= reliability.metrics("score_reliability")
        return metrics

    def reliability(
        self, job: Job, rows: Sequence[PromptRow], texts: Sequence[str], score_B: Tensor
    ) -> Sampled:
        """Correlation of the scores with those that the same answers get in another order."""
        import torch

        from rlhf.evaluation.intervals import correlation

        order_B = torch.randperm(len(texts), generator=torch.Generator().manual_seed(job.seed))
        order = order_B.tolist()
        scored = self.score(job, [rows[place] for place in order], [texts[place] for place in order], True)
        assert scored is not None
        again_B = torch.empty_like(score_B)
        again_B[order_B] = scored.score_B
        size = self.samples_per_prompt
        return correlation(score_B.view(-1, size), again_B.view(-1, size))

    def score(
        self, job: Job, rows: list[PromptRow], texts: list[str], is_again: bool = False
    ) -> Scores | None:
        """One score per response; None without a reward.

        Args:
            is_again: a second call, which does not report again for how many answers the reward raises.

        Raises:
            ConfigError: a score is infinite, no response has one, or a function raises for too many.
        """
        from rlhf.rewards.combined import usable_scores
        from rlhf.rewards.function import FunctionRaisedError, Tolerance

        if self.reward is None:
            return None
        compute, tolerance = job.compute, Tolerance(self.max_raised(len(texts)))
        reward = job.reward(self.reward, self.micro_batch_tokens, tolerance=tolerance)
        scored = usable_scores(reward, rows, texts, f"{self.name}.reward={self.reward}")
        raised_per_rank = compute.collect_taken({compute.rank: tolerance.raised}, compute.world_size)
        raised = [line for lines in raised_per_rank for line in lines]
        if len(raised) > tolerance.max_raised:
            raise FunctionRaisedError(
                f"The reward raised for {len(raised)} answers of {len(texts)}, the first one: {raised[0]}"
            )
        if raised and not is_again:
            line = (
                f"{self.name}: the reward raised for {len(raised)} answers, which have no score: {raised[0]}"
            )
            job.progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
        return scored._replace(usage=scored.usage | {"raised": float(len(raised))})

    def write_ranked(
        self, job: Job, rows: list[PromptRow], texts: list[str], scores: list[float]
    ) -> dict[str, float]:
        """Write best_of_n.jsonl and pairs.jsonl; returns the summary metrics of the scores.

        The best answer is paired with the worst, the second best with the second worst, and so on, as long
        as they differ: no answer is in two pairs. Answers without a score are left out.
        """
        import torch

        from rlhf.evaluation.intervals import nothing, ratio

        size, best_scores = self.samples_per_prompt, []
        best: list[dict[str, Any]] = []
        pairs: list[dict[str, Any]] = []
        for index, row in enumerate(rows):
            group = slice(index * size, (index + 1) * size)
            answers = zip(scores[group], texts[group], strict=True)
            ranked = sorted((each for each in answers if not math.isnan(each[0])), reverse=True)
            if not ranked:
                continue
            best_scores.append(ranked[0][0])
            if ranked[0][1]:
                best.append({"prompt": row.prompt, "completion": ranked[0][1], "score": ranked[0][0]})
            for (high, chosen), (low, rejected) in zip(
                ranked[: len(ranked) // 2], reversed(ranked), strict=False
            ):
                if high - low >= self.pair_min_gap and high > low and chosen and rejected:
                    gold = {"chosen_gold": round(high, 4), "rejected_gold": round(low, 4)}
                    pair = {"prompt": row.prompt, "chosen": chosen, "rejected": rejected}
                    pairs.append(pair | (gold if self.reward == "vader" else {}))
        job.write_rows("best_of_n.jsonl", best)
        job.write_rows("pairs.jsonl", pairs)
        moments = torch.tensor([score for score in scores if not math.isnan(score)], dtype=torch.float64)
        score_BS = torch.tensor(scores, dtype=torch.float64).view(len(rows), size)
        own_BS = (score_BS - score_BS.nanmean(-1, keepdim=True)).square().nan_to_num()
        all_BS = (score_BS - moments.mean()).square().nan_to_num()
        several_B = score_BS.isfinite().sum(-1) > 1  # a single score has no other to differ from
        own_B, all_B = own_BS.sum(-1)[several_B], all_BS.sum(-1)[several_B]
        within = ratio(own_B, all_B) if all_B.any() else nothing()
        return {
            **within.metrics("within_prompt_share"),
            "score_mean": float(moments.mean()),
            "score_deviation": float(moments.std(correction=0)),
            "unscored": len(scores) - len(moments),
            "best_of_n_mean": sum(best_scores) / len(best_scores),
            "pairs": float(len(pairs)),
        }


def repeats_question(row: PromptRow, text: str) -> bool:
    """Whether an answer repeats the last message, word for word."""
    question = str(row.prompt[-1].get("content") or "") if row.prompt else ""
    return text.split() == question.split() != []
