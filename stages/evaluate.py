"""Compare policies of the chain, such as base, SFT and PPO, on prompts that no stage trains on.

Reads   the policies; evaluation prompts (`evaluate.prompts`); the learned reward and, where it is known, the
        gold one; sft.data's held-out answers, which show what was learned; general texts and questions
        (`evaluate.retention`), which show what was forgotten; the answers to held-out prompts that a policy
        gave while it learned from scores, step by step.
Writes  responses.jsonl; comparison.jsonl (one prompt per line, all policies' answers); gold_over_steps.jsonl
        (gold score and KL of each of these steps); the summary metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveInt, model_validator

from rlhf.compare.candidate import Candidate, is_stage, parse_candidate, sampled_models
from rlhf.compare.prompts import Question
from rlhf.compare.stage import ComparisonStage
from rlhf.config import Complaint, ConfigError, did_you_mean
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import PromptRow, QuestionRow, Row, TextRow, prompt_identity
from rlhf.data.sources import PromptSource, SourceList
from rlhf.digests import DirectoryDigest
from rlhf.evaluation.lm_eval import Harness
from rlhf.evaluation.references import QUALITIES
from rlhf.models.start import directory_of
from rlhf.pipeline.checks import length_complaints
from rlhf.pipeline.fields import UNKEYED, Model, Reads, Rows, reads_of
from rlhf.pipeline.graph import root_of
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import INTERVAL, Metric, named
from rlhf.pipeline.stage import Stage, View

if TYPE_CHECKING:
    from rlhf.generation.policy_model import PolicyModel

START_GATES = ("length_ratio", "stop_rate_change", "word_gain")
"""Gates that compare answers with those of PPO's start."""
RETENTION_GATES = ("retention_perplexity_ratio", "question_accuracy_change")
"""Gates that need a retention set."""
SUBJECT_METRICS = (
    "win_rate", "win_rate_learned", "gold_gain", "judge_gain", "score_gain", "length_ratio",
    "stop_rate_change", "word_gain", "task_gain", "retention_perplexity_ratio", "retention_loss",
    "question_accuracy_change", "gain",
)  # fmt: skip
"""Summary metrics of each policy, as METRIC/POLICY; METRIC alone is that of evaluate.subject."""
POLICY_METRICS = (
    *SUBJECT_METRICS, "length_mean", "stop_rate", "distinct_1", "distinct_2", "score_mean", "score_deviation",
    "score_unscored", "gold_mean", "gold_deviation", "gold_unscored", "kl", "task_loss", "perplexity",
    "text_loss_*", "question_accuracy", "score_mean/*", "score_deviation/*", "gold_mean/*",
    "gold_deviation/*", "judge_*", "*_over_base", "gold_peak_step", "gold_lost", "prompt_tokens",
    "prompts_cut", "memory_bytes", "answer_loss", "rouge_l*", "exact_match*", "answer_found*", "seconds_*",
    "cost_per_thousand", "setup_*", "storage_bytes", "break_even*", "pass_at_*", "avg_at_*", "maj_at_*",
)  # fmt: skip


