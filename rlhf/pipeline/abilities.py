"""What few stages can: make rows that others learn from, record what people do, tell of the run itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from rlhf.costs.setup import CostContext
from rlhf.data.prepared import LengthStats
from rlhf.pipeline.stage import Stage
from rlhf.pipeline.store import Artifact


class MakesRows(Stage):
    """A stage that makes rows which others learn from: `dpo.data=stage:NAME`."""

    offers: ClassVar[Mapping[str, str]]
    """Roles that may read what it makes: the file in its artifact with their rows."""

    @abstractmethod
    def offer_advice(self) -> str:
        """How to have it make more rows for others, in the user's own keys."""

    @abstractmethod
    def check_offers(self, said: str, chain: Mapping[str, Stage]) -> None:
        """Refuse to make rows for others where the knobs are sure to give none.

        Args:
            said: the key that wants them, and its value.
            chain: all stages, where others' knobs decide too.

        Raises:
            ConfigError: in the user's own keys.
        """

    @abstractmethod
    def offered_lengths(self, on: CostContext, chain: Mapping[str, Stage]) -> LengthStats:
        """How many rows it makes for others, and how long, at most: for a cost."""

    @abstractmethod
    def suffices(self, metrics: Mapping[str, float]) -> bool:
        """Whether an artifact with these summary metrics has as much as is asked for now."""


class Records(Stage):
    """A stage that adds to a file outside the store while it runs. The digest of what it publishes of that is
    in its key: taken before it runs, and again from `job.recorded` when it is done."""

    @abstractmethod
    def recorded(self, inputs: Mapping[str, Artifact], external: Mapping[str, str]) -> str:
        """The digest of what it has recorded so far.

        Args:
            inputs: finished artifacts, with those that it reads.
            external: its `external_digests`.
        """


class TellsOfRuns(Stage):
    """A stage that each run runs for itself: what it makes is for people, and no weights are read for it."""

    random: ClassVar[bool] = False
    in_chain: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = False


def is_enough(stage: Stage, metrics: Mapping[str, float]) -> bool:
    """Whether an artifact with these summary metrics is taken instead of running the stage again."""
    return not isinstance(stage, MakesRows) or stage.suffices(metrics)
