"""What one of several ranks does in test_resumed_by_layers.py: the whole stage grpo."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from helpers.experiments import build_stage
from helpers.grpo import SETTINGS
from helpers.jobs import SmallJob, run_in, small_job, tiny_base
from helpers.ppo import prompts
from helpers.store import manifest
from rlhf.data.prepared import PreparedData
from rlhf.distributed.compute import Compute
from rlhf.distributed.signals import Stopped
from rlhf.pipeline.store import Artifact
from rlhf.stages.grpo import GrpoStage

MOMENTS = {
    "score_mean/num_letters": 3.0, "score_deviation/num_letters": 2.0,
    "score_mean/judged": 0.1, "score_deviation/judged": 0.4,
}  # fmt: skip
"""As `generate` would have measured them."""


def num_letters(prompts: Sequence[str], responses: Sequence[str]) -> list[float | None]:
    """How many bytes are letters; no score of a response without one."""
    found = [sum(each.isalpha() for each in response) for response in responses]
    return [float(count) if count else None for count in found]


def write_data(directory: Path) -> None:
    """Prepared prompts."""
    directory.mkdir()
    data = PreparedData(directory)
    data.write("ppo", "train", prompts(range(100, 120)))
    data.write("ppo", "held_out", prompts(range(700, 705)))


def through_and_resumed(compute: Compute, models: Path) -> tuple[dict[str, float], dict[str, float]]:
    """What the stage finds if nothing stops it; and if a signal does after its first step, with what a second
    job finds, which goes on from the checkpoint. Published are `through/artifact` and `resumed/artifact`."""
    sharded = replace(compute, zero="fsdp2", node_ranks=compute.world_size)
    through = run(job_in(models / "through", sharded, models), models, seed=0)
    stopped = job_in(models / "resumed", sharded, models)
    stopped.checkpoints.signals.received = signal.SIGTERM
    try:
        run(stopped, models, seed=0)
    except Stopped:
        second = job_in(models / "resumed", sharded, models)
        assert second.checkpoints.newest is not None
        return through, run(second, models, seed=1)
    raise AssertionError("it did not stop")


def job_in(directory: Path, compute: Compute, models: Path) -> SmallJob:
    """Its data are prepared; its checkpoints lie in the directory, for other jobs there too."""
    tiny = models / "tiny"
    job = small_job(
        "grpo", directory / "artifact", tiny_base(tiny), {"sft": tiny, "generate": tiny}, compute=compute,
        data=PreparedData(models / "data"),
    )  # fmt: skip
    measured = Artifact(tiny, manifest("generate", metrics=MOMENTS))
    return replace(job, inputs={**job.inputs, "generate": measured}, local_sampling="layers")


def run(job: SmallJob, models: Path, *, seed: int) -> dict[str, float]:
    """Run the stage; its figures without those of the clock."""
    torch.manual_seed(seed)
    parts = f"[{{source: python:{__name__}:num_letters, weight: 2.0}}, model:{models / 'judged'}]"
    run_in(build_stage(
        GrpoStage, *SETTINGS, f"ppo.reward={{of: {parts}, combine: minimum, normalize: true}}",
        "grpo.optim.lr=1e-3", "grpo.epochs=2", "grpo.evaluate_prompts=4", "grpo.frozen_placement=sharded",
    ), job)  # fmt: skip
    return {name: value for name, value in job.summary.items() if not name.startswith("token_seconds")}
