"""An annotator's actions, without the web: see a pair, vote, undo a vote."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal, NamedTuple

from rlhf.label.agreement import krippendorff_alpha
from rlhf.label.draw import Draw
from rlhf.label.snapshot import ORDERED_VERDICTS, Snapshot
from rlhf.label.votes import Choice, Shown, VotesFile

Button = Literal["left", "right", "tie", "both_bad", "skip"]
BUTTONS: tuple[Button, ...] = ("left", "right", "tie", "both_bad", "skip")
AWAY_SECONDS = 30 * 60.0
"""Time after which a pair that is still on an annotator's page is offered to others too."""
MAX_COMMENT_CHARACTERS = 4000
"""Characters of a comment; the rest is cut off."""


class Progress(NamedTuple):
    """Progress of the labelling."""

    votes: int
    wanted: int
    """Votes at the end: the goal, or fewer if there are not enough pairs."""
    own: int
    """Votes of the annotator."""
    seconds: float | None
    """Median time per page."""
    alpha: float | None
    overlap_pairs: int


class Desk:
    """Hands out pairs and takes votes. Use it from one thread only, so that the actions of annotators never
    overlap."""

    def __init__(
        self, file: VotesFile, draw: Draw, stage: str, annotators: Sequence[str], wanted: int
    ) -> None:
        """Args:
        wanted: votes at which the work is done.
        """
        self.file, self.draw, self.stage = file, draw, stage
        self.annotators, self.wanted = tuple(annotators), wanted
        self.comments: dict[int, str] = {}
        """`Shown.id` of a pair that is shown again after an undo -> comment of the undone vote."""

    def snapshot(self) -> Snapshot:
        """The current snapshot of the votes."""
        return Snapshot(self.file.votes(self.stage), self.draw.pairs, None)

    def page(self, annotator: str) -> Shown | None:
        """The pair on an annotator's page: the current one, or the next one; None if no pair is left."""
        shown = self.file.on_page(self.stage, annotator)
        if shown is not None and shown.pair.id in self.draw.pairs:
            return shown._replace(comment=self.comments.get(shown.id, ""))
        elsewhere = self.file.being_judged(self.stage, time.time() - AWAY_SECONDS)
        elsewhere.pop(annotator, None)
        drawn = self.draw.next(annotator, self.snapshot().all, elsewhere)
        return None if drawn is None else self.file.show(self.stage, annotator, *drawn)

    def vote(self, annotator: str, shown: int, button: Button, comment: str) -> bool:
        """Take a vote; False if that pair is not, or no longer, on the annotator's page."""
        current = self.file.on_page(self.stage, annotator)
        if current is None:
            return False
        other: Choice = "second" if current.left == "first" else "first"
        choice: Choice = current.left if button == "left" else other if button == "right" else button
        return self.file.cast(self.stage, annotator, shown, choice, comment[:MAX_COMMENT_CHARACTERS])

    def undo(self, annotator: str) -> bool:
        """Undo the annotator's last vote, and show its pair and comment again. False if there is no vote."""
        shown = self.file.undo(self.stage, annotator)
        if shown is not None:
            self.comments[shown.id] = shown.comment
        return shown is not None

    def is_done(self) -> bool:
        """Whether there are enough votes, or no annotator has a pair left."""
        votes = self.snapshot()
        return len(votes.counted) >= self.wanted or not self.draw.has_pair_left(self.annotators, votes.all)

    def progress(self, annotator: str = "") -> Progress:
        """Progress of the labelling, for an annotator."""
        snapshot = self.snapshot()
        several = [[*verdicts.values()] for verdicts in snapshot.judged_by_several().values()]
        wanted = min(self.wanted, len(snapshot.counted) + snapshot.open_votes(self.draw))
        return Progress(
            len(snapshot.counted), wanted, sum(vote.annotator == annotator for vote in snapshot.counted),
            snapshot.seconds_per_vote(), krippendorff_alpha(several, ORDERED_VERDICTS), len(several),
        )  # fmt: skip
