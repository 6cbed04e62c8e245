"""The word that a policy gained: a sign that its reward pays for a word instead of the content.

Dimensions: B rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from rlhf.evaluation.intervals import difference
from rlhf.evaluation.sampled import Sampled

WORD = re.compile(r"\w+")


def gained_word(texts: Sequence[str], before: Sequence[str]) -> tuple[str, Sampled]:
    """The word whose share of answers rose most, and the rise.

    Case is ignored. In a script without spaces, all text between two punctuation marks is one word, so little
    is detected there. The word is empty if no word is in more answers.

    Args:
        texts: B answers.
        before: B answers of another policy to the same prompts.
    """
    words_B, before_B = [*_words(texts)], [*_words(before)]
    gained = Counter(word for words in words_B for word in words)
    gained.subtract(word for words in before_B for word in words)
    word = min(gained, key=lambda word: (-gained[word], word), default="")
    if gained[word] <= 0:
        word = ""
    more_B = [(word in words) - (word in others) for words, others in zip(words_B, before_B, strict=True)]
    return word, difference(torch.tensor(more_B, dtype=torch.float64))


def _words(texts: Sequence[str]) -> Iterator[set[str]]:
    return ({*WORD.findall(text.casefold())} for text in texts)
