"""Differences between data sets: words and marks that most texts of one have and almost none of another. They
show that two sets do not belong together: one has HTML in its answers, or another frame around its
prompts."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from rlhf.data.roles import ROLES, Roles
from rlhf.data.schema import PairRow, Row, text_of
from rlhf.printable import printable

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""
WORD_CHARACTERS = (
    "\\w\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0dff\u0f00-\u0fff\u200c"
)
"""Characters of a word, with vowel signs and other combining marks."""
PIECE = re.compile(rf"[{UNSPACED}]+|(?:(?![{UNSPACED}])[{WORD_CHARACTERS}])+|[^\w\s\u200d\ufe0f]")
"""A word, a run of an unspaced script, or a mark. Joiners between emoji do not count."""
FORMS: Mapping[str, Callable[[str], bool]] = {
    "capital letters": lambda text: text != text.lower(),
    "digits": lambda text: any(map(str.isdigit, text)),
    "line breaks": lambda text: "\n" in text.strip(),
}
"""Features of a text other than words and marks."""
MIN_COMMON_SHARE, MAX_RARE_SHARE = 0.6, 0.01
"""Smallest share of texts in one set, and largest in the other, for a feature to be reported. In two sets of
the demo that belong together, a mark has the shares 0.57 and 0; this must not be reported."""
MIN_TEXTS = 20
"""Fewest texts of a data set that is compared. A share of fewer texts is too uncertain."""
MAX_ROWS, MAX_CHARACTERS = 2000, 5000
"""Most rows of a data set that are compared, evenly spaced, and first characters of a text."""
MAX_SHOWN_WORDS, MAX_WORD_CHARACTERS = 3, 20
"""Most words in a sentence of the report, and characters shown of one."""


def prompt_texts(row: Row) -> Iterator[str]:
    """The prompt without the assistant's turns. Plain text has none."""
    messages = row.exchanges()[0][0]
    if messages:
        yield " ".join(each["content"].strip() for each in messages if each["role"] != "assistant")


TEXTS: Mapping[str, Callable[[Row], Iterable[str]]] = {
    "prompts": prompt_texts,
    "answers": lambda row: [text_of(answer) for _, answer in row.exchanges() if answer is not None],
    "chosen answers": lambda row: [row.chosen] if isinstance(row, PairRow) else [],
    "rejected answers": lambda row: [row.rejected] if isinstance(row, PairRow) else [],
}
"""Kind of texts -> the texts of this kind in a row."""
COMPARED_TEXTS = (
    (("sft", "answers"), ("pairs", "answers")),
    (("sft", "answers"), ("dpo", "answers")),
    (("pairs", "chosen answers"), ("pairs", "rejected answers")),
    (("dpo", "chosen answers"), ("dpo", "rejected answers")),
    (("sft", "prompts"), ("ppo", "prompts")),
    (("pairs", "prompts"), ("ppo", "prompts")),
    (("evaluate", "prompts"), ("ppo", "prompts")),
)
"""Pairs of (role, kind of texts) that have the same words and marks if the data sets belong together."""


def find_differences(rows: Mapping[str, Sequence[Row]], roles: Roles = ROLES) -> Iterator[str]:
    """Differences between the texts of two roles, as sentences, in the order of `COMPARED_TEXTS`.

    Args:
        rows: role -> its rows.
    """
    for pair in COMPARED_TEXTS:
        features_by_text = [
            [
                features(text[:MAX_CHARACTERS])
                for row in evenly_spaced(rows.get(role, ()))
                for text in TEXTS[what](row)
            ]
            for role, what in pair
        ]
        if min(map(len, features_by_text)) < MIN_TEXTS:
            continue
        one, other = map(shares_of, features_by_text)
        names = [f"{what} of {roles[role].key}" for role, what in pair]
        sentences = [
            *describe_difference(names[0], one, names[1], other),
            *describe_difference(names[1], other, names[0], one),
        ]
        if sentences:
            yield " ".join(sentences)


def describe_difference(
    name: str, shares: Counter[str], other_name: str, lacking: Counter[str]
) -> Iterator[str]:
    """A sentence with the features that most texts of one set and almost none of the other have: the most
    frequent first; of equally frequent ones, the longest first."""
    order = sorted(shares, key=lambda each: (-shares[each], -len(each), each))
    common = [each for each in order if shares[each] >= MIN_COMMON_SHARE and lacking[each] <= MAX_RARE_SHARE][
        :MAX_SHOWN_WORDS
    ]
    if common:
        shares_text = ", ".join(f"{each} ({int(100 * shares[each])}%)" for each in common)
        yield f"The {name} have {shares_text}; the {other_name} hardly ever."


def evenly_spaced(rows: Sequence[Row]) -> Iterator[Row]:
    """At most `MAX_ROWS` of the rows, evenly spaced."""
    return (rows[place] for place in range(0, len(rows), max(1, -(-len(rows) // MAX_ROWS))))


def shares_of(texts: Sequence[set[str]]) -> Counter[str]:
    """Feature -> the share of the texts that have it.

    Args:
        texts: the features of each text.
    """
    counts = Counter(each for text_features in texts for each in text_features)
    return Counter({each: count / len(texts) for each, count in counts.items()})


def features(text: str) -> set[str]:
    """The features of a text: its words in lower case and its marks, both in quotes; and names of `FORMS`."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = {word for piece in PIECE.findall(plain) for word in words_of(piece)}
    return {quoted(word) for word in words} | {form for form, is_there in FORMS.items() if is_there(text)}


def words_of(piece: str) -> Iterable[str]:
    """A word; for a script without spaces, all pairs of neighbouring characters."""
    if len(piece) > 1 and re.match(f"[{UNSPACED}]", piece):
        return map("".join, pairwise(piece))
    return [piece]


def quoted(word: str) -> str:
    """The word as the report shows it, in quotes."""
    shown = printable(word)
    return f'"{shown[:MAX_WORD_CHARACTERS]}{"..." * (len(shown) > MAX_WORD_CHARACTERS)}"'
