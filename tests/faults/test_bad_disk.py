"""A disk on which a share of all writes, flushes and renames fails: one line each time, and nothing lost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.chains import SETTINGS, SOURCES, Chain
from rlhf.digests import file_digest

HERE = Path(__file__).parent
COMPILER = shutil.which("cc")
ADVICE = ("the same command continues", "choose another runs_dir")


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """eio.c as a library that can be preloaded."""
    if COMPILER is None:
        pytest.skip("no C compiler (cc) here")
    library = tmp_path_factory.mktemp("shim") / "eio.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", library, HERE / "eio.c", "-ldl"], check=True)
    return library


def attempts(directory: Path, shim: Path, share: float, *overrides: str) -> list[dict[str, int]]:
    """Run the chain until it is done; (exit code, failed calls) of each attempt."""
    directory.mkdir()
    Chain(directory)
    arguments = [*SETTINGS, *SOURCES, "run_name=run", "gates=warn", "stage=ppo", *overrides]
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, HERE / "bad_disk.py", directory, str(share), *arguments],
        env={**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
        | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )  # fmt: skip
    return [json.loads(line) for line in process.stdout.splitlines()]


def weights(directory: Path) -> dict[str, str]:
    """Stage -> digest of the weights that it published."""
    return {
        path.parts[-3]: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (directory / "store").glob("*/[!.]*/model.safetensors")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "overrides"),
    [
        (0.01, ("ppo.peft=none", "sft.peft=lora")),
        (0.005, ("checkpoint.every_steps=1",)),  # torch writes a checkpoint in hundreds of small parts
    ],
)
def test_on_a_bad_disk_each_failure_is_one_line_and_the_same_command_ends_with_the_same_weights(
    tmp_path: Path, shim: Path, share: float, overrides: tuple[str, ...]
) -> None:
    (sound,) = attempts(tmp_path / "sound", shim, 0.0, *overrides)
    assert sound == {"attempt": 0, "code": 0, "failures": 0}
    directory = tmp_path / "bad"
    found = attempts(directory, shim, share, *overrides)
    assert sum(each["failures"] for each in found) >= 3
    for each in found:
        said = (directory / f"err-{each['attempt']}").read_text()
        if each["code"] == 0:  # what failed can be done without: a heartbeat, the memory of digests
            assert said == ""
        else:
            assert each["code"] == 2 and each["failures"] >= 1 and "Traceback" not in said, (each, said)
            (line,) = said.splitlines()
            assert line.startswith("Error: ") and any(advice in line for advice in ADVICE), said
            assert "store/" in line or "runs/" in line, said
    for path in (directory / "store").glob("*/[!.]*"):  # whatever has a name is whole
        files = json.loads((path / "manifest.json").read_bytes())["files"]
        assert {name: file_digest(path / name) for name in files} == files
    assert weights(directory) == weights(tmp_path / "sound")
    assert {"base", "sft", "reward", "ppo"} <= weights(directory).keys()
