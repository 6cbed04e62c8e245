"""The file of votes: SQLite, named and owned by the user, outside the store. Votes are only added.

A vote is on the disk when `cast` returns (write-ahead log, `synchronous=FULL`). So a process that is killed
at any moment loses no vote. An undo adds a row of its own.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple, cast

from rlhf.config import ConfigError
from rlhf.label.pairs import Pair, Side

Choice = Literal["first", "second", "tie", "both_bad", "skip"]
Purpose = Literal["random", "chosen", "check", "imported"]
"""Why a pair was shown: drawn at random; chosen by its predicted gap; as a check of whether the annotator
repeats the vote; or not at all, for a vote imported from another tool."""

APPLICATION, VERSION = 0x524C4846, 1
"""SQLite's application id (`RLHF`), which tells the file from other SQLite files; and its schema version."""
BUSY_SECONDS = 30.0
SCHEMA = f"""
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
CREATE TABLE pairs (
    id TEXT PRIMARY KEY, prompt TEXT NOT NULL, first TEXT NOT NULL, second TEXT NOT NULL,
    first_by TEXT NOT NULL, second_by TEXT NOT NULL
) STRICT;
CREATE TABLE annotators (name TEXT PRIMARY KEY, token_hash TEXT NOT NULL UNIQUE) STRICT;
CREATE TABLE shown (
    id INTEGER PRIMARY KEY AUTOINCREMENT, stage TEXT NOT NULL, annotator TEXT NOT NULL,
    pair TEXT NOT NULL REFERENCES pairs, left TEXT NOT NULL CHECK (left IN ('first', 'second')),
    purpose TEXT NOT NULL CHECK (purpose IN ('random', 'chosen', 'check', 'imported')),
    predicted REAL, at REAL
) STRICT;
CREATE INDEX shown_to ON shown (stage, annotator, id);
CREATE TABLE votes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, shown INTEGER NOT NULL UNIQUE REFERENCES shown,
    choice TEXT NOT NULL CHECK (choice IN ('first', 'second', 'tie', 'both_bad', 'skip')),
    comment TEXT NOT NULL, at REAL
) STRICT;
CREATE TABLE undone (vote INTEGER PRIMARY KEY REFERENCES votes, at REAL NOT NULL) STRICT;
CREATE TRIGGER votes_stay BEFORE UPDATE ON votes BEGIN SELECT RAISE(ABORT, 'votes are only added'); END;
CREATE TRIGGER votes_are_kept BEFORE DELETE ON votes BEGIN SELECT RAISE(ABORT, 'votes are only added'); END;
"""


class Shown(NamedTuple):
    """A pair on an annotator's page."""

    id: int
    pair: Pair
    left: Side
    """The answer on the left."""
    purpose: Purpose
    comment: str = ""
    """Comment of the undone vote on this pair."""


class Vote(NamedTuple):
    """An annotator's vote on a pair, not undone."""

    id: int
    annotator: str
    pair: Pair
    left: Side
    purpose: Purpose
    choice: Choice
    comment: str
    shown: float | None
    """When the pair was shown, in seconds since 1970; None if unknown."""
    at: float | None
    """When the vote was cast, in seconds since 1970; None if unknown."""


_VOTES = """
SELECT votes.id, annotator, pairs.id, prompt, first, second, first_by, second_by, predicted, left, purpose,
       choice, comment, shown.at, votes.at
FROM votes JOIN shown ON shown.id = votes.shown JOIN pairs ON pairs.id = shown.pair
WHERE stage = ? AND votes.id NOT IN (SELECT vote FROM undone) ORDER BY votes.id
"""


class ExternalVote(NamedTuple):
    """A vote that was not cast on the page: imported, or by a machine."""

    annotator: str
    pair: Pair
    choice: Choice
    purpose: Purpose
    comment: str = ""
    at: float | None = None


