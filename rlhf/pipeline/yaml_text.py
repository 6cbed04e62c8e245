"""A config as YAML text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


def to_yaml(resolved: Mapping[str, Any]) -> str:
    """A resolved config as YAML that Hydra reads as it was: a text that looks like a number is quoted."""
    return yaml.dump(dict(resolved), Dumper=_Quoting, sort_keys=False, allow_unicode=True)


class _Quoting(yaml.SafeDumper):
    """PyYAML takes `1e-3` for a text, Hydra for a number."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    text = str(text)  # it may be of a subclass, such as ModelDirectory
    try:
        float(text)
    except ValueError:
        return dumper.represent_str(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_Quoting.add_representer(str, _quoted)
_Quoting.add_multi_representer(str, _quoted)
