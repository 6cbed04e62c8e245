"""The file of votes: SQLite, named and kept by the user, outside the store. Nothing in it is ever changed.

A vote is on the disk when `cast` returns: write-ahead log, `synchronous=FULL`. So a process that is killed at
any moment loses none. To take a vote back is a row of its own.
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
"""Why a pair was shown: drawn at random; chosen by its predicted gap; once more, to see whether the annotator
says the same; or a vote from elsewhere."""

APPLICATION, VERSION = 0x524C4846, 1
"""What the file says of itself, so that no other SQLite file is taken for one: `RLHF`, and the schema's."""
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
    """Of the vote on it that was taken back."""


class Vote(NamedTuple):
    """What somebody said of a pair, and did not take back."""

    id: int
    annotator: str
    pair: Pair
    left: Side
    purpose: Purpose
    choice: Choice
    comment: str
    shown: float | None
    """When the pair was shown, in seconds since 1970; None if that is not known."""
    at: float | None
    """When the vote was cast."""


_VOTES = """
SELECT votes.id, annotator, pairs.id, prompt, first, second, first_by, second_by, predicted, left, purpose,
       choice, comment, shown.at, votes.at
FROM votes JOIN shown ON shown.id = votes.shown JOIN pairs ON pairs.id = shown.pair
WHERE stage = ? AND votes.id NOT IN (SELECT vote FROM undone) ORDER BY votes.id
"""


class Given(NamedTuple):
    """A vote that no page asked for."""

    annotator: str
    pair: Pair
    choice: Choice
    purpose: Purpose
    comment: str = ""
    at: float | None = None


class VotesFile:
    """An open file of votes. Use it from one thread at a time."""

    def __init__(self, path: Path, key: str = "label.file") -> None:
        """Open it, or make it.

        Args:
            key: the user's key that names it.

        Raises:
            ConfigError: it is another kind of file, or of a later version, or cannot be written.
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

    def _prepare(self, said: str) -> None:
        run = self._connection.execute
        run("PRAGMA foreign_keys = ON")
        run("PRAGMA synchronous = FULL")
        if run("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise sqlite3.OperationalError("no write-ahead log is possible there")
        run("BEGIN IMMEDIATE")  # of two that find it empty one makes it
        application, version = (
            run(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        tables = run("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not tables:
            for statement in _statements(SCHEMA):
                run(statement)
        run("COMMIT")
        if tables and application != APPLICATION:
            raise ConfigError(f"{said}: an SQLite file with other tables. Name another file.")
        if tables and version != VERSION:
            raise ConfigError(
                f"{said}: its schema has version {version}, and this code reads {VERSION}. Use the "
                f"version of "
                "rlhf that made it, or another file."
            )

    def close(self) -> None:
        """Close it."""
        self._connection.close()

    def invite(self, annotator: str, *, again: bool = False) -> str | None:
        """A token for a new annotator. Only its hash is kept.

        Args:
            again: make a new one for an annotator who has one; the old one then opens nothing.

        Returns:
            The token, this once; None if the annotator has one.
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
        """Whose token it is. Hashes are compared, so that the time it takes says nothing of a token."""
        found = self._connection.execute(
            "SELECT name FROM annotators WHERE token_hash = ?", (_hash_of(token),)
        ).fetchone()
        return None if found is None else str(found[0])

    def show(self, stage: str, annotator: str, pair: Pair, left: Side, purpose: Purpose) -> Shown:
        """Note that a pair is shown now. It takes the place of what the annotator had on the page."""
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
        """What the annotator was shown last, if there is no vote on it yet."""
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
        """Annotator -> the id of the pair on their page, if it was shown after `since`."""
        rows = self._connection.execute(
            "SELECT annotator, pair FROM shown WHERE id IN (SELECT max(id) FROM shown WHERE stage = ? "
            "GROUP BY annotator) AND id NOT IN (SELECT shown FROM votes) AND at > ?",
            (stage, since),
        )
        return dict(rows.fetchall())

    def cast(self, stage: str, annotator: str, shown: int, choice: Choice, comment: str = "") -> bool:
        """Write a vote to the disk.

        Args:
            shown: the number of what is on the annotator's page.

        Returns:
            False if that is not on their page (any more): nothing is written.
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
        """Take the annotator's last vote back, and show its pair again.

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
        """The votes that the stage of this name asked for, in their order, without those taken back."""
        rows = self._connection.execute(_VOTES, (stage,)).fetchall()
        return [Vote(row[0], row[1], _pair(row[2:9]), *row[9:]) for row in rows]

    def add(self, stage: str, votes: Iterable[Given]) -> int:
        """Write votes, all or none; those that are there already are left out.

        Returns:
            How many were new.
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
    """The votes of a stage in a file, which is not made if there is none."""
    if not path.exists():
        return []
    with closing(VotesFile(path)) as file:
        return file.votes(stage)


def _pair(row: tuple[object, ...]) -> Pair:
    number, prompt, *rest = row
    return Pair(cast(str, number), json.loads(cast(str, prompt)), *rest)  # type: ignore[arg-type]  # as written


def _hash_of(token: str) -> str:
    """A token has 24 random bytes, so a plain hash cannot be guessed back."""
    return hashlib.sha256(token.encode()).hexdigest()


def _statements(script: str) -> list[str]:
    """The statements of a script: those of a trigger stay together."""
    found, rest = [], ""
    for line in script.strip().splitlines():
        rest += f"{line}\n"
        if sqlite3.complete_statement(rest):
            found.append(rest)
            rest = ""
    return found
