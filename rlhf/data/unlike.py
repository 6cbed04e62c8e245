"""Words and marks that most texts of one data set have, and hardly any of another: a sign that the two do not
belong together, such as HTML in the answers of one, or prompts with another frame around them."""

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
JOINED = (
    "\\w\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0963\u0966-\u0dff\u0f00-\u0fff\u200c"
)
"""What a word has: also vowel signs and other marks that stand on letters."""
PIECE = re.compile(rf"[{UNSPACED}]+|(?:(?![{UNSPACED}])[{JOINED}])+|[^\w\s\u200d\ufe0f]")
"""A word, a run of an unspaced script, or a mark. Joiners between emoji are none."""
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


def asked(row: Row) -> Iterator[str]:
    """What the prompt says, without the assistant's turns; plain text asks nothing."""
    messages = row.exchanges()[0][0]
    if messages:
        yield " ".join(each["content"].strip() for each in messages if each["role"] != "assistant")


TEXTS: Mapping[str, Callable[[Row], Iterable[str]]] = {
    "prompts": asked,
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


def unlike(rows: Mapping[str, Sequence[Row]], roles: Roles = ROLES) -> Iterator[str]:
    """In what texts of one role are unlike those of another, as sentences, in the order of `ALIKE`.

    Args:
        rows: role -> its rows.
    """
    for pair in ALIKE:
        found = [
            [features(text[:CHARACTERS]) for row in evenly(rows.get(role, ())) for text in TEXTS[what](row)]
            for role, what in pair
        ]
        if min(map(len, found)) < FEW:
            continue
        one, other = map(shares_of, found)
        named = [f"{what} of {roles[role].key}" for role, what in pair]
        said = [*has(named[0], one, named[1], other), *has(named[1], other, named[0], one)]
        if said:
            yield " ".join(said)


def has(named: str, shares: Counter[str], other: str, lacking: Counter[str]) -> Iterator[str]:
    """What most of the one have and hardly any of the other, as a sentence: the most frequent first, of
    equally frequent ones the longest."""
    order = sorted(shares, key=lambda each: (-shares[each], -len(each), each))
    found = [each for each in order if shares[each] >= MOST and lacking[each] <= HARDLY_ANY][:SHOWN]
    if found:
        listed = ", ".join(f"{each} ({int(100 * shares[each])}%)" for each in found)
        yield f"The {named} have {listed}; the {other} hardly ever."


def evenly(rows: Sequence[Row]) -> Iterator[Row]:
    """At most `ROWS` of them."""
    return (rows[place] for place in range(0, len(rows), max(1, -(-len(rows) // ROWS))))


def shares_of(texts: Sequence[set[str]]) -> Counter[str]:
    """What texts have, as it is named -> the share of the texts that have it.

    Args:
        texts: the features of each.
    """
    counts = Counter(each for found in texts for each in found)
    return Counter({each: count / len(texts) for each, count in counts.items()})


def features(text: str) -> set[str]:
    """Words, in small letters, and marks, both in quotes; and forms."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    words = {word for piece in PIECE.findall(plain) for word in words_of(piece)}
    return {quoted(word) for word in words} | {form for form, is_there in FORMS.items() if is_there(text)}


def words_of(piece: str) -> Iterable[str]:
    """A word; of a script without spaces, all pairs of characters, since nobody says where a word ends."""
    if len(piece) > 1 and re.match(f"[{UNSPACED}]", piece):
        return map("".join, pairwise(piece))
    return [piece]


def quoted(word: str) -> str:
    """The word as it is shown."""
    seen = printable(word)
    return f'"{seen[:LONGEST]}{"..." * (len(seen) > LONGEST)}"'
