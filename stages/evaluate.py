"""Compare policies of the chain, such as base, SFT and PPO, on prompts that no stage trains on.

Reads   the policies; evaluation prompts (`evaluate.prompts`); the learned reward and, where it is known, the
        gold one; sft.data's held-out answers, which show what was learned; general texts and questions
        (`evaluate.retention`), which show what was forgotten; the answers to held-out prompts that a policy
        gave while it learned from scores, step by step.
Writes  responses.jsonl; comparison.jsonl (one prompt per line, all policies' answers); gold_over_steps.jsonl
        (gold score and KL of each of these steps); the summary metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rlhf.config import Complaint, did_you_mean
from rlhf.costs.sampling import max_virtual_tokens, sampling_cost
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import PromptRow, QuestionRow
from rlhf.data.sources import PromptSource, SourceList
from rlhf.digests import DirectoryDigest
from rlhf.evaluation.lm_eval import Harness
from rlhf.models.start import directory_of
from rlhf.pipeline.checks import length_complaints
from rlhf.pipeline.fields import UNKEYED, Memory, Model, Reads, Rows, Score, peft_of, reads_of
from rlhf.pipeline.graph import root_of
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import INTERVAL, Metric, named
from rlhf.pipeline.recipe import BEST_OF_N
from rlhf.pipeline.stage import Stage, View
from rlhf.rewards.kinds import columns_needed, is_remote, models_of, stage_of
from rlhf.rewards.reward import with_token_ids

if TYPE_CHECKING:
    from rlhf.evaluation.answers import Answers
    from rlhf.generation.policy_model import PolicyModel
    from rlhf.rl.rollout import Rollout

NOT_FROM_STAGES = ("base", "init", BEST_OF_N)
"""Policies that no stage makes. `init` is a directory of the user's, from which PPO started."""
START_GATES = ("length_ratio", "stop_rate_change", "word_gain")
"""Gates that compare answers with those of PPO's start."""
RETENTION_GATES = ("retention_perplexity_ratio", "question_accuracy_change")
"""Gates that need a retention set."""
MIN_REPORTED_WORD_GAIN = 0.4
"""Smallest rise in a word's share of answers that is reported."""
SEQUENCES_PER_RETENTION_ROW = 2
"""Sequences per retention row, roughly: one for a text, one per choice for a question."""
SUBJECT_METRICS = (
    "win_rate", "win_rate_learned", "gold_gain", "judge_gain", "score_gain", "length_ratio",
    "stop_rate_change", "word_gain", "task_gain", "retention_perplexity_ratio", "retention_loss",
    "question_accuracy_change",
)  # fmt: skip
"""Summary metrics of each policy, as METRIC/POLICY; METRIC alone is that of evaluate.subject."""
POLICY_METRICS = (
    *SUBJECT_METRICS, "length_mean", "stop_rate", "distinct_1", "distinct_2", "score_mean", "score_deviation",
    "score_unscored", "gold_mean", "gold_deviation", "gold_unscored", "kl", "task_loss", "perplexity",
    "text_loss_*", "question_accuracy", "score_mean/*", "score_deviation/*", "gold_mean/*",
    "gold_deviation/*", "judge_*", "gold_over_base", "score_over_base", "gold_peak_step", "gold_lost",
)  # fmt: skip


