"""The word that a policy took up: a sign that its reward pays for a word, and not for what is said.

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
    """The word that is in more answers than before, by most answers; and how many more, as a share of all.

    Case does not count. In a script without spaces a word is all that stands between two marks, so little is
    seen there. Empty where no word is in more answers.

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
