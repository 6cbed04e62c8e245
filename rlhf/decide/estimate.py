"""What a run would take, and whether it can run: everything before the first model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def estimate(config: Mapping[str, Any], name: str) -> dict[str, float]:
    """Prepare the data of a run and check it as a run does. Nothing is trained or asked.

    Args:
        config: the result of `rlhf.compose`.
        name: of its run directory.

    Returns:
        Stage that is not in the store -> seconds that the planner predicts.

    Raises:
        ConfigError: it cannot run.
    """
    from rlhf.distributed.compute import make_compute
    from rlhf.models.base import base_files
    from rlhf.pipeline.checks import check
    from rlhf.pipeline.experiment import build_experiment
    from rlhf.pipeline.runner import RUN_LOCK, Pipeline
    from rlhf.tracking.redaction import RedactingConsole
    from rlhf.tracking.tracker import Tracker

    experiment = build_experiment(config)
    settings = experiment.settings
    compute, _ = make_compute(settings.device, settings.precision)
    pipeline = Pipeline(experiment, name, RedactingConsole(quiet=True), compute)
    for stage in experiment.needed():
        check(experiment.stages[stage], pipeline.view())
    with RUN_LOCK, pipeline.results.locked():
        pipeline.begin()
        base = base_files(settings.model, pipeline.model_identity, pipeline.store_base)
        prepared = pipeline.find_or_make("prepare", {}, base, Tracker(None, []))
        pipeline.check_pending(prepared, base)
    pipeline.close()
    return {stage: each.left() for stage, each in pipeline.expected.stages.items()}
