"""A wheel built from the tree holds all that the program needs, and runs where the tree is not. An editable
install is seen by type checkers too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from helpers.chains import STAGES

ROOT = Path(__file__).parents[2]
SOURCES = ("rlhf", "stages", "conf", "data", "pyproject.toml", "README.md", "LICENSE")
MAPPED = {"stages": "rlhf/stages", "conf": "rlhf/conf", "data": "rlhf/samples"}
HOSTILE = "raise RuntimeError('a folder of the current directory was imported')\n"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, ignore=ignore, symlinks=True)
        else:
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m build` makes of it."""
    out = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(tree)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with the wheel in it.

    The other packages come from the environment that runs the tests, as installing torch again takes
    minutes. The wheel's own site-packages stand before them, and a path in a .pth file does not bring an
    editable install along.
    """
    directory = tmp_path_factory.mktemp("venv")
    venv.create(directory, with_pip=True)
    interpreter = directory / "bin" / "python"
    # before the .pth file: pip would take the editable install behind that path for this very package
    subprocess.run(
        [interpreter, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True
    )
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    asked = subprocess.run([interpreter, "-c", ask], capture_output=True, text=True, check=True)
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    target = Path(asked.stdout.strip(), "dependencies.pth")
    target.write_text("".join(f"{path}\n" for path in dependencies))
    return interpreter


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A directory with folders named like ours, whose modules must not be taken for ours."""
    for name in ("stages", "conf", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(HOSTILE)
    (tmp_path / "conf" / "config.yaml").write_text("hostile: true\n")
    (tmp_path / "stages" / "sft.py").write_text(HOSTILE)
    (tmp_path / "data" / "prompts.jsonl").write_text("not JSON\n")
    return tmp_path


def run(python: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [python, *arguments], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


def test_the_wheel_holds_our_files_and_nothing_at_top_level(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.startswith("rlhf_chain-")
    assert {name.split("/")[0] for name in names} == {"rlhf", f"{wheel.name.split('-py3')[0]}.dist-info"}
    kinds = {
        "rlhf": ("py", "html", "css", "js"),
        "stages": ("py",),
        "conf": ("py", "yaml"),
        "data": ("py", "jsonl"),
    }
    expected = {"rlhf/py.typed"}
    for folder, kind in [(name, kind) for name in kinds for kind in kinds[name]]:
        files = list((ROOT / folder).rglob(f"*.{kind}"))
        assert files, f"no {kind} in {folder}"
        place = MAPPED.get(folder, folder)
        expected |= {f"{place}/{path.relative_to(ROOT / folder).as_posix()}" for path in files}
    assert expected - names == set()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_metadata_tells_what_is_needed(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = archive.read(name).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "Requires-Dist: transformers<5.40,>=5.16" in metadata
    assert [line for line in metadata.splitlines() if line.startswith("Requires-Dist: trl")] == [
        'Requires-Dist: trl<1.20,>=1.16; extra == "trl"'
    ]


def test_the_installed_package_is_the_wheel(python: Path, hostile: Path) -> None:
    modules = ["rlhf", "rlhf.stages.sft", "rlhf.conf", "rlhf.samples"]
    code = f"from importlib import import_module\nfor name in {modules}: print(import_module(name).__file__)"
    found = run(python, hostile, "-c", code)
    assert found.returncode == 0, found.stderr
    files = [Path(line) for line in found.stdout.splitlines()]
    assert len(files) == len(modules)
    assert all(file.is_relative_to(python.parents[1]) for file in files), files


def test_the_version_is_the_same_wherever_it_is_asked_for(python: Path, hostile: Path) -> None:
    code = (
        "import importlib.metadata, rlhf; print(rlhf.__version__, importlib.metadata.version('rlhf-chain'))"
    )
    module, distribution = run(python, hostile, "-c", code).stdout.split()
    assert module == distribution
    assert run(python, hostile, "-m", "rlhf", "--version").stdout == f"rlhf {module}\n"


def test_the_help_page(python: Path, hostile: Path) -> None:
    shown = run(python, hostile, "-m", "rlhf", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "Stages, in order: prepare sft reward generate ppo evaluate" in shown.stdout
    assert "hostile" not in shown.stdout


def test_the_chain_runs_from_a_directory_with_hostile_folders(python: Path, hostile: Path) -> None:
    done = run(python, hostile, "-m", "rlhf", "model=tiny", "run_name=wheel")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    summary = json.loads((hostile / "runs" / "wheel" / "summary.json").read_text())
    statuses = {name: stage["status"] for name, stage in summary["stages"].items()}
    assert statuses == dict.fromkeys(STAGES, "ran")
    assert (hostile / "runs" / "wheel" / "report.md").is_file()


def test_the_command_is_installed_too(python: Path, hostile: Path) -> None:
    shown = subprocess.run(
        [python.parent / "rlhf", "--help"], cwd=hostile, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert "Stages, in order" in shown.stdout


def test_a_type_checker_finds_the_modules_of_an_editable_install(tree: Path, tmp_path: Path) -> None:
    """In an environment of its own, without dependencies, so that nothing else can be found there."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", tree], check=True)
    lines = ("import rlhf.conf", "import rlhf.samples", "from rlhf.stages.sft import SftStage", "")
    user = tmp_path / "user.py"
    user.write_text("\n".join((*lines, "reveal_type(SftStage.run)\n")))
    checker = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), user.name]
    checked = run(Path(checker[0]), tmp_path, *checker[1:])
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "rlhf.stages.sft.SftStage" in checked.stdout and "rlhf.pipeline.job.Job" in checked.stdout
