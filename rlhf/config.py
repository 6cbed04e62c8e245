"""Checked config sections, and errors in the user's own keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, ClassVar, NamedTuple, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
)
from pydantic_core import ErrorDetails

from rlhf.printable import printable

ModelT = TypeVar("ModelT", bound=BaseModel)


STAGE = "{stage}"
"""Placeholder for the stage's name, in messages of code that serves several stages."""


class Complaint(NamedTuple):
    """A complaint about a setting."""

    about: str
    """The setting as the user types it, such as `ppo.clip=2`. Code that does not know the key names a
    directory or source; `in_user_keys` replaces it by the setting."""
    why: str
    """The reason, in one or more sentences. May quote text from elsewhere."""
    fix: str = ""
    """What to do, in our own words only: `STAGE` is replaced here and in `about`."""

    def __str__(self) -> str:
        return f"{self.about}: {self.why} {self.fix}".rstrip()

    def filled(self, stage: str) -> Complaint:
        """Put the stage's name in the place of `STAGE`. Not in `why`, which may quote other text."""
        return self._replace(about=self.about.replace(STAGE, stage), fix=self.fix.replace(STAGE, stage))


class ConfigError(Exception):
    """An error that the user can fix: a key, a value, a file. Shown without a traceback; exit code 2. Its
    arguments are complaints or sentences."""

    @property
    def complaints(self) -> list[Complaint | str]:
        """The single complaints."""
        return [*self.args]

    def __str__(self) -> str:
        return printable("\n".join(map(str, self.complaints)))


@contextmanager
def in_user_keys(keys: Mapping[str, str], stage: str = STAGE) -> Iterator[None]:
    """While open, complaints name the user's setting: `ppo.init=mine` instead of the directory `mine`.

    Args:
        keys: what a complaint is about -> the user's setting.
        stage: replaces `STAGE`, if it is known.

    Raises:
        ConfigError: the same error, about the user's own keys.
    """
    try:
        yield
    except ConfigError as error:
        error.args = tuple(
            each._replace(about=keys.get(each.about, each.about)).filled(stage)
            if isinstance(each, Complaint)
            else each
            for each in error.args
        )
        raise


