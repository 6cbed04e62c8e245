"""Rows as a stage gets them: token ids in a mapped file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from helpers.jobs import user
from rlhf.data.answers import Answers
from rlhf.data.chat_template import encode
from rlhf.data.cores import MIN_PIECES
from rlhf.data.schema import Message, PairRow, Row, SftRow
from rlhf.data.tokens import ROWS_AT_ONCE, TokenIds, write_tokens
from rlhf.supervised.pairs import Pairs

Sequences = list[tuple[int, list[int], list[list[int]]]]
"""Row, ids and spans of each."""
MANY = MIN_PIECES * ROWS_AT_ONCE + 7
"""Rows that several processes share, where there are several cores."""
TALK = [
    *user("How high is it?"), Message(role="assistant", content="8848 m."), *user("In feet?"),
]  # fmt: skip


def ids_of(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> TokenIds:
    with tempfile.TemporaryDirectory() as folder:  # a mapped file outlives its name
        path = Path(folder) / "tokens.arrow"
        write_tokens(path, tokenizer, rows)
        return TokenIds(path)


def answers_of(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[SftRow],
    max_tokens: int = 1000,
    *,
    all_turns: bool = True,
) -> Answers:
    return Answers.of(rows, ids_of(tokenizer, rows), max_tokens, all_turns=all_turns)


def pairs_of(tokenizer: PreTrainedTokenizerBase, rows: Sequence[PairRow]) -> Pairs:
    return Pairs(rows, ids_of(tokenizer, rows), 1000)


@contextmanager
def on_one_core() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def stored(ids: TokenIds) -> Sequences:
    return [(int(ids.row[n]), ids[n].tolist(), ids.encoded(n).spans.tolist()) for n in range(len(ids))]


def wanted(tokenizer: PreTrainedTokenizerBase, data: Iterable[Row]) -> Sequences:
    return [
        (number, list(ids), [list(span) for span in spans])
        for number, row in enumerate(data)
        for ids, spans in encode(tokenizer, row)
    ]
