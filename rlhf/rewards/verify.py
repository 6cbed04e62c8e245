"""Rewards that check a response by a rule: `verify:exact`, `verify:number`, ... The score is 1 if the rule
holds, 0 if it does not, and None if the row has no answer to compare with.

Text from a model is never run as code. A user's pattern has a time limit. Mathematics and JSON schemas are
checked in another process, which is stopped if a check takes too long.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rlhf.config import Complaint, ConfigError, Strict, validated
from rlhf.digests import digest_of
from rlhf.rewards.checker import Checker
from rlhf.rewards.reward import TOKEN_IDS, Prompts, Reward, as_scores

if TYPE_CHECKING:
    from torch import Tensor

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
Verify = Callable[[str, Mapping[str, Any]], bool | None]
"""(response, the row's columns) -> whether the response is right; None for no score."""


class AnswerArgs(Strict):
    """Arguments of a verifier that compares with the row's answer."""

    column: str = "answer"
    """The column of the prompts' file with the right answer."""


class ExactArgs(AnswerArgs):
    """Arguments of `verify:exact`."""

    ignore_case: bool = False
    """Whether upper and lower case count as the same."""


class NumberArgs(AnswerArgs):
    """Arguments of `verify:number`."""

    tolerance: NonNegativeFloat = 0.0
    """Largest difference from the right number."""


class RegexArgs(Strict):
    """Arguments of `verify:regex`."""

    pattern: str
    """A pattern of the `regex` package, which must match somewhere in the response."""
    seconds: PositiveFloat = 1.0
    """Longest search, in seconds. After that the response does not match."""


class SchemaArgs(Strict):
    """Arguments of `verify:json_schema`."""

    schema_file: str
    """File of the JSON schema that the whole response must follow."""
    seconds: PositiveFloat = 5.0
    """Longest check, in seconds. After that the response is wrong."""


class MathArgs(AnswerArgs):
    """Arguments of `verify:math`."""

    seconds: PositiveFloat = 5.0
    """Longest check, in seconds. After that the response is wrong."""


class LengthArgs(Strict):
    """Arguments of `verify:length`."""

    unit: Literal["words", "characters", "tokens"] = "words"
    """Unit of the length."""
    min: NonNegativeInt = 0
    """Shortest length that is right."""
    max: NonNegativeInt | None = None
    """Longest length that is right; null for no limit."""

    @model_validator(mode="after")
    def _in_order(self) -> LengthArgs:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max={self.max} is below min={self.min}")
        return self


class RepetitionArgs(Strict):
    """Arguments of `verify:repetition`."""

    words: PositiveInt = 3
    """Length of the counted word sequences."""
    max_share: float = Field(default=0.2, ge=0, le=1)
    """Largest share of sequences that repeat an earlier one."""


def exact(args: ExactArgs) -> Verify:
    """The response equals the answer, without surrounding white space."""

    def plain(text: str) -> str:
        return text.strip().casefold() if args.ignore_case else text.strip()

    def check(response: str, columns: Mapping[str, Any]) -> bool | None:
        answer = columns.get(args.column)
        return None if answer is None else plain(response) == plain(str(answer))

    return check


def number(args: NumberArgs) -> Verify:
    """The response's last number equals the answer's last number (a GSM8K answer ends with `#### 18`)."""

    def check(response: str, columns: Mapping[str, Any]) -> bool | None:
        wanted, given = last_number(str(columns.get(args.column))), last_number(response)
        if wanted is None:
            return None
        return given is not None and abs(given - wanted) <= Decimal(str(args.tolerance))

    return check


def last_number(text: str) -> Decimal | None:
    """The last number in a text, with or without commas between its digits."""
    numbers = NUMBER.findall(text)
    try:
        return Decimal(numbers[-1].replace(",", "")) if numbers else None
    except InvalidOperation:  # more digits than Decimal allows
        return None


def pattern(args: RegexArgs) -> Verify:
    """The pattern matches somewhere in the response."""
    import regex

    compiled = regex.compile(args.pattern)

    def check(response: str, columns: Mapping[str, Any]) -> bool:
        try:
            return compiled.search(response, timeout=args.seconds) is not None
        except TimeoutError:
            return False

    return check


def json_schema(args: SchemaArgs) -> Verify:
    """The whole response is JSON that follows the schema."""
    checker = Checker("json_schema", args.seconds)
    schema = Path(args.schema_file).read_text(encoding="utf-8")
    return lambda response, columns: checker.check(schema, response)


def mathematics(args: MathArgs) -> Verify:
    """The response's result equals the answer's, by math-verify: `\\frac{1}{2}` is 0.5."""
    checker = Checker("math", args.seconds)

    def check(response: str, columns: Mapping[str, Any]) -> bool | None:
        answer = columns.get(args.column)
        return None if answer is None else checker.check(str(answer), response)

    return check


def length(args: LengthArgs) -> Verify:
    """The response is neither too short nor too long."""

    def check(response: str, columns: Mapping[str, Any]) -> bool | None:
        if args.unit == "tokens":
            if TOKEN_IDS not in columns:
                return None
            count = len(columns[TOKEN_IDS])
        else:
            count = len(response.split()) if args.unit == "words" else len(response)
        return args.min <= count and (args.max is None or count <= args.max)

    return check


def repetition(args: RepetitionArgs) -> Verify:
    """The response does not repeat itself."""

    def check(response: str, columns: Mapping[str, Any]) -> bool:
        words = response.casefold().split()
        starts = range(len(words) - args.words + 1)
        counts = Counter(tuple(words[start : start + args.words]) for start in starts)
        return counts.total() - len(counts) <= args.max_share * counts.total()

    return check


class Verifier(NamedTuple):
    """An entry of `VERIFIERS`."""

    args: type[Strict]
    make: Callable[[Any], Verify]
    packages: tuple[str, ...] = ()
    """Optional packages that the result depends on."""


VERIFIERS: Mapping[str, Verifier] = {
    "exact": Verifier(ExactArgs, exact),
    "number": Verifier(NumberArgs, number),
    "regex": Verifier(RegexArgs, pattern, ("regex",)),
    "json_schema": Verifier(SchemaArgs, json_schema, ("jsonschema",)),
    "math": Verifier(MathArgs, mathematics, ("math-verify",)),
    "length": Verifier(LengthArgs, length),
    "repetition": Verifier(RepetitionArgs, repetition),
}


def verifier(source: str, args: Mapping[str, Any]) -> Reward:
    """The reward of `verify:NAME`."""
    entry = _entry(source)
    check = entry.make(entry.args.model_validate(args))

    def score(prompts: Prompts, completions: Sequence[str]) -> Tensor:
        results = [check(text, row.columns) for row, text in zip(prompts, completions, strict=True)]
        return as_scores([None if right is None else float(right) for right in results], len(results), source)

    return score


def same_answer(source: str, args: Mapping[str, Any]) -> Callable[[str, str], bool] | None:
    """Whether two responses give the same answer: the first would be right if the second were in the row.
    None for a verifier that compares with no answer."""
    entry = _entry(source)
    checked = entry.args.model_validate(args)
    if not isinstance(checked, AnswerArgs):
        return None
    check, column = entry.make(checked), checked.column
    return lambda response, other: bool(check(response, {column: other}))


def check_verifier(source: str, args: Mapping[str, Any]) -> None:
    """Refuse arguments that the verifier does not take.

    Raises:
        ValueError: with the arguments that are wrong.
    """
    try:
        checked = validated(_entry(source).args, args, "args")
    except ConfigError as error:
        raise ValueError(str(error).replace("\n", " ")) from None
    if isinstance(checked, RegexArgs) and find_spec("regex"):
        import regex

        try:
            regex.compile(checked.pattern)
        except regex.error as error:
            raise ValueError(f"args.pattern={checked.pattern!r}: {error}") from None


def verifier_digest(source: str, args: Mapping[str, Any]) -> dict[str, str]:
    """The versions of optional packages, and the digest of a schema.

    Raises:
        ConfigError: a package is not installed, or the schema cannot be read.
    """
    entry = _entry(source)
    missing = [name for name in entry.packages if not find_spec(name.replace("-", "_"))]
    if missing:
        why = f"it needs {' and '.join(missing)} (pip install -e '.[verify]')."
        raise ConfigError(Complaint(source, why))
    digests = {name: importlib.metadata.version(name) for name in entry.packages}
    if entry.args is SchemaArgs:
        schema = _schema(source, args["schema_file"])
        digests[f"{source} ({schema[:8]})"] = schema
    return digests


def _schema(source: str, file: str) -> str:
    """Digest of a JSON schema.

    Raises:
        ConfigError: the file does not hold a JSON schema.
    """
    import jsonschema

    try:
        schema = json.loads(Path(file).read_text(encoding="utf-8"))
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except (OSError, ValueError, jsonschema.SchemaError) as error:
        reason = getattr(error, "message", None) or error
        why = f"args.schema_file={file}: {reason}."
        raise ConfigError(Complaint(source, why, "Give a file with a JSON schema.")) from None
    return digest_of(schema)


def verifier_needs(source: str, args: Mapping[str, Any]) -> frozenset[str]:
    """The column of the right answer, if the verifier compares with one."""
    checked = _entry(source).args.model_validate(args)
    return frozenset({checked.column} if isinstance(checked, AnswerArgs) else ())


def _entry(source: str) -> Verifier:
    return VERIFIERS[source.removeprefix("verify:")]
