"""What one of several ranks does in test_every_sharding.py: the whole stages grpo and dpo."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from helpers.experiments import build_stage
from helpers.grpo import SETTINGS
from helpers.jobs import small_job, tiny_base, user
from helpers.ppo import prompts
from helpers.spawned import each_case
from helpers.store import manifest
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import PairRow
from rlhf.distributed.compute import Compute, Zero
from rlhf.distributed.signals import Stopped
from rlhf.pipeline.job import Job
from rlhf.pipeline.store import Artifact
from rlhf.stages.dpo import DpoStage
from rlhf.stages.grpo import GrpoStage

ALGORITHMS = ("grpo", "dpo")
MOMENTS = {
    "score_mean/num_letters": 3.0, "score_deviation/num_letters": 2.0,
    "score_mean/judged": 0.1, "score_deviation/judged": 0.4,
}  # fmt: skip
"""As `generate` would have measured them."""
Figures = dict[str, float]
Case = tuple[Zero, str]
"""And the algorithm."""
RESUMED: Case = ("fsdp2", "grpo, stopped and resumed")
"""Sampled from layer by layer."""


def num_letters(prompts: Sequence[str], responses: Sequence[str]) -> list[float | None]:
    """How many bytes are letters; no score of a response without one."""
    found = [sum(each.isalpha() for each in response) for response in responses]
    return [float(count) if count else None for count in found]


def write_data(directory: Path) -> None:
    """Prepared rows of both stages."""
    directory.mkdir()
    data = PreparedData(directory)
    data.write("ppo", "train", prompts(range(100, 120)))
    data.write("ppo", "held_out", prompts(range(700, 705)))
    pairs = [PairRow(user(f"{n}?"), "rain on the roof " * (n % 3 + 1), "sun " * (n % 4)) for n in range(15)]
    data.write("pairs", "train", pairs[:10])
    data.write("pairs", "held_out", pairs[10:])


def run_stage(compute: Compute, algorithm: str, directory: Path, model: Path, seed: int = 0) -> Figures:
    """Run it; what it publishes lies in `directory/artifact`. Its figures without those of the clock."""
    job = job_in(directory, compute, algorithm, model)
    torch.manual_seed(seed)
    {"grpo": run_grpo, "dpo": run_dpo}[algorithm](job, model.parent / "judged")
    assert job.summary is not None
    return {name: value for name, value in job.summary.items() if not name.startswith("token_seconds")}


def job_in(directory: Path, compute: Compute, algorithm: str, model: Path) -> Job:
    """Its data are prepared; its checkpoints lie in the directory, for other jobs there too."""
    inputs = {"sft": model, "generate": model}
    job = small_job(
        algorithm, directory / "artifact", tiny_base(model), inputs, compute=compute,
        data=PreparedData(model.parent / "data"),
    )  # fmt: skip
    measured = Artifact(model, manifest("generate", metrics=MOMENTS))
    return replace(job, inputs={**job.inputs, "generate": measured}, local_sampling=sampling_of(compute))


def stopped_and_resumed(compute: Compute, directory: Path, model: Path) -> Figures:
    """GRPO, which a signal stops after its first step; then a job goes on from the checkpoint."""
    first = job_in(directory, compute, "grpo", model)
    first.checkpoints.signals.received = signal.SIGTERM
    torch.manual_seed(0)
    try:
        run_grpo(first, model.parent / "judged")
    except Stopped:
        assert job_in(directory, compute, "grpo", model).checkpoints.newest is not None
        return run_stage(compute, "grpo", directory, model, seed=1)
    raise AssertionError("it did not stop")


def sampling_of(compute: Compute) -> Literal["whole", "layers"]:
    """As the preflight would choose, where a model is too large to be sampled from whole."""
    return "layers" if compute.shards_weights else "whole"


def run_grpo(job: Job, judged: Path) -> None:
    parts = f"[{{source: python:helpers.sharded_stages:num_letters, weight: 2.0}}, model:{judged}]"
    placement = "auto" if job.compute.zero == "none" else "sharded"
    reward = f"{{of: {parts}, combine: minimum, normalize: true}}"
    build_stage(
        GrpoStage, *SETTINGS, f"ppo.reward={reward}", "grpo.optim.lr=1e-3", "grpo.epochs=2",
        "grpo.evaluate_prompts=4", f"grpo.frozen_placement={placement}",
    ).run(job)  # fmt: skip


def run_dpo(job: Job, judged: Path) -> None:
    build_stage(
        DpoStage, "model=tiny", "stage=dpo", "dpo.init=base", "dpo.peft=none", "dpo.optim.lr=1e-3",
        "dpo.batch_rows=4", "dpo.epochs=2", "dpo.evaluations=2",
    ).run(job)  # fmt: skip


def go_through(
    compute: Compute, cases: Sequence[tuple[Zero, str]], models: Path
) -> dict[tuple[Zero, str], Figures]:
    """All cases, in step with the other ranks. With hsdp each rank is a node."""

    def figures(case: Case) -> Figures:
        here = replace(compute, zero=case[0], node_ranks=1 if case[0] == "hsdp" else compute.world_size)
        return run_stage(here, case[1], models / "-".join(case), models / "tiny")

    found = each_case(cases, figures)
    sharded = replace(compute, zero="fsdp2")
    assert sampling_of(sharded) == "layers"
    return found | {RESUMED: stopped_and_resumed(sharded, models / "resumed", models / "tiny")}
