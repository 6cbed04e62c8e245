"""A snapshot of the votes, as rows and metrics."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from rlhf.config import ConfigError
from rlhf.data.sources import SourceConfig
from rlhf.digests import digest_of
from rlhf.label.agreement import krippendorff_alpha, mean_kappa, ordinal
from rlhf.label.draw import Draw
from rlhf.label.pairs import Pair, pair_and_better, pair_as_named, rows_of
from rlhf.label.votes import Choice, ExternalVote, Vote

CHOICES: tuple[Choice, ...] = ("first", "second", "tie", "both_bad", "skip")
ORDERED_VERDICTS = ("second", "even", "first")
"""Verdicts from the lowest to the highest. `even`: a tie, or both answers are bad."""


class Snapshot:
    """The votes that a stage publishes."""

    def __init__(self, votes: Iterable[Vote], pairs: Collection[str], annotator: str | None) -> None:
        """Args:
        votes: the votes of the stage, in their order.
        pairs: ids of the stage's pairs. For other pairs, only imported votes count.
        annotator: the only annotator whose votes count; None for all people (no person's name contains
            `MACHINE_MARK`).
        """
        self.all = [
            vote
            for vote in votes
            if (vote.purpose == "imported" or vote.pair.id in pairs)
            and (vote.annotator == annotator if annotator else MACHINE_MARK not in vote.annotator)
        ]
        firsts: dict[tuple[str, str], Vote] = {}
        for vote in self.all:
            if vote.purpose != "check" and vote.choice != "skip":
                firsts.setdefault((vote.annotator, vote.pair.id), vote)
        self.counted = [*firsts.values()]
        """One vote per annotator and pair, without checks and skips. `label.votes` counts these."""

    @property
    def digest(self) -> str:
        """Digest of all published votes: a part of the artifact's key."""
        return digest_of([
            [
                vote.annotator, vote.pair.id, vote.pair.predicted, vote.left, vote.purpose, vote.choice,
                vote.comment, vote.shown, vote.at,
            ]
            for vote in self.all
        ])  # fmt: skip

    def rows(self) -> Iterator[dict[str, Any]]:
        """A preference row for each pair in which one answer has more votes than the other."""
        by_pair: dict[str, list[Vote]] = {}
        for vote in self.counted:
            by_pair.setdefault(vote.pair.id, []).append(vote)
        for votes in by_pair.values():
            counts, pair = Counter(vote.choice for vote in votes), votes[0].pair
            if counts["first"] == counts["second"]:
                continue
            better, worse = ("first", "second") if counts["first"] > counts["second"] else ("second", "first")
            stages = {
                "chosen_by": getattr(pair, f"{better}_by"), "rejected_by": getattr(pair, f"{worse}_by")
            }  # fmt: skip
            yield {
                "prompt": pair.prompt,
                "chosen": getattr(pair, better),
                "rejected": getattr(pair, worse),
                "annotators": [vote.annotator for vote in votes],
                "times": [_time(vote.at) for vote in votes],
                "votes": {
                    "chosen": counts[better], "rejected": counts[worse], "tie": counts["tie"],  # type: ignore[index]
                    "both_bad": counts["both_bad"],
                },
            } | {name: maker for name, maker in stages.items() if maker}  # fmt: skip

    def vote_rows(self) -> Iterator[dict[str, Any]]:
        """Every vote, in the format of `label.imports`."""
        for vote in self.all:
            pair = vote.pair
            yield {
                "prompt": pair.prompt, "first": pair.first, "second": pair.second, "choice": vote.choice,
                "annotator": vote.annotator, "time": _time(vote.at), "shown": _time(vote.shown),
                "left": vote.left, "purpose": vote.purpose, "comment": vote.comment,
                "first_by": pair.first_by, "second_by": pair.second_by,
            }  # fmt: skip

    def judged_by_several(self) -> dict[str, dict[str, str]]:
        """Pair -> annotator -> verdict, for the random pairs that several people judged."""
        judged: dict[str, dict[str, str]] = {}
        for vote in self.counted:
            if vote.purpose == "random":
                verdict = vote.choice if vote.choice in ("first", "second") else "even"
                judged.setdefault(vote.pair.id, {})[vote.annotator] = verdict
        return {pair: verdicts for pair, verdicts in judged.items() if len(verdicts) > 1}

    def agreement(self) -> dict[str, float]:
        """Agreement on random pairs that several people judged, without undefined coefficients."""
        several = self.judged_by_several()
        units = [[*verdicts.values()] for verdicts in several.values()]
        coefficients = {
            "alpha": krippendorff_alpha(units, ORDERED_VERDICTS),
            "alpha_ordinal": krippendorff_alpha(units, ORDERED_VERDICTS, ordinal),
            "kappa": mean_kappa(several),
        }
        return {"overlap_pairs": float(len(several))} | {
            name: value for name, value in coefficients.items() if value is not None
        }

    def seconds_per_vote(self) -> float | None:
        """Median time per page in seconds; None without times."""
        spent = [vote.at - vote.shown for vote in self.all if vote.at is not None and vote.shown is not None]
        return statistics.median(spent) if spent else None

    def metrics(self, draw: Draw) -> dict[str, float]:
        """Summary metrics, without shares of zero votes."""
        import torch

        from rlhf.evaluation.intervals import difference, share

        counts = Counter(vote.choice for vote in self.counted)
        metrics = {
            "votes": float(len(self.counted)),
            "pairs": float(sum(1 for _ in self.rows())),
            "ties": float(counts["tie"]),
            "both_bad": float(counts["both_bad"]),
            "skips": float(sum(vote.choice == "skip" for vote in self.all)),
            "annotators": float(len({vote.annotator for vote in self.counted})),
            "pairs_open": float(self.open_pairs(draw)),
            **self.agreement(),
        }
        seconds = self.seconds_per_vote()
        if seconds is not None:
            metrics["seconds_per_vote"] = seconds
        clear = [vote for vote in self.counted if vote.choice in ("first", "second")]
        on_page = [vote for vote in clear if vote.shown is not None and vote.purpose != "imported"]
        shares = {
            "left_share": [vote.choice == vote.left for vote in on_page],
            "longer_share": [
                (vote.choice == "first") == (len(vote.pair.first) > len(vote.pair.second))
                for vote in clear
                if len(vote.pair.first) != len(vote.pair.second)
            ],
            "reward_accuracy": [
                (vote.choice == "first") == (vote.pair.predicted > 0)
                for vote in on_page
                if vote.purpose == "random" and vote.pair.predicted
            ],
            "check_agreement": [*self.checks()],
        }
        for name, right in shares.items():
            if right:
                metrics |= share(torch.tensor(right, dtype=torch.float64)).metrics(name)
        for stage, wins in self.wins(draw).items():
            metrics |= difference(torch.tensor(wins, dtype=torch.float64)).metrics(f"preferred/{stage}")
        return metrics

    def wins(self, draw: Draw) -> dict[str, list[float]]:
        """Stage that answered -> for each prompt, share of votes that its answers won minus share that they
        lost, in pairs of two stages. Pairs chosen by their predicted gap do not count, because they do not
        represent all pairs."""
        by_prompt: dict[str, list[float]] = {}
        stages: set[str] = set()
        for vote in self.counted:
            pair = draw.pairs.get(vote.pair.id)
            if pair is None or vote.purpose == "chosen" or pair.first_by == pair.second_by:
                continue
            won = {"first": 1.0, "second": -1.0}.get(vote.choice, 0.0)
            stages |= {pair.first_by, pair.second_by}
            by_prompt.setdefault(digest_of(pair.prompt), []).append(
                won if pair.first_by < pair.second_by else -won
            )
        means = [statistics.mean(each) for each in by_prompt.values()]
        return {
            stage: [sign * mean for mean in means]
            for stage, sign in zip(sorted(stages), (1, -1), strict=False)
        }

    def checks(self) -> Iterator[bool]:
        """For each pair that an annotator saw again: whether the vote was the same."""
        before = {(vote.annotator, vote.pair.id): vote.choice for vote in self.counted}
        for vote in self.all:
            first = before.get((vote.annotator, vote.pair.id))
            if vote.purpose == "check" and vote.choice != "skip" and first is not None:
                yield vote.choice == first

    def open_pairs(self, draw: Draw) -> int:
        """Number of pairs that still need a vote."""
        return sum(wanted > 0 for wanted in self._open(draw))

    def open_votes(self, draw: Draw) -> int:
        """Number of votes that all pairs together still need."""
        return sum(self._open(draw))

    def _open(self, draw: Draw) -> list[int]:
        counts = Counter(vote.pair.id for vote in self.counted)
        return [max(0, wanted - counts[pair]) for pair, wanted in draw.wanted.items()]


