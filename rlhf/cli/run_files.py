"""Reads a run's directory, for the commands that use its models. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from rlhf.config import ConfigError, did_you_mean
from rlhf.pipeline.recipe import last_evaluation
from rlhf.pipeline.store import Artifact, Store


@dataclass(frozen=True)
class RunFiles:
    """A run's directory."""

    directory: Path

    @cached_property
    def summary(self) -> Mapping[str, Any]:
        """summary.json."""
        return self._read("summary.json")

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.yaml: the resolved config."""
        return self._read("config.yaml")

    @property
    def store_dir(self) -> Path:
        """The store that has the run's artifacts."""
        stages = [stage for stage, each in self.summary["stages"].items() if each["artifact"] is not None]
        if not stages:
            raise ConfigError(f"{self.directory}: no stage of this run has made anything.")
        return self._artifact_path(stages[0]).parents[1]

    @property
    def policies(self) -> list[str]:
        """The stages that made a policy, in the run's order."""
        return [name for name in self.summary["stages"] if self._is_policy(name)]

    def chosen_policy(self, name: str) -> str:
        """The policy of this stage. Without a name: the one that `evaluate` judged, or the last one.

        Raises:
            ConfigError: there is no such policy.
        """
        names = self.policies
        if not names:
            raise ConfigError(f"{self.directory}: no stage of this run has made a policy.")
        if not name:
            evaluation, metrics = last_evaluation(self.summary["stages"])
            subject = self.config[evaluation]["subject"] if metrics else None
            return subject if subject in names else names[-1]
        if name not in names:
            raise ConfigError(
                f"policy={name}: {self.directory} has no such policy.{did_you_mean(name, names)} "
                f"It has {', '.join(names)}."
            )
        return name

    def artifact(self, stage: str) -> Artifact:
        """A stage's artifact. Its files are read and compared with the manifest.

        Raises:
            ConfigError: it is gone or damaged.
        """
        path = self._artifact_path(stage)
        artifact = Store(path.parents[1]).find(path.parent.name, path.name, read=True)
        if artifact is None:
            raise ConfigError(f"{path}: it is no longer there. The run's command makes it again.")
        return artifact

    def _is_policy(self, stage: str) -> bool:
        made = self.summary["stages"][stage]["artifact"] is not None
        return made and (self._artifact_path(stage) / "generation_config.json").is_file()

    def _artifact_path(self, stage: str) -> Path:
        """Directory of a stage's artifact. Tries the link first: run and store may have moved together."""
        link = self.directory / "artifacts" / stage
        return link.resolve() if link.exists() else Path(self.summary["stages"][stage]["artifact"])

    def _read(self, name: str) -> Mapping[str, Any]:
        path = self.directory / name
        try:
            text = path.read_text(encoding="utf-8")
            values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}). Name the directory of a run.") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: it is not what a run writes.")
        return values
