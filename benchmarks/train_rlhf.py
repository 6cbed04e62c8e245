"""Some steps of this project's SFT or reward stage on given rows; `training_step.py` starts it.

    python benchmarks/train_rlhf.py work.json

The stage's own `run`, from its config, with rows enough for so many steps; what it does before the first step
and after the last is not counted. The last line printed is one JSON object.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from run_rlhf import about_this_process, make_job, make_single
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from rlhf.data.prepared import PreparedData
from rlhf.data.schema import PairRow, SftRow, Split
from rlhf.distributed.compute import make_compute
from rlhf.pipeline.experiment import Experiment
from rlhf.pipeline.job import Job

ROWS: dict[str, type[SftRow] | type[PairRow]] = {"sft": SftRow, "reward": PairRow}


@dataclass
class TimedJob(Job):
    """Notes when each step is done: a stage logs its metrics then."""

    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    positions: int = 0
    """That went through a model so far, padding included."""
    positions_at_end: list[int] = field(default_factory=list)

    def count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A forward pre-hook of all modules: what is embedded is what goes through the layers."""
        if isinstance(module, nn.Embedding):
            self.positions += inputs[0].numel()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Once a step."""
        self.ends.append(time.perf_counter())
        self.losses.append(metrics["loss"])
        self.positions_at_end.append(self.positions)
        super().log(metrics, step)


def overrides(work: dict[str, Any]) -> list[str]:
    """The work in this project's keys; the schedule is that of transformers' Trainer."""
    stage = work["stage"]
    batch = {"sft": "batch_rows", "reward": "batch_pairs"}[stage]
    return [
        "model=local", f"model.path={work['model']}", f"precision={work['precision']}", f"stage={stage}",
        f"seed={work['seed']}", f"{stage}.{batch}={work['batch']}", f"{stage}.epochs=1",
        f"{stage}.peft={work['peft']}", f"{stage}.optim.lr={work['lr']}", f"{stage}.optim.weight_decay=0",
        f"{stage}.optim.eps={work['eps']}", f"{stage}.optim.warmup_fraction=0",
        f"{stage}.max_tokens={work['max_tokens']}", *work["overrides"],
    ]  # fmt: skip


def make_timed_job(work: dict[str, Any], experiment: Experiment, scratch: Path) -> tuple[TimedJob, str]:
    """A job that has the rows as its prepared data, and the model both as base and as SFT model."""
    compute, how = make_compute(experiment.settings.device, experiment.settings.precision)
    plain = make_job(Path(work["model"]), compute, work["seed"], scratch)
    job = TimedJob(**{**vars(plain), "stage": work["stage"]})
    row_type = ROWS[work["stage"]]
    splits: dict[Split, Any] = {"train": work["rows"], "held_out": work["held_out"]}
    for split, rows in splits.items():
        PreparedData(scratch).write(work["stage"], split, [row_type(**row) for row in rows])
    return job, how


def main() -> None:
    """Run the work, print what it took."""
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(work["threads"])
    experiment = make_single(overrides(work))
    with tempfile.TemporaryDirectory() as scratch:
        job, how = make_timed_job(work, experiment, Path(scratch))
        register_module_forward_pre_hook(job.count)
        experiment.stages[work["stage"]].run(job)
    print(
        json.dumps(
            {
                "ends": job.ends,
                "losses": job.losses,
                "positions": job.positions_at_end,
                "precision": how,
                **about_this_process(job.compute.device),
            }
        )
    )


if __name__ == "__main__":
    main()
