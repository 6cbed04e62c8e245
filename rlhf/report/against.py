"""Differences between a run and the nearest run that worked.

The recipes of their artifacts are compared, so only what can change a result: keys, rows, models and code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.config import ConfigError
from rlhf.digests import Recipe
from rlhf.pipeline.auto import JUDGE
from rlhf.pipeline.defaults import Change, references, value_text
from rlhf.pipeline.recipe import kind_of
from rlhf.pipeline.run import Run
from rlhf.pipeline.stage import Stage
from rlhf.pipeline.store import read_manifest
from rlhf.report.judges import VOTES, votes

MAX_DIFFERING_KEYS = 4
"""Most differences of a comparable run; one with more is another experiment."""
MAX_RUNS_READ = 200
"""Number of the newest runs that are read."""
REQUIRED_ENTRIES = {"knobs", "external", "version"}
"""Entries that every recipe has. One that lacks them was written by another version."""
TRIAL = re.compile(r"(bisect|ceiling)-.+-\d{2,}")
"""Name of a run that `bisect` or `ceiling` made."""
SHARED_ENTRIES = {"seed": "seed", "dtype": "precision"}
"""Entries of a recipe that all stages share -> their names in the verdict."""


JUDGE_KEYS = ("gold", "judge", "reward")
"""Keys of `evaluate` that name a judge."""


class Worked(NamedTuple):
    """A run that worked."""

    name: str
    stages: dict[str, dict[str, Any]]
    """As in `Run.stages`."""
    differences: dict[str, str]
    """Key, or name of another difference -> the values, in words. In the order of the stages."""

    def __str__(self) -> str:
        found = " and ".join(f"{key}{how}" for key, how in self.differences.items())
        verb = "differs" if len(self.differences) == 1 else "differ"
        return f"against run {self.name}, which worked, only {found} {verb}."


def worked_before(run: Run) -> Worked | None:
    """The run in the same directory that worked and differs in the fewest keys, at least one; of several the
    newest. None if there is none, or all are other experiments. Runs with another judge, or judged by what
    they learned from, do not count."""
    mine = recipes(run.directory, run.stages)
    asked = {voted.label for voted in votes(run)}
    found: Worked | None = None
    for directory, summary in islice(_newest(run.directory.parent), MAX_RUNS_READ):
        if (
            summary.get("outcome") != "worked"
            or not summary.get("judged_by")
            or directory.resolve() == run.directory.resolve()
        ):
            continue
        theirs = recipes(directory, summary["stages"])
        if not mine or not mine.keys() <= theirs.keys():
            continue
        typed = differing_keys(run.changed, summary.get("changed") or ())
        each = Worked(directory.name, summary["stages"], differences(mine, theirs, run.chain, typed))
        if summary["judged_by"] == VOTES and not asked:
            continue
        if any(_is_of_judge(key) or key.partition(".")[0] in asked for key in each.differences):
            continue
        if each.differences and (found is None or len(each.differences) < len(found.differences)):
            found = each
    return found if found is not None and len(found.differences) <= MAX_DIFFERING_KEYS else None


def _is_of_judge(key: str) -> bool:
    """Whether a key decides which score judges: outcomes by different judges cannot be compared."""
    stage, _, own = key.partition(".")
    return stage == JUDGE or (kind_of(stage) == "evaluate" and own.partition(".")[0] in JUDGE_KEYS)


def _newest(runs: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Runs and their summaries, the newest first, without trials of searches. Unreadable ones are skipped:
    another run's files must not end a finished run."""
    found: list[tuple[float, Path]] = []
    for path in runs.glob("*/summary.json"):
        with suppress(OSError):  # it was removed just now
            if TRIAL.fullmatch(path.parent.name) is None:
                found.append((path.stat().st_mtime, path))
    for _, path in sorted(found, reverse=True):
        with suppress(OSError, ValueError):
            summary = json.loads(path.read_bytes())
            if isinstance(summary, dict) and isinstance(summary.get("stages"), dict):
                yield path.parent, summary


