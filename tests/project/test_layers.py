"""Who may import whom, how long a file may get, and what a run with nothing to do does not import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers.chains import SETTINGS, SOURCES, STAGES, Chain, Outcome

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "rlhf").rglob("*.py"), *(ROOT / "stages").rglob("*.py")])
LONGEST = 600
LAZY = ("deepspeed", "vllm", "wandb", "bm25s", "rapidfuzz", "matplotlib", "lm_eval", "nltk")
ROWS = (
    ("config", "digests", "disk", "exit_codes", "locks", "printable"),
    ("losses", "rl"),
    ("distributed", "tracking"),
    ("training", "data"),
    ("models",),
    ("generation", "rewards"),
    ("evaluation", "costs"),
    ("pipeline",),
    ("supervised", "ppo", "compare", "planner", "report", "label", "bisect", "decide"),
    ("stages",),
    ("cli",),
    ("__main__",),
)
"""The rooms of `rlhf/` in rows: a room imports from the rows above its own. The first row is the ground,
one room of several files."""
ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}


class Import(NamedTuple):
    """One imported name; `from a import b` counts as `a.b`, so that a module taken this way is seen."""

    name: str
    is_lazy: bool
    """Inside a function: run when that is called."""
    is_typing: bool = False
    """Under TYPE_CHECKING: never run."""


def imports_of(source: str, package: str) -> Iterator[Import]:
    """All imports of a file; relative ones are made absolute with the package it lies in."""

    def visit(node: ast.AST, is_lazy: bool, is_typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, is_lazy, is_typing) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
                start = ".".join([*above, *([child.module] if child.module else [])])
                yield from (Import(f"{start}.{alias.name}", is_lazy, is_typing) for alias in child.names)
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from visit(child, is_lazy or function, is_typing or typing)

    yield from visit(ast.parse(source), False, False)


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parent.parts
    return ".".join(parts if parts[0] == "rlhf" else ("rlhf", *parts))


def imports_under(*folders: str) -> list[tuple[str, Import]]:
    """(file, import) of everything in the folders."""
    found = []
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(folders):
            found += [(name, each) for each in imports_of(path.read_text(), package_of(path))]
    assert found, f"nothing under {folders}"
    return found


def is_in(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_every_form_of_import_is_seen() -> None:
    source = (
        "import a.b as c, d\nfrom e import f\nfrom . import g\nfrom .. import h\nfrom ..i import j\n"
        "if True:\n    import k\nclass C:\n    import l\n    def m(self):\n        from n import o\n"
        "if TYPE_CHECKING:\n    import p\n"
    )
    assert list(imports_of(source, "rlhf.data")) == [
        ("a.b", False, False), ("d", False, False), ("e.f", False, False), ("rlhf.data.g", False, False),
        ("rlhf.h", False, False), ("rlhf.i.j", False, False), ("k", False, False), ("l", False, False),
        ("n.o", True, False), ("p", False, True),
    ]  # fmt: skip


def test_losses_and_rl_know_torch_only() -> None:
    for file, each in imports_under("rlhf/losses/", "rlhf/rl/"):
        allowed = is_in(each.name, "torch", "rlhf.losses", "rlhf.rl")
        is_standard = each.name.partition(".")[0] in sys.stdlib_module_names
        assert allowed or is_standard, f"{file} imports {each.name}"


def test_losses_and_rl_communicate_with_nobody() -> None:
    for file, each in imports_under("rlhf/losses/", "rlhf/rl/"):
        assert not is_in(each.name, "torch.distributed", "os", "io", "pathlib", "json"), file


def room_of(name: str) -> str:
    """Of a file's path or of an imported name."""
    parts = name.removesuffix(".py").replace("/", ".").split(".")
    return parts[0] if parts[0] == "stages" else parts[1]


def test_rooms_import_from_rows_above_their_own() -> None:
    for file, each in imports_under("rlhf/", "stages/"):
        if not each.name.startswith("rlhf.") or file == "rlhf/__init__.py" or each.name == "rlhf.__version__":
            continue
        room, other = room_of(file), room_of(each.name)
        is_ground = ROW_OF[room] == ROW_OF[other] == 0
        assert room == other or is_ground or ROW_OF[other] < ROW_OF[room], f"{file} imports {each.name}"
        assert other != "stages" or room == "cli", (
            f"{file} imports {each.name}: stages are found by their config"
        )


def test_no_circle_of_imports() -> None:
    """Not even of imports inside functions; what only a type checker reads does not count."""
    modules = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in FILES}
    arrows = {
        name: {
            target
            for each in imports_of(path.read_text(), package_of(path))
            for target in (each.name, each.name.rpartition(".")[0])
            if target in modules and target != name and not each.is_typing
        }
        for name, path in modules.items()
    }
    assert sum(map(len, arrows.values())) > 400
    while free := [name for name, targets in arrows.items() if not targets & arrows.keys()]:
        for name in free:
            del arrows[name]
    assert not arrows, f"a circle among {sorted(arrows)}"


