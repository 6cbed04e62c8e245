"""What `evaluate` and `compare` have in common: all candidates are asked the same questions in the same way.

The two stages choose the candidates and the questions.
"""

from __future__ import annotations

import importlib.metadata
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    model_validator,
)

from rlhf.compare.artifacts import check_policy, content_of, training_seconds, tuned_artifact
from rlhf.compare.candidate import (
    JUDGES,
    METHODS,
    PROMPTED,
    Candidate,
    Method,
    is_directory,
    is_endpoint,
    is_stage,
)
from rlhf.compare.context_budget import ContextBudget, Sizes, measure_sizes
from rlhf.compare.dataset import Library, find_library
from rlhf.compare.endpoint import EndpointConfig
from rlhf.compare.prompts import FewShotConfig, Question, RetrievalConfig, RetrieverName
from rlhf.config import Complaint, ConfigError, did_you_mean
from rlhf.costs.sampling import max_virtual_tokens, sampling_cost
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost, joined, sequential_cost
from rlhf.data.prepared import LengthStats, PreparedData
from rlhf.data.schema import QuestionRow, TextRow
from rlhf.data.sources import SourceConfig
from rlhf.digests import DirectoryDigest
from rlhf.distributed.device import hardware
from rlhf.evaluation.references import Quality
from rlhf.pipeline.auto import JUDGE
from rlhf.pipeline.fields import UNKEYED, Memory, Score, peft_of
from rlhf.pipeline.graph import named_source, preference_roles, with_ancestors
from rlhf.pipeline.job import Job
from rlhf.pipeline.recipe import BEST_OF_N
from rlhf.pipeline.stage import Stage, View
from rlhf.rewards.kinds import is_verifier, keyed_parts, models_of, parts_of, stage_of

if TYPE_CHECKING:
    from rlhf.generation.policy_model import PolicyModel

SEQUENCES_PER_RETENTION_ROW = 2
"""Sequences per retention row, roughly: one for a text, one per choice for a question."""


