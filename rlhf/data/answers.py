"""Answers to learn, as token ids that lie in a mapped file: of each row there are only numbers in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

from rlhf.data.schema import SftRow, each_turn
from rlhf.data.tokens import TokenIds

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class EncodedAnswer:
    """A sequence to learn from."""

    prompt: Tensor
    """Long [prompt length]: what is only read."""
    answer: Tensor
    """Long [answer length]."""
    mask: Tensor
    """Of the answer: true on what is learned, false on turns between."""
    is_cut: bool
    """Whether its end was cut off."""

    @property
    def learned(self) -> int:
        """Tokens that are learned."""
        return int(self.mask.sum())

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class AnswerSource:
    """The rows of a file, and how they become sequences."""

    rows: Sequence[SftRow]
    ids: TokenIds
    max_tokens: int
    """Longer sequences are cut: the end of the answer is lost."""
    all_turns: bool
    """Learn every answer of a conversation, not only the last one. Where the chat template renders a turn in
    another way once later ones follow, each turn is its own sequence."""

    def __getitem__(self, index: int) -> EncodedAnswer:
        import torch

        ids, spans = self.ids.encoded(index)
        spans = spans[0 if self.all_turns else -1 :]
        begin, kept = int(spans[0][0]), torch.from_numpy(ids[: self.max_tokens].astype("int64"))
        mask = torch.zeros(len(kept), dtype=torch.bool)
        for start, end in spans.tolist():
            mask[start:end] = True
        return EncodedAnswer(kept[:begin], kept[begin:], mask[begin:], len(ids) > self.max_tokens)

    @cached_property
    def is_first(self) -> NDArray[Any]:
        """Of each sequence: whether it is its row's first. It holds the whole row; others are turns apart."""
        import numpy

        found: NDArray[Any] = numpy.diff(self.ids.row, prepend=-1) != 0
        return found

    def order(self) -> NDArray[Any]:
        """The sequences that are made of the rows, in the rows' order, earlier turns first."""
        import numpy

        if self.all_turns:
            return numpy.lexsort((self.is_first, self.ids.row))
        return numpy.flatnonzero(self.is_first)

    def learned(self) -> NDArray[Any]:
        """Tokens that each sequence teaches."""
        import numpy

        spans, ends = self.ids.spans.clip(max=self.max_tokens), self.ids.span_ends
        tokens = spans[:, 1] - spans[:, 0]
        if not self.all_turns:
            tokens = tokens[ends - 1]
        elif len(ends):
            tokens = numpy.add.reduceat(tokens, numpy.concatenate([[0], ends[:-1]]))
        found: NDArray[Any] = tokens
        return found

    def as_json(self, index: int) -> Mapping[str, Any]:
        """Prompt and answer of a sequence, as text."""
        import numpy

        number = int(self.ids.row[index])
        row, place = self.rows[number], index - int(numpy.searchsorted(self.ids.row, number))
        if place:
            row = [*each_turn(row)][place - 1]
        return {"prompt": row.prompt, "completion": row.completion}


class Answers(Sequence[EncodedAnswer]):
    """Sequences that teach something. Those that are asked for are read from their files."""

    def __init__(
        self,
        sources: Sequence[AnswerSource],
        source: NDArray[Any],
        index: NDArray[Any],
        lengths: NDArray[Any],
        learned: NDArray[Any],
    ) -> None:
        """`Answers.of` makes them of a file's rows."""
        self._sources, self._source, self._index = sources, source, index
        self.lengths = lengths
        """Tokens of each, as far as it is not cut off."""
        self.learned = learned
        """Tokens that each teaches."""

    @classmethod
    def of(cls, rows: Sequence[SftRow], ids: TokenIds, max_tokens: int, *, all_turns: bool) -> Answers:
        """The sequences of rows whose first `max_tokens` tokens leave anything to learn."""
        import numpy

        source = AnswerSource(rows, ids, max_tokens, all_turns)
        order, learned = source.order(), source.learned()
        order = order[learned[order] > 0].astype("int32")
        lengths = ids.lengths[order].clip(max=max_tokens)
        return cls([source], numpy.zeros(len(order), "uint8"), order, lengths, learned[order])

    @classmethod
    def joined(cls, first: Answers, second: Answers) -> Answers:
        """Those of the first, and behind them those of the second."""
        import numpy

        names = ("_index", "lengths", "learned")
        source = numpy.concatenate([first._source, second._source + len(first._sources)])
        columns = (numpy.concatenate([getattr(each, name) for each in (first, second)]) for name in names)
        return cls([*first._sources, *second._sources], source, *columns)

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> EncodedAnswer: ...
    @overload
    def __getitem__(self, index: slice) -> Answers: ...

    def __getitem__(self, index: int | slice) -> EncodedAnswer | Answers:
        if isinstance(index, slice):
            return self._picked(index)
        return self._of(index)[int(self._index[index])]

    def pick(self, indices: Sequence[int]) -> Answers:
        """Those at these places."""
        import numpy

        return self._picked(numpy.asarray(indices, dtype="int64"))

    def _picked(self, places: Any) -> Answers:
        return Answers(
            self._sources,
            self._source[places],
            self._index[places],
            self.lengths[places],
            self.learned[places],
        )

    def as_json(self, index: int) -> Mapping[str, Any]:
        """Prompt and answer, as text."""
        return self._of(index).as_json(int(self._index[index]))

    def _of(self, index: int) -> AnswerSource:
        return self._sources[int(self._source[index])]

    @property
    def num_cut(self) -> int:
        """How many have lost their end."""
        return sum(
            int((source.ids.lengths[index] > source.max_tokens).sum()) for source, index in self._of_each()
        )

    @property
    def num_rows(self) -> int:
        """How many rows they are made of."""
        return sum(_num_different(source.ids.row[index]) for source, index in self._of_each())

    @property
    def num_apart(self) -> int:
        """How many conversations have each of their turns as a sequence of its own."""
        import numpy

        found = 0
        for source, index in self._of_each():
            if source.all_turns:
                several = numpy.bincount(source.ids.row)[source.ids.row[index]] > 1
                found += _num_different(source.ids.row[index][several])
        return found

    def _of_each(self) -> Iterable[tuple[AnswerSource, NDArray[Any]]]:
        for number, source in enumerate(self._sources):
            yield source, self._index[self._source == number]


def _num_different(numbers: NDArray[Any]) -> int:
    import numpy

    return len(numpy.unique(numbers))