def test_every_room_stands_in_the_table() -> None:
    rooms = {room_of(path.relative_to(ROOT).as_posix()) for path in FILES} - {"__init__"}
    assert rooms == set(ROW_OF)


def test_a_test_lies_in_the_room_of_what_it_tests() -> None:
    own = {"ground", "benchmarks", "faults", "gpu", "launch", "outside", "project"}
    folders = {path.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").rglob("test_*.py")}
    assert folders - own <= set(ROW_OF)


def test_heavy_and_optional_packages_are_imported_where_they_are_used() -> None:
    for file, each in imports_under("rlhf/", "stages/"):
        if is_in(each.name, *LAZY):
            assert each.is_lazy or each.is_typing, f"{file} imports {each.name} for everybody"
        if is_in(each.name, "trl", "math_verify", "jsonschema", "regex"):
            assert each.is_lazy, f"{file} imports {each.name} for everybody"
        if is_in(each.name, "deepspeed"):
            assert file == "rlhf/training/deepspeed.py"


def test_only_the_front_door_knows_hydra() -> None:
    for file, each in imports_under("rlhf/", "stages/"):
        if is_in(each.name, "hydra", "omegaconf"):
            assert room_of(file) in ("cli", "__main__"), f"{file} imports {each.name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST


def test_text_files_are_utf_8_whatever_the_locale_is() -> None:
    """Ruff's PLW1514 sees only those whose type it can tell."""
    for path in [*FILES, *(ROOT / "benchmarks").rglob("*.py")]:
        for each in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(each, ast.Call) and isinstance(each.func, ast.Attribute):
                named = {keyword.arg for keyword in each.keywords}
                is_text = each.func.attr in ("read_text", "write_text")
                assert not is_text or "encoding" in named, f"{path}:{each.lineno}"


def test_what_mypy_passes_over_says_why() -> None:
    """After the code, so that no comment hides more than it names."""
    read = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    lines = [(path, line) for path in read for line in path.read_text(encoding="utf-8").splitlines()]
    passed = [(path, line) for path, line in lines if re.search(r"# type: ignore", line) and '"' not in line]
    assert len(passed) > 20
    for path, line in passed:
        assert re.search(r"# type: ignore\[[a-z, -]+\]  # \w", line), (
            f"{path.relative_to(ROOT)}: {line.strip()}"
        )


HEAVY = {
    "torch", "transformers", "peft", "accelerate", "datasets", "trl", "optuna", "submitit", "numpy", "scipy",
    "safetensors", "pyarrow", "pandas",
}  # fmt: skip
"""What takes from a tenth of a second to seconds."""


def imported_by(directory: Path, *arguments: str) -> tuple[set[str], subprocess.CompletedProcess[str]]:
    """What `python -m rlhf` imports in a process of its own, and how that ended."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "rlhf", *arguments],
        cwd=directory, capture_output=True, text=True, check=False,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "rlhf.exit_codes" in imported  # so the list was read
    return imported, done


def test_a_run_that_is_all_in_the_store_needs_no_torch(finished_chain: tuple[Chain, Outcome]) -> None:
    chain, before = finished_chain
    imported, done = imported_by(chain.directory, *SETTINGS, *SOURCES, "run_name=again")
    assert done.returncode == before.code == 0, done.stderr
    assert done.stdout.count(" reused (") == len(STAGES)
    assert {"rlhf.pipeline.runner", "rlhf.models.base"} <= imported
    assert not imported & HEAVY


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("ppo.kl.coeff=1", "ppo.kl.coeff: there is no such key."),
        ("ppo.steps=many", "ppo.steps"),
        ("sft.data=none.jsonl", "none.jsonl"),
        ("model.path=nowhere", "nowhere"),
    ],
)
def test_a_mistake_is_told_without_torch(tmp_path: Path, mistake: str, told: str) -> None:
    model = "local" if mistake.startswith("model.") else "tiny"
    imported, done = imported_by(tmp_path, f"model={model}", "device=cpu", "stage=sft", mistake)
    assert done.returncode == 2
    assert told in done.stderr.rpartition("Error: ")[2]
    assert not imported & HEAVY


def test_help_is_a_page_for_newcomers_and_needs_no_torch(tmp_path: Path) -> None:
    imported, done = imported_by(tmp_path, "--help")
    assert done.returncode == 0
    assert not imported & HEAVY
    for words in ("python -m rlhf stage=sft", "sft.data=", "why=true", "Exit codes"):
        assert words in done.stdout
    assert not list(tmp_path.iterdir())
