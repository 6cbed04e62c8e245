"""Compare policies of the chain, such as base, SFT and PPO, on prompts that no stage trains on.

Reads   the policies; evaluation prompts (`evaluate.prompts`); the learned reward and, where it is known, the
        gold one; sft.data's held-out answers, which show what was learned; general texts and questions
        (`evaluate.retention`), which show what was forgotten; what a policy that learned from scores answered
        to its held-out prompts, step by step.
Writes  responses.jsonl; comparison.jsonl (one prompt per line, all policies' answers); gold_over_steps.jsonl
        (the gold score and the KL of each of these steps); the summary metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from rlhf.config import Complaint, did_you_mean
from rlhf.costs.sampling import most_added, sampling_cost
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

NOT_MADE = ("base", "init", BEST_OF_N)
"""Policies that no stage makes; `init` is a directory of the user's that PPO started from."""
AGAINST_START = ("length_ratio", "stop_rate_change", "word_gain")
"""Gates that compare answers with those of PPO's start."""
RETAINED = ("retention_perplexity_ratio", "question_accuracy_change")
"""Gates that need a retention set."""
TOLD = 0.4
"""A word is named where so many more answers have it."""
PASSES = 2
"""Of a retention row, roughly: one of a text, one for each answer of a question."""


OF_SUBJECT = (
    "win_rate", "win_rate_learned", "gold_gain", "judge_gain", "score_gain", "length_ratio",
    "stop_rate_change", "word_gain", "task_gain", "retention_perplexity_ratio", "retention_loss",
    "question_accuracy_change",
)  # fmt: skip
"""Summary metrics of each policy, /POLICY behind them; without a name, of evaluate.subject."""
OF_EACH = (
    *OF_SUBJECT, "length_mean", "stop_rate", "distinct_1", "distinct_2", "score_mean", "score_deviation",
    "score_unscored", "gold_mean", "gold_deviation", "gold_unscored", "kl", "task_loss", "perplexity",
    "text_loss_*", "question_accuracy", "score_mean/*", "score_deviation/*", "gold_mean/*",
    "gold_deviation/*", "judge_*", "gold_over_base", "score_over_base", "gold_peak_step", "gold_lost",
)  # fmt: skip


