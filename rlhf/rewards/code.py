"""Identity of a user's code: a digest of what was imported, and the versions of installed packages."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
import traceback
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf.config import Complaint, ConfigError, did_you_mean
from rlhf.digests import PACKAGES, digest_of, file_digest

INSTALLED = {"site-packages", "dist-packages"}
"""Folders of installed packages, which are identified by version. Other code is identified by its content."""

DOCSTRING_NODES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

_imported: dict[str, tuple[ModuleType, dict[str, str]]] = {}
"""Module name -> the module, and its `code_on_disk` at the import."""


def imported_code(source: str) -> dict[str, str]:
    """Import `python:MODULE:FUNCTION`, and identify the imported code, not later versions of its files.

    Returns:
        See `code_on_disk`.

    Raises:
        ConfigError: it cannot be imported, or its files change during the import.
    """
    name = source.split(":")[1]
    try:
        import_code(name, source)
    except ImportError as error:
        fix = "The module must be importable: installed, or in a directory on PYTHONPATH."
        raise ConfigError(Complaint(source, f"{error}.", fix)) from None
    except SyntaxError as error:
        why = f"{error.filename}:{error.lineno}: {error.msg}."
        raise ConfigError(Complaint(source, why, "Fix that line.")) from None
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{last.filename}, line {last.lineno}"
        why = f"importing {name} raised {type(error).__name__}: {error} ({place})."
        raise ConfigError(Complaint(source, why, "Fix it.")) from error
    return _named(source, _imported[name][1])


def imported_object(source: str) -> Any:
    """The object that `python:MODULE:NAME` names.

    Raises:
        ConfigError: it cannot be imported, or there is no such name.
    """
    _, module, name = source.split(":", 2)
    imported_code(source)
    try:
        return getattr(sys.modules[module], name)
    except AttributeError as error:
        near = did_you_mean(name, vars(sys.modules[module]))
        raise ConfigError(Complaint(source, f"{error}.{near}", "Name a function of that module.")) from None


def import_code(name: str, named_by: str) -> ModuleType:
    """Import a module, and remember its identity.

    Args:
        named_by: what the user wrote, for error messages.

    Raises:
        ImportError: it cannot be imported.
        ConfigError: its files change during the import, or it is the script that was started.
    """
    if name.partition(".")[0] == "__main__":
        why = (
            "it is in the script that was started. Another process or a later run cannot find that code by "
            "a module name."
        )
        raise ConfigError(Complaint(named_by, why, "Move it into a module, MODULE.py, and name that."))
    known = _imported.get(name)
    if known is not None and known[0] is sys.modules.get(name):
        return known[0]
    before = code_on_disk(name)
    module = import_module(name)
    if code_on_disk(name) != before:
        why = "its code changed while it was imported."
        raise ConfigError(Complaint(named_by, why, "Run the same command again."))
    _imported[name] = (module, before)
    return module


def own_code(module: str, name: str) -> dict[str, str]:
    """Identity of a user's class or function: see `code_on_disk`. Empty for this package, because its stages
    have versions."""
    return {} if module.partition(".")[0] == "rlhf" else imported_code(f"python:{module}:{name}")


def has_changed(source: str) -> bool:
    """Whether the files of `python:MODULE:FUNCTION` have changed since the import."""
    return imported_code(source) != _named(source, code_on_disk(source.split(":")[1]))


def _named(source: str, identity: dict[str, str]) -> dict[str, str]:
    return {source if name == "" else name: value for name, value in identity.items()}


def code_on_disk(module: str) -> dict[str, str]:
    """Identity of a module's code.

    Identified by their syntax, without comments and docstrings: all modules of its top-level package, and
    everything they import that is not installed. Identified by version: installed packages. Left out: the
    standard library, this project, and packages whose versions are in every manifest (torch,
    transformers, ...).

    Returns:
        "" -> a digest of the files; distribution -> its version.
    """
    waiting, seen = [module.partition(".")[0]], {"rlhf", *sys.stdlib_module_names}
    files: dict[str, str] = {}
    versions: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        folder, paths = _files_of(name)
        if INSTALLED & {*folder.parts}:
            distributions = set(_distributions().get(name, ())) - {*PACKAGES}
            versions |= {each: importlib.metadata.version(each) for each in distributions}
            continue
        for path in paths:
            files[f"{name}: {path.relative_to(folder)}"] = _digest_of_code(path)
            waiting += _imports(path)
    return {"": digest_of(files), **versions}


def _digest_of_code(path: Path) -> str:
    """Digest of a file. For a Python module it is that of the syntax tree, so that a changed docstring or
    comment retrains nothing. Docstrings count if the module reads any."""
    content = path.read_bytes()
    try:
        tree = ast.parse(content) if path.suffix == ".py" else None
    except (SyntaxError, ValueError):  # then it was never imported
        tree = None
    if tree is None:
        return file_digest(path)
    if b"__doc__" not in content and b"getdoc" not in content:
        for node in ast.walk(tree):
            if isinstance(node, DOCSTRING_NODES) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return digest_of(ast.unparse(tree))


@cache
def _distributions() -> dict[str, list[str]]:
    return {name: [*names] for name, names in importlib.metadata.packages_distributions().items()}


def _files_of(name: str) -> tuple[Path, list[Path]]:
    """The folder and the files of a top-level module or package. No files if it cannot be imported, such as a
    missing optional package."""
    try:
        spec = find_spec(name)
    except ValueError:  # a module without a spec, such as one made at run time
        spec = None
    if spec is None:
        return Path(), []
    if spec.submodule_search_locations is None:
        path = Path(spec.origin or "")
        return path.parent, [path] if path.is_file() else []
    (folder, *_) = [Path(each) for each in spec.submodule_search_locations] or [Path()]
    paths = (path for path in folder.rglob("*") if path.suffix in (".py", ".so"))
    return folder, sorted(path for path in paths if not INSTALLED & {*path.relative_to(folder).parts})


def _imports(path: Path) -> Iterator[str]:
    """The top-level names that a file imports anywhere, without relative imports (its own package)."""
    try:
        tree = ast.parse(path.read_bytes()) if path.suffix == ".py" else None
    except (SyntaxError, ValueError):  # then it was never imported
        return
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]
