"""Quality of an answer, compared with a reference answer."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from typing import Literal

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def plain(text: str) -> str:
    """Lower case, without punctuation, English articles and doubled spaces.

    Source: the evaluation script of SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250).
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, reference: str) -> float:
    """1 if both have the same words in the same order, else 0."""
    return float(plain(answer) == plain(reference))


def answer_found(answer: str, reference: str) -> float:
    """1 if the answer contains the reference as whole words, else 0.

    Source: Mallen et al. 2023 (arXiv:2212.10511), section 3. A reference without words is never found.
    """
    wanted = plain(reference)
    return float(bool(wanted) and f" {wanted} " in f" {plain(answer)} ")


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, in [0, 1]; words are lower-cased and not stemmed.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1, with beta 1.
    """
    from rapidfuzz.distance import LCSseq

    answer_words, reference_words = (re.findall(r"\w+", text.lower()) for text in (answer, reference))
    if not answer_words or not reference_words:
        return 0.0
    return 2 * LCSseq.similarity(answer_words, reference_words) / (len(answer_words) + len(reference_words))


QUALITIES: Mapping[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "answer_found": answer_found,
    "rouge_l": rouge_l,
}
"""Metric -> quality of an answer compared with its reference, in [0, 1]."""
SHARES = ("exact_match", "answer_found")
"""Qualities that are 0 or 1 for each answer."""
Quality = Literal["auto", "gold", "judge", "score", "rouge_l", "exact_match", "answer_found"]
"""A score that can rank candidates."""