def recipes(directory: Path, stages: Iterable[str]) -> dict[str, Recipe]:
    """Recipes of a run's artifacts, without those that are gone, damaged or of another version."""
    found: dict[str, Recipe] = {}
    for name in stages:
        with suppress(OSError, ConfigError):
            recipe = read_manifest(directory / "artifacts" / name).recipe
            if recipe.keys() >= REQUIRED_ENTRIES:
                found[name] = recipe
    return found


def differences(
    mine: Mapping[str, Recipe],
    theirs: Mapping[str, Recipe],
    chain: Mapping[str, Stage],
    typed: Mapping[str, tuple[str, str]],
) -> dict[str, str]:
    """Differences between two runs' stages, without those that follow from another difference.

    Args:
        typed: keys whose values differ between the two configs: see `differing_keys`.
    """
    found: dict[str, str] = {}
    for name in (name for name in chain if name in mine):
        here, there = mine[name], theirs[name]
        for knob, (own, other) in _leaves(here["knobs"], there["knobs"], f"{name}."):
            # a value that was not typed was derived from other keys
            key = _part_of(knob, typed) if typed else knob
            if key is not None and knob.split(".")[1] in type(chain[name]).model_fields:
                values = typed.get(key, (value_text(key, own), value_text(key, other)))
                found[key] = f"={values[0]} (there: {values[1]})"
        for label, _ in _leaves(here["external"], there["external"], ""):
            outside, how = _outside(chain[name], label, here["knobs"])
            if outside is not None:
                found.setdefault(outside, how)
        if here.get("model") != there.get("model"):
            of_model = {key: values for key, values in typed.items() if key.startswith("model.")}
            found |= {key: f"={own} (there: {other})" for key, (own, other) in of_model.items()}
            found |= {} if of_model else {"the base model": ""}
        for entry, words in SHARED_ENTRIES.items():
            if here.get(entry) != there.get(entry):
                found[words] = f"={here.get(entry)} (there: {there.get(entry)})"
        if here["version"] != there["version"]:
            found["the version of rlhf"] = ""
    return {key: how for key, how in found.items() if _source(key) not in found}


def differing_keys(here: Sequence[Change], there: Sequence[Change]) -> dict[str, tuple[str, str]]:
    """The keys whose values differ between two configs, with both values.

    Args:
        here: one config's differences from the packaged values.
    """
    packaged = {each["key"]: each["default"] for each in (*here, *there)}
    own, other = ({each["key"]: each["value"] for each in side} for side in (here, there))
    pairs = {key: (own.get(key, value), other.get(key, value)) for key, value in packaged.items()}
    return {key: values for key, values in pairs.items() if values[0] != values[1]}


def _part_of(knob: str, typed: Iterable[str]) -> str | None:
    """The typed key that is this one, a part of it, or a section that contains it."""
    return next(
        (key for key in typed if f"{key}.".startswith(f"{knob}.") or knob.startswith(f"{key}.")), None
    )


def _leaves(here: Any, there: Any, path: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Paths at which two nested mappings differ, with both values."""
    for name in {**here, **there}:
        own, other = here.get(name), there.get(name)
        if isinstance(own, Mapping) and isinstance(other, Mapping):
            yield from _leaves(own, other, f"{path}{name}.")
        elif own != other:
            yield f"{path}{name}", (own, other)


def _outside(stage: Stage, label: str, knobs: Mapping[str, Any]) -> tuple[str | None, str]:
    """The key that names something outside the config (rows, a model, code), and how it differs. None for the
    names of row sources."""
    if stage.name == "prepare" and label in stage.mount.roles:
        return stage.mount.roles[label].key, " (other rows)"
    if stage.name == "prepare" and label == "names":
        return None, ""
    for key, value in knobs.items():
        is_start = label == "init" and key == "policy"  # as `generate` calls it
        text = value_text(key, value)  # of several rewards, the list
        if (
            key == label
            or is_start
            or label in text
            or (value and isinstance(value, str) and label.startswith(value))
        ):
            return f"{stage.name}.{key}", f"={text} (another content)"
    return f"{stage.name}.{label}", " (another content)"


def _source(key: str) -> str | None:
    """The key whose value this key repeats."""
    name, _, rest = key.partition(".")
    return references().get(f"{kind_of(name)}.{rest}")
