"""A work queue for groups of ranks: a group that is done early takes more items."""

from __future__ import annotations

from typing import Any

from rlhf.distributed.compute import Compute


class SharedQueue:
    """The items 0 to count - 1, in order. One group of ranks takes each item.

    Timing decides which group takes which item. So results must not depend on that.
    """

    def __init__(self, compute: Compute, name: str, count: int, group_size: int = 1) -> None:
        """All ranks create the queue, with the same arguments.

        Args:
            name: unique among the queues of this run.
            group_size: number of consecutive ranks that take the same items together.
        """
        self._compute, self._name, self._count = compute, name, count
        self._group, self._rank_in_group = divmod(compute.rank, group_size)
        self._group_size, self._turns, self._taken = group_size, 0, 0
        self.is_empty = count == 0
        """Whether all items are taken, as far as this group knows."""

    def take(self, max_items: int) -> range:
        """Take the next items, at most `max_items` of them; an empty range if all are taken. A group's first
        rank asks the store, and the others wait for its result.

        Raises:
            RuntimeError: another rank does not answer within `distributed.timeout`.
        """
        first = self._taken if self._compute.world_size == 1 else self._ask(max_items)
        self._taken = last = min(first + max_items, self._count)
        self.is_empty = last == self._count
        return range(min(first, last), last)

    def close(self) -> None:
        """Delete the queue from the store. Call it only when all ranks are done: a later `take` would start
        again at 0."""
        if self._compute.world_size == 1:
            return
        if self._rank_in_group == 0 and self._group_size > 1:
            for turn in range(self._turns):
                _store().delete_key(self._key(turn))
        if self._compute.is_main:
            _store().delete_key(self._name)

    def _ask(self, max_items: int) -> int:
        """The first item for this group in this turn; `count` or more if all are taken."""
        key = self._key(self._turns)
        self._turns += 1
        if self._rank_in_group == 0:
            first: int = _store().add(self._name, max_items) - max_items
            if self._group_size > 1:
                _store().set(key, str(first))
        else:
            first = int(_store().get(key))  # waits for the first rank
        self._compute.count_progress()
        return first

    def _key(self, turn: int) -> str:
        return f"{self._name}, group {self._group}, turn {turn}"


def _store() -> Any:
    """The key-value store of torch's default process group."""
    from torch import distributed

    return distributed.distributed_c10d._get_default_store()
