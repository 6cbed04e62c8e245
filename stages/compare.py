"""Compare prompting, retrieval and tuned models on the same questions: quality and cost of the answers.

Reads   the base model; tuned artifacts; questions with or without answers; the training rows of `sft.data` as
        examples; a corpus to search; a reward.
Writes  comparison.md, comparison.csv and comparison.png; responses.jsonl (one answer of one candidate per
        line, with its full prompt); comparison.jsonl (one question per line); and the summary metrics,
        METRIC/CANDIDATE.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, PositiveInt

from rlhf.compare.candidate import Candidate, Method, candidate, is_stage, label, sampled_models
from rlhf.compare.dataset import QUESTIONS, find_questions
from rlhf.compare.prompts import Question
from rlhf.compare.stage import ComparisonStage
from rlhf.config import ConfigError
from rlhf.data.prepared import PreparedData
from rlhf.data.roles import training_roles
from rlhf.data.sources import SourceConfig
from rlhf.digests import DirectoryDigest
from rlhf.evaluation.references import QUALITIES
from rlhf.pipeline.fields import UNKEYED, Reads, reads_of
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import Metric
from rlhf.pipeline.stage import Stage
from rlhf.report.compare import comparison_cells, draw, shown_quality, write_csv


def _no_repeats(names: list[str]) -> list[str]:
    if len({label(name) for name in names}) < len(names):
        raise ValueError("two have the same name")
    return names


class CompareStage(ComparisonStage):
    """The keys `compare.*`. Values: conf/stages/compare.yaml."""

    version, in_chain, asks_prepared_rows, candidates_key = 8, False, False, "artifacts"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "prompts": Metric("questions", ".0f"),
        "leaks": Metric("left out, as trained on", ".0f"),
    }

    questions: Annotated[SourceConfig | None, UNKEYED]
    """Rows with a question and, if known, its answer; null uses the held-out rows of sft.data."""
    num_questions: PositiveInt | None
    """Number of questions, the first ones; null uses all."""
    methods: Annotated[list[Method], Field(min_length=1), AfterValidator(_no_repeats)]
    """How the base model is asked. Win rates are against the question alone (zero_shot)."""
    artifacts: Annotated[list[str], AfterValidator(_no_repeats)]
    """Tuned models. A name is a stage of this run, such as sft, ppo or merge. A value with a slash is a
    directory: an artifact of a store, a link to one, or any directory that `save_pretrained` wrote (its
    training cost is then unknown); or an endpoint, http://HOST:PORT/v1#NAME."""
    tuned_methods: Annotated[list[Method], Field(min_length=1), AfterValidator(_no_repeats)]
    """How the tuned models are asked."""

    @property
    def candidates(self) -> list[Candidate]:
        """The base model asked with each of `methods`, then the tuned models with each of `tuned_methods`."""
        return [
            *(candidate("base", method) for method in self.methods),
            *(candidate(name, method) for name in self.artifacts for method in self.tuned_methods),
        ]

    @property
    def start(self) -> str:
        """The base model."""
        return "base"

    @property
    def max_questions(self) -> int | None:
        """Largest number of questions."""
        return self.num_questions

    def packages(self) -> list[str]:
        """rapidfuzz computes ROUGE-L, matplotlib draws the picture."""
        return [*super().packages(), "rapidfuzz", "matplotlib"]

    def reads(self) -> Reads:
        """The tuned models, and the training rows: examples and passages are drawn from them, and a question
        that one of them asks is left out."""
        return reads_of(self)._replace(
            policies=tuple(("compare.artifacts", name) for name in self.artifacts if is_stage(name)),
            roles=(*training_roles(self.mount.roles), "retention"),
            base=True,
            sampled=tuple(
                sampled_models("compare.artifacts", self.models, {"base": ("compare.methods", "base")})
            ),
        )

    def needs(self, chain: Mapping[str, Stage]) -> tuple[str, ...]:
        """The rows of sft.data, if they are the questions, the examples or the corpus."""
        return ("sft",) if self.questions is None or self.shows_training_rows else ()

    def more_metrics(self) -> Iterator[str]:
        """The metrics of each candidate."""
        yield from (f"*/{each.name}" for each in self.candidates)

    def external_digests(self, digest: DirectoryDigest, chain: Mapping[str, Stage]) -> dict[str, str]:
        """The questions, and what the candidates need."""
        own = {} if self.questions is None else {QUESTIONS: self.questions.reading_digest(QUESTIONS)}
        return own | super().external_digests(digest, chain)

    def questions_of(self, data: PreparedData) -> tuple[list[Question], dict[str, float]]:
        """The questions that no training row asks, and the number of the others."""
        questions, num_leaks = find_questions(self.questions, data, self.num_questions)
        if questions[0].reference is None and self.quality in QUALITIES:
            raise ConfigError(
                f"compare.quality={self.quality} needs answers in compare.questions={self.questions}. "
                "Give rows with answers, or a compare.gold and compare.quality=gold."
            )
        return questions, {"leaks": num_leaks}

    def report(self, job: Job, metrics: Mapping[str, float]) -> None:
        """Write the table and the picture."""
        if metrics["leaks"]:
            job.progress.console.print(
                f"{metrics['leaks']:.0f} questions are asked by training rows too; they are left out.",
                style="bold red",
            )
        if job.compute.is_main:
            text = comparison_cells(metrics).markdown()
            (job.directory / "comparison.md").write_text(f"{text}\n", encoding="utf-8")
            write_csv(metrics, job.directory / "comparison.csv")
            if (quality := shown_quality(metrics, self.quality)) is not None:
                figure = draw(metrics, quality)
                figure.savefig(job.directory / "comparison.png", dpi=160, metadata={"Software": None})
