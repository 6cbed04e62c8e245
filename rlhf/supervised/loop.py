"""The training loop of stages with fixed data: one optimizer step per batch, resumable after each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from rlhf.config import ConfigError
from rlhf.pipeline.job import Job
from rlhf.training.engine import Engine

Row = TypeVar("Row")

MOST_SKIPPED = 3
"""The stage ends after so many steps in a row with a gradient that is not finite."""


def train_batches(
    job: Job,
    engine: Engine,
    batches: Sequence[Sequence[Row]],
    step: Callable[[Sequence[Row]], dict[str, float]],
    *,
    state: Mapping[str, Any],
    as_json: Callable[[Row], Mapping[str, Any]],
    done: int,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Take one optimizer step per batch. The first `done` batches are done already.

    Args:
        step: computes a batch's gradients, calls `engine.step` and returns metrics, among them `loss`.
        state: kept in every checkpoint, with the number of batches that are done.
        as_json: a row as in the user's file, for the report of a batch with bad gradients.
        after: called with the number of batches that are done, before a checkpoint is written. It may change
            `state`.

    Raises:
        ConfigError: several gradients in a row were not finite. The state before them is kept.
        Stopped: a signal came; a checkpoint is written.
    """
    skipped_in_a_row = 0
    steps = job.progress.task(f"{job.stage}: training", len(batches), is_main=True)
    with steps as task, job.checkpoints.training(len(batches)):
        task.skip(done)
        for index in range(done, len(batches)):
            job.compute.position["step"] = index + 1
            rate, *_ = engine.set_rates(index, len(batches))
            metrics = step(batches[index])
            job.log({**metrics, "lr": rate, "grad_norm": engine.grad_norm}, index + 1)
            task.advance(1, f"loss {metrics['loss']:.3f}")
            skipped_in_a_row = 0 if math.isfinite(engine.grad_norm) else skipped_in_a_row + 1
            if skipped_in_a_row == MOST_SKIPPED:
                job.checkpoints.save(index + 1, engine, {"done": index + 1, **state})
                give_up(job, index + 1, map(as_json, batches[index]))
            after(index + 1)
            job.checkpoints.after_step(index + 1, engine, {"done": index + 1, **state})


def give_up(job: Job, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """End the stage, and name the file with the batch.

    Raises:
        ConfigError: always.
    """
    path = job.dump(f"step{step}", rows)
    raise ConfigError(
        f"{job.stage}: in step {step} and the {MOST_SKIPPED - 1} before it the gradients were not finite; "
        f"nothing was learned from them. The last batch is in {path}. Fix the data, lower "
        f"{job.stage}.optim.lr, or try precision=fp32."
    )
