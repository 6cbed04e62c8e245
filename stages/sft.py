"""Supervised instruction tuning: teach the base model to answer in the way of the examples.

Reads   the base model; prompt/completion rows (`sft.data`).
Writes  a plain causal-LM directory, and the held-out loss before and after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers import TrainingArguments as HfArguments

from rlhf.config import OptimConfig, Peft
from rlhf.data.batching import token_budget_batches
from rlhf.data.chat import exchange_ids
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import Role, SftRow
from rlhf.data.sources import SourceConfig
from rlhf.estimate import TRAINED, Work
from rlhf.job import Job
from rlhf.models.adapters import attach, count_parameters
from rlhf.models.load import load_causal_lm, save_policy
from rlhf.models.policy import check_head, pad_sequences, response_statistics
from rlhf.progress import Task
from rlhf.stage import Stage
from rlhf.training import make_optimizer


class SftStage(Stage):
    """What `sft.*` can be told. Values: conf/stages/sft.yaml."""

    name: ClassVar[str] = "sft"
    not_in_key: ClassVar[frozenset[str]] = frozenset({"data", "micro_batch_rows", "micro_batch_tokens"})

    data: SourceConfig
    """Rows with a prompt and its answer; prepared by `prepare`, so its content is in the key."""
    optim: OptimConfig
    peft: Peft
    epochs: PositiveFloat
    batch_rows: PositiveInt
    """Rows per optimizer step, over all ranks."""
    micro_batch_rows: PositiveInt
    """Rows per forward pass; lower it when memory runs out."""
    micro_batch_tokens: PositiveInt
    """Padded tokens per forward pass when measuring the held-out loss."""
    max_tokens: PositiveInt
    """Longer rows are cut (the end of the answer is lost)."""

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if self.batch_rows % self.micro_batch_rows:
            raise ValueError(
                f"micro_batch_rows={self.micro_batch_rows} does not divide batch_rows={self.batch_rows}"
            )
        return self

    def inputs(self) -> tuple[str, ...]:
        """It reads prepared data."""
        return ("prepare",)

    def roles(self) -> tuple[Role, ...]:
        """Reads prompt/completion rows."""
        return ("sft",)

    def reads_base_model(self) -> bool:
        """It trains the base model."""
        return True

    def work(self, data: PreparedData) -> Work:
        """Every training row once an epoch; the held-out rows twice."""
        rows, tokens = data.size("sft", "train")
        held_out, _ = data.size("sft", "held_out")
        return Work(
            trained=TRAINED[self.peft.method] * self.epochs * rows * tokens, read=2 * held_out * tokens
        )

    def run(self, job: Job) -> None:
        """Train on the answers only, and publish the model."""
        tokenizer = job.base.load_tokenizer()
        model = load_causal_lm(job.base.directory, job.base.config, job.compute.dtype, job.compute.device)
        check_head(model)
        train = [exchange_ids(tokenizer, row.prompt, row.completion) for row in job.data.rows("sft", "train")]
        held_out = job.data.rows("sft", "held_out")

        before = self.mean_loss(model, tokenizer, held_out)
        adapter = attach(model, self.peft)
        trained, _ = count_parameters(model)
        skipped = self.train(job, model, tokenizer, train)
        adapter.merge()
        after = self.mean_loss(model.eval(), tokenizer, held_out)

        save_policy(model, tokenizer, job.directory)
        job.publish({
            "held_out_loss_before": before,
            "held_out_loss": after,
            "held_out_loss_change": after - before,
            "skipped_steps": skipped,
            "rows_cut": sum(len(ids) > self.max_tokens for ids, _ in train),
            "trained_parameters": trained,
            "tokens": self.epochs * sum(min(len(ids), self.max_tokens) for ids, _ in train),
        })  # fmt: skip

    def train(
        self,
        job: Job,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[tuple[list[int], int]],
    ) -> int:
        """Run TRL's SFTTrainer; the number of steps skipped for a gradient that was not finite."""
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        labelled = [
            {
                "input_ids": ids[: self.max_tokens],
                "labels": ([-100] * prompt + ids[prompt:])[: self.max_tokens],
            }
            for ids, prompt in rows
        ]
        optimizer = make_optimizer([(model.parameters(), self.optim)])
        packing = job.base.config.attention.startswith("flash")  # others would attend across documents
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(job.directory),  # nothing is written: save_strategy
                use_cpu=job.compute.device.type == "cpu",
                bf16=False,  # the weights are in the compute dtype; the optimizer keeps fp32 masters
                num_train_epochs=self.epochs,
                per_device_train_batch_size=self.micro_batch_rows,
                gradient_accumulation_steps=self.batch_rows // self.micro_batch_rows,
                lr_scheduler_type="linear",
                warmup_steps=self.optim.warmup_fraction,
                max_grad_norm=0.0,  # clipped by the optimizer
                max_length=self.max_tokens,
                packing=packing,
                train_sampling_strategy="random" if packing else "group_by_length",
                gradient_checkpointing=False,
                seed=job.seed,
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(labelled),
            processing_class=tokenizer,
            optimizers=(optimizer, None),
        )
        num_steps = math.ceil(self.epochs * math.ceil(len(trainer.train_dataset) / self.batch_rows))
        with job.progress.task("sft: training", num_steps) as task:
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(Report(job, task))
            trainer.train()
        return optimizer.skipped_steps

    @torch.no_grad()
    def mean_loss(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[SftRow]
    ) -> float:
        """Mean negative log-likelihood per answer token, in nats."""
        pairs = [split_ids(*exchange_ids(tokenizer, row.prompt, row.completion)) for row in rows]
        total, count = 0.0, 0
        lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
        for group in token_budget_batches(lengths, self.micro_batch_tokens):
            batch = pad_sequences(
                [pairs[row][0] for row in group], [pairs[row][1] for row in group], 0, model.device
            )
            logp_N = response_statistics(model, batch, temperature=1.0).logp_N
            total, count = total - float(logp_N.sum()), count + len(logp_N)
        return total / count


def split_ids(ids: list[int], prompt_length: int) -> tuple[Tensor, Tensor]:
    """An exchange's ids as (prompt, answer)."""
    return torch.tensor(ids[:prompt_length]), torch.tensor(ids[prompt_length:])


class Report(TrainerCallback):
    """Passes TRL's logs on to the job."""

    def __init__(self, job: Job, task: Task) -> None:
        self._job, self._task = job, task

    def on_log(self, args: HfArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One line an optimizer step."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        metrics = {"loss": logs["loss"], "lr": logs["learning_rate"], "epoch": logs["epoch"]}
        self._job.log({**metrics, "grad_norm": kwargs["optimizer"].optimizer.grad_norm}, state.global_step)
        self._task.advance(1, f"loss {logs['loss']:.3f}")
