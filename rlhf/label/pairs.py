"""Pairs of answers that wait for a judgement."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf.config import ConfigError
from rlhf.data.formats import pair_row
from rlhf.data.schema import Message, RowError
from rlhf.data.sources import SourceConfig
from rlhf.digests import digest_of

Side = Literal["first", "second"]


class Pair(NamedTuple):
    """Two answers to one prompt. The one that sorts first is `first`, whatever its quality or origin."""

    id: str
    """Digest of the prompt and both answers. Equal pairs have equal ids, whatever their source."""
    prompt: list[Message]
    first: str
    second: str
    first_by: str = ""
    """The stage that generated the answer; empty if unknown. Annotators never see it."""
    second_by: str = ""
    predicted: float | None = None
    """Reward of the first answer minus reward of the second; None if unknown."""


class Answer(NamedTuple):
    """One answer to a prompt."""

    text: str
    by: str
    score: float | None


def pair_id(prompt: list[Message], one: str, other: str) -> str:
    """The id of the pair of two answers, in any order."""
    return digest_of([prompt, *sorted((one, other))])[:32]


def pair_of(prompt: list[Message], one: Answer, other: Answer) -> Pair:
    """The pair of two different answers."""
    first, second = sorted((one, other))
    known = first.score is not None and second.score is not None
    return Pair(
        pair_id(prompt, first.text, second.text),
        prompt,
        first.text,
        second.text,
        first.by,
        second.by,
        first.score - second.score if known else None,  # type: ignore[operator]  # known
    )


def pairs_of_answers(answers: Mapping[str, Path], per_prompt: int) -> list[Pair]:
    """Pairs of the answers that `generate` stages gave to the same prompts.

    Args:
        answers: stage -> its responses.jsonl. For one stage, two answers to a prompt make a pair; for two
            stages, one answer of each.
        per_prompt: most pairs per prompt, chosen by their digests.
    """
    prompts: dict[str, list[Message]] = {}
    given: dict[str, dict[str, dict[str, Answer]]] = {}
    for stage, path in answers.items():
        for row in rows_in(path):
            if not row["response"]:
                continue
            key = digest_of(row["prompt"])
            prompts[key] = row["prompt"]
            answer = Answer(row["response"], stage, row.get("score"))
            given.setdefault(key, {}).setdefault(stage, {}).setdefault(answer.text, answer)
    all_pairs: list[Pair] = []
    for key, by_stage in given.items():
        sides = [[*each.values()] for each in by_stage.values()]
        if len(answers) > 1 and len(sides) < len(answers):
            continue
        both = combinations(sides[0], 2) if len(answers) == 1 else product(sides[0], sides[1])
        pairs = {
            pair.id: pair
            for pair in (pair_of(prompts[key], *each) for each in both if each[0].text != each[1].text)
        }
        all_pairs += [pairs[each] for each in sorted(pairs)[:per_prompt]]
    return all_pairs


def rows_in(path: Path) -> list[dict[str, Any]]:
    """The rows of an artifact's .jsonl file. Not read by `str.splitlines`, which would also split an answer
    at characters such as U+2028."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def pairs_of_file(source: SourceConfig, key: str) -> list[Pair]:
    """Pairs of a file: rows with prompt, first and second; or with prompt, chosen and rejected. Annotators
    are not told which answer was chosen.

    Raises:
        ConfigError: a row is not a pair. The message names the user's own keys.
    """
    pairs: dict[str, Pair] = {}
    for where, raw in rows_of(source, key):
        sides = ("first", "second") if "first" in raw else ("chosen", "rejected")
        pair = _read(where, raw, sides, key)
        if pair is not None:
            pairs.setdefault(pair.id, pair)
    return [*pairs.values()]


def rows_of(source: SourceConfig, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Place and content of each row of a file.

    Raises:
        ConfigError: a line cannot be read as a row.
    """
    for where, raw in source.rows(key):
        if isinstance(raw, RowError):
            raise ConfigError(f"{key}: {where}: {raw}")
        yield where, raw


def _read(where: str, raw: Mapping[str, Any], sides: Sequence[str], key: str) -> Pair | None:
    """The pair of a row; None if both answers are the same."""
    lacking = [name for name in sides if raw.get(name) is None]
    if lacking:
        raise ConfigError(
            f'{key}: {where}: "{lacking[0]}" is missing (found: {", ".join(raw)}). A pair needs '
            f"prompt, first, "
            f"second; or prompt, chosen, rejected. Other names: "
            f"{key}={{path: FILE, fields: {{first: COLUMN, ...}}}}."
        )
    try:
        row = pair_row({**raw, "chosen": raw[sides[0]], "rejected": raw[sides[1]]})
    except RowError as error:
        raise ConfigError(f"{key}: {where}: {error}") from None
    if row.chosen == row.rejected:
        return None
    return pair_of(row.prompt, Answer(row.chosen, "", None), Answer(row.rejected, "", None))


def pair_and_better(where: str, raw: Mapping[str, Any], key: str) -> tuple[Pair, Side] | None:
    """The pair of a preference row, and its better side; None if both answers are the same.

    Raises:
        ConfigError: the row is not a preference row.
    """
    pair = _read(where, raw, ("chosen", "rejected"), key)
    if pair is None:
        return None
    better = pair_row(raw).chosen
    return pair, "first" if pair.first == better else "second"


def pair_as_named(where: str, raw: Mapping[str, Any], key: str) -> tuple[Pair, bool] | None:
    """The pair of a row with first and second, and whether the pair's first answer is also the row's; None if
    both answers are the same.

    Raises:
        ConfigError: the row is not such a row.
    """
    pair = _read(where, raw, ("first", "second"), key)
    if pair is None:
        return None
    return pair, pair.first == str(raw["first"]).strip()