class EvaluateStage(Stage):
    """The keys `evaluate.*`. Values: conf/stages/evaluate.yaml."""

    version, samples, repeats_keys = 16, True, True
    metrics: ClassVar[Mapping[str, Metric]] = {
        **named(*OF_SUBJECT, "prompts", "gold_correlation"),
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
    """What PPO started from: a stage (`sft`, `dpo`, ...), `base` or a directory. The others are compared with
    it."""
    policies: Annotated[list[str], Field(min_length=1), AfterValidator(sorted)]
    """The policies that are compared, in any order: base, stages that make one (sft, ppo, merge, your own),
    `init`, the directory of evaluate.init, and `best_of_n` (evaluate.best_of). Win rate, gold gain and KL
    need what PPO started from, task gain and forgetting need base; otherwise these metrics are left out.
    `auto` uses base, what PPO started from, and ppo."""
    best_of: int = Field(ge=2)
    """Answers of what PPO started from to each prompt, of which the policy `best_of_n` gives the one that
    evaluate.reward likes best. Its KL is the upper bound log n - (n - 1) / n (Beirami et al. 2024)."""
    lm_eval: list[str]
    """Tasks of EleutherAI's lm-eval, asked on one rank while the others wait; [] for none."""
    lm_eval_tasks: Annotated[str | None, UNKEYED]
    """A folder of lm-eval's task files to take them from; null for its own tasks, whose data it downloads."""
    lm_eval_limit: PositiveInt | None
    """Questions of each task; null uses all."""
    reward: Score | None
    """What PPO was trained on; null leaves it out."""
    gold: Score | None
    """The true reward, if it is known; null leaves it out. `auto` uses VADER for the demo; if some data is
    yours, null. If no server is asked, it also scores what PPO answered to its held-out prompts while it
    learned."""
    judge: Score | None
    """What judges where no gold score is known: a score that no policy learned from. `auto` is null where
    gold is set. Else it is a second reward model, `reward@judge`, which learns from pairs that nothing else
    learns from (prepare.judge_fraction), if reward.pairs or dpo.data is a file of yours with 1,000 rows."""
    smallest_gain: Annotated[NonNegativeFloat, UNKEYED]
    """The smallest gain worth having, in deviations of the score over the answers of PPO's start."""
    num_prompts: PositiveInt | None
    """How many evaluation prompts, the first ones; null uses all."""
    num_references: PositiveInt | None
    """How many held-out answers of sft.data are used to measure what was learned, the first ones; null uses
    all."""
    subject: str
    """The policy whose win rate, gains and forgetting stand without a name, so that gates bound them. `auto`
    uses the only policy that is neither base nor what PPO started from; of several, ppo; of none, what PPO
    started from."""
    max_new_tokens: PositiveInt
    """A longer response is cut off."""
    temperature: PositiveFloat
    """Divides the logits of every policy."""
    top_p: float = Field(gt=0, le=1)
    """Nucleus sampling. Below 1, the KL is still that of the whole distribution."""
    batch_rows: PositiveInt
    """Rows that are decoded together."""
    num_shown: Annotated[int, UNKEYED] = Field(ge=0)
    """How many prompts the report shows side by side, the first ones."""
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
            **dict.fromkeys(("task_gain", *RETAINED), (base,)),
        }
        lacking: dict[str, list[str]] = {}
        for gate, missing in needs.items():
            lacks = next(filter(None, missing), None)
            if lacks and self.gates.get(gate) is not None and gate not in self.not_checked():
                lacking.setdefault(lacks, []).append(f"KEY.gates.{gate}")
        if lacking:
            told = (
                f"{' and '.join(gates)} {'needs' if len(gates) == 1 else 'need'} {lacks}"
                for lacks, gates in lacking.items()
            )
            off = " ".join(f"{gate}=null" for gates in lacking.values() for gate in gates)
            raise ValueError(f"{'; '.join(told)}. What cannot be measured is turned off with {off}")
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
        """What PPO started from, by its name among the policies."""
        return self.init if directory_of(self.init) is None else "init"

    def reads(self) -> Reads:
        """The policies, the evaluation prompts, the held-out answers and the retention set."""
        found, made = reads_of(self), [name for name in self.policies if name not in NOT_MADE]
        return found._replace(
            models=found.models if "init" in self.policies else {},
            policies=tuple(("evaluate.policies", name) for name in made),
            roles=("evaluate", "sft", "retention"),
            base=True,
            sampled=tuple(
                ("evaluate.policies", name)
                if name in made
                else ("evaluate.init", "base" if name == "base" else self.init)
                for name in self.policies
            ),
        )

    def unkeyed(self) -> tuple[str, ...]:
        """From how many answers `best_of_n` chooses decides nothing where it is not compared."""
        return () if BEST_OF_N in self.policies else ("best_of",)

    def needs(self, chain: Mapping[str, Stage]) -> tuple[str, ...]:
        """Without held-out answers and retention sets their figures are left out."""
        return ("evaluate",)

    def not_checked(self) -> dict[str, str]:
        """Nothing is forgotten of no retention set; no answers are compared with themselves."""
        apart = self.start in self.policies and self.subject != self.start
        alone = f"only {self.subject} of these is compared"
        found = {} if apart else dict.fromkeys(AGAINST_START, alone)
        for key in ("reward", "gold"):
            if getattr(self, key) is None:
                found["gold_correlation"] = f"{self.name}.{key}=null"
        return found if self.retention else found | dict.fromkeys(RETAINED, "evaluate.retention=null")

    def more_metrics(self) -> Iterator[str]:
        """Those of each policy, and lm-eval's."""
        yield from (f"{metric}/{name}" for name in self.policies for metric in OF_EACH)
        yield from (("lm_eval/*",) if self.lm_eval else ())

    def external_digests(self, digest: DirectoryDigest, chain: Mapping[str, Stage]) -> dict[str, str]:
        """lm-eval's version and task files."""
        return {"lm_eval": self.harness.digest()} if self.lm_eval else {}

    def complaints(self, view: View) -> Iterator[Complaint]:
        """lm-eval is there and has the tasks, and their data can be had; what a gate bounds is in the
        retention set, where there is one; PPO's start, and so the model that PPO makes, can read prompts and
        retention rows."""
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
        """What lm-eval is asked for."""
        folder = None if self.lm_eval_tasks is None else Path(self.lm_eval_tasks)
        return Harness(self.lm_eval, folder, self.lm_eval_limit)

    def rows(self, data: PreparedData) -> Sequence[PromptRow]:
        """The prompts that are answered."""
        return data.rows("evaluate", "evaluation")[: self.num_prompts]

    def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
        """Every policy answers, is read by itself, SFT and the rewards, and takes the retention tests."""
        on = on.starting(directory_of(root_of("evaluate.init", self.init, chain)[1]))
        prompts = on.sizes("evaluate", "evaluation").first(self.num_prompts)
        added = most_added(on, [peft_of(chain[name]) for name in self.policies if name in chain])
        references = on.sizes("sft", "held_out").first(self.num_references).cut(on.shape.context - added)
        retained = on.sizes("retention", "evaluation")
        rewards = [len(models_of(each)) for each in (self.reward, self.gold, self.judge)]
        asks = partial(
            sampling_cost, on, prompts, new_tokens=self.max_new_tokens, batch_rows=self.batch_rows,
            micro_batch_tokens=self.micro_batch_tokens, models=max(1, *rewards), added=added,
        )  # fmt: skip
        cost = asks(
            samples=1, policies=len([*self.asked()]), readings=sum(rewards), measures=2,
            others=[references, retained._replace(rows=PASSES * retained.rows)],
        )  # fmt: skip
        if BEST_OF_N not in self.policies:
            return cost
        more = asks(samples=self.best_of, policies=1, readings=rewards[0], measures=0)
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
            found = policy_metrics(name, answers, self.start)
            metrics |= {f"{metric}/{name}": value for metric, value in found.items()}
            if name == self.subject:
                metrics |= {
                    metric: value for metric, value in found.items() if INTERVAL.sub("", metric) in OF_SUBJECT
                }
        # of answers that the reward chose, its agreement with the gold score tells nothing
        metrics |= agreement([said for name, said in answers.items() if name != BEST_OF_N])
        self.write(job, rows, answers)
        self.tell_words(job, answers)
        return metrics

    def ask(self, job: Job, rows: Sequence[PromptRow]) -> dict[str, Answers]:
        """What every policy says and knows; one model is in memory at a time."""
        from rlhf.evaluation.answers import divergence

        answers: dict[str, Answers] = {}
        # PPO's start is the last, as it also judges how far the others went from it
        for name in sorted(self.asked(), key=lambda name: name == self.start):
            policy = self.load(job, name)
            answers[name] = self.answer(job, name, policy, rows)
            if name == self.start:
                others = [said for other, said in answers.items() if other != name]
                for said in job.progress.track(others, "evaluate: KL", len(others)):
                    said.figures |= divergence(said, policy, self.temperature, self.micro_batch_tokens)
            del policy
        if BEST_OF_N in self.policies:
            answers[BEST_OF_N] = self.best(job, rows, answers[self.start])
        return {name: answers[name] for name in self.in_order(job.inputs)}

    def asked(self) -> Iterator[str]:
        """The policies that are models of their own."""
        yield from (name for name in self.policies if name != BEST_OF_N)

    def best(self, job: Job, rows: Sequence[PromptRow], start: Answers) -> Answers:
        """What the reward likes best of several answers of PPO's start. It knows what that knows."""
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
        """Answers to each prompt, neighbours; every policy with the same seed."""
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
        """The policies as they came to be: base, and PPO's start right before PPO.

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
        if name in NOT_MADE:
            return job.policy(job.start("base" if name == "base" else self.init))
        return job.policy(job.inputs[name].path)

    def answer(self, job: Job, name: str, policy: PolicyModel, rows: Sequence[PromptRow]) -> Answers:
        """One sampled answer a prompt; how well the policy knows the task's own answers, and how well it
        still knows everything else."""
        from rlhf.evaluation.answers import Answers
        from rlhf.evaluation.reference_loss import reference_losses
        from rlhf.evaluation.retention import retention

        rollout, texts = self.sample(job, name, policy, rows)
        logp_BR = policy.log_probabilities(rollout, self.temperature, self.micro_batch_tokens)
        known = job.data.rows("sft", "held_out")[: self.num_references]
        with job.progress.task(f"evaluate: what {name} knows", 2) as task:
            prompts, references = [row.prompt for row in known], [row.completion for row in known]
            task_losses = reference_losses(policy, prompts, references, self.micro_batch_tokens)
            task.advance()
            retained = retention(policy, job.data.rows("retention", "evaluation"), self.micro_batch_tokens)
            task.advance()
        said = Answers(rollout, texts, logp_BR, *task_losses, retained, policy.tokenizer.get_vocab())
        if self.lm_eval:
            with job.progress.task(f"evaluate: lm-eval asks {name}", 1) as task:
                said.figures |= policy.on_main(lambda: self.harness.measure(policy))
                task.advance()
        return said

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
            for said in job.progress.track(answers.values(), f"evaluate: {kind}", len(answers)):
                answered = with_token_ids(rows, said.rollout.response_ids)
                found = usable_scores(reward, answered, said.texts, f"evaluate.{key}={source}")
                said.scores[kind] = found.score_B
                said.parts[kind] = found.parts
                for name, value in found.usage.items():
                    said.figures[name] = said.figures.get(name, 0.0) + value
            del reward  # its memory is needed for the next one

    def may_judge(self, job: Job) -> bool:
        """Whether the judge's models are shown to rank better than a rule that reads no word. A gate should
        not fail by one that may be noise."""
        trained = [stage_of(part.source) for part in models_of(self.judge)]
        for name in filter(None, trained):
            if job.inputs[name].manifest.metrics.get("accuracy_over_baseline_low", 0.0) <= 0:
                self.tell(
                    job, f"{name} does not judge: it may rank no better than a rule that reads no word."
                )
                return False
        return True

    def gold_over_steps(self, job: Job, answers: Mapping[str, Answers]) -> None:
        """Let the gold reward also score what each policy answered while it learned, unless a server would
        be asked. For this figure nothing fails."""
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
                    self.tell(job, f"gold does not score what {name} answered while it learned: {error}")
                    continue
                rows += [{"policy": name, **at.row()} for at in steps]
                kept = int(job.inputs[name].manifest.metrics["best_step"])
                answers[name].figures |= lost_since_peak(steps, kept)
        job.write_rows("gold_over_steps.jsonl", rows)

    def tell(self, job: Job, line: str) -> None:
        """Print it. It may quote an answer, so brackets are no markup."""
        job.progress.console.print(f"{self.name}: {line}", style="yellow", highlight=False, markup=False)

    def tell_words(self, job: Job, answers: Mapping[str, Answers]) -> None:
        """Name the word that a policy took up, where many answers have it."""
        from rlhf.evaluation.wording import gained_word

        if self.start not in answers:
            return
        for name, said in answers.items():
            word, more = gained_word(said.texts, answers[self.start].texts)
            if name != "base" and more.value >= TOLD:  # base came before
                self.tell(
                    job, f"{word!r} is in {more.value:.0%} more answers of {name} than of {self.start}."
                )

    def write(self, job: Job, rows: Sequence[PromptRow], answers: Mapping[str, Answers]) -> None:
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
