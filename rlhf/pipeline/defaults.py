"""The keys of a composed config that differ from the packaged values."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, TypedDict

import yaml

from rlhf.pipeline.recipe import AT_SUBSTITUTE, kind_of
from rlhf.tracking.redaction import redacted

REFERENCE = re.compile(r"\$\{([\w.]+)\}")
"""A value that repeats another key's, such as `${ppo.init}`."""
RUN_KEYS = ("run_name", "runs_dir", "store_dir", "stage", "why", "force")
"""Keys that say where a run is stored and which part of it runs, not how."""
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""PyYAML's loader in C, which is ten times as fast, if PyYAML was built with it."""


class Change(TypedDict):
    """A key that has another value than the packaged one. The values are texts without secrets."""

    key: str
    default: str
    value: str


def changed_keys(composed: Mapping[str, Any]) -> list[Change]:
    """The keys of a config that have another value than the packaged one.

    Args:
        composed: the config as typed: every `auto` is still there, but every `${...}` is resolved.
    """
    packaged = packaged_values()
    instances = {
        name.replace(AT_SUBSTITUTE, "@"): keys for name, keys in (composed.get("instances") or {}).items()
    }
    pairs = [
        *_pairs(packaged, {name: value for name, value in composed.items() if name != "instances"}, ""),
        *(
            pair
            for name, keys in instances.items()
            for pair in _pairs(packaged.get(kind_of(name), {}), keys or {}, f"{name}.")
        ),
    ]
    return [
        Change(key=key, default=value_text(key, default), value=value_text(key, value))
        for key, default, value in pairs
        if key not in RUN_KEYS and value != _resolved(default, composed)
    ]


def references() -> dict[str, str]:
    """Packaged key -> the key whose value it repeats: `generate.max_new_tokens` -> `ppo.max_new_tokens`."""
    values = packaged_values()
    texts = {key: value for key, _, value in _pairs(values, values, "") if isinstance(value, str)}
    return {key: found[1] for key, value in texts.items() if (found := REFERENCE.fullmatch(value))}


def packaged_values() -> dict[str, Any]:
    """The values in conf/ without any override, as one mapping; `${...}` is not resolved."""
    root = resources.files("rlhf.conf")
    main = _loaded(root / "config.yaml")
    own = {key: value for key, value in main.items() if key not in ("defaults", "hydra")}
    values: dict[str, Any] = {}
    for entry in main["defaults"]:
        if entry == "_self_":
            values = _merged(values, own)
            continue
        ((group, choice),) = entry.items()
        if group.startswith("override "):
            continue
        folder, _, package = group.partition("@")
        values = _merged(values, {package or folder: _loaded(root / folder / f"{choice}.yaml")})
    return values


def _loaded(file: Traversable) -> dict[str, Any]:
    values: dict[str, Any] = yaml.load(file.read_text(encoding="utf-8"), Loader=LOADER)
    return values


def _merged(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _pairs(
    defaults: Mapping[str, Any], values: Mapping[str, Any], prefix: str
) -> Iterator[tuple[str, Any, Any]]:
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict) and default:
            yield from _pairs(default, value, f"{prefix}{key}.")
        elif key != "_target_" and (key in defaults or value is not None):
            yield f"{prefix}{key}", default, value


def value_text(key: str, value: Any) -> str:
    """A value as text, without secrets."""
    safe = value if isinstance(value, int | float | None) else redacted({key: value})[key]
    return safe if isinstance(safe, str) else json.dumps(safe, ensure_ascii=False)


def _resolved(value: Any, composed: Mapping[str, Any]) -> Any:
    if not isinstance(value, str) or (found := REFERENCE.fullmatch(value)) is None:
        return value
    at: Any = composed
    for part in found[1].split("."):
        at = at.get(part) if isinstance(at, Mapping) else None
    return at
