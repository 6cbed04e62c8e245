"""docs/api.md: what one may rely on, and that the examples of docs/extending.md rely on nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
ITEM = re.compile(r"^\.\. auto(\w+):: (\S+)\n((?:   .*\n)*)", re.M)


def listed() -> dict[str, set[str]]:
    """Module -> the names of it that the page lists; none for all."""
    found: dict[str, set[str]] = {}
    for kind, name, options in ITEM.findall(API):
        if kind == "module":
            (members,) = re.findall(r"^   :members:(.*)$", options, re.M)
            found.setdefault(name, set()).update(filter(None, re.split(r",?\s+", members.strip())))
        else:
            module, _, last = name.rpartition(".")
            found.setdefault(module, set()).add(last)
    return found


def examples() -> Iterator[tuple[str, str]]:
    """Each example: those on the page, and the files that it names."""
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", PAGE, re.S)):
        yield f"example {number}", code
    for name in sorted({*re.findall(r"tests/outside/\w+\.py", PAGE)}):
        if "/toy_" in name:
            yield name, (ROOT / name).read_text(encoding="utf-8")


EXAMPLES = dict(examples())


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_import_what_the_page_lists(name: str) -> None:
    known = listed()
    for node in ast.walk(ast.parse(EXAMPLES[name])):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf"):
            names = known.get(node.module or "")
            assert names is not None, f"docs/api.md lists nothing of {node.module}"
            for each in node.names if names else ():
                assert each.name in names, f"docs/api.md does not list {node.module}.{each.name}"


def test_there_are_examples_and_all_that_is_listed_exists() -> None:
    assert len(EXAMPLES) > 4
    for module, names in listed().items():
        assert all(hasattr(import_module(module), name) for name in names), module
