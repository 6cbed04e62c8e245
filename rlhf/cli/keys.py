"""`python -m rlhf keys`: every key with its default and meaning, from conf/ and the config classes."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel

from rlhf.cli.command import read_words
from rlhf.cli.schema import json_schema, packaged
from rlhf.config import Bound, ConfigError, did_you_mean
from rlhf.data.sources import SourceConfig
from rlhf.exit_codes import DONE
from rlhf.models.peft.config import PeftConfig
from rlhf.pipeline.experiment import Settings
from rlhf.rewards.kinds import RewardMix
from rlhf.training.config import OptimConfig

HELP = """python -m rlhf keys [KEY ...] [schema=FILE]

Print what keys mean, with their defaults: those of KEY and below it, such as `ppo.kl` or `sft`. Without KEY:
the keys of the whole run, and the names of the sections. schema=FILE writes a JSON schema, with which editors
complete an experiment's YAML and mark wrong keys.
"""
SHARED: Mapping[str, type[BaseModel]] = {
    "source": SourceConfig,
    "rewards": RewardMix,
    "optim": OptimConfig,
    "peft": PeftConfig,
    "gate": Bound,
}
"""Sections that several keys use. The page of all keys shows them once."""
RUN_TITLE = "For the whole run"
PAGE_TITLE = "# Keys\n\nEvery key with its default and its meaning; `${...}` is another key's value."
PAGE_LINK = re.compile(r"\(docs/([\w/-]+\.md)\)")
"""Matches the link to a page in an advice text."""
MAX_SHOWN_ENDINGS = 3
"""Most keys that are suggested for the end of a key, such as `lr`."""
LINE_WIDTH = 100
"""Width of printed lines, in characters."""


class Key(NamedTuple):
    """A key, its default as YAML, and its meaning in Markdown."""

    name: str
    default: str
    meaning: str


class Section(NamedTuple):
    """The keys that begin with the same word."""

    name: str
    about: str
    keys: Sequence[Key]


def keys(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """Print what keys mean.

    Returns:
        The exit code.

    Raises:
        ConfigError: there is no such key, or the schema cannot be written.
    """
    for place, argument in enumerate(arguments):
        name, equals, _ = argument.partition("=")
        if equals and name != "schema":
            raise ConfigError(
                f"keys {argument}: `keys` takes names of keys, such as `keys {name}`, and schema=FILE."
            )
        if equals and any(each.startswith("schema=") for each in arguments[:place]):
            raise ConfigError(f"keys {argument}: schema= is given twice. Leave one out.")
    parsed = read_words("keys", arguments, {"schema": ""}, HELP)
    if parsed is None:
        return DONE
    names, target = parsed[0], parsed[1]["schema"]
    if target:
        try:
            Path(target).write_text(json_schema(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"schema={target}: it cannot be written ({error.strerror}). Name another file."
            ) from None
        print(f"Written: {target}. To use it, name it in an experiment file's first line: docs/data.md")
        if not names:
            return DONE
    whole, *parts = sections({})
    if not names:
        _print(whole.keys)
        for part in parts:
            print(f"{part.name}.* ({len(part.keys)} keys)\n    {part.about}")
        return DONE
    known = [key for part in (whole, *parts) for key in part.keys]
    for name in names:
        plain = re.sub(r"@\w+", "", name)  # STAGE@LABEL has the keys of its stage
        matching = [key for key in known if key.name == plain or key.name.startswith(f"{plain}.")]
        matching = matching or [*_part_of_gate(plain, known)]
        if not matching:
            endings = sorted(
                (key.name for key in known if key.name.endswith(f".{plain}")), key=lambda key: key.count(".")
            )[:MAX_SHOWN_ENDINGS]
            near = f" Did you mean {' or '.join(endings)}?" if endings else ""
            raise ConfigError(
                f"keys {name}: there is no such key."
                f"{near or did_you_mean(name, [key.name for key in known])} "
                "`python -m rlhf keys` lists all sections."
            )
        if name != plain:
            stage = plain.partition(".")[0]
            print(f"{name.partition('.')[0]} has the keys of {stage}, with the same defaults.")
        _print(matching)
    return DONE


def _part_of_gate(name: str, known: Iterable[Key]) -> Iterator[Key]:
    """`ppo.gates.kl.max`: a part of a gate, which the lists of keys show in the gate's own line."""
    gate, _, part = name.rpartition(".")
    if ".gates." in gate and part in Bound.model_fields:
        limits = [yaml.safe_load(key.default) for key in known if key.name == gate]
        for each in limits:
            default = (each or {}).get(part, "")
            yield _key(name, default, Bound.model_fields[part].description or "")


