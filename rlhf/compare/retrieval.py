"""Finds the texts that fit a question: by their words (BM25), or by a model's embeddings.

Dimensions: B texts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rlhf.compare.prompts import RetrieverName
from rlhf.config import ConfigError
from rlhf.data.chat_template import continuation_ids
from rlhf.distributed.batching import chunks, token_budget_batches
from rlhf.generation.policy_model import PolicyModel
from rlhf.models.packed_attention import hidden_states
from rlhf.models.packed_batch import Packed

TEXTS_PER_CHUNK = 1000
"""Texts that are read and split into words at once."""


@dataclass(frozen=True)
class Index:
    """Texts that can be searched."""

    texts: Sequence[str]
    """They may be in a file: a search does not read them."""
    search: Callable[[str, int], list[int]]
    """(query, count) -> indices of the best texts, the best first. Fewer if fewer texts match the query."""
    index_bytes: int
    """Bytes of the search index, without the texts."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the texts (UTF-8) and of their search index."""
        return self.index_bytes + sum(len(text.encode()) for text in self.texts)


def make_index(
    name: RetrieverName, texts: Sequence[str], policy: PolicyModel | None, micro_batch_tokens: int, stage: str
) -> Index:
    """Index texts with `STAGE.retriever`. Embeddings come from the policy that answers."""
    if name == "bm25":
        return bm25_index(texts, stage)
    assert policy is not None
    return embedding_index(texts, policy, micro_batch_tokens)


def bm25_index(texts: Sequence[str], stage: str) -> Index:
    """Search by the words that a text shares with the query. Rare words weigh more, stop words nothing.

    While it is built, the words of all texts are in memory; afterwards one weight per word and text.

    Args:
        stage: the stage that searches, for errors.

    Source: Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", in the
    variant of Lucene; Lu 2024 (arXiv:2407.03618) for the library.

    Raises:
        ConfigError: the texts have no words except stop words.
    """
    import bm25s

    def words(chunk: Sequence[str]) -> list[list[str]]:
        tokens: list[list[str]] = bm25s.tokenize(
            list(chunk), stopwords="en", return_ids=False, show_progress=False
        )
        return tokens

    split = [text_words for chunk in chunks(texts, TEXTS_PER_CHUNK) for text_words in words(chunk)]
    if not any(split):
        raise ConfigError(
            f"{stage}.retriever=bm25: the {len(texts)} texts to search have only English stop words. "
            f"Give another {stage}.corpus, or set {stage}.retriever=embeddings."
        )
    ranking = bm25s.BM25()
    ranking.index(split, show_progress=False)

    def search(query: str, count: int) -> list[int]:
        places, scores = ranking.retrieve(words([query]), k=min(count, len(texts)), show_progress=False)
        return [int(place) for place, score in zip(places[0], scores[0], strict=True) if score > 0]

    weights = sum(ranking.scores[part].nbytes for part in ("data", "indices", "indptr"))
    vocabulary = sum(len(word.encode()) for word in ranking.vocab_dict)
    return Index(texts, search, weights + vocabulary)


def embedding_index(texts: Sequence[str], policy: PolicyModel, micro_batch_tokens: int) -> Index:
    """Search by the cosine between mean final hidden states of the policy. Texts are cut at its context.

    While it is built, the token ids of all texts are in memory; afterwards one vector per text.
    """
    embedding_BH = embeddings(texts, policy, micro_batch_tokens)

    def search(query: str, count: int) -> list[int]:
        similarity_B = embedding_BH @ embeddings([query], policy, micro_batch_tokens)[0]
        return [int(place) for place in similarity_B.topk(min(count, len(texts))).indices]

    return Index(texts, search, embedding_BH.nbytes)


@torch.no_grad()
def embeddings(texts: Sequence[str], policy: PolicyModel, micro_batch_tokens: int) -> Tensor:
    """Unit vectors, fp32 [B, H] on the CPU: the mean of the final hidden states over a text's tokens."""
    encoded = [continuation_ids(policy.tokenizer, "", text) for text in texts]
    rows = [torch.tensor([*first, *rest][: policy.context_length]) for first, rest in encoded]
    embedding_BH = torch.empty(len(rows), policy.model.config.get_text_config().hidden_size)
    for group in token_budget_batches([len(row) for row in rows], micro_batch_tokens):
        packed = Packed([rows[index] for index in group], policy.model.device)
        for index, hidden in zip(
            group, hidden_states(policy.model, packed).split(packed.lengths), strict=True
        ):
            embedding_BH[index] = hidden.float().mean(0).cpu()
    return functional.normalize(embedding_BH, dim=-1)
