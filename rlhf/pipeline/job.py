"""What a stage receives for its run: directories, inputs, data, and where to report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rlhf.data.chat_template import tokenizer_digest
from rlhf.data.prepared import PreparedData
from rlhf.data.tokens import TokenIds, write_tokens
from rlhf.distributed.batching import Batches, shuffled_batches
from rlhf.models.base import BaseModelFiles
from rlhf.models.start import directory_of
from rlhf.pipeline.store import Artifact
from rlhf.tracking.progress import Progress
from rlhf.tracking.redaction import redacted
from rlhf.tracking.tracker import Tracker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.distributed.compute import Compute
    from rlhf.distributed.peak import PeakMeter
    from rlhf.generation.policy_model import PolicyModel
    from rlhf.generation.vllm import Vllm
    from rlhf.models.peft.config import PeftConfig
    from rlhf.models.weight_sharing import Backbone, Placement
    from rlhf.pipeline.experiment import Experiment
    from rlhf.pipeline.trainable import PolicyLearner
    from rlhf.rewards.function import Tolerance
    from rlhf.rewards.http import RewardServerConfig
    from rlhf.rewards.kinds import RewardMix
    from rlhf.rewards.reward import Reward
    from rlhf.training.checkpoint import Checkpointer
    from rlhf.training.config import OptimConfig

Row = TypeVar("Row")


@dataclass
class Job:
    """One stage's run."""

    stage: str
    seed: int
    compute: Compute
    """Device, dtype and the accelerator."""
    base: BaseModelFiles
    """The base model as a local directory, and how to treat it."""
    inputs: Mapping[str, Artifact]
    """Finished artifacts of the stages that this one reads, in the order in which they are made."""
    data: PreparedData
    """The prepared data sets: `job.data.rows("sft", "train")`."""
    directory: Path
    """Where the stage writes its artifact; renamed into the store once the stage is done."""
    tracker: Tracker
    progress: Progress
    checkpoints: Checkpointer
    reward_server: RewardServerConfig
    """How to query a reward at a URL."""
    run_directory: Path
    """For what does not belong into the artifact, such as a batch that could not be learned from."""
    external_digests: Mapping[str, str] = field(default_factory=dict)
    """The result of `rlhf.pipeline.key.external_digests` on rank 0, which hashes full models, so only
    once."""
    digest_names: Mapping[str, str] = field(default_factory=dict)
    """Value of a key that names a model -> the name of the model's digest in `external_digests`."""
    vllm: Vllm | None = None
    """The engine that samples with `generation=vllm`; None for the local engine."""
    local_sampling: Literal["whole", "layers"] = "whole"
    """How the local engine samples from sharded weights: with all of them gathered for a rollout, or layer by
    layer. The preflight chooses."""
    experiment: Experiment | None = None
    """All stages and settings, for a stage that reports on other stages."""
    peak: PeakMeter | None = None
    """Measures the memory of parts of the stage; None in a job without a pipeline."""
    recorded: str = ""
    """Set by a stage that is a `Records`: digest of the part of its record that it publishes."""
    ending: KeyboardInterrupt | None = None
    """Set by a stage that a signal ended early with something to publish: the run ends after publishing."""

    @property
    def will_sample(self) -> bool:
        """Whether this stage or another of the run samples by the local engine."""
        if self.vllm is not None or self.experiment is None:
            return False
        stages = self.experiment.stages
        return any(stages[name].samples for name in self.experiment.needed())

    def start(self, init: str) -> BaseModelFiles:
        """The model that a key of the type `Model` names.

        Raises:
            ValueError: it is a stage that this one does not read. A directory must be a `ModelDirectory`.
        """
        directory = directory_of(init)
        if directory is not None:
            identity = self.external_digests[self.digest_names.get(init, "init")]
            return BaseModelFiles(directory, identity, self.base.config)
        if init == "base":
            return self.base
        if init not in self.inputs:
            raise ValueError(
                f"{self.stage} reads no stage {init!r}. A directory is ModelDirectory(path), of "
                "rlhf.models.start, as fields of the type Model hold it."
            )
        return BaseModelFiles(self.inputs[init].path, self.inputs[init].key, self.base.config)

    def tokens(self, role: str, split: str, tokenizer: PreTrainedTokenizerBase) -> TokenIds:
        """Token ids of a split's rows. `prepare` has made those of the base model's tokenizer. Rank 0 makes
        those of another tokenizer here, on all its cores."""
        prepared = self.data.tokens_path(role, split)
        if prepared.exists():
            token_ids = TokenIds(prepared)
            if token_ids.tokenizer == tokenizer_digest(tokenizer):
                return token_ids
        rows = self.data.rows(role, split)
        path = self.run_directory / f"{self.stage}-{role}-{split}.tokens.arrow"
        with self.progress.task(f"{self.stage}: tokenizing {role}, {split}", len(rows)) as task:
            self.compute.main_only(lambda: write_tokens(path, tokenizer, rows, task.advance))
        token_ids = TokenIds(path)
        self.compute.barrier()
        if self.compute.is_main:
            path.unlink()  # it is mapped: the disk keeps it until the last process has closed it
        return token_ids

    def trainable(
        self, init: str, peft: PeftConfig, optim: OptimConfig, *, activation_checkpointing: bool = False
    ) -> PolicyLearner:
        """The model that a key of the type `Model` names, ready to train: loaded and checked, with the
        parameters that `peft` trains, in the engine that `zero=` selects, in the newest checkpoint's state.

        The engine's model is a `rlhf.models.logprobs.ResponseModel`.

        Args:
            activation_checkpointing: store only the input of each layer for the backward pass.

        Raises:
            ConfigError: the model is of a kind that is not supported.
        """
        from rlhf.models.logprobs import ResponseModel
        from rlhf.models.recompute import checkpoint_layers
        from rlhf.pipeline.trainable import PolicyLearner, TunedPolicy

        policy = TunedPolicy.load(self, init, peft, check_decodes=self.will_sample)
        if activation_checkpointing:
            checkpoint_layers(policy.model)
        groups = [(policy.model.parameters(), optim)]
        learner = PolicyLearner(self, policy, ResponseModel(policy.model), groups)
        learner.restore()
        return learner

    def batches(self, rows: Sequence[Row], batch_rows: int, epochs: float) -> Batches[Row]:
        """The batches of a whole training, in order. Each epoch shuffles the rows anew, by the run's seed."""
        return shuffled_batches(rows, batch_rows, epochs, self.seed)

    def policy(self, model: BaseModelFiles | Path) -> PolicyModel:
        """A frozen policy that samples with the run's engine.

        Args:
            model: what `start` returns (the base model, or the directory of `STAGE.init`): it is checked,
                and has the config's chat template. Or the directory of a published model, with its own.

        Raises:
            ConfigError: the model's output layer is of a kind that is not supported.
        """
        from rlhf.generation.policy_model import PolicyModel

        load = partial(
            PolicyModel.load, config=self.base.config, compute=self.compute, vllm=self.vllm,
            local_sampling=self.local_sampling,
        )  # fmt: skip
        if isinstance(model, Path):
            return load(model)
        return load(model.directory, tokenizer=model.load_tokenizer(), check=True)

    def reward(
        self,
        source: str | RewardMix,
        micro_batch_tokens: int,
        backbone: Backbone | None = None,
        placement: Placement | None = None,
        tolerance: Tolerance | None = None,
    ) -> Reward:
        """The reward that a `RewardSource` names. A mix that normalises uses the means and deviations that
        `generate` measured; in `generate` itself, those of the scores at hand.

        Args:
            micro_batch_tokens: tokens of a model's forward pass.
            backbone: weights that a learned reward may share.
            placement: where a model's weights are; None: as those of the model that trains.
            tolerance: how often functions of the user's may raise; None: once is an error.
        """
        from rlhf.rewards.combined import Moments
        from rlhf.rewards.kinds import parts_of, stage_of
        from rlhf.rewards.model import make_reward

        trained = filter(None, (stage_of(part.source) for part in parts_of(source)))
        learned = {name: self.inputs[name].path for name in trained}
        moments = None
        if not isinstance(source, str) and source.normalize and self.stage != "generate":
            measured = self.inputs["generate"].manifest.metrics
            moments = {
                name: Moments(measured[f"score_mean/{name}"], measured[f"score_deviation/{name}"])
                for name in source.labels
            }
        return make_reward(
            source, learned, self.base.config, self.compute,
            micro_batch_tokens, self.reward_server, backbone, placement, moments, tolerance,
        )  # fmt: skip

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log one step's metrics under the stage's name."""
        self.progress.figures(metrics)
        self.tracker.log(self.stage, metrics, step)

    def sample(self, **row: Any) -> None:
        """Save one generated text (prompt, response, score, ...) in samples.jsonl."""
        self.tracker.sample(self.stage, row)

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows into a .jsonl file of the artifact."""
        if not self.compute.is_main:
            return
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self.directory / name).write_text(text, encoding="utf-8")

    def dump(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Save rows with which something went wrong in the run's directory, for a person to look at."""
        path = self.run_directory / f"{self.stage}-{name}.jsonl"
        if self.compute.is_main:
            text = "".join(json.dumps(redacted(row), ensure_ascii=False) + "\n" for row in rows)
            path.write_text(text, encoding="utf-8")
        return path
