"""The prepared data sets, as every later stage reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from rlhf.artifacts import digest_of, file_digest
from rlhf.data.schema import (
    TRAINING_ROLES,
    PairRow,
    PromptRow,
    QuestionRow,
    Role,
    Row,
    SftRow,
    Split,
    TextRow,
    row_from_json,
    row_to_json,
)

TrainSplit = Literal["train", "held_out"]
REPORT = "report.json"


def splits_of(role: Role) -> tuple[Split, ...]:
    """The splits that `prepare` writes for a role."""
    return ("train", "held_out") if role in TRAINING_ROLES else ("evaluation",)


@dataclass(frozen=True)
class PreparedData:
    """ROLE.SPLIT.jsonl files in one directory."""

    directory: Path

    @overload
    def rows(self, role: Literal["sft", "replay", "ptx"], split: TrainSplit) -> list[SftRow]: ...
    @overload
    def rows(self, role: Literal["reward"], split: TrainSplit) -> list[PairRow]: ...
    @overload
    def rows(self, role: Literal["ppo"], split: TrainSplit) -> list[PromptRow]: ...
    @overload
    def rows(self, role: Literal["evaluate"], split: Literal["evaluation"]) -> list[PromptRow]: ...
    @overload
    def rows(
        self, role: Literal["retention"], split: Literal["evaluation"]
    ) -> list[TextRow | QuestionRow]: ...
    @overload
    def rows(self, role: Role, split: Split) -> list[Row]: ...

    def rows(self, role: Role, split: Split) -> object:
        """The rows of one split, in the order of their source; none of a role without a source."""
        with self._path(role, split).open(encoding="utf-8") as file:
            return [row_from_json(line, role) for line in file]

    def digest(self, role: Role) -> str:
        """Digest of a role's rows: what depends on this role's data depends on nothing else here."""
        return digest_of({split: file_digest(self._path(role, split)) for split in splits_of(role)})

    def size(self, role: Role, split: Split) -> tuple[int, float]:
        """(rows, median tokens of a row): what time and memory depend on."""
        report = json.loads((self.directory / REPORT).read_text(encoding="utf-8"))[role]
        return int(report["kept"][split]), float(report["tokens"]["p50"])

    def write(self, role: Role, split: Split, rows: Iterable[Row]) -> None:
        """Write one split; only `prepare` does."""
        with self._path(role, split).open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(row_to_json(row) + "\n" for row in rows)

    def _path(self, role: Role, split: Split) -> Path:
        assert split in splits_of(role), f"{role} has no split {split}"
        return self.directory / f"{role}.{split}.jsonl"
