"""The pilots of a decision, in the order in which they ran: runs/NAME/pilots.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf.disk import replace_text
from rlhf.tracking.position import FILE_NAME
from rlhf.tracking.redaction import redacted

Part = Literal["choosing", "sealed"]
Ended = Literal["done", "stopped", "failed", "running"]


class Trial(NamedTuple):
    """What a pilot runs: the same trial is never run twice."""

    candidate: str
    share: float
    """Share of the candidate's length that it trains."""
    part: Part
    """The questions that it is asked."""
    seed: int


@dataclass(frozen=True)
class Pilot:
    """A trial that ran."""

    trial: Trial
    run: str
    """Name of its run."""
    start: float
    """Seconds of the decision before it."""
    seconds: float
    predicted: float
    """Seconds that it was expected to take."""
    ended: Ended
    why: str = ""
    """Why it did not end by itself."""
    planned: Mapping[str, float] = field(default_factory=dict)
    """Stage -> seconds that the planner predicted."""
    stages: Mapping[str, float] = field(default_factory=dict)
    """Stage that ran -> seconds."""

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return self.trial._asdict() | {key: each for key, each in asdict(self).items() if key != "trial"}


class PilotLog:
    """The pilots so far, in a file with a line for each. Another process continues it."""

    def __init__(self, path: Path) -> None:
        self.path, self.pilots = path, list[Pilot]()
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                values = json.loads(line)
                trial = Trial(**{key: values.pop(key) for key in Trial._fields})
                self.pilots.append(Pilot(trial, **values))
        if self.pilots and self.pilots[-1].ended == "running":
            self.pilots[-1] = self._broken_off(self.pilots[-1])

    def add(self, pilot: Pilot) -> None:
        """Append a pilot that ended."""
        self.pilots.append(pilot)
        self.write()

    def write(self, running: Pilot | None = None) -> None:
        """Write the file.

        Args:
            running: a pilot that begins. If its process is killed, the next process counts the time.
        """
        pilots = self.pilots if running is None else [*self.pilots, running]
        replace_text(self.path, "".join(json.dumps(redacted(each.as_json())) + "\n" for each in pilots))

    def _broken_off(self, pilot: Pilot) -> Pilot:
        """A pilot whose process ended without a word, about when its run last wrote its position."""
        position, seconds = self.path.parent.parent / pilot.run / FILE_NAME, 0.0
        if position.exists():
            seconds = max(0.0, position.stat().st_mtime - self.path.stat().st_mtime)
        return replace(pilot, seconds=seconds, ended="stopped", why="its process ended")

    def done(self, trial: Trial) -> Pilot | None:
        """The pilot that ran this trial to its end."""
        found = [each for each in self.pilots if each.trial == trial and each.ended == "done"]
        return found[-1] if found else None

    @property
    def spent(self) -> float:
        """Seconds of the decision up to the end of the last pilot."""
        return max((each.start + each.seconds for each in self.pilots), default=0.0)


def count_looks(path: Path, answers: Sequence[str]) -> int:
    """How often the sealed questions have judged, with this look. The same answers are the same look.

    Args:
        path: of the file that keeps the looks.
        answers: artifacts of the answers.
    """
    seen = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    now = sorted(answers)
    if now not in seen:
        seen.append(now)
        replace_text(path, json.dumps(seen))
    return int(seen.index(now)) + 1