UNPARSED = re.compile(r", unable to parse string as an? \w+$")
"""Matches what pydantic adds to `Input should be a valid integer`."""
SHORT_WORD_CHARACTERS = 6
"""Words with fewer characters are matched less strictly: one wrong character is a large part of them."""


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """At most two known words with a similar spelling or that begin with `WORD_`, the nearest first."""
    names = {name.lower(): name for name in known}
    cutoff = 0.6 if len(word) < SHORT_WORD_CHARACTERS else 0.75
    near = get_close_matches(word.lower(), names, n=2, cutoff=cutoff)
    near += [name for name in names if name.startswith(f"{word.lower()}_")]
    return [names[name] for name in dict.fromkeys(near)][:2]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean sft?`; empty if no known word is similar."""
    near = nearest(word, known)
    return f" Did you mean {' or '.join(near)}?" if near else ""


class Strict(BaseModel):
    """A config section. It refuses unknown keys, and its values cannot change after the check."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True
    )


class Bound(Strict):
    """The allowed range of a stage's summary metric, and what to try if the metric is outside.

    The gate is checked after every run and every reuse; `STAGE.gates.METRIC=null` turns it off. A metric that
    was measured on a sample of rows has a 95% interval: the gate passes if the whole interval is in the
    range, and fails if no part of it is. Otherwise the gate cannot tell, and the run continues.
    """

    min: float | None = None
    """The smallest value that passes; null for no bound."""
    max: float | None = None
    """The largest value that passes; null for no bound."""
    advice: str
    """What to try if the gate fails. The run prints it, with the stage's name instead of {stage}."""
    rows: str | None = None
    """How to give the metric more rows. The run prints it if the gate cannot tell; {stage} as in `advice`."""

    def holds(self, value: float) -> bool:
        """Whether the value is in the range. NaN never is."""
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)

    def __str__(self) -> str:
        parts = [f">= {self.min:g}"] if self.min is not None else []
        parts += [f"<= {self.max:g}"] if self.max is not None else []
        return " and ".join(parts) or "any"


def validated(model: type[ModelT], values: Mapping[str, Any], prefix: str, context: Any = None) -> ModelT:
    """Check values against a model.

    Args:
        prefix: put before the keys in complaints.
        context: pydantic's validation context, for the model's own checks.

    Raises:
        ConfigError: one line per complaint, with the full key (`ppo.kl.coef`).
    """
    try:
        return model.model_validate(values, context=context)
    except ValidationError as error:
        raise ConfigError("\n".join(_complaints(error, values, prefix, model))) from None


def _complaints(
    error: ValidationError, values: Mapping[str, Any], prefix: str, model: type[BaseModel]
) -> list[str]:
    lines: list[str] = []
    choices: dict[str, tuple[int, list[str]]] = {}  # setting -> place of its line, what it may be
    for detail in error.errors():
        key = ".".join([*([prefix] if prefix else []), *_given_key(detail, values)])
        message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        message = UNPARSED.sub("", message.replace("Input should be", "it must be"))
        if detail["type"] == "extra_forbidden":
            near = did_you_mean(str(detail["loc"][-1]), _fields_at(model, detail["loc"][:-1]))
            lines.append(f"{key}: there is no such key.{near}")
        elif detail["type"] == "missing":
            lines.append(f"{key}: a value is required.")
        elif detail["type"] in ("model_type", "dict_type"):
            names = ", ".join(_fields_at(model, detail["loc"]))
            expected = f"a mapping with the keys {names}" if names else "a mapping"
            lines.append(f"{key}={detail['input']!r}: it must be {expected}.")
        elif detail["type"] == "list_type":
            lines.append(f"{key}={detail['input']!r}: it must be a list, such as {key}=[A,B].")
        elif detail["type"] == "too_short":
            lines.append(f"{key}={detail['input']!r}: it must name at least one.")
        elif message.startswith("it must be "):
            known = re.findall("'([^']*)'", message) if detail["type"] == "literal_error" else []
            near = did_you_mean(str(detail["input"]), known)
            setting = f"{key}={detail['input']!r}"
            place, others = choices.setdefault(setting, (len(lines), []))
            others.append(message.removeprefix("it must be "))
            lines[place : place + 1] = [f"{setting}: it must be {' or '.join(others)}.{near}"]
        elif isinstance(detail["input"], Mapping):  # a check of a whole section, which it calls KEY
            named_message = message.replace("KEY.", f"{key}." if key else "")
            lines.append(f"{named_message}." if named_message != message else f"{key}: {message}.")
        else:
            lines.append(f"{key}={detail['input']!r}: {message}.")
    return lines


def _given_key(detail: ErrorDetails, values: Mapping[str, Any]) -> Iterator[str]:
    """The parts of the key as the user gave it: without the kind of a union, without the place of a text in a
    list, and without the keys of a section that was given as one word."""
    given: Any = values
    for place, part in enumerate(detail["loc"]):
        if isinstance(given, Mapping):
            is_last = place == len(detail["loc"]) - 1
            if part in given or (is_last and detail["type"] == "missing"):
                yield str(part)
                given = given.get(part)
        elif isinstance(given, Sequence) and isinstance(part, int) and not isinstance(given, str):
            if not isinstance(given[part], str):
                yield str(part)
            given = given[part]


def _fields_at(model: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """The keys of the section at this place; empty if it is no section."""
    section: type[BaseModel] | None = model
    for part in place:
        field = section.model_fields.get(str(part)) if section else None
        section = _section(field.annotation) if field else None
    return list(section.model_fields) if section else []


def _section(annotation: Any) -> type[BaseModel] | None:
    """The config model in `Model`, `Model | None` or `Annotated[Model, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)
