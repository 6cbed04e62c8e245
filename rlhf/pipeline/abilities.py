"""Abilities of some stages: make rows for other stages, record people's work, describe the run itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from rlhf.costs.setup import CostContext
from rlhf.data.prepared import LengthStats
from rlhf.pipeline.stage import Stage
from rlhf.pipeline.store import Artifact


class MakesRows(Stage):
    """A stage that makes rows from which other stages learn: `dpo.data=stage:NAME`."""

    offers: ClassVar[Mapping[str, str]]
    """Role that may read its rows -> the file in its artifact that holds them."""

    @abstractmethod
    def offer_advice(self) -> str:
        """How to make it produce more rows for other stages, in the user's own keys."""

    @abstractmethod
    def check_offers(self, said: str, chain: Mapping[str, Stage]) -> None:
        """Refuse if the knobs make it certain that there are no rows for other stages.

        Args:
            said: the key that asks for the rows, and its value, for the message.
            chain: all stages; other stages' knobs may matter too.

        Raises:
            ConfigError: in the user's own keys.
        """

    @abstractmethod
    def offered_lengths(self, on: CostContext, chain: Mapping[str, Stage]) -> LengthStats:
        """Upper bounds for a cost: how many rows it makes for other stages, and how long they are."""

    @abstractmethod
    def suffices(self, metrics: Mapping[str, float]) -> bool:
        """Whether an artifact with these summary metrics holds as much as the config now asks for."""


class Records(Stage):
    """A stage that adds to a file outside the store while it runs. Its key contains a digest of the part of
    that file that it publishes: taken before the run, and again from `job.recorded` after it."""

    @abstractmethod
    def recorded(self, inputs: Mapping[str, Artifact], external: Mapping[str, str]) -> str:
        """Digest of the record so far.

        Args:
            inputs: finished artifacts, among them those that it reads.
            external: the stage's `external_digests`.
        """


class TellsOfRuns(Stage):
    """A stage that describes its run to people. Every run executes it anew; it reads no weights."""

    random: ClassVar[bool] = False
    in_chain: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = False


def is_enough(stage: Stage, metrics: Mapping[str, float]) -> bool:
    """Whether an artifact with these summary metrics replaces a new run of the stage."""
    return not isinstance(stage, MakesRows) or stage.suffices(metrics)
