"""Every key, its default and its meaning: `python docs/keys.py` writes docs/keys.md, and docs/schema.json,
with which editors complete YAML."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from rlhf.config import Bound
from rlhf.data.sources import SourceConfig
from rlhf.models.peft.config import PeftConfig
from rlhf.pipeline.experiment import Settings, build_experiment
from rlhf.pipeline.stage import Stage
from rlhf.rewards.kinds import RewardMix
from rlhf.training.config import OptimConfig

SHARED = {
    "source": SourceConfig,
    "rewards": RewardMix,
    "optim": OptimConfig,
    "peft": PeftConfig,
    "gate": Bound,
}
INTRODUCTION = """# Keys

Every key with its default and its meaning; `${...}` is another key's value. `python docs/keys.py` writes this
page, from conf/ and the classes that check it; and `docs/schema.json`, with which
[an editor completes YAML](data.md#write-an-experiment-down)."""
INTERPOLATION = {"type": "string", "pattern": r"\$\{.+\}"}
ANY_TEXT = {"type": "string"}
SOURCE = {"$ref": "#/$defs/SourceConfig"}


def row(key: str, default: Any, meaning: str) -> str:
    """A line of a table."""
    text = yaml.safe_dump(default, default_flow_style=True, width=9999, sort_keys=False).split("\n")[0]
    text = default.replace("\n", r"\n") if isinstance(default, str) else text
    cells = (f"`{key}`", f"`{text}`" if text else "", " ".join(meaning.split()))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def in_yaml(choice: object) -> str:
    """As the user writes it."""
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


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
                limits = {name: limit for name, limit in bound.items() if name in ("min", "max")}
                said = bound["advice"].replace("{stage}", prefix.rstrip("."))
                advice = re.sub(r"\(docs/([\w/-]+\.md)\)", r"([more](\1))", said)
                yield row(f"{key}.{gate}", limits, f"When it fails: {advice}")
        elif shared:
            yield row(key, value, f"{meaning} {shared[0]}")
        elif found and get_origin(found[0]) is not Literal:
            yield row(key, "" if value else value, meaning or found[0].__doc__)
            yield from rows(found[0], value or {}, f"{key}.")
        else:
            choices = ", ".join(f"`{in_yaml(choice)}`" for each in found for choice in get_args(each))
            yield row(key, value, f"{choices}. {meaning}" if choices else meaning)


def part(title: str, about: str | None, lines: Iterable[str]) -> str:
    """A heading, a sentence and a table."""
    table = "\n".join(["| key | default | meaning |\n|---|---|---|", *lines])
    return "\n\n".join([title, *([" ".join(about.split())] if about else []), table])


def composed() -> tuple[dict[str, Any], dict[str, Stage]]:
    """The default config as it is written, and its stages."""
    with initialize_config_module("rlhf.conf", version_base="1.3"):
        node = compose("config")
    values, resolved = (OmegaConf.to_container(node, resolve=resolve) for resolve in (False, True))
    return values, build_experiment(resolved).stages


def page() -> str:
    """The whole text of keys.md."""
    values, stages = composed()
    found = {name: parts(field.annotation) for name, field in Settings.model_fields.items()}
    sections = {name: each[0] for name, each in found.items() if each and get_origin(each[0]) is not Literal}
    text = [INTRODUCTION, part("## For the whole run", None, rows(Settings, values, skip=sections))]
    for name, section in sections.items():
        text.append(part(f"## {name}", section.__doc__, rows(section, values[name], f"{name}.")))
    for name, stage in stages.items():
        about = sys.modules[type(stage).__module__].__doc__.partition("\n")[0]
        text.append(part(f"## {name}", about, rows(type(stage), values[name], f"{name}.")))
    text.append("## What several sections have")
    text += [part(f"### {title}", section.__doc__, rows(section, {})) for title, section in SHARED.items()]
    return "\n\n".join(text) + "\n"


def typed(field: dict[str, Any], value: Any) -> dict[str, Any]:
    """What YAML may say of a key beside what its class holds: one source for several, one name for a list,
    `auto` where that is the default, and another key's value."""
    if "$ref" in field:
        return field
    kept = {name: field.pop(name) for name in ("description",) if name in field}
    choices = field.get("anyOf", [field])
    if any(choice.get("items") == SOURCE for choice in choices):
        choices = [SOURCE, *choices]
    if {"type": "array", "items": ANY_TEXT} in choices:
        choices = [ANY_TEXT, *choices]
    if not any(choice in (ANY_TEXT, SOURCE) for choice in choices):
        choices = [*choices, *([{"const": value}] if value == "auto" else []), INTERPOLATION]
    return kept | (choices[0] if len(choices) == 1 else {"anyOf": choices})


def plain(node: Any) -> Any:
    """A part of pydantic's schema without titles and defaults, and with nothing required: a file says what it
    changes."""
    if isinstance(node, list):
        return [plain(each) for each in node]
    if not isinstance(node, dict):
        return node
    found = {key: plain(value) for key, value in node.items() if key not in ("title", "default", "required")}
    if "properties" in node:
        found["properties"] = {name: plain(value) for name, value in node["properties"].items()}
    if "description" in found:
        found["description"] = " ".join(found["description"].split())
    return found


def schema() -> str:
    """The whole text of schema.json: an experiment file, or the composed config."""
    values, stages = composed()
    models = [Settings, *map(type, stages.values())]
    _, found = models_json_schema([(model, "validation") for model in models])
    sections = {name: plain(section) for name, section in found["$defs"].items()}
    named = {"Settings": values} | {type(stage).__name__: values[name] for name, stage in stages.items()}
    for name, section in sections.items():
        default = named.get(name, {})
        section["properties"] = {
            key: typed(field, default.get(key)) for key, field in section["properties"].items()
        }
    for name, stage in stages.items():
        section = sections[type(stage).__name__]["properties"]
        section["_target_"] = {"type": "string", "description": "The class of the stage."}
        gate = section["gates"]["anyOf"][0]
        gate["properties"] = {
            metric: gate["additionalProperties"] | {"description": bound["advice"].replace("{stage}", name)}
            for metric, bound in values[name]["gates"].items()
        }
    sections["SourceConfig"] = {"anyOf": [ANY_TEXT, sections["SourceConfig"]]}
    methods = sections["PeftConfig"]["properties"]["method"]["anyOf"][0]
    sections["PeftConfig"] = {"anyOf": [methods, sections["PeftConfig"]]}
    whole = sections.pop("Settings")
    whole["properties"] |= {
        name: {"$ref": f"#/$defs/{type(stage).__name__}"} for name, stage in stages.items()
    } | {"defaults": {"type": "array"}, "hydra": {"type": "object"}}
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "rlhf"}
    return json.dumps(head | whole | {"$defs": sections}, indent=1) + "\n"


if __name__ == "__main__":
    for name, text in (("keys.md", page()), ("schema.json", schema())):
        Path(__file__).with_name(name).write_text(text, encoding="utf-8")