class VotesFile:
    """An open file of votes. Use it from one thread at a time."""

    def __init__(self, path: Path, key: str = "label.file") -> None:
        """Open the file, or create it.

        Args:
            key: the config key that names the file.

        Raises:
            ConfigError: it is another kind of file, has another version, or cannot be written.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._prepare(f"{key}={path}")
        except (OSError, sqlite3.DatabaseError) as error:
            raise ConfigError(
                f"{key}={path}: it cannot be used as a file of votes ({error}). Name a new file, or "
                f"one that an "
                "earlier stage=label made, on a disk of this machine (SQLite's log does not work on NFS)."
            ) from None

    def _prepare(self, source: str) -> None:
        run = self._connection.execute
        run("PRAGMA foreign_keys = ON")
        run("PRAGMA synchronous = FULL")
        if run("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise sqlite3.OperationalError("no write-ahead log is possible there")
        run("BEGIN IMMEDIATE")  # two processes may find it empty: only one creates the tables
        application, version = (
            run(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        tables = run("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not tables:
            for statement in _statements(SCHEMA):
                run(statement)
        run("COMMIT")
        if tables and application != APPLICATION:
            raise ConfigError(f"{source}: an SQLite file with other tables. Name another file.")
        if tables and version != VERSION:
            raise ConfigError(
                f"{source}: its schema has version {version}, and this code reads {VERSION}. Use the "
                f"version of "
                "rlhf that made it, or another file."
            )

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def invite(self, annotator: str, *, again: bool = False) -> str | None:
        """Create a token for a new annotator. Only its hash is saved.

        Args:
            again: replace the token of an annotator who has one; the old token is then invalid.

        Returns:
            The token, which cannot be read again; None if the annotator already has one.
        """
        known = self._connection.execute("SELECT 1 FROM annotators WHERE name = ?", (annotator,)).fetchone()
        if known and not again:
            return None
        token = secrets.token_urlsafe(24)
        self._connection.execute(
            "INSERT OR REPLACE INTO annotators VALUES (?, ?)", (annotator, _hash_of(token))
        )
        return token

    def annotator_of(self, token: str) -> str | None:
        """The annotator with this token, or None. Comparing hashes keeps timing from revealing a token."""
        found = self._connection.execute(
            "SELECT name FROM annotators WHERE token_hash = ?", (_hash_of(token),)
        ).fetchone()
        return None if found is None else str(found[0])

    def show(self, stage: str, annotator: str, pair: Pair, left: Side, purpose: Purpose) -> Shown:
        """Record that a pair is shown now. It replaces the pair on the annotator's page."""
        number = self._add_shown(stage, annotator, pair, left, purpose, time.time())
        return Shown(number, pair, left, purpose)

    def _add_shown(
        self, stage: str, annotator: str, pair: Pair, left: Side, purpose: Purpose, at: float | None
    ) -> int:
        run = self._connection.execute
        run(
            "INSERT OR IGNORE INTO pairs VALUES (?, ?, ?, ?, ?, ?)",
            (pair.id, json.dumps(pair.prompt, ensure_ascii=False), *pair[2:6]),
        )
        made = run(
            "INSERT INTO shown (stage, annotator, pair, left, purpose, predicted, at) VALUES (?, ?, "
            "?, ?, ?, ?, ?)",
            (stage, annotator, pair.id, left, purpose, pair.predicted, at),
        )
        assert made.lastrowid is not None
        return made.lastrowid

    def on_page(self, stage: str, annotator: str) -> Shown | None:
        """The pair that the annotator was shown last, if there is no vote on it yet; else None."""
        found = self._connection.execute(
            "SELECT shown.id, pairs.id, prompt, first, second, first_by, second_by, predicted, left, "
            "purpose, "
            "votes.id FROM shown JOIN pairs ON pairs.id = shown.pair LEFT JOIN votes ON votes.shown "
            "= shown.id "
            "WHERE stage = ? AND annotator = ? ORDER BY shown.id DESC LIMIT 1",
            (stage, annotator),
        ).fetchone()
        if found is None or found[-1] is not None:
            return None
        return Shown(found[0], _pair(found[1:8]), found[8], found[9])

    def being_judged(self, stage: str, since: float) -> dict[str, str]:
        """Annotator -> id of the pair on their page, if it was shown after `since` (seconds since 1970)."""
        rows = self._connection.execute(
            "SELECT annotator, pair FROM shown WHERE id IN (SELECT max(id) FROM shown WHERE stage = ? "
            "GROUP BY annotator) AND id NOT IN (SELECT shown FROM votes) AND at > ?",
            (stage, since),
        )
        return dict(rows.fetchall())

    def cast(self, stage: str, annotator: str, shown: int, choice: Choice, comment: str = "") -> bool:
        """Write a vote to the disk.

        Args:
            shown: `Shown.id` of the annotator's page.

        Returns:
            False if that pair is not, or no longer, on their page. Then nothing is written.
        """
        current = self.on_page(stage, annotator)
        if current is None or current.id != shown:
            return False
        made = self._connection.execute(
            "INSERT OR IGNORE INTO votes (shown, choice, comment, at) VALUES (?, ?, ?, ?)",
            (shown, choice, comment, time.time()),
        )
        return made.rowcount == 1

    def undo(self, stage: str, annotator: str) -> Shown | None:
        """Undo the annotator's last vote, and show its pair again.

        Returns:
            The pair, as it was shown, with the vote's comment; None if there is no vote.
        """
        last = [
            vote for vote in self.votes(stage) if vote.annotator == annotator and vote.purpose != "imported"
        ]
        if not last:
            return None
        vote = last[-1]
        run = self._connection.execute
        with self._connection:  # both or neither
            run("BEGIN IMMEDIATE")
            run("INSERT INTO undone VALUES (?, ?)", (vote.id, time.time()))
            shown = self.show(stage, annotator, vote.pair, vote.left, vote.purpose)
        return shown._replace(comment=vote.comment)

    def votes(self, stage: str) -> list[Vote]:
        """The votes of the stage with this name, in their order, without undone ones."""
        rows = self._connection.execute(_VOTES, (stage,)).fetchall()
        return [Vote(row[0], row[1], _pair(row[2:9]), *row[9:]) for row in rows]

    def add(self, stage: str, votes: Iterable[ExternalVote]) -> int:
        """Write votes, all or none. Votes that are already in the file are left out.

        Returns:
            The number of new votes.
        """
        known = {(vote.annotator, vote.pair.id, vote.choice, vote.at) for vote in self.votes(stage)}
        run, count = self._connection.execute, 0
        with self._connection:  # all of them or none
            run("BEGIN IMMEDIATE")
            for vote in votes:
                if (vote.annotator, vote.pair.id, vote.choice, vote.at) in known:
                    continue
                number = self._add_shown(stage, vote.annotator, vote.pair, "first", vote.purpose, vote.at)
                run(
                    "INSERT INTO votes (shown, choice, comment, at) VALUES (?, ?, ?, ?)",
                    (number, vote.choice, vote.comment, vote.at),
                )
                count += 1
        return count


def votes_in(path: Path, stage: str) -> list[Vote]:
    """The votes of a stage in a file. A missing file is not created."""
    if not path.exists():
        return []
    with closing(VotesFile(path)) as file:
        return file.votes(stage)


def _pair(row: tuple[object, ...]) -> Pair:
    number, prompt, *rest = row
    return Pair(cast(str, number), json.loads(cast(str, prompt)), *rest)  # type: ignore[arg-type]  # as written


def _hash_of(token: str) -> str:
    """Hash of a token. A token has 24 random bytes, so a plain hash cannot be inverted by guessing."""
    return hashlib.sha256(token.encode()).hexdigest()


def _statements(script: str) -> list[str]:
    """Split a script into its statements. A trigger, with its inner statements, is one."""
    statements, rest = [], ""
    for line in script.strip().splitlines():
        rest += f"{line}\n"
        if sqlite3.complete_statement(rest):
            statements.append(rest)
            rest = ""
    return statements
