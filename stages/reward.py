"""Train the reward model on preference pairs.

Reads   the SFT model, or what `reward.init` names instead; preference pairs (`reward.pairs`).
Writes  a sequence-classification model with one label, and how well it ranks held-out pairs; unless
        reward.peft is none, the trained weights alone too, in `adapter/` (PPO puts a LoRA adapter on the
        policy's weights, if both started from the same model); and calibration.jsonl: how often it is right,
        by how sure it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import NonNegativeFloat, PositiveInt

from rlhf.config import Complaint, ConfigError
from rlhf.data.roles import TRAINING
from rlhf.data.sources import SourceConfig
from rlhf.models.on_disk import open_scratch
from rlhf.models.peft.config import Peft
from rlhf.models.peft.methods import METHODS
from rlhf.models.peft.saved import attach_to_merge, bytes_under, save_adapter
from rlhf.models.start import files_of
from rlhf.pipeline.checks import length_complaints
from rlhf.pipeline.fields import LENGTH, UNKEYED, Batch, Memory, Model, Rows
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import SIZES, Healthy, Metric, named
from rlhf.pipeline.stage import Stage, View
from rlhf.supervised.pairs import Pairs, pair_step, rank_pairs
from rlhf.training.config import OptimConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RewardStage(Stage):
    """The keys `reward.*`. Values: conf/stages/reward.yaml."""

    title, makes, version = "Reward", "reward", 7
    metrics: ClassVar[Mapping[str, Metric]] = {
        "accuracy": Metric("accuracy", "z.3f"),
        "accuracy_wide_gap": Metric("on wide gaps", "z.3f"),
        "longer_wins_accuracy": Metric("longer wins", "z.3f"),
        **SIZES,
        "accuracy_over_baseline": Metric(
            better="higher",
            purpose="the reward model{label}'s ranking against chance and length",
        ),
        **named(
            "baseline_accuracy", "margin", "calibration_error", "length_correlation", "score_mean",
            "score_deviation", "held_out_pairs", "wide_gap_pairs", "train_pairs", "pairs_too_long",
            "skipped_steps",
        ),
        "train_accuracy": Metric(healthy=Healthy(min=0.5), is_curve=True),
    }  # fmt: skip

    pairs: Annotated[SourceConfig | None, Rows("pairs")]
    """Rows with a prompt, a chosen and a rejected answer. `auto` uses the demo's if none of the data is
    yours."""
    init: Model
    """The model that it starts from: `base`, a stage that makes a policy (`sft`, ...), or a directory.
    Without `sft`, no SFT stage is needed."""
    optim: OptimConfig
    peft: Peft
    epochs: Annotated[PositiveInt, LENGTH]
    """Passes over the pairs. Usually one: reward models overfit in the second (Ouyang et al. 2022, C.2)."""
    batch_pairs: Batch
    """Pairs per optimizer step, over all ranks."""
    micro_batch_tokens: Memory
    """Tokens per forward pass; lower it when memory runs out."""
    activation_checkpointing: Annotated[bool, UNKEYED]
    """Keep only the input of each layer and compute its activations again in the backward pass. Less memory,
    more time, the same result."""
    max_tokens: PositiveInt
    """Pairs with a longer side are left out and counted."""
    center: NonNegativeFloat
    """Weight that pulls scores towards 0 (Eisenstein et al. 2023)."""

    def complaints(self, view: View) -> Iterator[Complaint]:
        """The starting model can become a reward model, and the pairs within `max_tokens` fit its context."""
        yield from super().complaints(view)
        if view.prepared is None:
            return
        from rlhf.models.value_head import check_scorable

        data, base = view.prepared
        check_scorable(files_of(self.init, base).architecture)
        virtual = self.peft.tokens if METHODS[self.peft.method].pads else 0
        yield from length_complaints(
            view, "reward.init", self.init, f"reward.pairs={self.pairs}",
            lambda: itertools.chain.from_iterable(data.rows("pairs", split) for split in TRAINING),
            reserved_tokens=virtual, max_tokens=self.max_tokens,
            fix=f"Lower reward.max_tokens={self.max_tokens} to that, so that longer pairs are left out, or "
            "start from a model with a longer context.",
        )  # fmt: skip

    def run(self, job: Job) -> Mapping[str, float]:
        """Train, publish, and measure the published model."""
        from rlhf.evaluation.reward_model import calibration, rank_quality
        from rlhf.models.value_head import load_scalar_model
        from rlhf.models.weight_sharing import load_frozen

        tokenizer = job.start(self.init).load_tokenizer()
        assert isinstance(tokenizer.pad_token_id, int)
        rows = [job.data.rows("pairs", split) for split in TRAINING]
        train, held_out = (
            Pairs(rows[number], job.tokens("pairs", split, tokenizer), self.max_tokens)
            for number, split in enumerate(TRAINING)
        )
        if not train or not held_out:
            raise ConfigError(f"reward.max_tokens={self.max_tokens}: no pair is that short. Raise it.")
        metrics = self.train(job, tokenizer, train)
        published, _ = load_frozen(
            lambda device: load_scalar_model(
                job.directory, job.base.config, job.compute.dtype, device, job.compute
            ),
            job.compute,
        )
        ranking = rank_pairs(published, held_out, self.micro_batch_tokens, job.compute)
        bins = calibration(ranking.chosen_B, ranking.rejected_B)
        job.write_rows("calibration.jsonl", (each._asdict() for each in bins))
        too_long = sum(map(len, rows)) - len(train) - len(held_out)
        return {
            **rank_quality(ranking),
            **metrics,
            "train_pairs": len(train),
            "pairs_too_long": too_long,
        }  # fmt: skip

    def train(self, job: Job, tokenizer: PreTrainedTokenizerBase, pairs: Pairs) -> dict[str, float]:
        """Train and publish; returns summary metrics of both."""
        from rlhf.models.peft.attach import attach, check_adapters_used, loads_on
        from rlhf.models.recompute import checkpoint_layers
        from rlhf.models.value_head import load_scalar_model, reset_head
        from rlhf.pipeline.learner import Learner

        start, compute = job.start(self.init).directory, job.compute
        load_device = loads_on(self.peft, compute)
        model = load_scalar_model(start, job.base.config, compute.dtype, load_device, compute, new_head=True)
        reset_head(model)
        attach(model.model, self.peft, compute.device)
        model.to(compute.loads_on)  # the head too: QLoRA has moved only the backbone
        compute.ask_once(lambda: check_adapters_used(model.model))
        model.head.requires_grad_(True)
        model.offset.requires_grad_(False)
        if self.activation_checkpointing:
            checkpoint_layers(model)
        learner = Learner(job, model, [(model.parameters(), self.optim)], published=model)
        learner.fit(
            job.batches(range(len(pairs)), self.batch_pairs, self.epochs),
            lambda batch: pair_step(
                learner.engine, pairs.pick(batch), self.micro_batch_tokens, compute, center=self.center
            ),
            rows=lambda batch: map(pairs.as_json, batch),
        )
        with learner.weights() as weights:
            saved = compute.main_only(lambda: self.save(job, weights, tokenizer))
        return {
            **saved,
            "trained_parameters": learner.trained_parameters,
            "skipped_steps": learner.engine.skipped_steps,
        }

    def save(self, job: Job, weights: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        """Publish the trained weights alone, unless all were trained; and a plain classification model if the
        method merges.

        Args:
            weights: of `Learner.weights`.

        Returns:
            Summary metrics of what was written.
        """
        from rlhf.models.value_head import load_scalar_model, save_scalar_model
        from rlhf.training.trained import load_trained, put_weights

        start = job.start(self.init)
        with open_scratch(job.directory) as scratch:
            model = load_scalar_model(
                start.directory, job.base.config, job.compute.dtype, new_head=True, scratch=scratch.directory
            )
            adapter = attach_to_merge(model.model, self.peft, scratch.map_to_file)
            model.head.requires_grad_(True)
            model.offset.requires_grad_(False)
            put_weights(model, load_trained(weights))
            metrics = save_adapter(adapter, job.directory, start.directory, start.identity, model.head.weight)
            if METHODS[self.peft.method].merges:
                adapter.merge(scratch.map_to_file)
                save_scalar_model(model, tokenizer, job.directory)
            else:
                model.model.config.save_pretrained(job.directory)
                tokenizer.save_pretrained(job.directory)
        return {**metrics, "artifact_bytes": bytes_under(job.directory)}
