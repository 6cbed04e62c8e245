"""Long texts that differ in a few words from others.

They are compared by their runs of three words, as data sets are deduplicated (Lee et al. 2022,
arXiv:2107.06499). Runs that many of the texts have do not count: they are of a system prompt or a template.
Each of the others leads to a few texts, so nothing is left to chance, as it is with MinHash. Texts without
blanks between words, such as Chinese ones, are not compared.
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
MAX_TEXTS = 20
"""Different texts that may have a run of words before it is taken for a template's."""
MIN_JACCARD = 0.8
"""Runs that both texts have, of all that one has: the threshold of Lee et al."""
MAX_CHANGED = 3
"""Words in a row that may differ: more of them may say something else."""
TASK, QUESTION = 10, 25
"""Words at the begin of the first sentence and at the end of the last, of which none may be another one:
there stands what is to be done with the text."""
SENTENCE_END = re.compile(r"(?<=[.!?:])\s+|\n+")
MAX_ASKED = 10_000
"""Texts that are compared with others: of 100 words each, their runs take 100 MB."""


def changed_little(
    asked: Sequence[Place], trained: Iterable[Place], text_of: Callable[[Place], str]
) -> Iterator[tuple[Place, Place]]:
    """Texts that differ in a few words from one that is trained on, each with that one."""

    def read(places: Sequence[Place]) -> list[tuple[Place, set[int]]]:
        return [(place, _runs(text_of(place))) for place in places]

    own = [each for piece in on_all_cores(read, in_pieces(asked[:MAX_ASKED])) for each in piece]
    num_texts = Counter(run for _, runs in own for run in runs)
    having: dict[int, list[Place]] = defaultdict(list)
    for piece in on_all_cores(read, in_pieces(trained)):
        for other, runs in piece:
            for run in runs & num_texts.keys():
                num_texts[run] += 1
                if num_texts[run] <= MAX_TEXTS:
                    having[run].append(other)
    for place, runs in own:
        rare = {run for run in runs if num_texts[run] <= MAX_TEXTS}
        shared = Counter(other for run in rare for other in having.get(run, ()))
        for other, count in shared.most_common(1):
            theirs = {run for run in _runs(text_of(other)) if num_texts[run] <= MAX_TEXTS}
            few = count >= MIN_JACCARD * len(rare | theirs)
            if few and _differ_little(text_of(place), text_of(other)):
                yield place, other


def _runs(text: str) -> set[int]:
    words = plain_words(text).split()
    return {crc32(" ".join(run).encode()) for run in zip(words, words[1:], words[2:], strict=False)}


def _differ_little(one: str, other: str) -> bool:
    """Whether few words in a row differ, no number, and none is another one where the task stands."""
    words, others = plain_words(one).split(), plain_words(other).split()
    task, question = _ends(one)
    for tag, begin, end, other_begin, other_end in SequenceMatcher(None, words, others).get_opcodes():
        changed = words[begin:end], others[other_begin:other_end]
        has_number = any(map(str.isdigit, "".join(changed[0] + changed[1])))
        if tag != "equal" and (max(map(len, changed)) > MAX_CHANGED or has_number):
            return False
        if tag == "replace" and (begin < task or end > len(words) - question):
            return False
    return True


def _ends(text: str) -> tuple[int, int]:
    """Words of the task and of the question; 0 where there is one sentence alone."""
    sentences = SENTENCE_END.split(text.strip())
    first, last = (len(plain_words(each).split()) for each in (sentences[0], sentences[-1]))
    return (min(first, TASK), min(last, QUESTION)) if len(sentences) > 1 else (0, 0)
