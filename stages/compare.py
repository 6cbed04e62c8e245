"""Compare prompting, retrieval and tuned models on the same questions: quality and cost of the answers.

Reads   the base model; tuned artifacts; questions with or without answers; the training rows of `sft.data` as
        examples; a corpus to search; a reward.
Writes  comparison.md, comparison.csv and comparison.png; answers.jsonl (one answer of one contender
        per line, with its full prompt); and the summary metrics, METRIC/CONTENDER.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    model_validator,
)

from rlhf.compare.artifacts import (
    check_policy,
    contender,
    content_of,
    is_of_this_run,
    label,
    path_of,
    training_seconds,
    tuned_artifact,
)
from rlhf.compare.context_budget import ContextBudget, Sizes, measure_sizes
from rlhf.compare.cost import cost_of, model_bytes
from rlhf.compare.dataset import CORPUS, QUESTIONS, Library, find_library, find_questions
from rlhf.compare.prompts import FewShotConfig, PromptMethod, Question, RetrievalConfig, RetrieverName
from rlhf.config import Complaint, ConfigError
from rlhf.costs.sampling import sampling_cost
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost, joined, sequential_cost
from rlhf.data.prepared import PreparedData
from rlhf.data.roles import training_roles
from rlhf.data.schema import PromptRow
from rlhf.data.sources import SourceConfig
from rlhf.digests import DirectoryDigest
from rlhf.distributed.device import hardware
from rlhf.models.start import ModelDirectory
from rlhf.pipeline.fields import UNKEYED, Memory, Reads, Score, reads_of
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import Metric
from rlhf.pipeline.stage import Stage, View
from rlhf.report.compare import Quality, comparison_cells, draw, write_csv
from rlhf.rewards.kinds import models_of

if TYPE_CHECKING:
    from rlhf.compare.answering import Answers
    from rlhf.generation.policy_model import PolicyModel

PACKAGES = ("bm25s", "rapidfuzz", "matplotlib")
"""Packages of `pip install -e '.[compare]'`, imported where they are used."""
SCORING_PACKAGES = ("bm25s", "rapidfuzz")
"""Packages whose versions change figures: bm25s finds passages, rapidfuzz computes ROUGE-L."""


def _no_repeats(names: list[str]) -> list[str]:
    if len({label(name) for name in names}) < len(names):
        raise ValueError("two have the same name")
    return names


class CompareStage(Stage):
    """The keys `compare.*`. Values: conf/stages/compare.yaml."""

    version, samples, in_chain, is_timed, repeats_keys = 6, True, False, True, True
    metrics: ClassVar[Mapping[str, Metric]] = {
        "questions": Metric("questions", ".0f"),
        "leaks": Metric("left out, as trained on", ".0f"),
    }

    questions: Annotated[SourceConfig | None, UNKEYED]
    """Rows with a question and, if known, its answer; null uses the held-out rows of sft.data."""
    corpus: Annotated[SourceConfig | None, UNKEYED]
    """What retrieval searches: texts, or questions with answers; null uses the training rows of sft.data."""
    num_questions: PositiveInt | None
    """Number of questions, the first ones; null uses all."""
    methods: Annotated[list[PromptMethod], Field(min_length=1), AfterValidator(_no_repeats)]
    """Prompting methods of the base model. Win rates are against the first one."""
    artifacts: Annotated[list[str], AfterValidator(_no_repeats)]
    """Tuned models. A name is a stage of this run, such as sft, ppo or merge. A value with a slash is a
    directory: an artifact of a store, a link to one, or any directory that `save_pretrained` wrote (its
    training cost is then unknown)."""
    tuned_methods: Annotated[list[PromptMethod], Field(min_length=1), AfterValidator(_no_repeats)]
    """Prompting methods of the tuned models."""
    retriever: RetrieverName
    """bm25 compares words; embeddings are mean hidden states of the model that answers."""
    few_shot: FewShotConfig
    retrieval: RetrievalConfig
    reward: Score | None
    """Scores the answers, and decides which of two wins. With null, ROUGE-L decides."""
    quality: Quality
    """The quality metric that the picture shows."""
    price_per_hour: PositiveFloat
    """Price of the machine per hour, in any currency, for training and for answering."""
    max_new_tokens: PositiveInt
    """Longest answer, in tokens; longer ones are cut off."""
    temperature: NonNegativeFloat
    """Sampling temperature; 0 always takes the likeliest token."""
    micro_batch_tokens: Memory
    """Tokens per forward pass that measures or embeds; lower it when memory runs out."""
    _sizes: Sizes | None = PrivateAttr(None)
    """Measured by `complaints`, for `cost`."""

    @model_validator(mode="after")
    def _quality_can_be_measured(self) -> Self:
        if self.quality == "score" and self.reward is None:
            raise ValueError("KEY.quality=score needs KEY.reward. Give one, or choose another KEY.quality")
        return self

    def complaints(self, view: View) -> Iterator[Complaint]:
        """The extra packages are installed. Then: questions, corpus and examples can be read, and each
        question fits the base model's context."""
        if view.prepared is None:
            missing = [package for package in PACKAGES if find_spec(package) is None]
            if missing:
                why = f"it needs {', '.join(missing)}."
                yield Complaint("stage=compare", why, "Install: pip install -e '.[compare]'")
                return
            for name in self.artifacts:
                if not is_of_this_run(name):
                    artifact = tuned_artifact(name)
                    check_policy(name, artifact, view.chain)
                    training_seconds(artifact)
            return
        data, base = view.prepared
        questions, _, library = self.questions_and_library(data)
        budget = ContextBudget(base.load_tokenizer(), base.context_length, self.max_new_tokens)
        self._sizes = measure_sizes(
            budget, questions, library, {*self.contender_methods()}, self.few_shot, self.retrieval
        )

    def reads(self) -> Reads:
        """The tuned models, and the training rows: examples and passages are drawn from them, and a question
        that one of them asks is left out."""
        own_stages = [name for name in self.artifacts if is_of_this_run(name)]
        tuned = [name if name in own_stages else ModelDirectory(name) for name in self.artifacts]
        return reads_of(self)._replace(
            policies=tuple(("compare.artifacts", name) for name in own_stages),
            roles=training_roles(self.mount.roles),
            base=True,
            sampled=(("compare.methods", "base"), *(("compare.artifacts", each) for each in tuned)),
        )

    def needs(self, chain: Mapping[str, Stage]) -> tuple[str, ...]:
        """The rows of sft.data, if they are the questions, the examples or the corpus."""
        searches = self.corpus is None and "retrieval" in self.contender_methods()
        return (
            ("sft",) if self.questions is None or searches or "few_shot" in self.contender_methods() else ()
        )

    def more_metrics(self) -> Iterator[str]:
        """The metrics of each contender."""
        names = [contender(None, method) for method in self.methods]
        names += [contender(name, method) for name in self.artifacts for method in self.tuned_methods]
        yield from (f"*/{name}" for name in names)

    def external_digests(self, digest: DirectoryDigest, chain: Mapping[str, Stage]) -> dict[str, str]:
        """Questions, corpus, artifacts from elsewhere, and the machine that is timed."""
        sources = {QUESTIONS: self.questions, CORPUS: self.corpus}
        digests = {key: source.reading_digest(key) for key, source in sources.items() if source is not None}
        elsewhere = {
            name: content_of(tuned_artifact(name), digest)
            for name in self.artifacts
            if not is_of_this_run(name)
        }
        versions = {name: importlib.metadata.version(name) for name in SCORING_PACKAGES}
        return digests | elsewhere | versions | {"machine": hardware()}

    def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
        """Each contender answers each question, and then reads the reference behind the same prompt.
        Questions are asked one at a time, so a single rank answers."""
        assert self._sizes is not None, "complaints come first"
        alone = replace(on, machine=replace(on.machine, ranks=1))
        cost = replace(self.cost_on(alone), sampled=0)  # prompts are cut to the context, so none is too long
        return replace(cost, phases=self.cost_on(on).phases) if on.shards_weights else cost

    def cost_on(self, on: CostContext) -> StageCost:
        """`cost` on the ranks of this setup."""
        assert self._sizes is not None
        costs, models = [], len(models_of(self.reward))
        for method in self.contender_methods():
            asked = self._sizes.asked(method, self.few_shot, self.retrieval)
            asked = asked.cut(on.shape.context - self.max_new_tokens)
            known = joined(asked, self._sizes.references).cut(on.shape.context)
            costs.append(sampling_cost(
                on, asked, samples=1, new_tokens=self.max_new_tokens, batch_rows=1,
                micro_batch_tokens=self.micro_batch_tokens, policies=1, rollouts=asked.rows,
                readings=models, measures=0, models=max(1, models), others=[known],
            ))  # fmt: skip
        return sequential_cost(costs)

    def contender_methods(self) -> list[PromptMethod]:
        """The prompting method of each contender."""
        return [*self.methods, *(method for _ in self.artifacts for method in self.tuned_methods)]

    def questions_and_library(self, data: PreparedData) -> tuple[list[Question], int, Library]:
        """The questions, the number left out because training rows ask them, and the source of examples and
        passages.

        Raises:
            ConfigError: there are no questions, or they lack what the config needs.
        """
        questions, num_leaks = find_questions(self.questions, data, self.num_questions)
        if questions[0].reference is None and self.quality != "score":
            raise ConfigError(
                f"compare.quality={self.quality} needs answers in compare.questions={self.questions}. "
                "Give rows with answers, or a compare.reward and compare.quality=score."
            )
        library = find_library(self.corpus, data)
        if "few_shot" in self.contender_methods() and not library.examples:
            raise ConfigError(
                "compare.methods: few_shot takes its examples from the training rows of sft.data that hold "
                "one question and its answer, and there are none. Remove few_shot."
            )
        return questions, num_leaks, library

    def run(self, job: Job) -> Mapping[str, float]:
        """Ask every contender every question, score the answers, and compute their cost."""
        from rlhf.compare.figures import break_evens, contender_metrics, win_rate

        questions, num_leaks, library = self.questions_and_library(job.data)
        if num_leaks:
            job.progress.console.print(
                f"{num_leaks} questions are asked by training rows too; they are left out.", style="bold red"
            )
        answers: dict[str, Answers] = {}
        for model in (None, *self.artifacts):
            answers |= self.ask(job, model, library, questions)
        self.score(job, questions, answers)
        metrics: dict[str, float] = {"questions": len(questions), "leaks": num_leaks}
        first = next(iter(answers.values()))
        for name, own_answers in answers.items():
            figures = contender_metrics(own_answers, self.price_per_hour)
            if own_answers is not first:
                figures |= win_rate(own_answers, first)
            metrics |= {f"{metric}/{name}": value for metric, value in figures.items()}
        metrics |= break_evens(metrics, list(answers))
        self.write(job, questions, answers)
        if job.compute.is_main:
            text = comparison_cells(metrics).markdown()
            (job.directory / "comparison.md").write_text(f"{text}\n", encoding="utf-8")
            write_csv(metrics, job.directory / "comparison.csv")
            figure = draw(metrics, self.quality)
            figure.savefig(job.directory / "comparison.png", dpi=160, metadata={"Software": None})
        return metrics

    def ask(
        self, job: Job, model: str | None, library: Library, questions: Sequence[Question]
    ) -> dict[str, Answers]:
        """The answers of one model (None: the base), by contender. No other model is in memory."""
        from rlhf.compare.answering import answer_one_by_one, make_prompt_builder
        from rlhf.compare.retrieval import make_index
        from rlhf.evaluation.intervals import ratio
        from rlhf.evaluation.reference_loss import reference_losses

        policy, training, size = self.load(job, model)
        answers = {}
        for method in self.methods if model is None else self.tuned_methods:
            name = contender(model, method)
            index = partial(
                make_index, self.retriever, policy=policy, micro_batch_tokens=self.micro_batch_tokens
            )
            builder = make_prompt_builder(method, library, self.few_shot, self.retrieval, index, job.seed)
            with job.progress.task(f"compare: {name} answers", len(questions)) as task:
                given = answer_one_by_one(
                    policy, builder, questions,
                    max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=job.seed,
                    on_answer=task.advance,
                )  # fmt: skip
            references = [question.reference for question in questions if question.reference is not None]
            if references:
                losses = reference_losses(policy, given.asked, references, self.micro_batch_tokens)
                given.figures |= ratio(*losses).metrics("answer_loss")
            given.figures["storage_bytes"] = size + builder.num_bytes
            if training is not None:
                setup = training + builder.setup_seconds
                given.figures |= {
                    "setup_seconds": setup, "setup_cost": cost_of(setup, self.price_per_hour)
                }  # fmt: skip
            warn_cut_prompts(job, name, method, given)
            answers[name] = given
        return answers

    def load(self, job: Job, model: str | None) -> tuple[PolicyModel, float | None, int]:
        """A policy, the seconds that its training took (None if unknown), and its size in bytes."""
        if model is None:
            return job.policy(job.base), 0.0, model_bytes(job.base.directory)
        artifact = job.inputs[model] if is_of_this_run(model) else tuned_artifact(model, read=True)
        path = path_of(artifact)
        return job.policy(path), training_seconds(artifact), model_bytes(path)

    def score(self, job: Job, questions: Sequence[Question], answers: Mapping[str, Answers]) -> None:
        """Compare every answer with its reference, and let the reward score it."""
        from rlhf.compare.figures import score_by_reference
        from rlhf.rewards.combined import usable_scores

        for given in answers.values():
            score_by_reference(given, questions)
        if self.reward is None:
            return
        reward = job.reward(self.reward, self.micro_batch_tokens)
        rows = [PromptRow(question.prompt, columns=question.columns) for question in questions]
        for given in job.progress.track(answers.values(), "compare: score", len(answers)):
            scores = usable_scores(reward, rows, given.texts, f"compare.reward={self.reward}")
            given.scores["score"] = scores.score_B

    def write(self, job: Job, questions: Sequence[Question], answers: Mapping[str, Answers]) -> None:
        """Write answers.jsonl, one answer per line."""
        rows = [
            {
                "contender": name,
                "prompt": question.prompt,
                "reference": question.reference,
                **given.row(index),
                "asked": given.asked[index],
            }
            for name, given in answers.items()
            for index, question in enumerate(questions)
        ]
        job.write_rows("answers.jsonl", rows)
        for row in rows:
            job.sample(**{name: value for name, value in row.items() if name != "asked"})


def warn_cut_prompts(job: Job, name: str, method: PromptMethod, answers: Answers) -> None:
    """Warn that prompts of a contender lost examples or passages."""
    cut = sum(count > 0 for count in answers.num_cut)
    if cut:
        what = "passages" if method == "retrieval" else "examples"
        job.progress.console.print(
            f"CUT: {name} lost {sum(answers.num_cut)} {what} in {cut} of {len(answers.num_cut)} prompts, "
            "since they did not fit the model's context beside the answer. It is measured with less than "
            f"compare.{method}.{what} says: lower that or compare.max_new_tokens, or take a model with a "
            "longer context.",
            style="bold red", markup=False, highlight=False,
        )  # fmt: skip
