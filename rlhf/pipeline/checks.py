"""Asks stages for complaints as early as they can be known, before any work is lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

from rlhf.config import Complaint, ConfigError, in_user_keys
from rlhf.data.schema import Row
from rlhf.models.start import check_start, row_complaints
from rlhf.pipeline.graph import naming_keys, root_of
from rlhf.pipeline.stage import Stage, View


def length_complaints(
    view: View, key: str, init: str, source: str, rows: Callable[[], Iterable[Row]], *,
    reserved_tokens: int, fix: str, max_tokens: float = math.inf,
) -> list[Complaint]:  # fmt: skip
    """Complain about rows that are too long for the user's own model that a stage, or a stage before it,
    starts from: see `rlhf.models.start.row_complaints`. Rank 0 counts, because it takes a while."""
    if view.base is None or view.compute is None:
        return []
    root, base = root_of(key, init, view.chain), view.base
    too_long: list[Complaint] = view.compute.main_only(
        lambda: [
            *row_complaints(
                *root, base, source, rows(), reserved=reserved_tokens, fix=fix, max_tokens=max_tokens
            )
        ]
    )
    return too_long


def complaints(stage: Stage, view: View) -> list[Complaint | str]:
    """What does not fit in a stage's config, data or models, in the user's own keys."""
    found: list[Complaint | str] = []
    try:
        with in_user_keys(naming_keys(stage, view.base), stage.name):
            if view.base is not None:
                for key, model in stage.reads().models.items():
                    check_start(f"{stage.name}.{key}", model, view.base)
            own = stage.complaints(view)
            for each in [own] if isinstance(own, Complaint | str) else own or ():
                found.append(each)  # one by one, to keep the complaints before an error
    except ConfigError as error:
        found += error.complaints
    return found


def check_published(stage: Stage, directory: Path) -> None:
    """Refuse to publish an artifact that should be a model and is none.

    Raises:
        ConfigError: the stage has written no model.
    """
    if stage.makes is not None and not (directory / "config.json").is_file():
        raise ConfigError(
            f"{stage.name}: {type(stage).__name__} publishes a {stage.makes}, and its run has written no "
            "config.json into job.directory. Write the model there: learner.publish() of job.trainable does."
        )


def check(stage: Stage, view: View) -> None:
    """Refuse a stage that has complaints.

    Raises:
        ConfigError: all of them.
    """
    refuse(complaints(stage, view))


def refuse(found: Iterable[Complaint | str], *more: str) -> None:
    """Refuse if there are complaints.

    Raises:
        ConfigError: all of them, a line each.
    """
    unique = [*dict.fromkeys(found)]
    if unique:
        raise ConfigError(*unique, *more)
