"""Near duplicates: long texts that differ from others in a few words.

Texts are compared by their runs of three words, as in deduplication of data sets (Lee et al. 2022,
arXiv:2107.06499). Runs that many of the texts share do not count: they come from a system prompt or a
template. Each other run leads to a few texts, so nothing is left to chance, as it would be with MinHash.
Texts without spaces between words, such as Chinese ones, are not compared.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import TypeVar
from zlib import crc32

from rlhf.data.cores import on_all_cores
from rlhf.data.schema import plain_words
from rlhf.data.tokens import in_pieces

Place = TypeVar("Place")
MAX_TEXTS_PER_RUN = 20
"""A run of words in more texts than this counts as part of a template."""
MIN_JACCARD = 0.8
"""Smallest share of shared runs among all runs of both texts: the threshold of Lee et al."""
MAX_CHANGED_WORDS = 3
"""Most consecutive words that may differ. More may change the meaning."""
MAX_TASK_WORDS, MAX_QUESTION_WORDS = 10, 25
"""Words at the start of the first sentence and at the end of the last that may not be replaced: they say what
to do with the text."""
SENTENCE_END = re.compile(r"(?<=[.!?:])\s+|\n+")
MAX_COMPARED_TEXTS = 10_000
"""Most texts that are compared with the training texts. With 100 words each, their runs take 100 MB."""


def near_duplicates(
    asked: Sequence[Place], trained: Iterable[Place], text_of: Callable[[Place], str]
) -> Iterator[tuple[Place, Place]]:
    """Pairs of a text and a training text from which it differs in a few words.

    Args:
        asked: held-out or evaluation texts; the first `MAX_COMPARED_TEXTS` are compared.
        trained: training texts.
    """

    def read(places: Sequence[Place]) -> list[tuple[Place, set[int]]]:
        return [(place, _runs(text_of(place))) for place in places]

    asked_runs = [
        each for piece in on_all_cores(read, in_pieces(asked[:MAX_COMPARED_TEXTS])) for each in piece
    ]
    num_texts = Counter(run for _, runs in asked_runs for run in runs)
    texts_with: dict[int, list[Place]] = defaultdict(list)
    for piece in on_all_cores(read, in_pieces(trained)):
        for other, runs in piece:
            for run in runs & num_texts.keys():
                num_texts[run] += 1
                if num_texts[run] <= MAX_TEXTS_PER_RUN:
                    texts_with[run].append(other)
    for place, runs in asked_runs:
        rare = {run for run in runs if num_texts[run] <= MAX_TEXTS_PER_RUN}
        shared = Counter(other for run in rare for other in texts_with.get(run, ()))
        for other, count in shared.most_common(1):
            theirs = {run for run in _runs(text_of(other)) if num_texts[run] <= MAX_TEXTS_PER_RUN}
            is_similar = count >= MIN_JACCARD * len(rare | theirs)
            if is_similar and _differ_little(text_of(place), text_of(other)):
                yield place, other


def _runs(text: str) -> set[int]:
    words = plain_words(text).split()
    return {crc32(" ".join(run).encode()) for run in zip(words, words[1:], words[2:], strict=False)}


def _differ_little(one: str, other: str) -> bool:
    """Whether only short runs of words differ, without a number in them, and none is replaced in the task or
    the question."""
    words, others = plain_words(one).split(), plain_words(other).split()
    task, question = _num_task_words(one)
    for tag, begin, end, other_begin, other_end in SequenceMatcher(None, words, others).get_opcodes():
        changed = words[begin:end], others[other_begin:other_end]
        has_number = any(map(str.isdigit, "".join(changed[0] + changed[1])))
        if tag != "equal" and (max(map(len, changed)) > MAX_CHANGED_WORDS or has_number):
            return False
        if tag == "replace" and (begin < task or end > len(words) - question):
            return False
    return True


def _num_task_words(text: str) -> tuple[int, int]:
    """Number of words of the task and of the question; 0 for a single sentence."""
    sentences = SENTENCE_END.split(text.strip())
    first, last = (len(plain_words(each).split()) for each in (sentences[0], sentences[-1]))
    return (min(first, MAX_TASK_WORDS), min(last, MAX_QUESTION_WORDS)) if len(sentences) > 1 else (0, 0)
