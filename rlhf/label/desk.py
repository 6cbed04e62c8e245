"""What an annotator can do, without the web: see a pair, vote, take a vote back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

from rlhf.label.agreement import krippendorff_alpha
from rlhf.label.draw import Draw
from rlhf.label.snapshot import IN_ORDER, Snapshot
from rlhf.label.votes import Choice, Shown, VotesFile

Button = Literal["left", "right", "tie", "both_bad", "skip"]
BUTTONS: tuple[Button, ...] = ("left", "right", "tie", "both_bad", "skip")
AWAY_SECONDS = 30 * 60.0
"""A pair that lies so long on an annotator's page is given to others too."""
MOST_COMMENT = 4000
"""Characters of a comment; the rest is cut off."""


class Progress(NamedTuple):
    """How far the work is."""

    votes: int
    wanted: int
    """As many as are to be cast, or can be."""
    own: int
    seconds: float | None
    """The median of all pages."""
    alpha: float | None
    overlap_pairs: int


class Desk:
    """Hands out pairs and takes votes. Only one thread uses it: what two annotators do happens one after
    the other."""

    def __init__(
        self, file: VotesFile, draw: Draw, stage: str, annotators: Sequence[str], wanted: int
    ) -> None:
        """Args:
        wanted: votes at which the work is done.
        """
        self.file, self.draw, self.stage = file, draw, stage
        self.annotators, self.wanted = tuple(annotators), wanted
        self.comments: dict[int, str] = {}
        """Number of what is shown again after an undo -> the comment of the vote that was taken back."""

    def snapshot(self) -> Snapshot:
        """The votes that count."""
        return Snapshot(self.file.votes(self.stage), self.draw.pairs, None)

    def page(self, annotator: str) -> Shown | None:
        """The pair on an annotator's page: the one that is there, or the next one; None if none is left."""
        shown = self.file.on_page(self.stage, annotator)
        if shown is not None and shown.pair.id in self.draw.pairs:
            return shown._replace(comment=self.comments.get(shown.id, ""))
        elsewhere = self.file.being_judged(self.stage, time.time() - AWAY_SECONDS)
        elsewhere.pop(annotator, None)
        found = self.draw.next(annotator, self.snapshot().all, elsewhere)
        return None if found is None else self.file.show(self.stage, annotator, *found)

    def vote(self, annotator: str, shown: int, button: Button, comment: str) -> bool:
        """Take a vote; False if that pair is not on the annotator's page (any more)."""
        current = self.file.on_page(self.stage, annotator)
        if current is None:
            return False
        other: Choice = "second" if current.left == "first" else "first"
        choice: Choice = current.left if button == "left" else other if button == "right" else button
        return self.file.cast(self.stage, annotator, shown, choice, comment[:MOST_COMMENT])

    def undo(self, annotator: str) -> bool:
        """Take back the annotator's last vote; its pair and comment are on their page again. False if there
        is none."""
        shown = self.file.undo(self.stage, annotator)
        if shown is not None:
            self.comments[shown.id] = shown.comment
        return shown is not None

    def is_done(self) -> bool:
        """Whether there are enough votes, or nobody has a pair left."""
        votes = self.snapshot()
        return len(votes.counted) >= self.wanted or not self.draw.is_open(self.annotators, votes.all)

    def progress(self, annotator: str = "") -> Progress:
        """How far the work is, for an annotator."""
        found = self.snapshot()
        several = [[*said.values()] for said in found.judged_by_several().values()]
        wanted = min(self.wanted, len(found.counted) + found.open_votes(self.draw))
        return Progress(
            len(found.counted), wanted, sum(vote.annotator == annotator for vote in found.counted),
            found.seconds_per_vote(), krippendorff_alpha(several, IN_ORDER), len(several),
        )  # fmt: skip
