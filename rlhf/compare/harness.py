"""Asks the candidates, scores their answers, and computes the metrics of a comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf.compare.answering import PromptBuilder, make_prompt_builder, request_seconds
from rlhf.compare.artifacts import path_of, training_seconds, tuned_artifact
from rlhf.compare.candidate import (
    CANDIDATES,
    JUDGES,
    PROMPTED,
    Candidate,
    in_order,
    is_directory,
    is_endpoint,
    is_stage,
)
from rlhf.compare.context_budget import ContextBudget
from rlhf.compare.endpoint import Endpoint
from rlhf.compare.figures import best_untrained, break_even_metrics, request_metrics
from rlhf.compare.prompts import Question
from rlhf.compare.retrieval import make_index
from rlhf.compare.sizes import model_bytes
from rlhf.costs.price import cost_of
from rlhf.data.chat_template import prompt_ids
from rlhf.data.schema import Message
from rlhf.evaluation.answers import Answers, agreement, divergence, paired_gain, policy_metrics
from rlhf.evaluation.best_of_n import best_answers, kl_bound
from rlhf.evaluation.held_out import FILE, gold_over_steps, lost_since_peak
from rlhf.evaluation.intervals import ratio
from rlhf.evaluation.reference_loss import reference_losses
from rlhf.evaluation.references import QUALITIES
from rlhf.evaluation.repeated import repeated_metrics
from rlhf.evaluation.retention import Retained, retention
from rlhf.evaluation.wording import gained_word
from rlhf.generation.policy_model import PolicyModel
from rlhf.pipeline.job import Job
from rlhf.pipeline.store import Artifact
from rlhf.rewards.combined import usable_scores
from rlhf.rewards.kinds import columns_needed, is_remote, is_verifier, models_of, parts_of, stage_of
from rlhf.rewards.reward import Reward, RewardError, with_token_ids
from rlhf.rewards.verify import same_answer
from rlhf.rl.rollout import Rollout

if TYPE_CHECKING:
    from rlhf.compare.stage import ComparisonStage

MIN_REPORTED_WORD_GAIN = 0.4
"""Smallest rise in a word's share of answers that is reported."""


@dataclass(frozen=True)
class Knowledge:
    """What a model knows, however it is asked."""

    task_losses: tuple[Tensor, Tensor]
    retained: Retained
    figures: dict[str, float]

    @classmethod
    def unknown(cls) -> Knowledge:
        """That of an endpoint, which gives no likelihoods."""
        nothing = torch.zeros(0)
        return cls((nothing, nothing), Retained([], nothing, nothing, nothing), {})


