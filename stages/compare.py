"""Compare prompting, retrieval and tuned models on the same questions: quality and cost of the answers.

Reads   the base model; tuned artifacts; questions with or without answers; the training rows of `sft.data` as
        examples; a corpus to search; a reward.
Writes  comparison.md, comparison.csv and comparison.png; answers.jsonl (one contender's answer a line,
        with all that it was asked); and the summary metrics, METRIC/CONTENDER.
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
from rlhf.costs.stage_cost import StageCost, joined, one_after_the_other
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
"""Of `pip install -e '.[compare]'`; imported where they are used."""
SCORING = ("bm25s", "rapidfuzz")
"""Whose versions decide figures: what is found, and ROUGE-L."""


def _once(names: list[str]) -> list[str]:
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
    """Rows with a question and, if there is one, its answer; null uses the held-out rows of sft.data."""
    corpus: Annotated[SourceConfig | None, UNKEYED]
    """What retrieval searches: texts, or questions with answers; null uses the training rows of sft.data."""
    num_questions: PositiveInt | None
    """How many questions, the first ones; null uses all."""
    methods: Annotated[list[PromptMethod], Field(min_length=1), AfterValidator(_once)]
    """How the base model is asked; the first is what the others' win rate is against."""
    artifacts: Annotated[list[str], AfterValidator(_once)]
    """Tuned models. A word is a stage of this run, such as sft, ppo or merge. A value with a slash
    is a directory: of a store, a link to one, or any directory that `save_pretrained`
    wrote (the cost of its training is then unknown)."""
    tuned_methods: Annotated[list[PromptMethod], Field(min_length=1), AfterValidator(_once)]
    """How the tuned models are asked."""
    retriever: RetrieverName
    """bm25 compares words; embeddings are mean hidden states of the model that answers."""
    few_shot: FewShotConfig
    retrieval: RetrievalConfig
    reward: Score | None
    """Scores the answers, and decides who wins; null leaves it out, and ROUGE-L decides."""
    quality: Quality
    """What the picture shows."""
    price_per_hour: PositiveFloat
    """What the machine costs, in any currency; the same for training and for answering."""
    max_new_tokens: PositiveInt
    """A longer answer is cut off."""
    temperature: NonNegativeFloat
    """0 takes the likeliest token each time."""
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
        """What it needs beside the other stages' packages is there. Then: every question, corpus and example
        can be had, and each question fits the base model's context."""
        if view.prepared is None:
            missing = [package for package in PACKAGES if find_spec(package) is None]
            if missing:
                why = f"it needs {', '.join(missing)}."
                yield Complaint("stage=compare", why, "Install: pip install -e '.[compare]'")
                return
            for name in self.artifacts:
                if not is_of_this_run(name):
                    found = tuned_artifact(name)
                    check_policy(name, found, view.chain)
                    training_seconds(found)
            return
        data, base = view.prepared
        questions, _, library = self.material(data)
        room = ContextBudget(base.load_tokenizer(), base.context_length, self.max_new_tokens)
        self._sizes = measure_sizes(room, questions, library, {*self.ways()}, self.few_shot, self.retrieval)

    def reads(self) -> Reads:
        """The tuned models. Examples and passages are training rows; no training row may ask a question."""
        made = [name for name in self.artifacts if is_of_this_run(name)]
        tuned = [name if name in made else ModelDirectory(name) for name in self.artifacts]
        return reads_of(self)._replace(
            policies=tuple(("compare.artifacts", name) for name in made),
            roles=training_roles(self.mount.roles),
            base=True,
            sampled=(("compare.methods", "base"), *(("compare.artifacts", each) for each in tuned)),
        )

    def needs(self, chain: Mapping[str, Stage]) -> tuple[str, ...]:
        """Rows of sft.data where they are the questions, the examples or the corpus."""
        searches = self.corpus is None and "retrieval" in self.ways()
        return ("sft",) if self.questions is None or searches or "few_shot" in self.ways() else ()

    def more_metrics(self) -> Iterator[str]:
        """Those of each contender."""
        asked = [contender(None, method) for method in self.methods]
        asked += [contender(name, method) for name in self.artifacts for method in self.tuned_methods]
        yield from (f"*/{name}" for name in asked)

    def external_digests(self, digest: DirectoryDigest, chain: Mapping[str, Stage]) -> dict[str, str]:
        """Questions, corpus, artifacts from elsewhere, and the machine that is timed."""
        sources = {QUESTIONS: self.questions, CORPUS: self.corpus}
        digests = {key: source.reading_digest(key) for key, source in sources.items() if source is not None}
        elsewhere = {
            name: content_of(tuned_artifact(name), digest)
            for name in self.artifacts
            if not is_of_this_run(name)
        }
        versions = {name: importlib.metadata.version(name) for name in SCORING}
        return digests | elsewhere | versions | {"machine": hardware()}

    def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
        """Each contender decodes an answer to each question, and reads it behind its longer prompt. Questions
        are asked one at a time, so a single rank answers."""
        assert self._sizes is not None, "complaints come first"
        alone = replace(on, machine=replace(on.machine, ranks=1))
        cost = replace(self.cost_on(alone), sampled=0)  # examples and passages fill what the model can read
        return replace(cost, phases=self.cost_on(on).phases) if on.shards_weights else cost

    def cost_on(self, on: CostContext) -> StageCost:
        """`cost` with these ranks."""
        assert self._sizes is not None
        costs, models = [], len(models_of(self.reward))
        for method in self.ways():
            asked = self._sizes.asked(method, self.few_shot, self.retrieval)
            asked = asked.cut(on.shape.context - self.max_new_tokens)
            known = joined(asked, self._sizes.references).cut(on.shape.context)
            costs.append(sampling_cost(
                on, asked, samples=1, new_tokens=self.max_new_tokens, batch_rows=1,
                micro_batch_tokens=self.micro_batch_tokens, policies=1, rollouts=asked.rows,
                readings=models, measures=0, models=max(1, models), others=[known],
            ))  # fmt: skip
        return one_after_the_other(costs)

    def ways(self) -> list[PromptMethod]:
        """How each contender is asked."""
        return [*self.methods, *(method for _ in self.artifacts for method in self.tuned_methods)]

    def material(self, data: PreparedData) -> tuple[list[Question], int, Library]:
        """The questions, how many more were left out because training rows ask them, and what prompts are
        made of.

        Raises:
            ConfigError: there are none, or they do not fit the knobs.
        """
        questions, num_leaks = find_questions(self.questions, data, self.num_questions)
        if questions[0].reference is None and self.quality != "score":
            raise ConfigError(
                f"compare.quality={self.quality} needs answers in compare.questions={self.questions}. "
                "Give rows with answers, or a compare.reward and compare.quality=score."
            )
        library = find_library(self.corpus, data)
        if "few_shot" in self.ways() and not library.examples:
            raise ConfigError(
                "compare.methods: few_shot takes its examples from the training rows of sft.data that hold "
                "one question and its answer, and there are none. Remove few_shot."
            )
        return questions, num_leaks, library

    def run(self, job: Job) -> Mapping[str, float]:
        """Ask everybody everything, score the answers, count what they cost."""
        from rlhf.compare.figures import break_evens, contender_metrics, win_rate

        questions, num_leaks, library = self.material(job.data)
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
        for name, said in answers.items():
            found = contender_metrics(said, self.price_per_hour)
            if said is not first:
                found |= win_rate(said, first)
            metrics |= {f"{metric}/{name}": value for metric, value in found.items()}
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
        """Every answer of one model (None: the base), by contender; it is the only one in memory."""
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
            asking = make_prompt_builder(method, library, self.few_shot, self.retrieval, index, job.seed)
            with job.progress.task(f"compare: {name} answers", len(questions)) as task:
                said = answer_one_by_one(
                    policy, asking, questions,
                    max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=job.seed,
                    on_answer=task.advance,
                )  # fmt: skip
            references = [question.reference for question in questions if question.reference is not None]
            if references:
                losses = reference_losses(policy, said.asked, references, self.micro_batch_tokens)
                said.figures |= ratio(*losses).metrics("answer_loss")
            said.figures["storage_bytes"] = size + asking.num_bytes
            if training is not None:
                setup = training + asking.setup_seconds
                said.figures |= {
                    "setup_seconds": setup, "setup_cost": cost_of(setup, self.price_per_hour)
                }  # fmt: skip
            tell_cut(job, name, method, said)
            answers[name] = said
        return answers

    def load(self, job: Job, model: str | None) -> tuple[PolicyModel, float | None, int]:
        """A policy, the seconds that its training took, where that is known, and its bytes."""
        if model is None:
            return job.policy(job.base), 0.0, model_bytes(job.base.directory)
        artifact = job.inputs[model] if is_of_this_run(model) else tuned_artifact(model, read=True)
        path = path_of(artifact)
        return job.policy(path), training_seconds(artifact), model_bytes(path)

    def score(self, job: Job, questions: Sequence[Question], answers: Mapping[str, Answers]) -> None:
        """Put every answer beside its reference, and before the reward."""
        from rlhf.compare.figures import score_by_reference
        from rlhf.rewards.combined import usable_scores

        for said in answers.values():
            score_by_reference(said, questions)
        if self.reward is None:
            return
        reward = job.reward(self.reward, self.micro_batch_tokens)
        rows = [PromptRow(question.prompt, columns=question.columns) for question in questions]
        for said in job.progress.track(answers.values(), "compare: score", len(answers)):
            found = usable_scores(reward, rows, said.texts, f"compare.reward={self.reward}")
            said.scores["score"] = found.score_B

    def write(self, job: Job, questions: Sequence[Question], answers: Mapping[str, Answers]) -> None:
        """Every answer by itself."""
        rows = [
            {
                "contender": name,
                "prompt": question.prompt,
                "reference": question.reference,
                **said.row(index),
                "asked": said.asked[index],
            }
            for name, said in answers.items()
            for index, question in enumerate(questions)
        ]
        job.write_rows("answers.jsonl", rows)
        for row in rows:
            job.sample(**{name: value for name, value in row.items() if name != "asked"})


def tell_cut(job: Job, name: str, method: PromptMethod, said: Answers) -> None:
    """Say loudly that a contender was not given all that it should have been."""
    cut = sum(count > 0 for count in said.num_cut)
    if cut:
        what = "passages" if method == "retrieval" else "examples"
        job.progress.console.print(
            f"CUT: {name} lost {sum(said.num_cut)} {what} in {cut} of {len(said.num_cut)} prompts, since "
            "they did not fit the model's context beside the answer. It is measured with less than "
            f"compare.{method}.{what} says: lower that or compare.max_new_tokens, or take a model with a "
            "longer context.",
            style="bold red", markup=False, highlight=False,
        )  # fmt: skip
