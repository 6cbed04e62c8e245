"""JSON schema of an experiment file, from the config classes. Editors complete YAML with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import hydra
from omegaconf import OmegaConf
from pydantic.json_schema import models_json_schema

from rlhf.pipeline.experiment import Settings, build_experiment
from rlhf.pipeline.stage import Stage

INTERPOLATION = {"type": "string", "pattern": r"\$\{.+\}"}
ANY_TEXT = {"type": "string"}
SOURCE = {"$ref": "#/$defs/SourceConfig"}


def packaged() -> tuple[dict[str, Any], Mapping[str, Stage]]:
    """The packaged config, with `${...}` not resolved, and its stages."""
    with hydra.initialize_config_module("rlhf.conf", version_base="1.3"):
        node = hydra.compose("config")
    values, resolved = (OmegaConf.to_container(node, resolve=resolve) for resolve in (False, True))
    assert isinstance(values, dict) and isinstance(resolved, dict)
    named = {str(name): value for name, value in values.items()}
    return named, build_experiment({str(name): value for name, value in resolved.items()}).stages


def _typed(field: dict[str, Any], value: Any) -> dict[str, Any]:
    """A field's schema, extended by what YAML also accepts: a source or a name instead of a list, `auto` if
    it is the default, and `${...}`."""
    if "$ref" in field:
        return field
    description = {name: field.pop(name) for name in ("description",) if name in field}
    choices = field.get("anyOf", [field])
    if any(choice.get("items") == SOURCE for choice in choices):
        choices = [SOURCE, *choices]
    if {"type": "array", "items": ANY_TEXT} in choices:
        choices = [ANY_TEXT, *choices]
    if not any(choice in (ANY_TEXT, SOURCE) for choice in choices):
        choices = [*choices, *([{"const": value}] if value == "auto" else []), INTERPOLATION]
    return description | (choices[0] if len(choices) == 1 else {"anyOf": choices})


def _plain(node: Any) -> Any:
    """A part of pydantic's schema without titles, defaults and required keys: a file sets only some keys."""
    if isinstance(node, list):
        return [_plain(each) for each in node]
    if not isinstance(node, dict):
        return node
    plain = {key: _plain(value) for key, value in node.items() if key not in ("title", "default", "required")}
    if "properties" in node:
        plain["properties"] = {name: _plain(value) for name, value in node["properties"].items()}
    if "description" in plain:
        plain["description"] = " ".join(plain["description"].split())
    return plain


def json_schema() -> str:
    """Text of the schema for an experiment file or the composed config."""
    values, stages = packaged()
    models = [Settings, *map(type, stages.values())]
    _, schema = models_json_schema([(model, "validation") for model in models])
    sections = {name: _plain(section) for name, section in schema["$defs"].items()}
    named = {"Settings": values} | {type(stage).__name__: values[name] for name, stage in stages.items()}
    for name, section in sections.items():
        default = named.get(name, {})
        section["properties"] = {
            key: _typed(field, default.get(key)) for key, field in section["properties"].items()
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
    root = sections.pop("Settings")
    root["properties"] |= {
        name: {"$ref": f"#/$defs/{type(stage).__name__}"} for name, stage in stages.items()
    } | {"defaults": {"type": "array"}, "hydra": {"type": "object"}}
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "rlhf"}
    return json.dumps(head | root | {"$defs": sections}, indent=1) + "\n"
