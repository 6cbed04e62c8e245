"""The prepared data sets, as later stages read them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

from rlhf.config import ConfigError
from rlhf.data.roles import ROLES
from rlhf.data.schema import (
    PairRow,
    PromptRow,
    QuestionRow,
    Row,
    SftRow,
    Split,
    TextRow,
    row_from_json,
    row_to_json,
)
from rlhf.digests import digest_of, file_digest

TrainSplit = Literal["train", "held_out"]
REPORT = "report.json"


class LengthStats(NamedTuple):
    """Number of rows and of their tokens. Time and memory depend on them."""

    rows: int
    mean: float
    deviation: float
    longest: int
    shared_prefix: float = 0.0
    """Mean number of first tokens that a row shares with the row before it. On CPUs they are computed
    once."""

    def cut(self, most: int) -> LengthStats:
        """The lengths if rows with more than `most` tokens are cut or left out."""
        return self._replace(
            mean=min(self.mean, most),
            longest=min(self.longest, most),
            shared_prefix=min(self.shared_prefix, most),
        )

    def first(self, rows: int | None) -> LengthStats:
        """The lengths of the first `rows` rows."""
        return self if rows is None else self._replace(rows=min(self.rows, rows))


def role_digest(role: str, files: Mapping[str, str]) -> str:
    """Like `PreparedData.digest`, from the file digests in a manifest."""
    return digest_of({split: files[f"{role}.{split}.jsonl"] for split in ROLES[role].splits})


@dataclass(frozen=True)
class PreparedData:
    """ROLE.SPLIT.jsonl files in one directory."""

    directory: Path

    @overload
    def rows(self, role: Literal["sft", "replay", "ptx"], split: TrainSplit) -> list[SftRow]: ...
    @overload
    def rows(self, role: Literal["pairs"], split: TrainSplit) -> list[PairRow]: ...
    @overload
    def rows(self, role: Literal["ppo"], split: TrainSplit) -> list[PromptRow]: ...
    @overload
    def rows(self, role: Literal["evaluate"], split: Literal["evaluation"]) -> list[PromptRow]: ...
    @overload
    def rows(
        self, role: Literal["retention"], split: Literal["evaluation"]
    ) -> list[TextRow | QuestionRow]: ...
    @overload
    def rows(self, role: str, split: str) -> list[Any]: ...

    def rows(self, role: str, split: str) -> object:
        """The rows of one split, in the order of their source; none of a role without a source. A role of a
        user's stage gives rows of its own type."""
        with self._path(role, split).open(encoding="utf-8") as file:
            return [row_from_json(line, ROLES[role].row_types) for line in file]

    def digest(self, role: str) -> str:
        """Digest of a role's rows. It does not depend on other roles."""
        paths = [self._path(role, split) for split in ROLES[role].splits]
        return role_digest(role, {path.name: file_digest(path) for path in paths})

    def size(self, role: str, split: Split) -> LengthStats:
        """Number of rows in a split, with the lengths of the role's rows; for pairs, of the longer side."""
        report = json.loads((self.directory / REPORT).read_text(encoding="utf-8")).get(role)
        if report is None:  # it has no source
            return LengthStats(0, 0.0, 0.0, 0)
        tokens = report["tokens"]
        return LengthStats(
            report["kept"][split], tokens["mean"], tokens["deviation"], tokens["max"], tokens["in_common"]
        )

    def check_not_empty(self, role: str) -> None:
        """Refuse rows that `prepare` took from others' where none are left; an empty source of the role's own
        it refuses itself.

        Raises:
            ConfigError: what became of them.
        """
        report = json.loads((self.directory / REPORT).read_text(encoding="utf-8"))[role]
        for split, rows in report["kept"].items():
            if not rows:
                removed = [f"{each['count']} {reason}" for reason, each in report["removed"].items()]
                why = "; ".join([f"{report['read']} rows", *removed])
                raise ConfigError(
                    f"{ROLES[role].key}={report['source']}: no prompts are left for {split}: {why}. "
                    f"Give more rows, or set {ROLES[role].key} to a source that no other key uses."
                )

    def write(self, role: str, split: Split, rows: Iterable[Row]) -> None:
        """Write one split. Only `prepare` calls it."""
        with self._path(role, split).open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(row_to_json(row) + "\n" for row in rows)

    def _path(self, role: str, split: str) -> Path:
        assert split in ROLES[role].splits, f"{role} has no split {split}"
        return self.directory / f"{role}.{split}.jsonl"