class EvaluateStage(ComparisonStage):
    """The keys `evaluate.*`. Values: conf/stages/evaluate.yaml."""

    version = 17
    metrics: ClassVar[Mapping[str, Metric]] = {
        **named(*SUBJECT_METRICS, "prompts", "gold_correlation"),
        "win_rate": Metric("win rate", "z.2f"),
        "gold_gain": Metric("gold gain", "+z.2f"),
        "task_gain": Metric("task gain", "+z.3f"),
        "retention_perplexity_ratio": Metric("perplexity ratio", "z.3f"),
    }

    prompts: Annotated[PromptSource | None, Rows("evaluate")]
    """A source, or a key as in ppo.prompts. If training reads the same rows, `prepare` sets a share of them
    aside. `auto` uses the demo's; if some data is yours, the same rows as ppo.prompts."""
    retention: Annotated[SourceList | None, Rows("retention")]
    """What the model should not forget: files of texts, of multiple-choice questions, or both. If training
    reads one of them too, `prepare` sets a share of it aside. Null measures no forgetting. `auto` uses the
    demo's; if some data is yours, null."""
    init: Model
    """What PPO started from: a stage (`sft`, `dpo`, ...), `base` or a directory. The other policies are
    compared with it."""
    policies: Annotated[list[str], Field(min_length=1), AfterValidator(sorted)]
    """The candidates that are compared, in any order: base, stages that make a policy (sft, ppo, merge, your
    own), `init`, the directory of evaluate.init, directories with a slash, and endpoints
    (http://HOST:PORT/v1#NAME). `+few_shot`, `+retrieval` or `+best_of_n` behind one says how it is asked:
    `base+few_shot`. `best_of_n` alone is that of evaluate.init. Win rate, gold gain and KL need what PPO
    started from, task gain and forgetting need base; otherwise these metrics are left out. `auto` uses base,
    what PPO started from, and ppo."""
    reference: str | None
    """The column of evaluate.prompts with a reference answer for each prompt; null: there are none."""
    lm_eval: list[str]
    """Tasks of EleutherAI's lm-eval, asked on one rank while the others wait; [] for none."""
    lm_eval_tasks: Annotated[str | None, UNKEYED]
    """A folder of lm-eval task files for these tasks; null for lm-eval's own, whose data it downloads."""
    lm_eval_limit: PositiveInt | None
    """Number of questions of each task; null uses all."""
    smallest_gain: Annotated[NonNegativeFloat, UNKEYED]
    """The smallest gain worth having, in deviations of the score over the answers of PPO's start."""
    num_prompts: PositiveInt | None
    """Number of evaluation prompts, the first ones; null uses all."""
    part: Literal["all", "choosing", "sealed"]
    """Which of these prompts are asked. `decide` chooses candidates with the choosing ones, and judges with
    the sealed ones, about a third, which the hash of each prompt draws."""
    subject: str
    """The policy that gates check: its win rate, gains and forgetting are logged without a policy's name.
    `auto` uses the only policy that is neither base nor what PPO started from; if there are several, ppo; if
    there is none, what PPO started from."""
    num_shown: Annotated[int, UNKEYED] = Field(ge=0)
    """Number of prompts that the report shows side by side, the first ones."""

    @model_validator(mode="after")
    def _gates_can_be_measured(self) -> Self:
        if self.quality in QUALITIES and self.reference is None:
            raise ValueError(
                f"KEY.quality={self.quality} needs KEY.reference, a column of the prompts. Name it"
            )
        names = [each.name for each in self.candidates]
        if self.subject not in names:
            raise ValueError(
                f"KEY.subject={self.subject} is not in KEY.policies=[{','.join(names)}]."
                f"{did_you_mean(self.subject, names)} Add it, or set KEY.subject to one of them"
            )
        start = f"{self.start} in KEY.policies" if self.start not in self.policies else ""
        other = f"another KEY.subject than {self.start}" if self.subject == self.start else ""
        base = "base in KEY.policies" if "base" not in self.policies else ""
        reward = "" if self.reward else "a reward"
        scored = self.reward or self.gold or self.judge or self.reference
        score = "" if scored else "a score: KEY.gold, KEY.reference, KEY.judge or KEY.reward"
        needs = {
            "win_rate": (start, other, score),
            "win_rate_learned": (start, other, reward),
            "score_gain": (start, other, reward),
            "gold_gain": (start, other, "" if self.gold else "gold"),
            "judge_gain": (start, other, "" if self.judge else "a judge"),
            **dict.fromkeys(("task_gain", *RETENTION_GATES), (base,)),
        }
        lacking: dict[str, list[str]] = {}
        for gate, missing in needs.items():
            lacks = next(filter(None, missing), None)
            if lacks and self.gates.get(gate) is not None and gate not in self.not_checked():
                lacking.setdefault(lacks, []).append(f"KEY.gates.{gate}")
        if lacking:
            needs_of_gates = (
                f"{' and '.join(gates)} {'needs' if len(gates) == 1 else 'need'} {lacks}"
                for lacks, gates in lacking.items()
            )
            off = " ".join(f"{gate}=null" for gates in lacking.values() for gate in gates)
            raise ValueError(f"{'; '.join(needs_of_gates)}. What cannot be measured is turned off with {off}")
        if "init" in self.policies and self.start != "init":
            raise ValueError(
                f"KEY.policies: init is a directory, and KEY.init={self.init} is none. Leave init out"
            )
        sets = [source.name for source in self.retention or []]
        if len(set(sets)) < len(sets):
            raise ValueError(
                f"KEY.retention has two sets whose figures would have the same name ({', '.join(sets)}). "
                "Rename one file"
            )
        return self

    @property
    def start(self) -> str:
        """The name, among the policies, of what PPO started from."""
        return self.init if directory_of(self.init) is None else "init"

    @property
    def start_model(self) -> str:
        """The value of `init`."""
        return self.init

    @property
    def candidates(self) -> list[Candidate]:
        """The policies, with the methods that ask them."""
        return [parse_candidate(each, self.start) for each in self.policies]

    @property
    def gated(self) -> str:
        """The policy that gates check."""
        return self.subject

    @property
    def max_questions(self) -> int | None:
        """Largest number of prompts."""
        return self.num_prompts

    def reads(self) -> Reads:
        """The policies, the evaluation prompts, the held-out answers and the retention set."""
        named = {"base": ("evaluate.init", "base"), "init": ("evaluate.init", self.init)}
        return reads_of(self)._replace(
            models={"init": self.init} if "init" in self.models else {},
            policies=tuple(("evaluate.policies", name) for name in filter(is_stage, self.models)),
            roles=("evaluate", "sft", "retention"),
            base=True,
            sampled=tuple(sampled_models("evaluate.policies", self.models, named)),
        )

    def needs(self, chain: Mapping[str, Stage]) -> tuple[str, ...]:
        """The prompts, and what prompted candidates are shown. Without held-out answers or retention sets,
        their metrics are left out."""
        return ("evaluate", *(["sft"] if self.shows_training_rows else []))

    def not_checked(self) -> dict[str, str]:
        """Without a retention set no forgetting is measured, and the start is not compared with itself."""
        is_compared = self.start in self.policies and self.subject != self.start
        alone = f"only {self.subject} of these is compared"
        reasons = {} if is_compared else dict.fromkeys(START_GATES, alone)
        for key in ("reward", "gold"):
            if getattr(self, key) is None:
                reasons["gold_correlation"] = f"{self.name}.{key}=null"
        return (
            reasons if self.retention else reasons | dict.fromkeys(RETENTION_GATES, "evaluate.retention=null")
        )

    def more_metrics(self) -> Iterator[str]:
        """The metrics of each policy, and lm-eval's."""
        names = [each.name for each in self.candidates]
        yield from (f"{metric}/{name}" for name in names for metric in POLICY_METRICS)
        yield from (("lm_eval/*",) if self.lm_eval else ())

    def external_digests(self, digest: DirectoryDigest, chain: Mapping[str, Stage]) -> dict[str, str]:
        """lm-eval's version and task files, and what the candidates need."""
        own = {"lm_eval": self.harness.digest()} if self.lm_eval else {}
        return own | super().external_digests(digest, chain)

    def packages(self) -> list[str]:
        """rapidfuzz computes ROUGE-L."""
        return [*super().packages(), *(["rapidfuzz"] if self.reference is not None else [])]

    def complaints(self, view: View) -> Iterator[Complaint]:
        """lm-eval is installed and has the tasks and their data. A retention set has what its gates need.
        Prompts and retention rows fit the context of PPO's start, and so of the model that PPO makes."""
        if self.lm_eval and view.directory is None and view.compute is None:  # the first time
            self.harness.check()
        if self.lm_eval and view.compute is not None:
            view.compute.main_only(self.harness.fetch)
        yield from super().complaints(view)
        if (data := view.data) is None:
            return
        if self.reference is not None:
            self.questions_of(data)
        rows = data.rows("retention", "evaluation")
        has_questions = any(isinstance(row, QuestionRow) for row in rows)
        has_texts = not all(isinstance(row, QuestionRow) for row in rows)
        for gate, words, is_there in (
            ("retention_perplexity_ratio", "texts", has_texts),
            ("question_accuracy_change", "questions", has_questions),
        ):
            if self.retention is not None and not is_there and self.gates.get(gate) is not None:
                yield Complaint(
                    f"evaluate.retention={', '.join(map(str, self.retention))}",
                    f"it holds no {words}, which gate {gate} needs.",
                    f"Add a source that does, or turn it off with evaluate.gates.{gate}=null.",
                )
        prompts = self.asked(data.rows("evaluate", "evaluation")[: self.num_prompts])
        yield from length_complaints(
            view, "evaluate.init", self.init, f"evaluate.prompts={self.prompts}", lambda: prompts,
            reserved_tokens=self.max_new_tokens,
            fix=f"Lower evaluate.max_new_tokens={self.max_new_tokens}, or leave out the longest prompts.",
        )  # fmt: skip
        yield from length_complaints(
            view, "evaluate.init", self.init, "evaluate.retention", lambda: rows, reserved_tokens=0,
            fix="Leave out the longest rows.",
        )  # fmt: skip

    @property
    def harness(self) -> Harness:
        """The lm-eval run that the config asks for."""
        folder = None if self.lm_eval_tasks is None else Path(self.lm_eval_tasks)
        return Harness(self.lm_eval, folder, self.lm_eval_limit)

    def questions_of(self, data: PreparedData) -> tuple[list[Question], dict[str, float]]:
        """The evaluation prompts, with their references."""
        rows = self.asked(data.rows("evaluate", "evaluation")[: self.num_prompts])
        questions = []
        for number, row in enumerate(rows, 1):
            assert isinstance(row, PromptRow)
            reference = None if self.reference is None else row.columns.get(self.reference)
            if self.reference is not None and reference is None:
                raise ConfigError(
                    f"{self.name}.reference={self.reference}: prompt {number} of evaluate.prompts has no "
                    f"such column. It has {', '.join(row.columns) or 'none'}. Add it, or set "
                    f"{self.name}.reference=null."
                )
            questions.append(Question(f"prompt {number}", row, None if reference is None else str(reference)))
        empty = [
            each.where for each in questions if each.reference is not None and not each.reference.strip()
        ]
        if empty:
            raise ConfigError(
                f"{self.name}.reference={self.reference} is empty in {len(empty)} of {len(rows)} prompts, "
                f"first in {empty[0]} of evaluate.prompts. Every answer to these would score 0. Fill it in, "
                "or leave these rows out."
            )
        return questions, {}

    def asked(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The prompts of `part`.

        Raises:
            ConfigError: there are none.
        """
        if self.part == "all":
            return rows
        from rlhf.evaluation.selection import split_questions

        try:
            choosing, sealed = split_questions([prompt_identity(row) for row in rows])
        except ValueError as error:
            raise ConfigError(Complaint(f"{self.name}.part={self.part}", str(error))) from None
        return [rows[index] for index in (choosing if self.part == "choosing" else sealed)]

    def retention_rows(self, data: PreparedData) -> Sequence[TextRow | QuestionRow]:
        """None for the choosing prompts: what is forgotten chooses no candidate."""
        return () if self.part == "choosing" else super().retention_rows(data)

    def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
        """That of all comparisons, from the directory where the start's training began."""
        return super().cost(on.starting(directory_of(root_of("evaluate.init", self.init, chain)[1])), chain)

    def knowledge(self, job: Job, model: str, policy: PolicyModel) -> dict[str, float]:
        """The metrics of lm-eval's tasks."""
        if not self.lm_eval:
            return {}
        with job.progress.task(f"{self.name}: lm-eval asks {model}", 1) as task:
            figures = policy.on_main(lambda: self.harness.measure(policy))
            task.advance()
        return figures

    def of_subject(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The metrics of `SUBJECT_METRICS`, with their intervals."""
        return {name: value for name, value in figures.items() if INTERVAL.sub("", name) in SUBJECT_METRICS}
