"""Work that groups of ranks take from one queue, so that a group that is done early takes more."""

from __future__ import annotations

from typing import Any

from rlhf.distributed.compute import Compute


class SharedQueue:
    """The items 0 to count - 1. Each is taken once, by one group of ranks; the lowest are taken first.

    Who takes which item is decided by who asks first. So results must not depend on that.
    """

    def __init__(self, compute: Compute, name: str, count: int, group_size: int = 1) -> None:
        """All ranks make one, with the same arguments.

        Args:
            name: which no other queue of this run has.
            group_size: consecutive ranks that take the same items, at the same turns.
        """
        self._compute, self._name, self._count = compute, name, count
        self._group, self._place = divmod(compute.rank, group_size)
        self._group_size, self._turns, self._taken = group_size, 0, 0
        self.is_empty = count == 0
        """Whether everything is taken, as far as this group knows."""

    def take(self, most: int) -> range:
        """The next items, at most `most` of them; none where all are taken. A group's first rank asks, and
        the others wait for what it got.

        Raises:
            RuntimeError: the others do not answer within `distributed.timeout`.
        """
        first = self._taken if self._compute.world_size == 1 else self._ask(most)
        self._taken = last = min(first + most, self._count)
        self.is_empty = last == self._count
        return range(min(first, last), last)

    def close(self) -> None:
        """Forget what was taken. Only when all ranks are done: a later turn would begin anew."""
        if self._compute.world_size == 1:
            return
        if self._place == 0 and self._group_size > 1:
            for turn in range(self._turns):
                _store().delete_key(self._key(turn))
        if self._compute.is_main:
            _store().delete_key(self._name)

    def _ask(self, most: int) -> int:
        """The first item that this group gets at this turn; it may be behind the last."""
        key = self._key(self._turns)
        self._turns += 1
        if self._place == 0:
            first: int = _store().add(self._name, most) - most
            if self._group_size > 1:
                _store().set(key, str(first))
        else:
            first = int(_store().get(key))  # which waits for it
        self._compute.moved()
        return first

    def _key(self, turn: int) -> str:
        return f"{self._name}, group {self._group}, turn {turn}"


def _store() -> Any:
    """Where the ranks met."""
    from torch import distributed

    return distributed.distributed_c10d._get_default_store()
