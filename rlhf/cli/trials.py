"""Trials of `bisect` and `ceiling`: runs that differ from a finished run in a few keys, and are judged alike.

A trial is an ordinary run with a name of its own, in the store of the finished run. The same command asks for
the same trials: what is in the store is reused, and a stopped stage continues from its checkpoint.
"""

from __future__ import annotations

import copy
import json
import math
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf.bisect.scores import NoScoresError, Scores, read_scores
from rlhf.cli.api import run as run_config
from rlhf.cli.run_files import RunFiles
from rlhf.cli.runs import runs_in
from rlhf.config import Complaint, ConfigError, did_you_mean
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import PromptRow
from rlhf.digests import Recipe
from rlhf.disk import replace_text
from rlhf.exit_codes import INTERRUPTED, STOPPED
from rlhf.pipeline.experiment import RUN_NAME, Experiment, build_experiment
from rlhf.pipeline.graph import roles_of
from rlhf.pipeline.recipe import last_evaluation
from rlhf.pipeline.run import Run
from rlhf.pipeline.store import Store, read_manifest
from rlhf.report.judges import KINDS, faults, no_judge
from rlhf.rewards.kinds import parts_of, stage_of
from rlhf.tracking.progress import clock
from rlhf.tracking.redaction import RedactingConsole, redacted
from rlhf.tracking.tables import Cells, shown

CONTINUE = "The same command continues: finished trials and the last checkpoint are kept."


@dataclass(frozen=True)
class Finished:
    """A run that has ended, and the experiment that its config is."""

    files: RunFiles
    experiment: Experiment

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.files.directory.name

    @property
    def results(self) -> Run:
        """Its results, as while it ran."""
        stages = {
            name: stage
            | {"metrics": {key: math.nan if v is None else v for key, v in stage["metrics"].items()}}
            for name, stage in self.files.summary["stages"].items()
        }
        return Run(self.files.directory, stages=stages, writes=False, chain=self.experiment.stages)

    def recipes(self) -> dict[str, Recipe]:
        """Stage -> the recipe of its artifact.

        Raises:
            ConfigError: an artifact is gone, or another version of rlhf made it.
        """
        found = {}
        for name in self.experiment.needed():
            path = self.files.directory / "artifacts" / name
            if name not in self.files.summary["stages"] or not path.exists():
                continue  # a failed gate ended the run before it, or it was removed from the store
            recipe = read_manifest(path).recipe
            if recipe.get("version") != type(self.experiment.stages[name]).version:
                raise ConfigError(
                    Complaint(
                        str(self.files.directory),
                        f"another version of rlhf made its {name}.",
                        "Run its command again.",
                    )
                )
            found[name] = recipe
        return found

    def seconds(self, stage: str) -> float | None:
        """How long it took to make a stage's artifact."""
        cost = (self.files.summary["stages"].get(stage) or {}).get("cost")
        return None if cost is None else float(cost["seconds"])