class Comparison:
    """One run of `evaluate` or `compare`."""

    def __init__(self, stage: ComparisonStage, job: Job, questions: Sequence[Question]) -> None:
        self.stage, self.job, self.questions = stage, job, questions
        self.rows = [question.row for question in questions]
        self.library = stage.library(job.data)
        self.rollouts: dict[str, Rollout] = {}
        """Candidate -> all n answers, until the best are chosen."""
        self.ranked_by: str | None = None
        self.best_untrained: str | None = None
        self._artifacts: dict[str, Artifact | Path] = {}

    def ask(self) -> dict[str, Answers]:
        """The answers of every candidate. One model is in memory at a time."""
        stage, answers = self.stage, dict[str, Answers]()
        # first the endpoints: one that does not answer costs no other model's time
        # the start is the last model: the KL of the others is measured with it
        for model in sorted(stage.models, key=lambda model: (not is_endpoint(model), model == stage.start)):
            candidates = [each for each in stage.candidates if each.model == model]
            if is_endpoint(model):
                answers |= {each.name: self.ask_endpoint(each) for each in candidates}
                continue
            policy = self.load(model)
            known = self.knowledge(model, policy)
            answers |= {each.name: self.answer(each, policy, known) for each in candidates}
            if model == stage.start:
                self.measure_kl(policy, answers)
            del policy  # its memory is needed for the reward model
            for each in candidates:
                if each.method == "best_of_n":
                    answers[each.name] = self.best_of(each, answers[each.name])
        models = ["base", *self.job.inputs]
        models.insert(models.index("ppo") if "ppo" in models else len(models), "init")
        return {each.name: answers[each.name] for each in in_order(stage.candidates, models)}

    def load(self, model: str) -> PolicyModel:
        """One of the models, frozen."""
        if model == "base":
            return self.job.policy(self.job.base)
        if model == "init":
            return self.job.policy(self.job.start(self.stage.start_model))
        return self.job.policy(path_of(self.artifact(model)))

    def artifact(self, model: str) -> Artifact | Path:
        """The artifact of a stage, or what is in a directory, which is read and verified once."""
        if model not in self._artifacts:
            name = self.stage.name
            self._artifacts[model] = (
                self.job.inputs[model] if is_stage(model) else tuned_artifact(model, name, read=True)
            )
        return self._artifacts[model]

    def knowledge(self, model: str, policy: PolicyModel) -> Knowledge:
        """The losses on the held-out answers of sft.data, and the retention tests."""
        data, stage = self.job.data, self.stage
        rows = data.rows("sft", "held_out")[: stage.num_references] if stage.num_references != 0 else []
        with self.job.progress.task(f"{stage.name}: what {model} knows", 2) as task:
            prompts, references = [row.prompt for row in rows], [row.completion for row in rows]
            losses = reference_losses(policy, prompts, references, stage.micro_batch_tokens)
            task.advance()
            retained = retention(policy, stage.retention_rows(data), stage.micro_batch_tokens)
            task.advance()
        return Knowledge(losses, retained, stage.knowledge(self.job, model, policy))

    def answer(self, candidate: Candidate, policy: PolicyModel, known: Knowledge) -> Answers:
        """The answers of one candidate, and the time of single requests. For best of n all n answers to each
        question: `best_of` chooses among them."""
        stage = self.stage
        builder = self.builder(candidate, policy)
        budget = self.budget(candidate, policy)
        built = [builder.build(question, budget) for question in self.questions]
        asked, num_cut = [each for each, _ in built], [cut for _, cut in built]
        self.warn_cut(candidate, num_cut)
        samples = stage.best_of if candidate.method == "best_of_n" else stage.samples_per_prompt
        rollout, texts = self.sample(candidate, policy, asked, samples)
        first = torch.arange(len(asked)) * samples
        own, own_texts = rollout.select(first), texts[::samples]
        is_plain = candidate.method == "zero_shot"
        logp_BR = torch.zeros(0)
        if is_plain and stage.temperature > 0 and stage.start in stage.models:
            logp_BR = policy.log_probabilities(own, stage.temperature, stage.micro_batch_tokens)
        vocabulary = policy.tokenizer.get_vocab()
        # the losses are of the prompts alone, so they tell nothing of a candidate that is shown more
        losses = known.task_losses if candidate.method not in PROMPTED else Knowledge.unknown().task_losses
        given = Answers(own, own_texts, logp_BR, *losses, known.retained, vocabulary)
        given.asked = asked if candidate.method in PROMPTED else []
        given.num_cut = num_cut if candidate.method in PROMPTED else []
        given.figures = dict(known.figures)
        if candidate.method == "best_of_n":
            self.rollouts[candidate.name] = rollout
        if samples > 1:
            given.repeated = (rollout.response_ids, texts)
        references = [question.reference for question in self.questions if question.reference is not None]
        if len(references) == len(asked):
            nats_B, tokens_B = reference_losses(policy, asked, references, stage.micro_batch_tokens)
            given.figures |= ratio(nats_B, tokens_B).metrics("answer_loss")
        self.time(candidate, policy, builder, given)
        return given

    def builder(self, candidate: Candidate, policy: PolicyModel | None) -> PromptBuilder:
        """Makes the prompts of a candidate. An endpoint (None) gives no embeddings."""
        stage = self.stage
        index = partial(
            make_index, stage.retriever, policy=policy, micro_batch_tokens=stage.micro_batch_tokens,
            stage=stage.name,
        )  # fmt: skip
        return make_prompt_builder(
            candidate.method, self.library, stage.few_shot, stage.retrieval, index, self.job.seed
        )

    def budget(self, candidate: Candidate, policy: PolicyModel) -> ContextBudget | None:
        """What fits into the context; None if `prepare` has seen to it."""
        if self.stage.asks_prepared_rows and candidate.method not in PROMPTED:
            return None
        return ContextBudget(
            policy.tokenizer, policy.context_length, self.stage.max_new_tokens, self.stage.name
        )

    def sample(
        self, candidate: Candidate, policy: PolicyModel, asked: Sequence[list[Message]], samples: int
    ) -> tuple[Rollout, list[str]]:
        """Answers to each prompt, those to one prompt next to each other. All use the same seed."""
        stage, prompts = self.stage, [prompt for prompt in asked for _ in range(samples)]
        with self.job.progress.task(f"{stage.name}: {candidate.name} answers", len(prompts)) as task:
            return policy.sample(
                prompts, max_new_tokens=stage.max_new_tokens, temperature=stage.temperature,
                top_p=stage.top_p, generator=torch.Generator().manual_seed(self.job.seed),
                batch_rows=stage.batch_rows, on_rows=task.advance,
            )  # fmt: skip

    def time(self, candidate: Candidate, policy: PolicyModel, builder: PromptBuilder, given: Answers) -> None:
        """Measure memory, and time and cost of single requests. Best of n samples and scores n answers."""
        stage, job, budget = self.stage, self.job, self.budget(candidate, policy)
        if stage.num_timed:
            given.figures["storage_bytes"] = self.storage(candidate) + builder.num_bytes
            self.price_setup(candidate, builder, given)
            samples = stage.best_of if candidate.method == "best_of_n" else 1
            reward = self.reward() if candidate.method == "best_of_n" else None
            generator = torch.Generator().manual_seed(job.seed)

            def answer(question: Question) -> None:
                asked, _ = builder.build(question, budget)
                rollout, texts = policy.sample(
                    [asked] * samples, max_new_tokens=stage.max_new_tokens, temperature=stage.temperature,
                    top_p=stage.top_p, generator=generator, batch_rows=samples,
                )  # fmt: skip
                if reward is not None:
                    self.choose(reward, [question], rollout, texts)

            questions = self.questions[: stage.num_timed]
            with job.progress.task(f"{stage.name}: {candidate.name}, timed", len(questions)) as task:
                given.seconds_B = request_seconds(policy, questions, answer, task.advance)
            given.cost_B = given.seconds_B * cost_of(1.0, stage.price_per_hour)
        if job.peak is not None and (peak := job.peak.lap()) is not None:
            given.figures["memory_bytes"] = peak

    def price_setup(self, candidate: Candidate, builder: PromptBuilder, given: Answers) -> None:
        """Add the time and cost of training the models that a candidate needs, and of its search index, if
        they are known."""
        tuned = [self.artifact(candidate.model)] if self.has_artifact(candidate.model) else []
        if candidate.method == "best_of_n":
            tuned += self.reward_artifacts()
        training = None if candidate.model == "init" else training_seconds(tuned)
        if training is not None:
            setup = training + builder.setup_seconds
            cost = cost_of(setup, self.stage.price_per_hour)
            given.figures |= {"setup_seconds": setup, "setup_cost": cost}

    def reward_artifacts(self) -> list[Artifact]:
        """The models of the reward that stages of this run trained."""
        trained = (stage_of(part.source) for part in models_of(self.stage.reward))
        return [self.job.inputs[name] for name in filter(None, trained)]

    def has_artifact(self, model: str) -> bool:
        """Whether the model is in the store or in a directory that the user names."""
        return is_stage(model) or is_directory(model)

    def storage(self, candidate: Candidate) -> int:
        """Bytes of the files of a candidate's model; for best of n also of the reward models that stages
        trained."""
        model, rewards = candidate.model, 0
        if candidate.method == "best_of_n":
            rewards = sum(model_bytes(each.path) for each in self.reward_artifacts())
        if self.has_artifact(model):
            return model_bytes(path_of(self.artifact(model))) + rewards
        return model_bytes(
            (self.job.base if model == "base" else self.job.start(self.stage.start_model)).directory
        )

    def is_untrained(self, candidate: Candidate) -> bool:
        """Whether a candidate needs no training: the base model, the user's own start, or an endpoint, and no
        trained reward."""
        if candidate.method == "best_of_n" and self.reward_artifacts():
            return False
        return not self.has_artifact(candidate.model)

    def reward(self) -> Reward:
        """The reward that chooses the best of n."""
        assert self.stage.reward is not None
        return self.job.reward(self.stage.reward, self.stage.micro_batch_tokens)

    def choose(
        self, reward: Reward, questions: Sequence[Question], rollout: Rollout, texts: Sequence[str]
    ) -> Tensor:
        """Indices of the best answer to each question, long [questions]."""
        rows, key = [each.row for each in questions], f"{self.stage.name}.reward={self.stage.reward}"
        return best_answers(reward, rows, rollout, texts, of=self.stage.best_of, key=key)

    def best_of(self, candidate: Candidate, given: Answers) -> Answers:
        """The best of the answers to each question."""
        assert given.repeated is not None
        _, texts = given.repeated
        rollout = self.rollouts.pop(candidate.name)
        chosen_B = self.choose(self.reward(), self.questions, rollout, texts)
        figures = given.figures
        if candidate.model == self.stage.start:
            figures = figures | {"kl": kl_bound(self.stage.best_of)}
        chosen = [texts[index] for index in chosen_B.tolist()]
        return replace(given, rollout=rollout.select(chosen_B), texts=chosen, repeated=None, figures=figures)

    def ask_endpoint(self, candidate: Candidate) -> Answers:
        """The answers of an endpoint. Their tokens are counted with the base model's tokenizer."""
        stage, job, tokenizer = self.stage, self.job, self.job.base.load_tokenizer()
        endpoint = Endpoint(
            candidate.model, stage.endpoint, job.reward_server, stage.max_new_tokens, stage.temperature,
            stage.top_p,
        )  # fmt: skip
        builder = self.builder(candidate, None)
        asked = [builder.build(question, None)[0] for question in self.questions]
        with job.progress.task(f"{stage.name}: {candidate.name} answers", len(asked)) as task:
            replies = job.compute.main_only(lambda: endpoint.answers(asked, task.advance))
        end = [tokenizer.eos_token_id]
        rollout = Rollout(
            prompt_ids=[torch.tensor(prompt_ids(tokenizer, prompt)) for prompt in asked],
            response_ids=[torch.tensor(tokenizer(each.text)["input_ids"] or end) for each in replies],
            stopped=torch.tensor([each.stopped for each in replies]),
        )
        known = Knowledge.unknown()
        given = Answers(
            rollout, [each.text for each in replies], torch.zeros(0), *known.task_losses, known.retained, {}
        )
        given.asked = asked if candidate.method in PROMPTED else []
        timed = replies[: stage.num_timed]
        costs = [each.cost for each in timed if each.cost is not None]
        given.seconds_B = torch.tensor([each.seconds for each in timed], dtype=torch.float64)
        given.cost_B = torch.tensor(costs if len(costs) == len(timed) else [], dtype=torch.float64)
        if timed:
            self.price_setup(candidate, builder, given)
        if timed and not len(given.cost_B):
            self.warn(
                f"the cost of {candidate.name} is unknown: {stage.name}.endpoint.price_in and price_out are "
                "null, or it does not say how many tokens it used."
            )
        return given

    def measure_kl(self, policy: PolicyModel, answers: Mapping[str, Answers]) -> None:
        """Measure how far the other candidates are from the start, on their own answers."""
        stage = self.stage
        others = [given for name, given in answers.items() if name != stage.start and len(given.logp_BR)]
        for given in self.job.progress.track(others, f"{stage.name}: KL", len(others)):
            given.figures |= divergence(given, policy, stage.temperature, stage.micro_batch_tokens)

    def score(self, answers: Mapping[str, Answers]) -> None:
        """Compare every answer with its reference, and let the learned reward, the gold one and the judge
        score it. Of several answers per question a verifier says how often they are right."""
        stage, job = self.stage, self.job
        references = [question.reference for question in self.questions if question.reference is not None]
        if len(references) == len(self.questions):
            for given in answers.values():
                for quality, measure in QUALITIES.items():
                    values = [measure(*pair) for pair in zip(given.texts, references, strict=True)]
                    given.scores[quality] = torch.tensor(values, dtype=torch.float64)
        for kind, key in JUDGES.items():
            source = getattr(stage, key)
            if source is None or (key == "judge" and not self.may_judge()):
                continue
            reward, named = job.reward(source, stage.micro_batch_tokens), f"{stage.name}.{key}={source}"
            for given in job.progress.track(answers.values(), f"{stage.name}: {kind}", len(answers)):
                rows = with_token_ids(self.rows, given.rollout.response_ids)
                scores = usable_scores(reward, rows, given.texts, named)
                given.scores[kind] = scores.score_B
                given.parts[kind] = scores.parts
                for name, value in scores.usage.items():
                    given.figures[name] = given.figures.get(name, 0.0) + value
                if given.repeated is not None and all(map(is_verifier, parts_of(source))):
                    given.figures |= self.repeated_metrics(source, reward, given.repeated, named)
            del reward  # its memory is needed for the next one

    def repeated_metrics(
        self, source: Any, reward: Reward, repeated: tuple[list[Tensor], list[str]], named: str
    ) -> dict[str, float]:
        """How often answers to the same question are right."""
        ids, texts = repeated
        count, parts = self.stage.samples_per_prompt, parts_of(source)
        rows = with_token_ids([row for row in self.rows for _ in range(count)], ids)
        right_BN = usable_scores(reward, rows, texts, named).score_B.view(-1, count)
        if not bool(((right_BN == 0) | (right_BN == 1) | right_BN.isnan()).all()):
            self.warn(f"{named} gives other scores than 0 and 1, so there is no pass@k.")
            return {}
        is_rule = len(parts) == 1 and parts[0].source.startswith("verify:")
        agree = same_answer(parts[0].source, parts[0].args) if is_rule else None
        groups = [texts[first : first + count] for first in range(0, len(texts), count)]
        return repeated_metrics(right_BN, groups, agree)

    def may_judge(self) -> bool:
        """Whether the judge's models rank better than a rule that reads no word. A judge that may be noise
        should fail no gate."""
        trained = [stage_of(part.source) for part in models_of(self.stage.judge)]
        for name in filter(None, trained):
            if self.job.inputs[name].manifest.metrics.get("accuracy_over_baseline_low", 0.0) <= 0:
                self.warn(f"{name} does not judge: it may rank no better than a rule that reads no word.")
                return False
        return True

    def judge_training(self, answers: Mapping[str, Answers]) -> list[Mapping[str, Any]]:
        """Let the gold reward score the answers that each policy gave while it learned. Skipped if it asks a
        server. An error of the reward does not end the stage.

        Returns:
            One row per policy and evaluation.
        """
        stage, job = self.stage, self.job
        rows: list[Mapping[str, Any]] = []
        learned = [
            name for name in answers if name in job.inputs and (job.inputs[name].path / FILE).is_file()
        ]
        if stage.gold is not None and learned and not is_remote(stage.gold):
            gold, needed = job.reward(stage.gold, stage.micro_batch_tokens), columns_needed(stage.gold)
            for name in job.progress.track(learned, f"{stage.name}: gold over steps", len(learned)):
                try:
                    steps = gold_over_steps(job.inputs[name].path / FILE, gold, needed)
                except RewardError as error:
                    self.warn(f"gold does not score what {name} answered while it learned: {error}")
                    continue
                rows += [{"policy": name, **at.row()} for at in steps]
                best_step = int(job.inputs[name].manifest.metrics["best_step"])
                answers[name].figures |= lost_since_peak(steps, best_step)
        return rows

    def quality(self, answers: Mapping[str, Answers]) -> str | None:
        """The score that ranks the candidates; None if there is none that no candidate learned from."""
        stage, experiment = self.stage, self.job.experiment
        chain = {} if experiment is None else experiment.stages
        for kind in ("gold", "judge", "rouge_l") if stage.quality == "auto" else (stage.quality,):
            is_known = all(kind in given.scores for given in answers.values())
            if is_known and not (kind in JUDGES and stage.learned_from(kind, chain)):
                return kind
        return None

    def metrics(self, answers: Mapping[str, Answers]) -> dict[str, float]:
        """All summary metrics, METRIC/CANDIDATE."""
        stage, quality = self.stage, self.quality(answers)
        self.ranked_by = quality
        for given in answers.values():
            given.figures |= request_metrics(given)
        if quality is not None:
            self.add_gains(answers, quality)
        elif len(answers) > 1:
            self.warn(
                f"no score ranks the candidates, so no gain is known: {stage.name}.gold and judge are null, "
                "or a candidate learned from them, and there are no references."
            )
        metrics: dict[str, float] = {"prompts": len(self.questions)}
        for name in answers:
            figures = policy_metrics(name, answers, stage.start, quality)
            metrics |= {f"{metric}/{name}": value for metric, value in figures.items()}
            if name == stage.gated:
                metrics |= stage.of_subject(figures)
        # not best of n: the reward chose its answers, so their agreement with the gold score tells nothing
        methods = {each.name: each.method for each in stage.candidates}
        metrics |= agreement([given for name, given in answers.items() if methods[name] != "best_of_n"])
        self.warn_gained_words(answers)
        return metrics

    def add_gains(self, answers: Mapping[str, Answers], quality: str) -> None:
        """Add each candidate's gain over the best untrained one, and after how many requests it pays off."""
        candidates = {each.name: each for each in self.stage.candidates}
        untrained = [name for name in answers if self.is_untrained(candidates[name])]
        self.best_untrained = best = best_untrained(answers, untrained, quality)
        for name, own in answers.items():
            if best is not None and name != best:
                own.figures |= paired_gain(own, answers[best], quality).metrics("gain")
            if name in untrained:  # its set-up costs nothing worth speaking of
                continue
            if best is not None:
                own.figures |= break_even_metrics("break_even", own, answers[best])
            for other, each in candidates.items():
                if each.model == "base" and other != name:
                    own.figures |= break_even_metrics(f"break_even_{each.method}", own, answers[other])

    def warn(self, line: str) -> None:
        """Print a warning. It may quote an answer, so brackets are not markup."""
        self.job.progress.console.print(
            f"{self.stage.name}: {line}", style="yellow", highlight=False, markup=False
        )

    def warn_cut(self, candidate: Candidate, num_cut: Sequence[int]) -> None:
        """Warn that prompts of a candidate lost examples or passages."""
        if cut := sum(count > 0 for count in num_cut):
            name, method = self.stage.name, candidate.method
            what = "passages" if method == "retrieval" else "examples"
            self.job.progress.console.print(
                f"CUT: {candidate.name} lost {sum(num_cut)} {what} in {cut} of {len(num_cut)} prompts, "
                "since they did not fit the model's context beside the answer. It is measured with less than "
                f"{name}.{method}.{what} says: lower that or {name}.max_new_tokens, or take a model with a "
                "longer context.",
                style="bold red", markup=False, highlight=False,
            )  # fmt: skip

    def warn_gained_words(self, answers: Mapping[str, Answers]) -> None:
        """Report a word that appears in many more answers of a candidate than of the start."""
        start = self.stage.start
        if start not in answers:
            return
        for name, given in answers.items():
            word, more = gained_word(given.texts, answers[start].texts)
            if name != "base" and more.value >= MIN_REPORTED_WORD_GAIN:  # base comes before the start
                self.warn(f"{word!r} is in {more.value:.0%} more answers of {name} than of {start}.")

    def repeats(self, given: Answers, index: int) -> list[str]:
        """All answers to one question."""
        assert given.repeated is not None
        count = self.stage.samples_per_prompt
        return given.repeated[1][index * count : (index + 1) * count]

    def write(self, answers: Mapping[str, Answers], training: Sequence[Mapping[str, Any]]) -> None:
        """Write responses.jsonl (one answer per line), comparison.jsonl (one prompt per line),
        gold_over_steps.jsonl, and candidates.json (who was asked, and what the gains are over)."""
        job = self.job
        if job.compute.is_main:
            by_name = {each.name: each for each in self.stage.candidates}
            asked = [by_name[name] for name in answers]
            told = {
                "start": self.stage.start,
                "quality": self.ranked_by,
                "best_untrained": self.best_untrained,
                "candidates": [{**each._asdict(), "is_untrained": self.is_untrained(each)} for each in asked],
            }
            (job.directory / CANDIDATES).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        responses = [
            {
                "policy": name,
                "prompt": question.prompt,
                **({} if question.reference is None else {"reference": question.reference}),
                **given.row(index),
                **({"asked": given.asked[index]} if given.asked else {}),
                **({"responses": self.repeats(given, index)} if given.repeated else {}),
            }
            for name, given in answers.items()
            for index, question in enumerate(self.questions)
        ]
        for response in responses:
            job.sample(
                **{name: value for name, value in response.items() if name not in ("asked", "responses")}
            )
        job.write_rows("responses.jsonl", responses)
        job.write_rows(
            "comparison.jsonl",
            (
                {"prompt": question.prompt, **{name: given.row(index) for name, given in answers.items()}}
                for index, question in enumerate(self.questions)
            ),
        )
        job.write_rows("gold_over_steps.jsonl", training)
