"""Words and marks that most texts of one data set have, and hardly any of another: a sign that the two do not
belong together, such as HTML in the answers of one, or prompts with another frame around them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from rlhf.data.roles import ROLES
from rlhf.data.schema import PairRow, Row, text_of
from rlhf.printable import printable

WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")
FORMS: Mapping[str, Callable[[str], bool]] = {
    "capital letters": lambda text: text != text.lower(),
    "digits": lambda text: any(map(str.isdigit, text)),
    "line breaks": lambda text: "\n" in text.strip(),
}
"""What a text may have beside words and marks."""
MOST, HARDLY_ANY = 0.6, 0.01
"""Shares of texts. Between the demo's own data sets a mark is in 0.57 of the one and in none of the other."""
FEW = 20
"""Texts, of which a share tells nothing."""
ROWS, CHARACTERS = 2000, 5000
"""Rows of a data set that are looked at, evenly chosen, and first characters of a text."""
SHOWN, LONGEST = 3, 20
"""Words that are named, and characters of one."""

TEXTS: Mapping[str, Callable[[Row], Iterable[str]]] = {
    "prompts": lambda row: [row.asked()] if row.exchanges()[0][0] else [],  # plain text asks nothing
    "answers": lambda row: [text_of(answer) for _, answer in row.exchanges() if answer is not None],
    "chosen answers": lambda row: [row.chosen] if isinstance(row, PairRow) else [],
    "rejected answers": lambda row: [row.rejected] if isinstance(row, PairRow) else [],
}
"""What a row has."""
ALIKE = (
    (("sft", "answers"), ("pairs", "answers")),
    (("sft", "answers"), ("dpo", "answers")),
    (("pairs", "chosen answers"), ("pairs", "rejected answers")),
    (("dpo", "chosen answers"), ("dpo", "rejected answers")),
    (("sft", "prompts"), ("ppo", "prompts")),
    (("pairs", "prompts"), ("ppo", "prompts")),
    (("evaluate", "prompts"), ("ppo", "prompts")),
)
"""Texts of roles that have the same words and marks in a chain whose data belong together."""


def unlike(rows: Mapping[str, Sequence[Row]]) -> Iterator[tuple[str, str]]:
    """Each role whose texts are so unlike another's, and in what, as a sentence.

    Args:
        rows: role -> its rows.
    """
    for pair in ALIKE:
        texts = [
            [text[:CHARACTERS] for row in evenly(rows.get(role, ())) for text in TEXTS[what](row)]
            for role, what in pair
        ]
        if min(map(len, texts)) < FEW:
            continue
        one, other = map(shares_of, texts)
        told, (has, lacks) = max(
            ((apart(one, other), pair), (apart(other, one), pair[::-1])),
            key=lambda found: max(found[0].values(), default=0.0),
        )
        if not told:
            continue
        words = [*told][:SHOWN]
        said = f"At least {told[words[-1]]:.0%} of the {named_texts(*has)} have {' and '.join(words)}"
        yield pair[0][0], f"{said}, and hardly any of the {named_texts(*lacks)} do."


def named_texts(role: str, what: str) -> str:
    """Such as `answers of sft.data`."""
    return f"{what} of {ROLES[role].key}"


def evenly(rows: Sequence[Row]) -> Iterator[Row]:
    """At most `ROWS` of them."""
    return (rows[place] for place in range(0, len(rows), max(1, -(-len(rows) // ROWS))))


def shares_of(texts: Sequence[str]) -> Counter[str]:
    """What texts have, as it is named -> the share of the texts that have it."""
    counts = Counter(each for text in texts for each in features(text))
    return Counter({each: count / len(texts) for each, count in counts.items()})


def features(text: str) -> set[str]:
    """Words, in small letters, and marks, both in quotes; and forms."""
    words = {f'"{printable(word)[:LONGEST]}"' for word in WORD_OR_MARK.findall(text.casefold())}
    return words | {form for form, has in FORMS.items() if has(text)}


def apart(has: Counter[str], lacks: Counter[str]) -> dict[str, float]:
    """What most of the one have and hardly any of the other, and its share there: the most frequent first, of
    equally frequent ones the longest."""
    order = sorted(has, key=lambda word: (-has[word], -len(word), word))
    return {word: has[word] for word in order if has[word] >= MOST and lacks[word] <= HARDLY_ANY}