@dataclass(frozen=True)
class Judged(Finished):
    """A run whose last policy an independent judge has scored."""

    evaluation: str
    """The stage that compared the policies."""
    kind: str
    """The judge: `gold` or `judge`, one of `KINDS`."""

    @property
    def words(self) -> str:
        """What judges."""
        return KINDS[self.kind]

    @property
    def section(self) -> Any:
        """The evaluation, as a stage."""
        return self.experiment.stages[self.evaluation]

    @property
    def subject(self) -> str:
        """The policy that is judged."""
        return str(self.section.subject)

    @property
    def judges(self) -> set[str]:
        """The reward models that judge."""
        source = getattr(self.section, self.kind)
        return {stage for part in parts_of(source) if (stage := stage_of(part.source)) is not None}

    @property
    def prompts(self) -> int:
        """Number of prompts that were asked."""
        return int(self.files.summary["stages"][self.evaluation]["metrics"][f"{self.evaluation}/prompts"])

    def rows(self) -> Sequence[PromptRow]:
        """The evaluation prompts. The first ones are asked."""
        directory = self.files.directory / "artifacts" / "prepare"
        if not directory.is_dir():  # it was removed from the store
            return ()
        data = PreparedData(directory, roles=roles_of(self.experiment.stages))
        rows: Sequence[PromptRow] = data.rows(self.section.mount.own_role("evaluate"), "evaluation")
        return rows

    def scores(self, policy: str = "", directory: Path | None = None) -> Scores:
        """The judge's score of each answer.

        Args:
            policy: by default the subject.
            directory: of another run that was evaluated in the same way.
        """
        artifacts = (directory or self.files.directory) / "artifacts"
        return read_scores(artifacts / self.evaluation / "responses.jsonl", policy or self.subject, self.kind)

    def config(self, policy: str = "", **changes: Any) -> dict[str, Any]:
        """Its config, up to its evaluation, which asks one policy only and checks no gates: a trial needs
        the scores of this one. Other gates only warn. Reward models that judge are the run's own, whatever
        they were made from.

        Args:
            policy: by default the subject.
            changes: other keys of the evaluation, with their values.
        """
        config = copy.deepcopy(dict(self.experiment.resolved))
        config |= {"stage": [self.evaluation], "gates": "warn", "why": False, "force": []}
        config |= {"store_dir": str(self.files.store_dir), "runs_dir": str(self.files.directory.parent)}
        config["tracker"] = {"kind": "none"}
        section = section_of(config, self.evaluation)
        for judge in self.judges:
            path = (self.files.directory / "artifacts" / judge).resolve()
            source = judge.replace("reward", "learned", 1)
            section[self.kind] = replaced(config[self.evaluation][self.kind], source, f"model:{path}")
        asked = policy or self.subject
        section.update(policies=[asked], subject=asked, num_references=0, lm_eval=[])
        section["gates"] = dict.fromkeys(self.section.gates)
        section.update(changes)
        return config


def section_of(config: dict[str, Any], stage: str) -> dict[str, Any]:
    """The keys of a stage, to change them: for a named instance those of its own."""
    section: dict[str, Any] = (config["instances"] if "@" in stage else config)[stage]
    return section


def replaced(value: Any, before: str, after: str) -> Any:
    """A config value, with another text in the place of one that it is or contains."""
    if isinstance(value, dict):
        return {key: replaced(each, before, after) for key, each in value.items()}
    if isinstance(value, list):
        return [replaced(each, before, after) for each in value]
    return after if value == before else value


def named_run(key: str, word: str, runs_dir: Path) -> RunFiles:
    """The run with this directory or name.

    Args:
        key: what the user typed before it, such as `good=`.

    Raises:
        ConfigError: there is none.
    """
    if (Path(word) / "summary.json").is_file():
        return RunFiles(Path(word))
    names = [path.name for path in runs_in(runs_dir)]
    if word not in names:
        why = f"there is no such run in {runs_dir}.{did_you_mean(word, names)}"
        raise ConfigError(Complaint(f"{key}{word}", why, "Name a run, or its directory."))
    return RunFiles(runs_dir / word)


def judged_run(key: str, word: str, runs_dir: Path) -> Judged:
    """A finished run with an independent judge.

    Raises:
        ConfigError: there is no such run, it has not finished, or nothing can judge it.
    """
    files = named_run(key, word, runs_dir)
    evaluation, metrics = last_evaluation(files.summary["stages"])
    if metrics and not (files.directory / "artifacts" / evaluation).is_dir():
        why = f"the artifact of its {evaluation} is no longer there."
        raise ConfigError(Complaint(f"{key}{word}", why, "Put it back, or run its command again."))
    if not metrics:
        raise ConfigError(
            Complaint(
                f"{key}{word}", "it has not evaluated its policies.",
                "Run its command again, with evaluate; after a failed gate with gates=warn.",
            )
        )  # fmt: skip
    experiment = build_experiment({**files.config, "stage": [evaluation]})
    found = Finished(files, experiment).results
    for kind in KINDS:
        source = getattr(experiment.stages[evaluation], kind)
        if source is not None and not [*faults(found, kind, source)]:
            return Judged(files, experiment, evaluation, kind)
    if why := no_judge(found):
        raise ConfigError(Complaint(f"{key}{word}", why))
    fix = f"Name a judge, such as {evaluation}.gold, and run its command again."
    raise ConfigError(Complaint(f"{key}{word}", "no score of it can judge its policies.", fix))


