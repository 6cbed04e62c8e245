"""Rows as a stage gets them: token ids in a mapped file."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf.data.answers import Answers
from rlhf.data.schema import PairRow, Row, SftRow
from rlhf.data.tokens import TokenIds, write_tokens
from rlhf.supervised.pairs import Pairs


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
