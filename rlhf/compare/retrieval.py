"""Finding the texts that belong to a question: by their words (BM25), or by what a model makes of them.

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

TEXTS_AT_ONCE = 1000
"""That are read and split into words together."""


@dataclass(frozen=True)
class Index:
    """Texts that can be searched."""

    texts: Sequence[str]
    """They may lie in a file: a search does not read them."""
    search: Callable[[str, int], list[int]]
    """(query, how many) -> places of the best texts, the best first; fewer where fewer have anything to do
    with the query."""
    index_bytes: int
    """What the search itself holds, without the texts."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the texts (UTF-8) and of what searches them."""
        return self.index_bytes + sum(len(text.encode()) for text in self.texts)


def make_index(
    name: RetrieverName, texts: Sequence[str], policy: PolicyModel, micro_batch_tokens: int
) -> Index:
    """Index texts with `compare.retriever`; embeddings are those of the policy that answers."""
    return bm25_index(texts) if name == "bm25" else embedding_index(texts, policy, micro_batch_tokens)


def bm25_index(texts: Sequence[str]) -> Index:
    """By the words that a text shares with the query, rare ones counting more; English stop words do not.

    While it is made, the words of all texts are in memory; afterwards how much each word tells of each text.

    Source: Robertson & Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", in the
    variant of Lucene; Lu 2024 (arXiv:2407.03618) for the library.

    Raises:
        ConfigError: there are no words to search.
    """
    import bm25s

    def words(some: Sequence[str]) -> list[list[str]]:
        found: list[list[str]] = bm25s.tokenize(
            list(some), stopwords="en", return_ids=False, show_progress=False
        )
        return found

    split = [each for some in chunks(texts, TEXTS_AT_ONCE) for each in words(some)]
    if not any(split):
        raise ConfigError(
            f"compare.retriever=bm25: the {len(texts)} texts to search have only English stop words. "
            "Give another compare.corpus, or set compare.retriever=embeddings."
        )
    ranking = bm25s.BM25()
    ranking.index(split, show_progress=False)

    def search(query: str, count: int) -> list[int]:
        found, scores = ranking.retrieve(words([query]), k=min(count, len(texts)), show_progress=False)
        return [int(place) for place, score in zip(found[0], scores[0], strict=True) if score > 0]

    held = sum(ranking.scores[part].nbytes for part in ("data", "indices", "indptr"))
    vocabulary = sum(len(word.encode()) for word in ranking.vocab_dict)
    return Index(texts, search, held + vocabulary)


def embedding_index(texts: Sequence[str], policy: PolicyModel, micro_batch_tokens: int) -> Index:
    """By the cosine between mean final hidden states, without another model. Texts are cut at the context.

    While it is made, the token ids of all texts are in memory; afterwards a vector of each text.
    """
    embedding_BH = embeddings(texts, policy, micro_batch_tokens)

    def search(query: str, count: int) -> list[int]:
        similarity_B = embedding_BH @ embeddings([query], policy, micro_batch_tokens)[0]
        return [int(place) for place in similarity_B.topk(min(count, len(texts))).indices]

    return Index(texts, search, embedding_BH.nbytes)


@torch.no_grad()
def embeddings(texts: Sequence[str], policy: PolicyModel, micro_batch_tokens: int) -> Tensor:
    """fp32 [B, H] on the CPU, each of length 1: the mean over a text's tokens of the final hidden states."""
    encoded = [continuation_ids(policy.tokenizer, "", text) for text in texts]
    rows = [torch.tensor([*first, *rest][: policy.context_length]) for first, rest in encoded]
    found = torch.empty(len(rows), policy.model.config.get_text_config().hidden_size)
    for group in token_budget_batches([len(row) for row in rows], micro_batch_tokens):
        packed = Packed([rows[index] for index in group], policy.model.device)
        for index, hidden in zip(
            group, hidden_states(policy.model, packed).split(packed.lengths), strict=True
        ):
            found[index] = hidden.float().mean(0).cpu()
    return functional.normalize(found, dim=-1)
