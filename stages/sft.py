"""Supervised instruction tuning: teach the base model to answer in the way of the examples.

Reads   the base model, or what `sft.init` names instead; prompt/completion rows (`sft.data`);
        general data to replay (`sft.replay`).
Writes  a plain causal-LM directory, and the held-out loss before and after; unless sft.peft is none, the
        trained weights alone too, in `adapter/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rlhf.config import ConfigError
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost
from rlhf.costs.training import training_cost, with_replayed
from rlhf.data.answers import Answers
from rlhf.data.roles import TRAINING
from rlhf.data.schema import Split
from rlhf.data.sources import SourceConfig
from rlhf.models.peft.config import Peft
from rlhf.models.peft.methods import METHODS
from rlhf.pipeline.costing import starting
from rlhf.pipeline.fields import LENGTH, UNKEYED, Batch, Memory, Model, Reads, Rows, reads_of
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import TUNED, Healthy, Metric, named
from rlhf.pipeline.stage import Stage
from rlhf.supervised.answers import answer_losses, answer_step, cut_share, prompt_gain, with_replay
from rlhf.training.config import OptimConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

NUM_ROWS_CHECKED_FOR_CUTS = 1000
"""Number of training rows, the first ones, that are checked for cut-off answers."""


class SftStage(Stage):
    """The keys `sft.*`. Values: conf/stages/sft.yaml."""

    title, makes, version = "SFT", "policy", 10
    metrics: ClassVar[Mapping[str, Metric]] = {
        "held_out_loss_before": Metric("loss before", "z.3f"),
        "held_out_loss": Metric(
            "after", "z.3f", healthy=Healthy(gate="held_out_loss_change", from_start=True)
        ),
        **TUNED,
        "held_out_loss_change": Metric(
            better="lower",
            purpose="{title}'s loss on held-out answers",
        ),
        **named(
            "prompt_gain", "cut_share", "answer_tokens", "skipped_steps", "rows_cut", "rows_left_out",
            "turns_apart", "tokens", "replayed_rows",
        ),
    }  # fmt: skip

    data: Annotated[SourceConfig | None, Rows("sft")]
    """Rows with a prompt and its answer. `auto` uses the demo's if none of the data is yours."""
    init: Model
    """The model that it trains: `base`, a stage that makes a policy, or a `save_pretrained` directory."""
    replay: Annotated[SourceConfig | None, Rows("replay")]
    """General texts or conversations that SFT also learns, so that the model does not forget them. It learns
    full texts, and the answers of conversations."""
    replay_fraction: float = Field(ge=0, lt=1)
    """Share of the learned tokens that are replayed, as closely as full rows allow; 0 turns it off.

    Source: rehearsal, Robins 1995; for language models Scialom et al. 2022 (arXiv:2205.12393) and Ibrahim et
    al. 2024 (arXiv:2403.08763).
    """
    optim: OptimConfig
    peft: Peft
    epochs: Annotated[PositiveFloat, LENGTH]
    """Passes over the training rows, such as 1.5."""
    batch_rows: Batch
    """Rows of `data` per optimizer step, over all ranks; replayed rows come in addition."""
    micro_batch_tokens: Memory
    """Tokens per forward pass; lower it when memory runs out."""
    activation_checkpointing: Annotated[bool, UNKEYED]
    """Keep only the input of each layer and compute its activations again in the backward pass. Less memory,
    more time, the same result."""
    turns: Literal["all", "last"]
    """Which answers of a conversation SFT learns: every assistant turn, or the last one."""
    max_tokens: PositiveInt
    """Longer rows are cut: the end of the answer is lost. The model's context is a limit too. Rows whose
    prompt leaves no room for an answer are left out. Both are counted."""

    @model_validator(mode="after")
    def _something_to_replay(self) -> Self:
        if self.replay_fraction > 0 and self.replay is None:
            raise ValueError(
                f"KEY.replay_fraction={self.replay_fraction:g} needs KEY.replay, a source of general data. "
                "Give one, or set KEY.replay_fraction=0"
            )
        return self

    def reads(self) -> Reads:
        """Rows to replay only if some are replayed."""
        return reads_of(self, without=() if self.replay_fraction > 0 else ("replay",))

    def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
        """Every training row once an epoch, plus replayed rows; the held-out rows twice."""
        on = starting(self, on, chain)
        row_budget = self.row_budget(on.shape.context)
        train, held_out = (on.sizes("sft", split).cut(row_budget) for split in TRAINING)
        if self.replay_fraction > 0:
            train = with_replayed(train, on.sizes("replay", "train").cut(row_budget), self.replay_fraction)
        return training_cost(
            on, self.peft, train, held_out, longest=train.longest, batch_rows=self.batch_rows,
            epochs=self.epochs, micro_batch_tokens=self.micro_batch_tokens,
            checkpointing=self.activation_checkpointing, has_logits=True,
        )  # fmt: skip

    def row_budget(self, context: int) -> int:
        """Largest number of tokens of a row; longer rows are cut. Virtual tokens take their part of the
        context.

        Raises:
            ConfigError: the virtual tokens fill the context.
        """
        virtual = self.peft.tokens if METHODS[self.peft.method].pads else 0
        if context - virtual < 2:  # one to read, one to learn
            raise ConfigError(
                f"{self.name}.peft.tokens={virtual}: they fill the model's context of {context} tokens. "
                "Use fewer."
            )
        return min(self.max_tokens, context - virtual)

    def run(self, job: Job) -> Mapping[str, float]:
        """Train on the answers only, and publish the model."""
        import torch

        from rlhf.evaluation.intervals import ratio

        learner = job.trainable(
            self.init, self.peft, self.optim, activation_checkpointing=self.activation_checkpointing
        )
        engine, budget, compute = learner.engine, self.micro_batch_tokens, job.compute
        train = answers = self.answers(job, learner.tokenizer, "sft", "train", "data: no training row")
        held_out = self.answers(job, learner.tokenizer, "sft", "held_out", "data: no held-out row")
        left_out = len(job.data.rows("sft", "train")) - train.num_rows
        self.print_cut_rows(job, train, left_out)
        batches = task_batches = job.batches(range(len(train)), self.batch_rows, self.epochs)
        if self.replay_fraction > 0:
            none = f"replay={self.replay}: no row"
            general = self.answers(job, learner.tokenizer, "replay", "train", none)
            answers = Answers.joined(train, general)
            batches = with_replay(task_batches, train, general, self.replay_fraction, job.seed)
        tokens_B = torch.from_numpy(held_out.learned.astype("int64"))

        def measure(step: int) -> Tensor:
            loss_B = answer_losses(engine, held_out, budget, compute)
            job.log({"held_out_loss": ratio(loss_B, tokens_B).value}, step)
            return loss_B

        before_B = learner.once("before_B", lambda: measure(0))
        learner.fit(
            batches,
            lambda batch: answer_step(engine, answers.pick(batch), budget, compute),
            rows=lambda batch: map(answers.as_json, batch),
        )
        after_B = measure(len(batches))
        context = job.start(self.init).context_length
        gain = prompt_gain(engine, held_out, after_B, self.row_budget(context), budget, compute)
        return {
            **learner.publish(),
            "held_out_loss_before": ratio(before_B, tokens_B).value,
            "held_out_loss": ratio(after_B, tokens_B).value,
            **ratio(after_B - before_B, tokens_B).metrics("held_out_loss_change"),
            **gain.metrics("prompt_gain"),
            **cut_share(job.data.rows("sft", "train")[:NUM_ROWS_CHECKED_FOR_CUTS]).metrics("cut_share"),
            "answer_tokens": float(held_out.learned.mean()),
            "skipped_steps": engine.skipped_steps,
            "rows_cut": train.num_cut,
            "rows_left_out": left_out,
            "turns_apart": train.num_apart,
            "tokens": sum(int(answers.lengths[batch].sum()) for batch in batches),
            "replayed_rows": sum(map(len, batches)) - sum(map(len, task_batches)),
        }  # fmt: skip

    def print_cut_rows(self, job: Job, train: Answers, left_out: int) -> None:
        """Print how many training rows were too long, and how many conversations were split into turns."""
        apart, limit = train.num_apart, self.row_budget(job.start(self.init).context_length)
        if apart:
            job.progress.console.print(
                f"{self.name}.turns=all: the chat template renders earlier turns of {apart} conversations "
                "differently once later turns follow: each of their turns is a sequence of its own.",
                style="yellow", highlight=False,
            )  # fmt: skip
        cut = train.num_cut
        if cut or left_out:
            job.progress.console.print(
                f"{self.name}: {cut} of {len(train) + left_out} training rows are cut at {limit} tokens, "
                f"{left_out} are left out, since their prompts leave no room for an answer "
                f"({self.name}.max_tokens={self.max_tokens}).",
                style="yellow", highlight=False,
            )  # fmt: skip

    def answers(
        self, job: Job, tokenizer: PreTrainedTokenizerBase, role: str, split: Split, none: str
    ) -> Answers:
        """The rows of a split with at least one token to learn.

        Args:
            none: the key and the missing rows, for the error.

        Raises:
            ConfigError: there is no such row.
        """
        rows, ids = job.data.rows(role, split), job.tokens(role, split, tokenizer)
        row_budget = self.row_budget(job.start(self.init).context_length)
        answers = Answers.of(rows, ids, row_budget, all_turns=self.turns == "all")
        if not answers:
            raise ConfigError(
                f"{self.name}.{none} has anything to learn within {self.name}.max_tokens={self.max_tokens}. "
                "Raise it, or give rows with shorter prompts."
            )
        return answers
