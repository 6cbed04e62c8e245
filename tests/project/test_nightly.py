"""What `.ci/run` leaves out, and what a night writes down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nightly
import pytest
from nightly import MOST_COMMITS, PARTS, ROOT, due, main

PASSES, FAILS = f"{sys.executable} -c ''", f"{sys.executable} -c 'raise SystemExit(1)'"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One commit, in which a file lies at each path of the table."""
    monkeypatch.setattr(nightly, "ROOT", tmp_path)
    monkeypatch.setattr(nightly, "PASSED", tmp_path / ".ci" / "nightly")
    monkeypatch.setattr(nightly, "ENDED", tmp_path / ".ci" / ".ended.json")
    monkeypatch.setattr(nightly, "NIGHT", {"one": PASSES, "two": PASSES})
    monkeypatch.delenv("CI_ALL", raising=False)
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".gitignore").write_text(".ci/\n")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    commit(tmp_path, "rlhf/report/page.py")
    return tmp_path


def commit(repository: Path, path: str) -> str:
    """Change this file; the revision."""
    file = repository / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{file.read_text() if file.exists() else ''}x")
    for words in (["add", "."], ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=repository, check=True)
    return revision(repository)


def revision(repository: Path) -> str:
    words = ["git", "rev-parse", "HEAD"]
    return subprocess.run(words, cwd=repository, check=True, capture_output=True, text=True).stdout.strip()


def test_every_path_is_there_and_every_command_has_its_target() -> None:
    for name, part in PARTS.items():
        for path in (*part.tests, *part.paths):
            assert (ROOT / path).exists(), f"{name}: {path}"
    targets = (ROOT / "Makefile").read_text()
    for command in nightly.NIGHT.values():
        assert f"\n{command.split()[1]}:" in targets, command


def test_a_part_is_due_when_what_it_exercises_has_changed(repository: Path) -> None:
    assert due() == list(PARTS), "no night has passed"
    assert main(["night"]) == 0
    assert due() == []
    commit(repository, "docs/index.md")
    assert due() == []
    commit(repository, "rlhf/report/page.py")
    assert due() == ["browser"]
    assert main(["is-due", "browser"]) == 0 and main(["is-due", "vllm"]) == 1
    commit(repository, "launch/torchrun.sh")
    assert due() == ["slurm", "two hosts", "browser"]


def test_an_old_or_unknown_night_counts_for_nothing(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["night"]) == 0
    for _ in range(MOST_COMMITS):
        commit(repository, "docs/index.md")
    assert due() == []
    monkeypatch.setenv("CI_ALL", "1")
    assert due() == list(PARTS)
    monkeypatch.delenv("CI_ALL")
    commit(repository, "docs/index.md")
    assert due() == list(PARTS)
    nightly.PASSED.write_text("0" * 40)
    assert due() == list(PARTS)


def test_what_is_left_out_is_what_is_not_due(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["left-out"])
    assert capsys.readouterr().out == "\n"
    assert main(["night"]) == 0
    commit(repository, "rlhf/report/page.py")
    capsys.readouterr()
    main(["left-out"])
    left_out = capsys.readouterr().out.split()
    assert left_out == [
        "tests/launch/test_slurm.py", "tests/launch/test_two_hosts.py", "tests/project/test_wheel.py"
    ]  # fmt: skip


def test_only_a_whole_night_of_one_revision_that_passed_is_written_down(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nightly, "NIGHT", {"one": PASSES, "two": FAILS})
    assert main(["night"]) == 1 and not nightly.PASSED.exists()
    monkeypatch.setattr(nightly, "NIGHT", {"one": PASSES, "two": PASSES})
    commit(repository, "README.md")
    assert main(["night", "two"]) == 0 and not nightly.PASSED.exists()
    assert "passed at another revision" in capsys.readouterr().out
    (repository / "README.md").write_text("not committed")
    assert main(["night", "one"]) == 0 and not nightly.PASSED.exists()
    subprocess.run(["git", "checkout", "--quiet", "README.md"], cwd=repository, check=True)
    assert main(["night", "one"]) == 0
    assert nightly.PASSED.read_text() == f"{revision(repository)}\n"


def test_a_part_that_changes_the_tree_does_not_pass_it(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = f'{sys.executable} -c \'open("README.md", "a").write("changed")\''
    monkeypatch.setattr(nightly, "NIGHT", {"one": changes})
    commit(repository, "README.md")
    assert main(["night"]) == 0 and not nightly.PASSED.exists()


def test_another_word_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["night", "vlm"]) == 2
    assert "night slow vllm" in capsys.readouterr().err
