"""Preference pairs as token ids, and how the reward model learns and ranks them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from rlhf.data.schema import PairRow
from rlhf.data.tokens import TokenIds
from rlhf.distributed.compute import Compute

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray
    from torch import Tensor

    from rlhf.evaluation.reward_model import Ranking
    from rlhf.models.value_head import ScalarModel
    from rlhf.training.engine import Engine


class EncodedPair(NamedTuple):
    """Both sides of a pair: prompt and answer, long [length]."""

    chosen: Tensor
    rejected: Tensor


class Pairs(Sequence[EncodedPair]):
    """Preference pairs as token ids in a mapped file. Only row numbers and lengths are in memory; the ids of
    a pair are read on access."""

    def __init__(
        self,
        rows: Sequence[PairRow],
        ids: TokenIds,
        max_tokens: int,
        row_numbers: NDArray[numpy.int32] | None = None,
    ) -> None:
        """The pairs whose sides have at most `max_tokens` tokens.

        Args:
            ids: token ids of the rows.
            row_numbers: use these rows only; by default, all that are short enough.
        """
        import numpy

        self._rows, self._ids, self._max_tokens = rows, ids, max_tokens
        lengths_N2 = ids.lengths.reshape(-1, 2)  # a pair's sides follow each other
        if row_numbers is None:
            row_numbers = numpy.flatnonzero(lengths_N2.max(-1) <= max_tokens).astype("int32")
        self._row_numbers, self.lengths = row_numbers, lengths_N2[row_numbers]
        """Tokens of the chosen and the rejected side, [pairs, 2]."""

    def __len__(self) -> int:
        return len(self._row_numbers)

    @overload
    def __getitem__(self, index: int) -> EncodedPair: ...
    @overload
    def __getitem__(self, index: slice) -> Pairs: ...

    def __getitem__(self, index: int | slice) -> EncodedPair | Pairs:
        if isinstance(index, slice):
            return Pairs(self._rows, self._ids, self._max_tokens, self._row_numbers[index])
        return EncodedPair(self.side(index, 0), self.side(index, 1))

    def pick(self, indices: Sequence[int]) -> Pairs:
        """The pairs at these indices."""
        return Pairs(self._rows, self._ids, self._max_tokens, self._row_numbers[list(indices)])

    def side(self, index: int, side: int) -> Tensor:
        """The token ids of the chosen side (0) or the rejected side (1)."""
        import torch

        return torch.from_numpy(self._ids[2 * int(self._row_numbers[index]) + side].astype("int64"))

    @property
    def answer_lengths(self) -> NDArray[numpy.int64]:
        """Tokens of both answers without the prompt, [pairs, 2]."""
        # an answer ends its sequence
        lengths: NDArray[numpy.int64] = self._ids.lengths - self._ids.spans[:, 0]
        return lengths.reshape(-1, 2)[self._row_numbers]

    def gold_gaps(self) -> Iterator[float]:
        """True reward of each chosen answer minus that of the rejected one; nan if unknown."""
        for index in self._row_numbers:
            row = self._rows[int(index)]
            if row.chosen_gold is None or row.rejected_gold is None:
                yield float("nan")
            else:
                yield row.chosen_gold - row.rejected_gold

    def as_json(self, index: int) -> dict[str, Any]:
        """The pair's prompt and answers as texts."""
        row = self._rows[int(self._row_numbers[index])]
        return {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}


class BothSides(Sequence["Tensor"]):
    """The chosen sides of pairs, then the rejected ones."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return 2 * len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[each] for each in range(len(self))[index]]
        side, place = divmod(index, len(self._pairs))
        return self._pairs.side(place, side)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each side."""
        lengths: list[int] = self._pairs.lengths.T.flatten().tolist()
        return lengths


def pair_step(
    engine: Engine, batch: Pairs, micro_batch_tokens: int, compute: Compute, *, center: float
) -> dict[str, float]:
    """One optimizer step. The Bradley-Terry loss is the mean over all pairs of the batch, over all ranks."""
    from rlhf.losses.pairwise import bradley_terry_loss

    def loss(pairs: list[EncodedPair]) -> tuple[Tensor, dict[str, Tensor]]:
        score_2B = engine.model([*(p.chosen for p in pairs), *(p.rejected for p in pairs)])
        chosen_B, rejected_B = score_2B.chunk(2)
        mean = bradley_terry_loss(chosen_B, rejected_B, total_pairs=len(batch), center=center)
        return mean, {"loss": mean, "train_accuracy": (chosen_B > rejected_B).sum() / len(batch)}

    lengths = (2 * batch.lengths.max(-1)).tolist()
    return engine.learn(
        lengths, lambda indices: [batch[index] for index in indices], loss, micro_batch_tokens
    )


def rank_pairs(model: ScalarModel, pairs: Pairs, micro_batch_tokens: int, compute: Compute) -> Ranking:
    """Score both sides of every pair. Each rank scores its share."""
    import torch

    from rlhf.evaluation.reward_model import Ranking

    sides = BothSides(pairs)
    chosen_B, rejected_B = model.score(sides, micro_batch_tokens, compute, sides.lengths).chunk(2)
    chosen_length_B, rejected_length_B = torch.from_numpy(pairs.answer_lengths.astype("int64")).T
    gold_gap_B = torch.tensor(array("f", pairs.gold_gaps()))
    return Ranking(chosen_B, rejected_B, chosen_length_B, rejected_length_B, gold_gap_B)
