"""Learn a policy from preferences alone: no reward model, no sampling (DPO, IPO, KTO, SimPO).

Reads   the SFT model, or what `dpo.init` names instead (policy and reference); preferences: `dpo.data`, or
        the pairs of `reward.pairs`.
Writes  a plain causal-LM directory: the policy with the lowest loss on one half of the held-out rows, judged
        on the other; unless dpo.peft is none, the trained weights alone too, in `adapter/`; and the
        reference's log-probabilities of each training row, in `reference.arrow`.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from rlhf.config import Complaint, ConfigError
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost, ThroughputModel, joined
from rlhf.costs.training import training_cost, with_reference
from rlhf.data.roles import TRAINING
from rlhf.data.schema import Split, ThumbRow
from rlhf.data.sources import SourceConfig
from rlhf.models.peft.config import Peft
from rlhf.models.peft.methods import METHODS
from rlhf.pipeline.checks import length_complaints
from rlhf.pipeline.costing import starting
from rlhf.pipeline.fields import LENGTH, UNKEYED, Batch, Memory, Model, Rows
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import TUNED, Healthy, Metric, named
from rlhf.pipeline.stage import Stage, View
from rlhf.supervised.preferences import (
    REFERENCE,
    Measurement,
    PreferenceConfig,
    Preferences,
    Values,
    all_logps,
    measure,
    preference_step,
    ranked_right,
    read_reference,
    write_reference,
)
from rlhf.training.config import OptimConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.pipeline.learner import Evaluations
    from rlhf.pipeline.trainable import PolicyLearner

CHOICE_ROWS, JUDGE_ROWS = slice(0, None, 2), slice(1, None, 2)
"""Slices of the held-out rows: those that choose the published weights, and those that judge them."""


class DpoStage(PreferenceConfig, Stage):
    """The keys `dpo.*`: also rlhf/supervised/preferences.py. Values: conf/stages/dpo.yaml."""

    title, makes, version, in_chain = "DPO", "policy", 2, False
    metrics: ClassVar[Mapping[str, Metric]] = {
        "held_out_loss_before": Metric("loss before", "z.3f"),
        "held_out_loss": Metric(
            "after", "z.3f", healthy=Healthy(gate="held_out_loss_change", from_start=True)
        ),
        "accuracy": Metric("ranks right", "z.3f"),
        "longer_wins_accuracy": Metric("longer wins", "z.3f"),
        **TUNED,
        "accuracy_over_baseline": Metric(
            better="higher",
            purpose="{title}'s ranking against chance and length",
        ),
        **named(
            "held_out_loss_change", "held_out_loss_last", "baseline_accuracy", "margin", "chosen_change",
            "rejected_change", "best_step", "steps", "held_out_rows", "train_rows", "rows_too_long",
            "skipped_steps",
        ),
        "held_out_accuracy": Metric(healthy=Healthy(min=0.5), is_curve=True),
        "held_out_margin": Metric(healthy=Healthy(min=0.0), is_curve=True),
        "train_accuracy": Metric(healthy=Healthy(min=0.5), is_curve=True),
        "train_margin": Metric(healthy=Healthy(min=0.0), is_curve=True),
    }  # fmt: skip

    data: Annotated[SourceConfig | None, Rows("dpo", otherwise="pairs")]
    """Rows with a prompt, a chosen and a rejected answer; with `loss=kto` also rows with a prompt, an answer
    and a `label` or `thumb`: true or false. Null uses reward.pairs."""
    init: Model
    """The model that the policy starts from, which is also the reference: `sft`, `base`, another stage that
    makes a policy, or a `save_pretrained` directory."""
    optim: OptimConfig
    peft: Peft
    epochs: Annotated[PositiveFloat, LENGTH]
    """Passes over the rows."""
    batch_rows: Batch
    """Rows per optimizer step, over all ranks."""
    micro_batch_tokens: Memory
    """Tokens per forward pass, both sides of a pair counted; lower it when memory runs out."""
    activation_checkpointing: Annotated[bool, UNKEYED]
    """Keep only the input of each layer and compute its activations again in the backward pass. Less memory,
    more time, the same result."""
    max_tokens: PositiveInt
    """Rows with a longer side are left out and counted. The model's context is a limit too."""
    evaluations: PositiveInt
    """Number of evaluations on the held-out rows, equally spaced, the last one after the last step. The
    policy with the lowest loss on one half of these rows is published, and judged on the other half. Only
    with 1 can a longer run continue a shorter one: docs/store.md."""

    @model_validator(mode="after")
    def _only_what_the_loss_has(self) -> Self:
        if self.label_smoothing > 0 and self.loss not in ("dpo", "simpo"):
            raise ValueError(
                f"KEY.label_smoothing={self.label_smoothing:g}: KEY.loss={self.loss} has none. Set it to 0, "
                "or use dpo or simpo"
            )
        return self

    @property
    def role(self) -> str:
        """The role whose rows it reads."""
        return "pairs" if self.data is None else "dpo"

    @property
    def source(self) -> str:
        """The config key that names these rows."""
        return "reward.pairs" if self.data is None else f"{self.name}.data={self.data}"

    def complaints(self, view: View) -> Iterator[Complaint]:
        """The rows fit the loss and the model, and each half of the held-out rows has one."""
        yield from super().complaints(view)
        if view.data is None:
            return
        train, held_out = (view.data.rows(self.role, split) for split in TRAINING)
        is_rated = any(isinstance(row, ThumbRow) for row in itertools.chain(train, held_out))
        if self.loss != "kto" and self.data is not None and is_rated:
            yield Complaint(
                f"{self.name}.loss={self.loss}",
                f"{self.source} has rows with a thumb, and this loss compares two answers.",
                f"Use {self.name}.loss=kto, or give pairs of answers.",
            )
        if len(held_out) < 2:
            yield Complaint(
                self.source,
                f"{len(held_out)} held-out row, but at least 2 are needed: one half chooses the weights, the "
                "other half judges them.",
                "Give more rows, or raise prepare.held_out_fraction.",
            )
        yield from length_complaints(
            view, f"{self.name}.init", self.init, self.source, lambda: itertools.chain(train, held_out),
            reserved_tokens=self.virtual_tokens, max_tokens=self.max_tokens,
            fix=f"Lower {self.name}.max_tokens={self.max_tokens} to that, so that longer rows are left out, "
            "or start from a model with a longer context.",
        )  # fmt: skip

    def has_open_end(self) -> bool:
        """Several evaluations are spread over the length. A single one is made after the last step."""
        return super().has_open_end() and self.evaluations == 1

    @property
    def virtual_tokens(self) -> int:
        """Tokens that the tuning method puts before every row."""
        return self.peft.tokens if METHODS[self.peft.method].pads else 0

    def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
        """Before the policy is loaded, the reference reads both sides of every training row. Then as SFT."""
        on = starting(self, on, chain)
        train, held_out = (
            joined(sides, sides)
            for sides in (on.sizes(self.role, split).cut(self.max_tokens) for split in TRAINING)
        )
        cost = training_cost(
            on, self.peft, train, held_out, batch_rows=self.batch_rows, epochs=self.epochs,
            micro_batch_tokens=self.micro_batch_tokens, checkpointing=self.activation_checkpointing,
            has_logits=True, longest=train.longest // 2,
        )  # fmt: skip
        worker, passes = ThroughputModel(on), 2 if self.needs_others else 1
        measured, again = held_out.rows * held_out.mean, passes * (self.evaluations + 1) - 2
        work = [*cost.work]
        if again > 0:  # training_cost counts two passes
            work.append(
                worker.read(
                    on.computed(again * measured, held_out), held_out.mean, predicted=again * measured,
                    what="held-out rows, measured more often",
                )
            )  # fmt: skip
        cost = replace(cost, work=work)
        if not self.needs_reference:
            return cost
        others = self.epochs * train.rows * train.mean if self.needs_others else 0.0
        return with_reference(
            cost, on, train, held_out, passes=passes, others=others,
            micro_batch_tokens=self.micro_batch_tokens,
        )  # fmt: skip

    def run(self, job: Job) -> Mapping[str, float]:
        """Measure the reference once, train, and publish the best policy."""
        from rlhf.pipeline.learner import Evaluations

        tokenizer = job.start(self.init).load_tokenizer()
        train, held_out = self.rows(job, tokenizer)
        learner = job.trainable(
            self.init, self.peft, self.optim, activation_checkpointing=self.activation_checkpointing
        )
        batches = job.batches(range(len(train)), self.batch_rows, self.epochs)
        evaluation_steps = {
            math.ceil(len(batches) * turn / self.evaluations) for turn in range(1, self.evaluations + 1)
        }

        def chosen_loss(measured: Measurement) -> float:
            return self.mean_loss(held_out, measured, CHOICE_ROWS)

        evaluations = Evaluations(
            Measurement,
            lambda: self.measure(job, learner, held_out),
            is_better=lambda new, best: chosen_loss(new) < chosen_loss(best),
            steps=evaluation_steps,
        )
        learner.fit(
            batches,
            lambda batch: preference_step(
                learner.engine, self, train.pick(batch), self.micro_batch_tokens, job.compute
            ),
            rows=lambda batch: map(train.as_json, batch),
            evaluations=evaluations,
        )
        written = learner.publish()
        if (reference_file := job.checkpoints.saved_file(f"train.{REFERENCE}")) and job.compute.is_main:
            shutil.copyfile(reference_file, job.directory / REFERENCE)
        all_rows = sum(len(job.data.rows(self.role, split)) for split in TRAINING)
        return {
            **self.summary(held_out, evaluations),
            **written,
            "steps": len(batches),
            "held_out_rows": len(held_out),
            "train_rows": len(train),
            "rows_too_long": all_rows - len(train) - len(held_out),
            "skipped_steps": learner.engine.skipped_steps,
        }  # fmt: skip

    def rows(self, job: Job, tokenizer: PreTrainedTokenizerBase) -> tuple[Preferences, Preferences]:
        """The training and the held-out rows, with the reference's log-probabilities.

        Raises:
            ConfigError: a split has too few rows within `max_tokens`.
        """
        budget = job.start(self.init).context_length - self.virtual_tokens

        def split(name: Split) -> Preferences:
            ids = job.tokens(self.role, name, tokenizer)
            return Preferences.of(job.data.rows(self.role, name), ids, min(self.max_tokens, budget))

        splits = [split(name) for name in TRAINING]
        for rows, name, least in zip(splits, TRAINING, (1, 2), strict=True):
            if len(rows) < least:
                raise ConfigError(
                    f"{self.name}.max_tokens={self.max_tokens}: {len(rows)} {name} rows of {self.source} are "
                    f"that short, and at least {least} must be. Raise it, or give shorter rows."
                )
        if self.needs_others:
            splits = [rows.with_others() for rows in splits]
        if not self.needs_reference:
            return splits[0], splits[1]
        names = [f"{name}.{REFERENCE}" for name in TRAINING]
        files = [job.checkpoints.saved_file(name) for name in names]
        if None in files:
            measured = self.measure_reference(job, splits)
            files = [
                job.checkpoints.save_file(name, partial(write_reference, rows=rows))
                for name, rows in zip(names, measured, strict=True)
            ]
        train, held_out = (
            read_reference(path, rows) for path, rows in zip(files, splits, strict=True) if path is not None
        )
        return train, held_out

    def measure_reference(self, job: Job, splits: list[Preferences]) -> list[Preferences]:
        """Measure all rows with the reference model. No other model is in memory."""
        from rlhf.models.logprobs import ResponseModel

        measured = []
        reference = job.policy(job.start(self.init))
        with (
            job.progress.task(f"{self.name}: reference", len(splits)) as task,
            reference.access.reading(),
        ):
            model = ResponseModel(reference.model)
            for rows in splits:
                own, other = (
                    all_logps(model, rows, self.micro_batch_tokens, job.compute, others=others).numpy()
                    if others is False or self.needs_others
                    else rows.other_reference_B2
                    for others in (False, True)
                )
                measured.append(rows.with_reference(own, other))
                task.advance(1)
        return measured

    def measure(self, job: Job, learner: PolicyLearner, rows: Preferences) -> Measurement:
        """Measure and log the current policy on the held-out rows."""
        measured = measure(learner.engine.model, self, rows, self.micro_batch_tokens, job.compute)
        margin_B = self.values_of(rows, measured).margin_B[JUDGE_ROWS]
        job.log(
            {
                "held_out_loss": self.mean_loss(rows, measured, JUDGE_ROWS),
                "held_out_choice_loss": self.mean_loss(rows, measured, CHOICE_ROWS),
                "held_out_accuracy": float(ranked_right(margin_B).mean()),
                "held_out_margin": float(margin_B.mean()),
            },
            learner.done,
        )  # fmt: skip
        return measured

    def values_of(self, rows: Preferences, measured: Measurement) -> Values:
        """Losses and rewards of all held-out rows."""
        return self.values(rows, measured.logp_B2, measured.point.double())

    def mean_loss(self, rows: Preferences, measured: Measurement, half: slice) -> float:
        """The mean loss over the examples of one half of the rows."""
        examples_B = self.examples(rows)[half]
        return float(self.values_of(rows, measured).loss_B[half].sum() / examples_B.sum())

    def summary(self, rows: Preferences, evaluations: Evaluations[Measurement]) -> dict[str, float]:
        """Summary metrics of the best policy, on the half that judges."""
        import torch

        from rlhf.evaluation.intervals import mean, ratio, share
        from rlhf.evaluation.reward_model import over_baseline
        from rlhf.evaluation.win_rate import wins

        first, best = evaluations.first, evaluations.best
        before, after = self.values_of(rows, first), self.values_of(rows, best)
        examples_B = self.examples(rows)[JUDGE_ROWS]
        change_B = (after.loss_B - before.loss_B)[JUDGE_ROWS]
        has_B2 = torch.from_numpy(rows.has_B2)[JUDGE_ROWS]
        moved_B2 = (best.logp_B2 - first.logp_B2)[JUDGE_ROWS]
        right_B = ranked_right(after.margin_B[JUDGE_ROWS])
        lengths_B2 = torch.from_numpy(rows.answer_lengths_B2)[JUDGE_ROWS]
        longer_B, is_pair_B = wins(lengths_B2[:, 0], lengths_B2[:, 1]), has_B2.all(-1)
        # an answer with a thumb has no longer side: the baseline is that all thumbs are up
        rule_B = torch.where(is_pair_B, longer_B, has_B2[:, 0].to(longer_B.dtype))
        metrics = {
            "held_out_loss_before": self.mean_loss(rows, first, JUDGE_ROWS),
            "held_out_loss": self.mean_loss(rows, best, JUDGE_ROWS),
            **ratio(change_B, examples_B).metrics("held_out_loss_change"),
            "held_out_loss_last": self.mean_loss(rows, evaluations.last, JUDGE_ROWS),
            **share(right_B).metrics("accuracy"),
            **over_baseline(right_B, rule_B),
            **mean(after.margin_B[JUDGE_ROWS]).metrics("margin"),
            "best_step": evaluations.best_step,
        }
        if bool(is_pair_B.any()):
            metrics["longer_wins_accuracy"] = float(longer_B[is_pair_B].mean())
        for side, name in enumerate(("chosen_change", "rejected_change")):
            if bool(has_B2[:, side].any()):
                metrics |= mean(moved_B2[has_B2[:, side], side]).metrics(name)
        return metrics
