"""What a search finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.jobs import TINY, on_cpu
from rlhf.compare.retrieval import bm25_index, embedding_index, embeddings
from rlhf.config import ConfigError
from rlhf.generation.policy_model import PolicyModel

TEXTS = [
    "The cat sleeps in the post room.",
    "The dog sleeps in the sledge shed.",
    "Bread is baked on Tuesdays.",
]


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> PolicyModel:
    return PolicyModel.load(tiny_model, TINY, on_cpu())


def test_bm25_ranks_by_shared_words_and_rare_ones_count_more() -> None:
    search = bm25_index(TEXTS, "compare").search
    assert search("Where does the dog sleep, and who sleeps there?", 3) == [1, 0]  # dog + sleeps, sleeps
    assert search("When is bread baked?", 1) == [2]


def test_bm25_finds_nothing_where_no_word_is_shared() -> None:
    search = bm25_index(TEXTS, "compare").search
    assert search("Quarks?", 3) == []
    assert search("is the in on?", 3) == []  # stop words only


def test_texts_without_words_cannot_be_searched() -> None:
    with pytest.raises(
        ConfigError, match=r"compare\.retriever=bm25: the 2 texts to search have only English stop words"
    ):
        bm25_index(["the", "?"], "compare")


def test_embeddings_find_the_same_text_first_and_never_more_than_there_are(policy: PolicyModel) -> None:
    index = embedding_index(TEXTS, policy, 4096)
    assert [index.search(text, 1) for text in TEXTS] == [[0], [1], [2]]
    assert sorted(index.search("cat", 9)) == [0, 1, 2]


def test_an_embedding_depends_on_its_own_text_only(policy: PolicyModel) -> None:
    together = embeddings(TEXTS, policy, 4096)
    alone = torch.cat([embeddings([text], policy, 1) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))
    assert float((together[0] - together[2]).abs().max()) > 1e-3


def test_a_text_longer_than_the_context_is_cut(policy: PolicyModel) -> None:
    long = "x" * policy.context_length
    torch.testing.assert_close(embeddings([long], policy, 1), embeddings([f"{long}y"], policy, 1))


def test_storage_counts_texts_and_index(policy: PolicyModel) -> None:
    text_bytes = sum(map(len, TEXTS))
    assert embedding_index(TEXTS, policy, 4096).num_bytes == text_bytes + 3 * 64 * 4  # fp32
    assert bm25_index(TEXTS, "compare").num_bytes > text_bytes
