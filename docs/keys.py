"""Every key, its default and its meaning: `python docs/keys.py` writes docs/keys.md."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from pydantic import BaseModel

from rlhf.config import Bound, OptimConfig, PeftConfig
from rlhf.data.sources import SourceConfig
from rlhf.experiment import Settings, build_experiment

SHARED = {"source": SourceConfig, "optim": OptimConfig, "peft": PeftConfig, "gate": Bound}
INTRODUCTION = """# Keys

Every key with its default and its meaning; `${...}` is another key's value. `python docs/keys.py` writes this
page, from conf/ and the classes that check it."""


def row(key: str, default: Any, meaning: str) -> str:
    """A line of a table."""
    text = yaml.safe_dump(default, default_flow_style=True, width=9999, sort_keys=False).split("\n")[0]
    text = default.replace("\n", r"\n") if isinstance(default, str) else text
    cells = (f"`{key}`", f"`{text}`" if text else "", " ".join(meaning.split()))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def parts(annotation: Any) -> list[Any]:
    """The config sections and the choices in a type."""
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    inner = [part for argument in get_args(annotation) for part in parts(argument)]
    return [annotation] if is_section or get_origin(annotation) is Literal else inner


def rows(
    model: type[BaseModel], values: Mapping[str, Any], prefix: str = "", skip: Collection[str] = ()
) -> Iterator[str]:
    """A section's keys and those below them; what several sections have is named instead."""
    for name in [name for name in model.model_fields if name not in skip]:
        field, key = model.model_fields[name], f"{prefix}{name}"
        found, meaning = parts(field.annotation), field.description or ""
        value = values.get(name, "" if field.is_required() else field.get_default(call_default_factory=True))
        shared = [f"See [{title}](#{title})." for title, section in SHARED.items() if section in found]
        if Bound in found:
            yield row(key, "" if value else value, *shared)
            for gate, bound in value.items():
                yield row(
                    f"{key}.{gate}", {k: v for k, v in bound.items() if k in ("min", "max")}, bound["advice"]
                )
        elif shared:
            yield row(key, value, f"{meaning} {shared[0]}")
        elif found and get_origin(found[0]) is not Literal:
            yield row(key, "" if value else value, meaning or found[0].__doc__)
            yield from rows(found[0], value or {}, f"{key}.")
        else:
            choices = ", ".join(f"`{choice}`" for each in found for choice in get_args(each))
            yield row(key, value, f"{choices}. {meaning}" if choices else meaning)


def part(title: str, about: str | None, lines: Iterable[str]) -> str:
    """A heading, a sentence and a table."""
    table = "\n".join(["| key | default | meaning |\n|---|---|---|", *lines])
    return "\n\n".join([title, *([" ".join(about.split())] if about else []), table])


def page() -> str:
    """The whole text."""
    with initialize_config_module("rlhf.conf", version_base="1.3"):
        node = compose("config")
    values, resolved = (OmegaConf.to_container(node, resolve=resolve) for resolve in (False, True))
    found = {name: parts(field.annotation) for name, field in Settings.model_fields.items()}
    sections = {name: each[0] for name, each in found.items() if each and get_origin(each[0]) is not Literal}
    text = [INTRODUCTION, part("## Beside the stages", None, rows(Settings, values, skip=sections))]
    for name, section in sections.items():
        text.append(part(f"## {name}", section.__doc__, rows(section, values[name], f"{name}.")))
    for name, stage in build_experiment(resolved).stages.items():
        about = sys.modules[type(stage).__module__].__doc__.partition("\n")[0]
        text.append(part(f"## {name}", about, rows(type(stage), values[name], f"{name}.")))
    text.append("## What several sections have")
    text += [part(f"### {title}", section.__doc__, rows(section, {})) for title, section in SHARED.items()]
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("keys.md").write_text(page(), encoding="utf-8")
