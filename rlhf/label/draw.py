"""Chooses the next pair to show.

A share of the pairs is drawn at random, by their digests. Only these measure agreement and the accuracy of
the reward model, because they represent all pairs. A share of them is shown to several people. The other
pairs are chosen by the gap that a reward predicts between the answers: alternately one with a large gap
(Melikidze et al. 2026, arXiv:2603.09692) and one with a moderate gap (Shen et al. 2025, arXiv:2502.04354).
Without predictions every pair is random. Sometimes an annotator sees one of their own pairs again, with the
answers swapped.

The file of votes holds the only state, so a server that is killed and restarted continues unchanged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, zip_longest

from pydantic import Field, PositiveInt

from rlhf.config import Strict
from rlhf.digests import digest_of
from rlhf.label.pairs import Pair, Side
from rlhf.label.votes import Purpose, Vote

LARGE_GAP_SHARE = 1 / 3
"""Share of pairs whose predicted gap counts as large. An equal share is moderate; the rest come last."""
MIN_VOTES_BEFORE_CHECK = 5
"""Fewest other votes of an annotator before they see a pair again."""


class DrawConfig(Strict):
    """`label.draw.*`: which pair comes next."""

    random_share: float = Field(ge=0, le=1)
    """Share of the pairs that are drawn at random. Only these measure agreement, and the reward model's
    accuracy against people. Without predicted gaps all pairs are random."""
    overlap_share: float = Field(ge=0, le=1)
    """Share of the random pairs that several people see."""
    overlap_people: PositiveInt
    """Number of people who see such a pair."""
    check_share: float = Field(ge=0, le=0.5)
    """Share of the pages that show an annotator a pair of theirs again, with the answers swapped."""


class Draw:
    """The pairs of one stage, and the order in which they are shown."""

    def __init__(self, pairs: Sequence[Pair], config: DrawConfig, seed: int, people: int) -> None:
        """Args:
        people: number of annotators; no pair needs more votes than that.
        """
        self.config, self.seed = config, seed
        self.pairs = {pair.id: pair for pair in pairs}
        by_chance = sorted(pairs, key=lambda pair: self.chance("order", pair.id))
        has_gaps = any(pair.predicted is not None for pair in pairs)
        is_random = {
            pair.id for pair in pairs if not has_gaps or self.chance("random", pair.id) < config.random_share
        }
        self.purpose: dict[str, Purpose] = {
            pair.id: "random" if pair.id in is_random else "chosen" for pair in pairs
        }
        self.wanted = {
            pair.id: min(people, config.overlap_people)
            if pair.id in is_random and self.chance("overlap", pair.id) < config.overlap_share
            else 1
            for pair in pairs
        }
        self.random = [pair for pair in by_chance if pair.id in is_random]
        self.chosen = _by_gap([pair for pair in by_chance if pair.id not in is_random])

    def chance(self, *about: object) -> float:
        """A pseudo-random number in [0, 1), determined by the seed and `about`."""
        return int(digest_of([self.seed, *about])[:13], 16) / 16**13

    def left(self, annotator: str, pair: Pair) -> Side:
        """The answer that an annotator sees on the left, the first time."""
        return "first" if self.chance("left", annotator, pair.id) < 0.5 else "second"

    def next(
        self, annotator: str, votes: Iterable[Vote], elsewhere: Mapping[str, str]
    ) -> tuple[Pair, Side, Purpose] | None:
        """The next pair for an annotator.

        Args:
            votes: all votes that count, in their order.
            elsewhere: other annotator -> the pair on their page.

        Returns:
            The pair, its left answer, and why it is shown; None if no pair is left for them.
        """
        votes = [vote for vote in votes if vote.pair.id in self.pairs]
        own = [vote for vote in votes if vote.annotator == annotator]
        seen = {vote.pair.id for vote in own}
        counts = Counter(vote.pair.id for vote in votes if vote.purpose != "check" and vote.choice != "skip")
        counts.update(elsewhere.values())
        turn = len(own)
        if self.chance("check", annotator, turn) < self.config.check_share:
            again = self._again(own)
            if again is not None:
                return again
        queues = [self.random, self.chosen]
        if self.chance("queue", annotator, turn) >= self.config.random_share:
            queues.reverse()
        if turn % 2 == 0:  # every other page: finish the pairs that others have voted on
            begun = [pair for pair in self.random if 0 < counts[pair.id] < self.wanted[pair.id]]
            queues.insert(0, begun)
        for pair in chain.from_iterable(queues):
            if pair.id not in seen and counts[pair.id] < self.wanted[pair.id]:
                return pair, self.left(annotator, pair), self.purpose[pair.id]
        return None

    def in_order(self) -> Iterator[Pair]:
        """All pairs, each once, in the order for a single annotator who skips none."""
        queues = [iter(self.random), iter(self.chosen)]
        for turn in range(len(self.pairs)):
            one = 0 if self.chance("queue", "", turn) < self.config.random_share else 1
            pair = next(queues[one], None) or next(queues[1 - one], None)
            assert pair is not None
            yield pair

    def _again(self, own: Sequence[Vote]) -> tuple[Pair, Side, Purpose] | None:
        """The oldest pair that an annotator judged once, long enough ago, with its answers swapped."""
        times = Counter(vote.pair.id for vote in own)
        for vote in own[: max(0, len(own) - MIN_VOTES_BEFORE_CHECK)]:
            if times[vote.pair.id] == 1 and vote.choice in ("first", "second"):
                return self.pairs[vote.pair.id], "second" if vote.left == "first" else "first", "check"
        return None

    def has_pair_left(self, annotators: Iterable[str], votes: Sequence[Vote]) -> bool:
        """Whether at least one annotator has a pair left."""
        return any(self.next(each, votes, {}) is not None for each in annotators)


def _by_gap(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs with large and moderate gaps in turn; then small gaps; pairs without a prediction last."""
    known = [pair for pair in pairs if pair.predicted is not None and not math.isnan(pair.predicted)]
    known.sort(key=lambda pair: -abs(pair.predicted or 0.0))
    cut = math.ceil(LARGE_GAP_SHARE * len(known))
    large, moderate, small = known[:cut], known[cut : 2 * cut], known[2 * cut :]
    mixed = [pair for both in zip_longest(large, moderate) for pair in both if pair is not None]
    rest = {pair.id for pair in known}
    return [*mixed, *small, *(pair for pair in pairs if pair.id not in rest)]