def _print(keys: Iterable[Key]) -> None:
    for key in keys:
        print(f"{key.name}={key.default}" if key.default else key.name)
        print(textwrap.fill(key.meaning, LINE_WIDTH, initial_indent="    ", subsequent_indent="    "))


def markdown_page() -> str:
    """The documentation's page of all keys."""
    whole, *parts = sections(SHARED)
    text = [PAGE_TITLE, _markdown(f"## {whole.name}", whole)]
    text += [_markdown(f"## {part.name}", part) for part in parts]
    text.append("## What several sections have")
    for name, model in SHARED.items():
        shared = Section(name, model.__doc__ or "", [*_keys(model, {}, "", SHARED)])
        text.append(_markdown(f"### {name}", shared))
    return "\n\n".join(text) + "\n"


def _markdown(title: str, part: Section) -> str:
    """A heading, a sentence and a table."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for key in part.keys:
        meaning = PAGE_LINK.sub(r"([more](\1))", key.meaning)
        cells = (f"`{key.name}`", f"`{key.default}`" if key.default else "", meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    about = [" ".join(part.about.split())] if part.about else []
    return "\n\n".join([title, *about, "\n".join(lines)])


def sections(shared: Mapping[str, type[BaseModel]]) -> Iterator[Section]:
    """All keys: those of the whole run, of each section, and of each stage.

    Args:
        shared: sections to name only, without listing their keys again.
    """
    values, stages = packaged()
    parts = {name: _parts(field.annotation) for name, field in Settings.model_fields.items()}
    models = {name: each[0] for name, each in parts.items() if each and get_origin(each[0]) is not Literal}
    top = {name: value for name, value in values.items() if name not in models}
    yield Section(RUN_TITLE, "", [*_keys(Settings, top, "", shared, skip=models)])
    for name, model in models.items():
        yield Section(name, model.__doc__ or "", [*_keys(model, values[name], f"{name}.", shared)])
    for name, stage in stages.items():
        about = (sys.modules[type(stage).__module__].__doc__ or "").partition("\n")[0]
        yield Section(name, about, [*_keys(type(stage), values[name], f"{name}.", shared)])


def _keys(
    model: type[BaseModel],
    values: Mapping[str, Any],
    prefix: str,
    shared: Mapping[str, type[BaseModel]],
    skip: Iterable[str] = (),
) -> Iterator[Key]:
    """A section's keys, with nested ones."""
    for name in [name for name in model.model_fields if name not in skip]:
        field, key = model.model_fields[name], f"{prefix}{name}"
        parts, meaning = _parts(field.annotation), field.description or ""
        value = values.get(name, "" if field.is_required() else field.get_default(call_default_factory=True))
        named = [f"See [{title}](#{title})." for title, section in shared.items() if section in parts]
        if Bound in parts:
            yield _key(key, "" if value else value, *(named or [meaning or Bound.__doc__ or ""]))
            for gate, bound in value.items():
                limits = {name: limit for name, limit in bound.items() if name in ("min", "max")}
                advice = bound["advice"].replace("{stage}", prefix.rstrip("."))
                yield _key(f"{key}.{gate}", limits, f"When it fails: {advice}")
        elif named:
            yield _key(key, value, f"{meaning} {named[0]}")
        elif parts and get_origin(parts[0]) is not Literal:
            below = value if isinstance(value, Mapping) else {}
            yield _key(key, "" if below else value, meaning or parts[0].__doc__ or "")
            yield from _keys(parts[0], below, f"{key}.", shared)
        else:
            choices = ", ".join(f"`{_in_yaml(choice)}`" for each in parts for choice in get_args(each))
            yield _key(key, value, f"{choices}. {meaning}" if choices else meaning)


def _key(name: str, default: Any, meaning: str) -> Key:
    shown = yaml.safe_dump(default, default_flow_style=True, width=9999, sort_keys=False).split("\n")[0]
    if isinstance(default, str):
        shown = default.replace("\n", r"\n")
    return Key(name, shown, " ".join(meaning.split()))


def _in_yaml(choice: object) -> str:
    """A value as the user writes it."""
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def _parts(annotation: Any) -> list[Any]:
    """The config sections and `Literal`s in a type annotation."""
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    inner = [part for argument in get_args(annotation) for part in _parts(argument)]
    return [annotation] if is_section or get_origin(annotation) is Literal else inner