class EvaluateStage(Stage):
    """The keys `evaluate.*`. Values: conf/stages/evaluate.yaml."""

    version, samples, repeats_keys = 16, True, True
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
    """The policies that are compared, in any order: base, stages that make one (sft, ppo, merge, your own),
    `init`, the directory of evaluate.init, and `best_of_n` (evaluate.best_of). Win rate, gold gain and KL
    need what PPO started from, task gain and forgetting need base; otherwise these metrics are left out.
    `auto` uses base, what PPO started from, and ppo."""
    best_of: int = Field(ge=2)
    """Answers per prompt for the policy `best_of_n`. What PPO started from gives them, and the one with the
    highest evaluate.reward is used. Its KL is the upper bound log n - (n - 1) / n (Beirami et al. 2024)."""
    lm_eval: list[str]
    """Tasks of EleutherAI's lm-eval, asked on one rank while the others wait; [] for none."""
    lm_eval_tasks: Annotated[str | None, UNKEYED]
    """A folder of lm-eval task files for these tasks; null for lm-eval's own, whose data it downloads."""
    lm_eval_limit: PositiveInt | None
    """Number of questions of each task; null uses all."""
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
    smallest_gain: Annotated[NonNegativeFloat, UNKEYED]
    """The smallest gain worth having, in deviations of the score over the answers of PPO's start."""
    num_prompts: PositiveInt | None
    """Number of evaluation prompts, the first ones; null uses all."""
    num_references: PositiveInt | None
    """Number of held-out answers of sft.data that measure what was learned, the first ones; null uses all."""
    subject: str
    """The policy that gates check: its win rate, gains and forgetting are logged without a policy's name.
    `auto` uses the only policy that is neither base nor what PPO started from; if there are several, ppo; if
    there is none, what PPO started from."""
    max_new_tokens: PositiveInt
    """Longest response, in tokens; longer ones are cut off."""
    temperature: PositiveFloat
    """Sampling temperature; divides the logits of every policy."""
    top_p: float = Field(gt=0, le=1)
    """Nucleus sampling. Also below 1, the KL is that of the full distribution."""
    batch_rows: PositiveInt
    """Rows that are decoded together."""
    num_shown: Annotated[int, UNKEYED] = Field(ge=0)
    """Number of prompts that the report shows side by side, the first ones."""
    micro_batch_tokens: Memory
    """Tokens per forward pass that measures; lower it when memory runs out."""

    @model_validator(mode="after")
    def _gates_can_be_measured(self) -> Self:
        if self.subject not in self.policies:
            raise ValueError(
                f"KEY.subject={self.subject} is not in KEY.policies=[{','.join(self.policies)}]."
                f"{did_you_mean(self.subject, self.policies)} Add it, or set KEY.subject to one of them"
            )
        start = f"{self.start} in KEY.policies" if self.start not in self.policies else ""
        other = f"another KEY.subject than {self.start}" if self.subject == self.start else ""
        base = "base in KEY.policies" if "base" not in self.policies else ""
        reward = "" if self.reward else "a reward"
        if BEST_OF_N in self.policies and (wanted := "KEY.reward" if reward else start):
            raise ValueError(f"KEY.policies: best_of_n needs {wanted}. Add it, or leave best_of_n out")
        needs = {
            "win_rate": (start, other, "" if self.gold or self.judge else reward and "a reward or gold"),
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
        if len(set(self.policies)) < len(self.policies):
            raise ValueError(f"KEY.policies=[{','.join(self.policies)}] names one twice. Remove one")
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

    def reads(self) -> Reads:
        """The policies, the evaluation prompts, the held-out answers and the retention set."""
        fields, from_stages = reads_of(self), [name for name in self.policies if name not in NOT_FROM_STAGES]
        return fields._replace(
            models=fields.models if "init" in self.policies else {},
            policies=tuple(("evaluate.policies", name) for name in from_stages),
            roles=("evaluate", "sft", "retention"),
            base=True,
            sampled=tuple(
                ("evaluate.policies", name)
                if name in from_stages
                else ("evaluate.init", "base" if name == "base" else self.init)
                for name in self.policies
            ),
        )

    def unkeyed(self) -> tuple[str, ...]:
        """`best_of` changes nothing if `best_of_n` is not compared."""
        return () if BEST_OF_N in self.policies else ("best_of",)

    def needs(self, chain: Mapping[str, Stage]) -> tuple[str, ...]:
        """Only the prompts: without held-out answers or retention sets, their metrics are left out."""
        return ("evaluate",)

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
        yield from (f"{metric}/{name}" for name in self.policies for metric in POLICY_METRICS)
        yield from (("lm_eval/*",) if self.lm_eval else ())

    def external_digests(self, digest: DirectoryDigest, chain: Mapping[str, Stage]) -> dict[str, str]:
        """lm-eval's version and task files."""
        return {"lm_eval": self.harness.digest()} if self.lm_eval else {}

    def complaints(self, view: View) -> Iterator[Complaint]:
        """lm-eval is installed and has the tasks and their data. A retention set has what its gates need.
        Prompts and retention rows fit the context of PPO's start, and so of the model that PPO makes."""
        if self.lm_eval and view.directory is None and view.compute is None:  # the first time
            self.harness.check()
        if self.lm_eval and view.compute is not None:
            view.compute.main_only(self.harness.fetch)
        if (data := view.data) is None:
            return
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
        yield from length_complaints(
            view, "evaluate.init", self.init, f"evaluate.prompts={self.prompts}", lambda: self.rows(data),
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

    def rows(self, data: PreparedData) -> Sequence[PromptRow]:
        """The prompts that are answered."""
        return data.rows("evaluate", "evaluation")[: self.num_prompts]

    def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
        """Every policy answers and takes the retention tests; it, SFT and the rewards read its answers."""
        on = on.starting(directory_of(root_of("evaluate.init", self.init, chain)[1]))
        prompts = on.sizes("evaluate", "evaluation").first(self.num_prompts)
        added = max_virtual_tokens(on, [peft_of(chain[name]) for name in self.policies if name in chain])
        references = on.sizes("sft", "held_out").first(self.num_references).cut(on.shape.context - added)
        retained = on.sizes("retention", "evaluation")
        rewards = [len(models_of(each)) for each in (self.reward, self.gold, self.judge)]
        sampling = partial(
            sampling_cost, on, prompts, new_tokens=self.max_new_tokens, batch_rows=self.batch_rows,
            micro_batch_tokens=self.micro_batch_tokens, models=max(1, *rewards), added=added,
        )  # fmt: skip
        cost = sampling(
            samples=1, policies=len([*self.own_models()]), readings=sum(rewards), measures=2,
            others=[references, retained._replace(rows=SEQUENCES_PER_RETENTION_ROW * retained.rows)],
        )  # fmt: skip
        if BEST_OF_N not in self.policies:
            return cost
        more = sampling(samples=self.best_of, policies=1, readings=rewards[0], measures=0)
        return replace(cost, phases=[*cost.phases, *more.phases], work=[*cost.work, *more.work])

    def run(self, job: Job) -> Mapping[str, float]:
        """Let every policy answer, score the answers, and compare them."""
        from rlhf.evaluation.answers import agreement, policy_metrics

        rows = self.rows(job.data)
        answers = self.ask(job, rows)
        self.score(job, rows, answers)
        self.gold_over_steps(job, answers)
        metrics: dict[str, float] = {"prompts": len(rows)}
        for name in answers:
            own_figures = policy_metrics(name, answers, self.start)
            metrics |= {f"{metric}/{name}": value for metric, value in own_figures.items()}
            if name == self.subject:
                metrics |= {
                    metric: value
                    for metric, value in own_figures.items()
                    if INTERVAL.sub("", metric) in SUBJECT_METRICS
                }
        # not best_of_n: the reward chose its answers, so their agreement with the gold score tells nothing
        metrics |= agreement([given for name, given in answers.items() if name != BEST_OF_N])
        self.write(job, rows, answers)
        self.warn_gained_words(job, answers)
        return metrics

    def ask(self, job: Job, rows: Sequence[PromptRow]) -> dict[str, Answers]:
        """Answers and losses of every policy. One model is in memory at a time."""
        from rlhf.evaluation.answers import divergence

        answers: dict[str, Answers] = {}
        # PPO's start is the last: the KL of the others is measured with it
        for name in sorted(self.own_models(), key=lambda name: name == self.start):
            policy = self.load(job, name)
            answers[name] = self.answer(job, name, policy, rows)
            if name == self.start:
                others = [given for other, given in answers.items() if other != name]
                for given in job.progress.track(others, "evaluate: KL", len(others)):
                    given.figures |= divergence(given, policy, self.temperature, self.micro_batch_tokens)
            del policy
        if BEST_OF_N in self.policies:
            answers[BEST_OF_N] = self.best(job, rows, answers[self.start])
        return {name: answers[name] for name in self.in_order(job.inputs)}

    def own_models(self) -> Iterator[str]:
        """The policies that have weights of their own: all but best_of_n."""
        yield from (name for name in self.policies if name != BEST_OF_N)

    def best(self, job: Job, rows: Sequence[PromptRow], start: Answers) -> Answers:
        """The answers of `best_of_n`. Its task losses and retention are those of PPO's start."""
        import torch

        from rlhf.evaluation.best_of_n import best_answers, kl_bound

        assert self.reward is not None
        policy = self.load(job, BEST_OF_N)
        rollout, texts = self.sample(job, BEST_OF_N, policy, rows, samples=self.best_of)
        del policy  # its memory is needed for the reward model
        reward = job.reward(self.reward, self.micro_batch_tokens)
        named = f"evaluate.reward={self.reward}"
        chosen_B = best_answers(reward, rows, rollout, texts, of=self.best_of, key=named)
        return replace(
            start,
            rollout=rollout.select(chosen_B),
            texts=[texts[index] for index in chosen_B.tolist()],
            logp_BR=torch.zeros(0),
            scores={}, parts={}, figures={"kl": kl_bound(self.best_of)},
        )  # fmt: skip

    def sample(
        self, job: Job, name: str, policy: PolicyModel, rows: Sequence[PromptRow], *, samples: int = 1
    ) -> tuple[Rollout, list[str]]:
        """Answers to each prompt, those to one prompt next to each other. All policies use the same seed."""
        import torch

        prompts = [row.prompt for row in rows for _ in range(samples)]
        with job.progress.task(f"evaluate: {name} answers", len(prompts)) as task:
            return policy.sample(
                prompts,
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                generator=torch.Generator().manual_seed(job.seed),
                batch_rows=self.batch_rows,
                on_rows=task.advance,
            )

    def in_order(self, made: Iterable[str]) -> list[str]:
        """The policies in the order in which they are made: base first, PPO's start right before PPO.

        Args:
            made: stages in the chain's order.
        """
        names = ["base", *made]
        names.insert(names.index("ppo") if "ppo" in names else len(names), "init")
        if BEST_OF_N in self.policies:
            names.insert(names.index(self.start) + 1, BEST_OF_N)
        return [name for name in names if name in self.policies]

    def load(self, job: Job, name: str) -> PolicyModel:
        """One of the policies, frozen."""
        if name in NOT_FROM_STAGES:
            return job.policy(job.start("base" if name == "base" else self.init))
        return job.policy(job.inputs[name].path)

    def answer(self, job: Job, name: str, policy: PolicyModel, rows: Sequence[PromptRow]) -> Answers:
        """One sampled answer per prompt, the losses on the task's own answers, and the retention tests."""
        from rlhf.evaluation.answers import Answers
        from rlhf.evaluation.reference_loss import reference_losses
        from rlhf.evaluation.retention import retention

        rollout, texts = self.sample(job, name, policy, rows)
        logp_BR = policy.log_probabilities(rollout, self.temperature, self.micro_batch_tokens)
        task_rows = job.data.rows("sft", "held_out")[: self.num_references]
        with job.progress.task(f"evaluate: what {name} knows", 2) as task:
            prompts, references = [row.prompt for row in task_rows], [row.completion for row in task_rows]
            task_losses = reference_losses(policy, prompts, references, self.micro_batch_tokens)
            task.advance()
            retained = retention(policy, job.data.rows("retention", "evaluation"), self.micro_batch_tokens)
            task.advance()
        given = Answers(rollout, texts, logp_BR, *task_losses, retained, policy.tokenizer.get_vocab())
        if self.lm_eval:
            with job.progress.task(f"evaluate: lm-eval asks {name}", 1) as task:
                given.figures |= policy.on_main(lambda: self.harness.measure(policy))
                task.advance()
        return given

    def score(self, job: Job, rows: Sequence[PromptRow], answers: Mapping[str, Answers]) -> None:
        """Let the learned reward, the gold one and the judge score every answer."""
        from rlhf.rewards.combined import usable_scores

        for kind, key, source in (
            ("score", "reward", self.reward),
            ("gold", "gold", self.gold),
            ("judge", "judge", self.judge),
        ):
            if source is None or (key == "judge" and not self.may_judge(job)):
                continue
            reward = job.reward(source, self.micro_batch_tokens)
            for given in job.progress.track(answers.values(), f"evaluate: {kind}", len(answers)):
                answered = with_token_ids(rows, given.rollout.response_ids)
                scores = usable_scores(reward, answered, given.texts, f"evaluate.{key}={source}")
                given.scores[kind] = scores.score_B
                given.parts[kind] = scores.parts
                for name, value in scores.usage.items():
                    given.figures[name] = given.figures.get(name, 0.0) + value
            del reward  # its memory is needed for the next one

    def may_judge(self, job: Job) -> bool:
        """Whether the judge's models rank better than a rule that reads no word. A judge that may be noise
        should fail no gate."""
        trained = [stage_of(part.source) for part in models_of(self.judge)]
        for name in filter(None, trained):
            if job.inputs[name].manifest.metrics.get("accuracy_over_baseline_low", 0.0) <= 0:
                self.warn(
                    job, f"{name} does not judge: it may rank no better than a rule that reads no word."
                )
                return False
        return True

    def gold_over_steps(self, job: Job, answers: Mapping[str, Answers]) -> None:
        """Let the gold reward score the answers that each policy gave while it learned. Skipped if it asks a
        server. An error of the reward does not end the stage."""
        from rlhf.evaluation.held_out import FILE, gold_over_steps, lost_since_peak
        from rlhf.rewards.reward import RewardError

        rows: list[Mapping[str, Any]] = []
        learned = [
            name for name in answers if name in job.inputs and (job.inputs[name].path / FILE).is_file()
        ]
        if self.gold is not None and learned and not is_remote(self.gold):
            gold, needed = job.reward(self.gold, self.micro_batch_tokens), columns_needed(self.gold)
            for name in job.progress.track(learned, "evaluate: gold over steps", len(learned)):
                try:
                    steps = gold_over_steps(job.inputs[name].path / FILE, gold, needed)
                except RewardError as error:
                    self.warn(job, f"gold does not score what {name} answered while it learned: {error}")
                    continue
                rows += [{"policy": name, **at.row()} for at in steps]
                best_step = int(job.inputs[name].manifest.metrics["best_step"])
                answers[name].figures |= lost_since_peak(steps, best_step)
        job.write_rows("gold_over_steps.jsonl", rows)

    def warn(self, job: Job, line: str) -> None:
        """Print a warning. It may quote an answer, so brackets are not markup."""
        job.progress.console.print(f"{self.name}: {line}", style="yellow", highlight=False, markup=False)

    def warn_gained_words(self, job: Job, answers: Mapping[str, Answers]) -> None:
        """Report a word that appears in many more answers of a policy than of its start."""
        from rlhf.evaluation.wording import gained_word

        if self.start not in answers:
            return
        for name, given in answers.items():
            word, more = gained_word(given.texts, answers[self.start].texts)
            if name != "base" and more.value >= MIN_REPORTED_WORD_GAIN:  # base comes before the start
                self.warn(
                    job, f"{word!r} is in {more.value:.0%} more answers of {name} than of {self.start}."
                )

    def write(self, job: Job, rows: Sequence[PromptRow], answers: Mapping[str, Answers]) -> None:
        """Write responses.jsonl (one answer per line) and comparison.jsonl (one prompt per line)."""
        responses = [
            {"policy": name, "prompt": row.prompt, **given.row(index)}
            for name, given in answers.items()
            for index, row in enumerate(rows)
        ]
        for response in responses:
            job.sample(**response)
        job.write_rows("responses.jsonl", responses)
        job.write_rows(
            "comparison.jsonl",
            (
                {"prompt": row.prompt, **{name: given.row(index) for name, given in answers.items()}}
                for index, row in enumerate(rows)
            ),
        )
