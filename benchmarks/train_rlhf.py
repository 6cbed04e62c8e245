"""Timed steps of this project's SFT, reward or DPO stage on given rows; `training_step.py` starts it.

    python benchmarks/train_rlhf.py work.json

It calls the stage's own `run` with enough rows for the steps. Work before the first step and after the last
is not counted. The last line printed is one JSON object.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peer_work import CLOCKS
from run_rlhf import about_this_process, make_job, make_single
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from rlhf.data.prepared import PreparedData
from rlhf.data.schema import PairRow, SftRow, Split
from rlhf.distributed.compute import make_compute
from rlhf.pipeline.experiment import Experiment
from rlhf.pipeline.job import Job
from rlhf.stages.dpo import DpoStage
from rlhf.supervised.preferences import Preferences

ROWS: dict[str, tuple[str, type[SftRow] | type[PairRow]]] = {
    "sft": ("sft", SftRow), "reward": ("pairs", PairRow), "dpo": ("pairs", PairRow),
}  # fmt: skip
"""Stage -> role and type of its rows."""


@dataclass
class TimedJob(Job):
    """Records the end of each step, when a stage logs its metrics."""

    clock: Callable[[], float] = CLOCKS["wall"]
    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    reference_seconds: float = 0.0
    """Seconds of DPO's reference pass over all rows, before its first step."""
    positions: int = 0
    """Positions that went through a model so far, padding included."""
    positions_at_end: list[int] = field(default_factory=list)

    def count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A forward pre-hook of all modules: embedded positions are those that go through the layers."""
        if isinstance(module, nn.Embedding):
            self.positions += inputs[0].numel()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Called once per step, and after the last step for DPO's held-out rows."""
        if "loss" in metrics:
            self.ends.append(self.clock())
            self.losses.append(metrics["loss"])
            self.positions_at_end.append(self.positions)
        super().log(metrics, step)


def overrides(work: dict[str, Any]) -> list[str]:
    """The work as overrides of this project's keys, with the schedule of transformers' Trainer."""
    stage = work["stage"]
    batch = "batch_pairs" if stage == "reward" else "batch_rows"
    return [
        "model=local", f"model.path={work['model']}", f"precision={work['precision']}", f"stage={stage}",
        f"seed={work['seed']}", f"{stage}.{batch}={work['batch']}", f"{stage}.epochs=1",
        f"{stage}.peft={work['peft']}", f"{stage}.optim.lr={work['lr']}", f"{stage}.optim.weight_decay=0",
        f"{stage}.optim.eps={work['eps']}", f"{stage}.optim.warmup_fraction=0",
        f"{stage}.max_tokens={work['max_tokens']}", *work["overrides"],
    ]  # fmt: skip


def make_timed_job(work: dict[str, Any], experiment: Experiment, scratch: Path) -> tuple[TimedJob, str]:
    """A job with the rows as prepared data, and the model both as base and as SFT model."""
    compute, how = make_compute(experiment.settings.device, experiment.settings.precision)
    plain = make_job(Path(work["model"]), compute, work["seed"], scratch)
    job = TimedJob(**{**vars(plain), "stage": work["stage"], "clock": CLOCKS[work["clock"]]})
    role, row_type = ROWS[work["stage"]]
    splits: dict[Split, Any] = {"train": work["rows"], "held_out": work["held_out"]}
    for split, rows in splits.items():
        PreparedData(scratch).write(role, split, [row_type(**row) for row in rows])
    return job, how


def time_reference(job: TimedJob) -> None:
    """Measure the time of DPO's single reference pass."""
    ask = DpoStage.measure_reference

    def timed(stage: DpoStage, own_job: Job, splits: list[Preferences]) -> list[Preferences]:
        begin = job.clock()
        found = ask(stage, own_job, splits)
        job.reference_seconds = job.clock() - begin
        return found

    DpoStage.measure_reference = timed  # type: ignore[method-assign, assignment]  # in this process


def main() -> None:
    """Run the work and print the measurements."""
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(work["threads"])
    experiment = make_single(overrides(work))
    with tempfile.TemporaryDirectory() as scratch:
        job, how = make_timed_job(work, experiment, Path(scratch))
        register_module_forward_pre_hook(job.count)
        time_reference(job)
        experiment.stages[work["stage"]].run(job)
    print(
        json.dumps(
            {
                "ends": job.ends,
                "losses": job.losses,
                "reference_seconds": job.reference_seconds,
                "positions": job.positions_at_end,
                "precision": how,
                **about_this_process(job.compute.device),
            }
        )
    )


if __name__ == "__main__":
    main()