MACHINE_MARK = ":"
"""Part of the name of every annotator that is a machine, and of no person's name."""
MACHINE_NAME = re.compile(r"(?:rule|reward_model|judge):.+ \([0-9a-f]{8}\)")
"""Name of a machine annotator: see `stages/label.py`."""


def imported(sources: Iterable[SourceConfig], key: str) -> Iterator[ExternalVote]:
    """Votes in files of other tools: rows with prompt, first, second and choice (first, second, tie, both_bad
    or skip); or preference rows. The columns `annotator`, `time` and `comment` are optional.

    Raises:
        ConfigError: a row is not a vote.
    """
    for source in sources:
        for where, raw in rows_of(source, key):
            vote = _vote_of(where, raw, key)
            if vote is not None:
                pair, choice = vote
                by = str(raw.get("annotator") or source.name)
                if MACHINE_NAME.fullmatch(by):
                    raise ConfigError(
                        f"{key}: {where}: annotator={by}: no person, but a machine's vote. Leave such rows "
                        "out, or let the machine judge: label.annotator, label.reward."
                    )
                by = by.replace(MACHINE_MARK, "-")
                at = _seconds(raw.get("time"), where, key)
                yield ExternalVote(by, pair, choice, "imported", str(raw.get("comment") or ""), at)


def _vote_of(where: str, raw: Mapping[str, Any], key: str) -> tuple[Pair, Choice] | None:
    if "choice" not in raw:
        return pair_and_better(where, raw, key)
    choice = raw["choice"]
    if choice not in CHOICES:
        raise ConfigError(f"{key}: {where}: choice={choice!r}. It must be one of {', '.join(CHOICES)}.")
    named = pair_as_named(where, raw, key)
    if named is None:
        return None
    pair, is_same_order = named
    swapped: dict[Choice, Choice] = {"first": "second", "second": "first"}
    return pair, choice if is_same_order else swapped.get(choice, choice)


def _seconds(value: Any, where: str, key: str) -> float | None:
    """Seconds since 1970, from a number or an ISO 8601 time; None if empty."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, str):
            return datetime.fromisoformat(value).timestamp()
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"{key}: {where}: time={value!r}. Write seconds since 1970, or a time such as "
            f"2026-01-31T12:00:00+00:00."
        ) from None


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