class NotTriedError(NoScoresError):
    """The budget is spent."""


class Trials:
    """The trials of one command, counted in the order in which they are asked for."""

    def __init__(self, base: Judged, command: str, name: str, budget: int) -> None:
        """`name` is that of the command's directory. The trials are called NAME-01, NAME-02 and so on.

        Raises:
            ConfigError: no run can be called so.
        """
        if re.fullmatch(RUN_NAME, name) is None:
            why = "trials are called so, and a run's name has only letters (A to Z), digits, _, . and -."
            raise ConfigError(Complaint(name, why, "Rename the run's directory."))
        self.base, self.command, self.name, self.budget = base, command, name, budget
        self.console: Console = RedactingConsole(highlight=False, soft_wrap=True, markup=False)
        self.number = 0
        self.directory = base.files.directory.parent / name
        self.store = Store(base.files.store_dir)

    @property
    def newest(self) -> RunFiles:
        """The trial that was asked for last."""
        return RunFiles(self.directory.with_name(f"{self.name}-{self.number:02d}"))

    def run(
        self, config: Mapping[str, Any], words: str, seconds: float, left: float, policy: str = ""
    ) -> Scores:
        """Run one trial, and give its scores.

        Args:
            config: all keys, without a name.
            words: what it tries.
            seconds: about how long it takes.
            left: about how long the trials after it take.
            policy: the policy that is judged; by default the subject.

        Raises:
            NotTriedError: the budget is spent.
            NoScoresError: the config cannot run.
            ConfigError: the disk is full.
            KeyboardInterrupt: the run was interrupted.
        """
        if self.number == self.budget:
            raise NotTriedError(f"not tried: budget={self.budget} is spent")
        self.number += 1
        name = self.newest.directory.name
        self.console.print(
            f"Trial {self.number} of at most {self.budget}: {words}. About {clock(seconds)}, and about "
            f"{clock(left)} for the rest. Its state: python -m rlhf status run_name={name}"
        )
        try:
            finished = run_config({**config, "run_name": name}, quiet=True)
        except ConfigError as error:
            if isinstance(error.__cause__, OSError):
                raise
            raise NoScoresError(f"cannot run: {' '.join(str(error).split())}") from None
        return self.base.scores(policy, finished.directory)

    def write(self, title: str, lines: Sequence[str], table: Cells, content: Mapping[str, Any]) -> None:
        """Print the result, and write it as Markdown and as JSON."""
        if table.rows:
            self.console.print(shown(table))
        self.console.print("\n".join(lines))
        texts = [f"# {title}", *filter(None, lines), *([table.markdown()] if table.rows else [])]
        replace_text(self.directory / f"{self.command}.md", redacted("\n\n".join(texts)) + "\n")
        replace_text(self.directory / f"{self.command}.json", json.dumps(redacted(content), indent=2))
        self.console.print(f"Written to {self.directory / self.command}.md and .json.")

    def finish(self, work: Callable[[], int]) -> int:
        """Do the command's work in its directory, alone. Gives the exit code, or that of a signal."""
        with Run(self.directory).locked(command=self.command):
            try:
                return work()
            except KeyboardInterrupt as stop:
                signum = getattr(stop, "signum", signal.SIGINT)
                print(f"\nInterrupted. {CONTINUE}", file=sys.stderr)
                return INTERRUPTED if signum == signal.SIGINT else STOPPED


def is_true(key: str, text: str) -> bool:
    """A switch of the command line.

    Raises:
        ConfigError: it is neither true nor false.
    """
    if text not in ("true", "false"):
        raise ConfigError(f"{key}={text}: true or false.")
    return text == "true"