class ComparisonStage(Stage):
    """A stage that asks several candidates the same questions, and scores their answers."""

    samples: ClassVar[bool] = True
    repeats_keys: ClassVar[bool] = True
    asks_prepared_rows: ClassVar[bool] = True
    """Whether `prepare` has checked and measured its questions."""
    candidates_key: ClassVar[str] = "policies"
    """The key that lists the tuned candidates."""

    corpus: Annotated[SourceConfig | None, UNKEYED]
    """What retrieval searches: texts, or questions with answers; null uses the training rows of sft.data."""
    retriever: RetrieverName
    """bm25 compares words; embeddings are mean hidden states of the model that answers."""
    few_shot: FewShotConfig
    retrieval: RetrievalConfig
    endpoint: EndpointConfig
    reward: Score | None
    """The reward that PPO was trained on; null leaves it out."""
    gold: Score | None
    """The true reward, if it is known; null leaves it out. `auto` uses VADER for the demo; if some data is
    yours, null. If no server is asked, it also scores the answers to held-out prompts that PPO gave while it
    learned."""
    judge: Score | None
    """A score that judges if no gold score is known. No policy may learn from it. `auto` is null if gold is
    set. Otherwise it is a second reward model, `reward@judge`, which learns from pairs that nothing else
    learns from (prepare.judge_fraction), if reward.pairs or dpo.data is a file of yours with 1,000 rows."""
    quality: Quality
    """The score that ranks the candidates: `gold`, `judge`, `score` (the reward), or a comparison with the
    reference answers (`rouge_l`, `exact_match`, `answer_found`). `auto` takes the gold score, else the
    judge's, else ROUGE-L if there are references. No candidate may have learned from it."""
    best_of: int = Field(ge=2)
    """Answers per prompt for `best_of_n`. The one with the highest reward is used. The KL of `best_of_n` of
    PPO's start is the upper bound log n - (n - 1) / n (Beirami et al. 2024)."""
    samples_per_prompt: PositiveInt
    """Answers per prompt. With several, a verifier (`gold`, `judge` or `reward`) also gives `pass_at_K`,
    `avg_at_N` and `maj_at_N`. All other metrics are of the first answer."""
    num_timed: NonNegativeInt
    """Number of prompts, the first ones, that each candidate is also asked one at a time, for the latency and
    cost of a request; 0 for none."""
    price_per_hour: PositiveFloat
    """Price of the machine per hour, in any currency, for training and for answering."""
    num_references: NonNegativeInt | None
    """Number of held-out answers of sft.data that measure what was learned, the first ones; null uses all."""
    max_new_tokens: PositiveInt
    """Longest response, in tokens; longer ones are cut off."""
    temperature: NonNegativeFloat
    """Sampling temperature; divides the logits of every policy. 0 always takes the likeliest token; then no
    KL is measured."""
    top_p: float = Field(gt=0, le=1)
    """Nucleus sampling. Also below 1, the KL is that of the full distribution."""
    batch_rows: PositiveInt
    """Rows that are decoded together."""
    micro_batch_tokens: Memory
    """Tokens per forward pass that measures or embeds; lower it when memory runs out."""
    _sizes: Sizes | None = PrivateAttr(None)
    """Measured by `complaints`, for `cost`, where `prepare` has not measured the prompts."""

    @property
    @abstractmethod
    def candidates(self) -> list[Candidate]:
        """Who is asked."""

    @property
    @abstractmethod
    def start(self) -> str:
        """The candidate with which the others are compared."""

    @abstractmethod
    def questions_of(self, data: PreparedData) -> tuple[list[Question], dict[str, float]]:
        """What is asked, and metrics of its choice.

        Raises:
            ConfigError: there are no questions, or they lack what the config needs.
        """

    def retention_rows(self, data: PreparedData) -> Sequence[TextRow | QuestionRow]:
        """The texts and questions that show what was forgotten."""
        return data.rows("retention", "evaluation")

    @property
    @abstractmethod
    def max_questions(self) -> int | None:
        """Largest number of questions; None for all."""

    @property
    def start_model(self) -> str:
        """The value of the key that names the start: a stage, `base` or a directory."""
        return self.start

    @property
    def gated(self) -> str | None:
        """The candidate whose metrics are also logged without its name."""
        return None

    @property
    def models(self) -> list[str]:
        """The models that answer, each once."""
        return [*dict.fromkeys(each.model for each in self.candidates)]

    @property
    def methods_used(self) -> set[Method]:
        """The methods of all candidates."""
        return {each.method for each in self.candidates}

    @model_validator(mode="after")
    def _candidates_can_be_asked(self) -> Self:
        names, key = [each.name for each in self.candidates], f"KEY.{self.candidates_key}"
        for model in filter(is_stage, self.models):
            name, plus, method = model.partition("+")
            known = self.mount.policies
            if plus and {*model.split("+")[1:]} <= {*METHODS}:
                raise ValueError(f"{key}: {model}+...: only one method may follow a model")
            if plus:
                raise ValueError(
                    f"{key}: {model}: there is no method {method}.{did_you_mean(method, METHODS)} One of "
                    f"{', '.join(METHODS[1:])} may follow a model, as in {name}+few_shot"
                )
            if known and model not in known:
                raise ValueError(
                    f"{key}={model}: no stage of that name makes a policy.{did_you_mean(model, known)} "
                    f"Known: {', '.join(sorted(known))}"
                )
        asked = [(each.model, each.method) for each in self.candidates]
        for name, pair in zip(names, asked, strict=True):
            if names.count(name) > 1 or asked.count(pair) > 1:
                raise ValueError(f"{key}: two candidates are called {name}, or are the same. Remove one")
        if "best_of_n" in self.methods_used and self.reward is None:
            raise ValueError(f"{key}: {BEST_OF_N} needs KEY.reward. Add it, or leave {BEST_OF_N} out")
        if self.temperature == 0 and ("best_of_n" in self.methods_used or self.samples_per_prompt > 1):
            what = BEST_OF_N if "best_of_n" in self.methods_used else "KEY.samples_per_prompt"
            raise ValueError(f"KEY.temperature=0 gives equal answers, and {what} needs others. Set it to 1")
        if self.quality in JUDGES and getattr(self, needed := JUDGES[self.quality]) is None:
            raise ValueError(
                f"KEY.quality={self.quality} needs KEY.{needed}. Give one, or choose another KEY.quality"
            )
        endpoints = [each for each in self.candidates if is_endpoint(each.model)]
        for each in endpoints:
            if not each.model.partition("#")[2]:
                raise ValueError(
                    f"{key}: {each.model}: name the model behind a #, as in {each.model.rstrip('#')}#NAME"
                )
            if each.method == "best_of_n":
                raise ValueError(
                    f"{key}: {each.name}: {BEST_OF_N} is not sampled from an endpoint. Leave it out"
                )
            if each.method in PROMPTED and self.retriever == "embeddings":
                raise ValueError(
                    f"{key}: {each.name}: an endpoint gives no embeddings. Use KEY.retriever=bm25"
                )
        if endpoints and self.samples_per_prompt > 1:
            raise ValueError("KEY.samples_per_prompt: an endpoint is asked once per prompt. Set it to 1")
        return self

    @property
    def shows_training_rows(self) -> bool:
        """Whether candidates see rows of sft.data, as examples or as passages."""
        searches = "retrieval" in self.methods_used and self.corpus is None
        return searches or "few_shot" in self.methods_used

    def is_timed(self) -> bool:
        """Whether candidates are asked one at a time."""
        return self.num_timed > 0

    def unkeyed(self) -> tuple[str, ...]:
        """What the candidates do not use changes nothing."""
        methods = self.methods_used
        return (
            *(() if "best_of_n" in methods else ("best_of",)),
            *(() if "few_shot" in methods else ("few_shot",)),
            *(() if "retrieval" in methods else ("retrieval",)),
            *(() if methods.intersection(PROMPTED) else ("retriever",)),
            *(() if any(map(is_endpoint, self.models)) else ("endpoint",)),
        )

    def external_digests(self, digest: DirectoryDigest, chain: Mapping[str, Stage]) -> dict[str, str]:
        """The corpus, models from elsewhere, packages that change figures, and the machine that is timed."""
        digests = {
            name: content_of(tuned_artifact(name, self.name), digest)
            for name in filter(is_directory, self.models)
        }
        if self.corpus is not None and "retrieval" in self.methods_used:
            digests["corpus"] = self.corpus.reading_digest(f"{self.name}.corpus")
        digests |= {name: importlib.metadata.version(name) for name in self.packages()}
        return digests | ({"machine": hardware()} if self.is_timed() else {})

    def packages(self) -> list[str]:
        """The optional packages that its figures depend on."""
        searches = "retrieval" in self.methods_used or (
            "few_shot" in self.methods_used and self.few_shot.choice == "nearest"
        )
        return ["bm25s"] if searches and self.retriever == "bm25" else []

    def complaints(self, view: View) -> Iterator[Complaint]:
        """The extra packages are installed; models from elsewhere are there; no candidate learned from what
        ranks them; few-shot has examples. Questions that `prepare` has not measured fit the context."""
        if view.prepared is None:
            if missing := [name for name in self.packages() if find_spec(name) is None]:
                why = f"it needs {', '.join(missing)} (pip install -e '.[compare]')."
                yield Complaint(f"stage={self.name}", why)
                return
            for name in filter(is_directory, self.models):
                artifact = tuned_artifact(name, self.name)
                check_policy(name, artifact, view.chain, self.name)
                training_seconds([artifact])
            if self.quality in JUDGES and (taught := self.learned_from(self.quality, view.chain)):
                yield Complaint(
                    f"{self.name}.quality={self.quality}",
                    f"a candidate learned from {taught}, so it cannot judge.",
                    f"Choose another {self.name}.quality, or a judge that nothing learned from.",
                )
            return
        if self.asks_prepared_rows and not self.methods_used.intersection(PROMPTED):
            return
        data, base = view.prepared
        questions, _ = self.questions_of(data)
        library = self.library(data)
        budget = ContextBudget(base.load_tokenizer(), base.context_length, self.max_new_tokens, self.name)
        self._sizes = measure_sizes(
            budget, questions, library, {"zero_shot", *self.methods_used}, self.few_shot, self.retrieval
        )

    def library(self, data: PreparedData) -> Library:
        """The source of examples and passages; empty if no candidate uses them.

        Raises:
            ConfigError: there are no examples for few_shot.
        """
        if not self.methods_used.intersection(PROMPTED):
            return Library((), ())
        library = find_library(self.corpus, data, f"{self.name}.corpus")
        if "few_shot" in self.methods_used and not library.examples:
            raise ConfigError(
                f"{self.name}: few_shot takes its examples from the training rows of sft.data that hold one "
                "question and its answer, and there are none. Leave few_shot out."
            )
        return library

    def learned_from(self, kind: str, chain: Mapping[str, Stage]) -> str:
        """The part of a judge that a candidate learned from, or whose pairs it learned from, as the user
        wrote it; empty if there is none. A verifier may judge what learned from it, as it checks new answers
        against the right ones.

        Args:
            kind: a key of `JUDGES`.
        """
        judge = getattr(self, JUDGES[kind])
        parts = [] if judge is None else [part for part in parts_of(judge) if not is_verifier(part)]
        makers = {each for model in self.models for each in with_ancestors(model, chain)}
        rewards = [chain[name].reads().rewards for name in makers]
        if "best_of_n" in self.methods_used and self.reward is not None:
            rewards.append({"reward": self.reward})
        taught = [(part.source, part.args) for each in rewards for _, part in keyed_parts(each)]
        pairs = [named_source(chain, role) for name in makers for role in preference_roles(chain[name])]
        for part in parts:
            reward = stage_of(part.source)
            own = preference_roles(chain[reward]) if reward is not None and reward != JUDGE else ()
            if (part.source, part.args) in taught or any(named_source(chain, role) in pairs for role in own):
                return part.source
        return ""

    def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
        """Every policy answers and takes the retention tests; it, the start and the rewards read its answers.
        Prompted candidates read the references behind their prompts. What is timed is asked alone."""
        lengths = partial(self._lengths, on=on)
        added = max_virtual_tokens(on, [peft_of(chain[name]) for name in self.models if name in chain])
        references = on.sizes("sft", "held_out").first(self.num_references).cut(on.shape.context - added)
        retained = on.sizes("retention", "evaluation")
        retained = retained._replace(rows=SEQUENCES_PER_RETENTION_ROW * retained.rows)
        rewards = [len(models_of(each)) for each in (self.reward, self.gold, self.judge)]
        sampling = partial(
            sampling_cost, new_tokens=self.max_new_tokens, micro_batch_tokens=self.micro_batch_tokens,
            models=max(1, *rewards), added=added,
        )  # fmt: skip
        own = [each for each in self.candidates if not is_endpoint(each.model)]
        plain = {each.model for each in own if each.method not in PROMPTED}
        costs = [sampling(
            on, lengths("zero_shot"), batch_rows=self.batch_rows, samples=self.samples_per_prompt,
            policies=len(plain), readings=sum(rewards), measures=2, others=[references, retained],
        )]  # fmt: skip
        for each in own:
            asked = lengths(each.method)
            if each.method in PROMPTED:
                known = joined(asked, self._sizes.references if self._sizes else asked).cut(on.shape.context)
                costs.append(sampling(
                    on, asked, batch_rows=self.batch_rows, samples=self.samples_per_prompt, policies=1,
                    readings=sum(rewards), measures=0, others=[known],
                ))  # fmt: skip
            if each.method == "best_of_n":
                costs.append(sampling(
                    on, asked, batch_rows=self.batch_rows, samples=self.best_of, policies=1,
                    readings=rewards[0], measures=0,
                ))  # fmt: skip
            if self.num_timed:
                samples = self.best_of if each.method == "best_of_n" else 1
                timed = asked.first(self.num_timed)
                alone = replace(on, machine=replace(on.machine, ranks=1))
                cost = sampling(
                    alone, timed, batch_rows=samples, samples=samples, policies=1, measures=0,
                    readings=rewards[0] if samples > 1 else 0, rollouts=timed.rows,
                )  # fmt: skip
                costs.append(replace(cost, phases=[]))
        total = sequential_cost(costs)
        return replace(total, sampled=0) if self._sizes else total  # then prompts are cut to the context

    def _lengths(self, method: Method, on: CostContext) -> LengthStats:
        """Tokens of the prompts of a method."""
        if self._sizes is None:
            assert self.asks_prepared_rows, "complaints come first"
            return on.sizes("evaluate", "evaluation").first(self.max_questions)
        asked = self._sizes.asked(method, self.few_shot, self.retrieval)
        return asked.cut(on.shape.context - self.max_new_tokens)

    def run(self, job: Job) -> Mapping[str, float]:
        """Let every candidate answer, score the answers, and compare them."""
        from rlhf.compare.harness import Comparison

        questions, metrics = self.questions_of(job.data)
        comparison = Comparison(self, job, questions)
        answers = comparison.ask()
        comparison.score(answers)
        training = comparison.judge_training(answers)
        metrics |= comparison.metrics(answers)
        comparison.write(answers, training)
        self.report(job, metrics)
        return metrics

    def knowledge(self, job: Job, model: str, policy: PolicyModel) -> dict[str, float]:
        """Further metrics of a model, measured while it is in memory."""
        return {}

    def of_subject(self, figures: Mapping[str, float]) -> dict[str, float]:
        """The metrics of `gated` that are also logged without its name."""
        return {}

    def report(self, job: Job, metrics: Mapping[str, float]) -> None:
        """Write further files into the artifact."""
