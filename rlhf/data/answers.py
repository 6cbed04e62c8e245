"""Answers to learn, as token ids in a mapped file. Only a few numbers of each row are in memory."""

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
    """Long [prompt length]: tokens that are read but not learned."""
    answer: Tensor
    """Long [answer length]."""
    mask: Tensor
    """Bool [answer length]: true for tokens to learn, false for the turns in between."""
    is_cut: bool
    """Whether the end of the answer was cut off."""

    @property
    def learned(self) -> int:
        """Number of tokens to learn."""
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
    """Learn every answer of a conversation, not only the last one. If the chat template renders earlier turns
    differently once later turns follow, each turn is its own sequence."""

    def __getitem__(self, index: int) -> EncodedAnswer:
        import torch

        ids, spans = self.ids.encoded(index)
        spans = spans[0 if self.all_turns else -1 :]
        begin, cut_ids = int(spans[0][0]), torch.from_numpy(ids[: self.max_tokens].astype("int64"))
        mask = torch.zeros(len(cut_ids), dtype=torch.bool)
        for start, end in spans.tolist():
            mask[start:end] = True
        return EncodedAnswer(cut_ids[:begin], cut_ids[begin:], mask[begin:], len(ids) > self.max_tokens)

    @cached_property
    def is_first(self) -> NDArray[Any]:
        """Per sequence: whether it is the first of its row. The first one holds the full row; each other one
        is a single earlier turn."""
        import numpy

        is_first: NDArray[Any] = numpy.diff(self.ids.row, prepend=-1) != 0
        return is_first

    def order(self) -> NDArray[Any]:
        """Indices of the sequences to learn from, in the order of the rows; earlier turns come first."""
        import numpy

        if self.all_turns:
            return numpy.lexsort((self.is_first, self.ids.row))
        return numpy.flatnonzero(self.is_first)

    def learned(self) -> NDArray[Any]:
        """Number of tokens to learn per sequence."""
        import numpy

        spans, ends = self.ids.spans.clip(max=self.max_tokens), self.ids.span_ends
        tokens = spans[:, 1] - spans[:, 0]
        if not self.all_turns:
            tokens = tokens[ends - 1]
        elif len(ends):
            tokens = numpy.add.reduceat(tokens, numpy.concatenate([[0], ends[:-1]]))
        learned: NDArray[Any] = tokens
        return learned

    def as_json(self, index: int) -> Mapping[str, Any]:
        """Prompt and answer of a sequence, as text."""
        import numpy

        number = int(self.ids.row[index])
        row, turn = self.rows[number], index - int(numpy.searchsorted(self.ids.row, number))
        if turn:
            row = [*each_turn(row)][turn - 1]
        return {"prompt": row.prompt, "completion": row.completion}


class Answers(Sequence[EncodedAnswer]):
    """Sequences with tokens to learn. Each is read from its file when it is accessed."""

    def __init__(
        self,
        sources: Sequence[AnswerSource],
        source: NDArray[Any],
        index: NDArray[Any],
        lengths: NDArray[Any],
        learned: NDArray[Any],
    ) -> None:
        """To make them from the rows of a file, call `Answers.of`."""
        self._sources, self._source, self._index = sources, source, index
        self.lengths = lengths
        """Tokens per sequence, after the cut to `max_tokens`."""
        self.learned = learned
        """Tokens to learn per sequence."""

    @classmethod
    def of(cls, rows: Sequence[SftRow], ids: TokenIds, max_tokens: int, *, all_turns: bool) -> Answers:
        """The sequences that have tokens to learn within their first `max_tokens` tokens."""
        import numpy

        source = AnswerSource(rows, ids, max_tokens, all_turns)
        order, learned = source.order(), source.learned()
        order = order[learned[order] > 0].astype("int32")
        lengths = ids.lengths[order].clip(max=max_tokens)
        return cls([source], numpy.zeros(len(order), "uint8"), order, lengths, learned[order])

    @classmethod
    def joined(cls, first: Answers, second: Answers) -> Answers:
        """The sequences of the first, followed by those of the second."""
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
            return self._select(index)
        return self._source_of(index)[int(self._index[index])]

    def pick(self, indices: Sequence[int]) -> Answers:
        """The sequences at these indices."""
        import numpy

        return self._select(numpy.asarray(indices, dtype="int64"))

    def _select(self, indices: Any) -> Answers:
        return Answers(
            self._sources,
            self._source[indices],
            self._index[indices],
            self.lengths[indices],
            self.learned[indices],
        )

    def as_json(self, index: int) -> Mapping[str, Any]:
        """Prompt and answer, as text."""
        return self._source_of(index).as_json(int(self._index[index]))

    def _source_of(self, index: int) -> AnswerSource:
        return self._sources[int(self._source[index])]

    @property
    def num_cut(self) -> int:
        """Number of sequences whose end was cut off."""
        return sum(
            int((source.ids.lengths[index] > source.max_tokens).sum())
            for source, index in self._indices_by_source()
        )

    @property
    def num_rows(self) -> int:
        """Number of rows that the sequences are made from."""
        return sum(_num_distinct(source.ids.row[index]) for source, index in self._indices_by_source())

    @property
    def num_apart(self) -> int:
        """Number of conversations whose turns are separate sequences."""
        import numpy

        num_conversations = 0
        for source, index in self._indices_by_source():
            if source.all_turns:
                has_turns = numpy.bincount(source.ids.row)[source.ids.row[index]] > 1
                num_conversations += _num_distinct(source.ids.row[index][has_turns])
        return num_conversations

    def _indices_by_source(self) -> Iterable[tuple[AnswerSource, NDArray[Any]]]:
        for number, source in enumerate(self._sources):
            yield source, self._index[self._source == number]


def _num_distinct(numbers: NDArray[Any]) -> int:
    import numpy

    return len(numpy.unique(numbers))
