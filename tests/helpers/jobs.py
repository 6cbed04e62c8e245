"""What the pipeline would hand to a stage, without the pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from helpers.store import manifest
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import Message
from rlhf.distributed.compute import Compute, MicroBatch
from rlhf.distributed.signals import StopSignals
from rlhf.models.base import BaseModelFiles, ModelConfig
from rlhf.pipeline.job import Job
from rlhf.pipeline.stage import Stage
from rlhf.pipeline.store import Artifact
from rlhf.rewards.http import RewardServerConfig
from rlhf.tracking.progress import Progress
from rlhf.tracking.tracker import Tracker
from rlhf.training.checkpoint import CheckpointConfig, Checkpointer

TINY = ModelConfig(kind="tiny")
WHEN_STOPPED = {"every_steps": None, "every_minutes": None, "background": False, "keep": 2, "resume": True}
"""Checkpoints are written only by what stops a stage."""


def tiny_base(model: Path) -> BaseModelFiles:
    """The tiny model in a directory as the experiment's base model."""
    return BaseModelFiles(model, "tiny", TINY)


def user(text: str) -> list[Message]:
    """A prompt of one turn."""
    return [Message(role="user", content=text)]


def on_cpu(rank: int = 0, world_size: int = 1, dtype: torch.dtype = torch.float32) -> Compute:
    """One of so many ranks. Only a single one can talk to the others."""
    return Compute("cpu", str(dtype).removeprefix("torch."), rank=rank, world_size=world_size)


class WithIdlePasses(Compute):
    """A rank with less to do than another: two more passes that only keep it in step."""

    def micro_batches(
        self, lengths: Sequence[int], max_tokens: int, units: Sequence[Sequence[int]] | None = None
    ) -> Iterator[MicroBatch]:
        """The shortest row again, without weight, before the last pass and behind it."""
        found = super().micro_batches(lengths, max_tokens, units)
        idle = MicroBatch([min(range(len(lengths)), key=lambda index: lengths[index])], 0.0, False)
        yield from (each._replace(last=False) for each in found)
        yield from (idle, idle._replace(last=True))


@dataclass
class SmallJob(Job):
    """A job, and what its stage measured."""

    summary: dict[str, float] = field(default_factory=dict)


def run_in(stage: Stage, job: SmallJob) -> None:
    """Run a stage as the pipeline does."""
    job.summary = {name: float(value) for name, value in stage.run(job).items()}
    job.tracker.summarize(job.stage, job.summary)


def small_job(
    stage: str,
    directory: Path,
    base: BaseModelFiles,
    inputs: Mapping[str, Path] | None = None,
    *,
    data: PreparedData | None = None,
    checkpoints: Path | None = None,
    console: Console | None = None,
    seed: int = 0,
    compute: Compute | None = None,
    **checkpoint: object,
) -> SmallJob:
    """A job that makes its artifact in `directory`; run and checkpoints lie beside it.

    Args:
        data: prepared rows; without, `directory` takes them.
        checkpoints: where to keep them: those of an earlier job, to go on from there.
        compute: one of several ranks; without, the only one.
        checkpoint: changes to `WHEN_STOPPED`.
    """
    run_directory = directory.with_name(f"{directory.name}.run")
    for path in (directory, run_directory):
        path.mkdir(parents=True, exist_ok=True)
    compute, tracker = compute or on_cpu(), Tracker(run_directory, [])
    tracker.begin(directory)
    console = console or Console(quiet=True)
    return SmallJob(
        stage=stage,
        seed=seed,
        compute=compute,
        base=base,
        inputs={name: Artifact(path, manifest(name)) for name, path in (inputs or {}).items()},
        data=data or PreparedData(directory),
        directory=directory,
        tracker=tracker,
        progress=Progress(console),
        checkpoints=Checkpointer(
            directory=checkpoints or directory.with_name(f"{directory.name}.checkpoints"),
            config=CheckpointConfig.model_validate(WHEN_STOPPED | checkpoint),
            compute=compute,
            tracker=tracker,
            signals=StopSignals(),
            log=lambda text: console.print(text, highlight=False),
            stage=stage,
        ),
        reward_server=RewardServerConfig(timeout=10.0, retries=0),
        run_directory=run_directory,
    )
