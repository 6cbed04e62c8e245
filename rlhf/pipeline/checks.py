"""Asks stages what does not fit, as soon as it can be known, and before anything is lost by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from rlhf.config import Complaint, ConfigError, in_user_keys
from rlhf.data.schema import Row
from rlhf.models.start import check_start, misfits
from rlhf.pipeline.graph import naming_keys, root_of
from rlhf.pipeline.stage import Stage, View


def too_long(
    view: View, key: str, init: str, source: str, rows: Callable[[], Iterable[Row]], *,
    beside: int, fix: str, most: float = math.inf,
) -> list[Complaint]:  # fmt: skip
    """Say which rows do not fit the user's own model that a stage starts from, or that the stages before it
    started from: see `rlhf.models.start.misfits`. Rank 0 counts, as it takes a while."""
    if view.base is None or view.compute is None:
        return []
    root, base = root_of(key, init, view.chain), view.base
    found: list[Complaint] = view.compute.main_only(
        lambda: [*misfits(*root, base, source, rows(), beside=beside, fix=fix, most=most)]
    )
    return found


def complaints(stage: Stage, view: View) -> list[Complaint | str]:
    """What does not fit, in the user's own keys."""
    found: list[Complaint | str] = []
    try:
        with in_user_keys(naming_keys(stage, view.base), stage.name):
            if view.base is not None:
                for key, model in stage.reads().models.items():
                    check_start(f"{stage.name}.{key}", model, view.base)
            told = stage.complaints(view)
            for each in [told] if isinstance(told, Complaint | str) else told or ():
                found.append(each)  # one by one: what stands before an error is told too
    except ConfigError as error:
        found += error.complaints
    return found


def check_published(stage: Stage, directory: Path) -> None:
    """Refuse to publish a model that is none.

    Raises:
        ConfigError: the stage has written none.
    """
    if stage.makes is not None and not (directory / "config.json").is_file():
        raise ConfigError(
            f"{stage.name}: {type(stage).__name__} publishes a {stage.makes}, and its run has written no "
            "config.json into job.directory. Write the model there: learner.publish() of job.trainable does."
        )


def check(stage: Stage, view: View) -> None:
    """Refuse what does not fit.

    Raises:
        ConfigError: all of it.
    """
    refuse(complaints(stage, view))


def refuse(found: Iterable[Complaint | str], *more: str) -> None:
    """Refuse if there are complaints.

    Raises:
        ConfigError: all of them, a line each.
    """
    each_once = [*dict.fromkeys(found)]
    if each_once:
        raise ConfigError(*each_once, *more)
