"""No path leads out of a store or of runs/, whatever a manifest or a name says."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from helpers.chains import Chain, Outcome
from helpers.store import manifest, sign
from rlhf.cli.verify import complaints
from rlhf.config import ConfigError
from rlhf.digests import MANIFEST, file_digest
from rlhf.pipeline.store import Store, write_manifest
from rlhf.training.checkpoint import CHECKPOINT_FORMAT, verify_checkpoint


@pytest.mark.parametrize("name", ["../../sft.jsonl", "{absolute}", "link", "linked/sft.jsonl"])
def test_a_manifests_names_stay_in_its_directory(tmp_path: Path, name: str) -> None:
    """Of an artifact and of a checkpoint."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "sft.jsonl").write_text("private")
    artifact = tmp_path / "store" / "sft" / "key"
    artifact.mkdir(parents=True)
    (artifact / "link").symlink_to(outside / "sft.jsonl")
    (artifact / "linked").symlink_to(outside)
    named = name.replace("{absolute}", str(outside / "sft.jsonl")).replace("../../", "../../../outside/")
    assert (artifact / named).exists()
    files = {named: file_digest(artifact / named)}
    write_manifest(artifact, manifest("sft", "key", files=files))
    with pytest.raises(ConfigError, match=r"leads out of the directory, or to itself\. It was tampered with"):
        Store(tmp_path / "store").find("sft", "key")
    sign(artifact, {"format": CHECKPOINT_FORMAT, "name": "key", "files": files})
    checkpoint, complaint = verify_checkpoint(artifact)
    assert checkpoint is None
    assert complaint == f"{named} leads out of its directory, or to itself"


def test_a_link_to_itself_and_a_pipe_are_named(tmp_path: Path, finished_chain: tuple[Chain, Outcome]) -> None:
    """Nobody writes into the pipe, so to open it would take for ever."""
    chain, outcome = finished_chain
    shutil.copytree(chain.directory / "store", tmp_path / "store", symlinks=True)
    pipe, loop = (tmp_path / "store" / name / outcome.key(name) for name in ("reward", "sft"))
    (loop / "loop").symlink_to("loop")
    (pipe / MANIFEST).unlink()
    os.mkfifo(pipe / MANIFEST)
    checkpoint = tmp_path / "store" / "sft" / f".{loop.name}.checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    os.mkfifo(checkpoint / MANIFEST)
    told = [said for said in complaints(tmp_path / "store") if said is not None]
    found = {said.partition(" ")[0].rstrip(":"): said for said in told}
    assert len(told) == 3
    assert f"{loop}: loop leads out of the directory, or to itself. It was tampered" in found[str(loop)]
    assert f"{pipe} is damaged: its manifest.json is no regular file. The next" in found[str(pipe)]
    assert "it is no regular file" in found[str(checkpoint)]


def test_an_unlisted_link_leads_out(tmp_path: Path, finished_chain: tuple[Chain, Outcome]) -> None:
    """transformers reads files that no manifest names, where they exist."""
    _, outcome = finished_chain
    artifact = tmp_path / "sft" / outcome.key("sft")
    shutil.copytree(outcome.artifact("sft"), artifact)
    store = Store(tmp_path)
    assert store.find("sft", artifact.name) is not None
    (tmp_path / "chat_template.jinja").write_text("evil")
    (artifact / "generation_config.jinja").symlink_to(tmp_path / "chat_template.jinja")
    with pytest.raises(ConfigError, match=r"generation_config\.jinja leads out"):
        store.find("sft", artifact.name)


def test_a_store_may_itself_be_a_link(tmp_path: Path, finished_chain: tuple[Chain, Outcome]) -> None:
    """Large artifacts are kept on another disk."""
    _, outcome = finished_chain
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / outcome.key("sft")).symlink_to(outcome.artifact("sft"))
    assert Store(tmp_path).find("sft", outcome.key("sft")) is not None


def test_a_checkpoints_name_is_its_directorys(tmp_path: Path) -> None:
    sign(tmp_path, {"format": CHECKPOINT_FORMAT, "name": "../elsewhere", "files": {}})
    assert verify_checkpoint(tmp_path) == (None, f"{MANIFEST} belongs to ../elsewhere")


@pytest.mark.parametrize("name", ["../out", "a/b", "/abs", "..", ".hidden", "a\\b", "a b"])
def test_a_run_is_one_directory_below_runs(finished_chain: tuple[Chain, Outcome], name: str) -> None:
    chain, _ = finished_chain
    outcome = chain.run(f"run_name='{name}'")
    assert outcome.code == 2
    assert outcome.err.startswith("Error: run_name=")


@pytest.mark.parametrize(
    "override",
    ["stage=../sft", "stage=[/sft]", "force=[../sft]", "+../evil._target_=x", "+a/b.c=1", "'+a/b.c=1'"],
)
def test_a_stages_name_has_no_separators(finished_chain: tuple[Chain, Outcome], override: str) -> None:
    chain, _ = finished_chain
    outcome = chain.run(override)
    assert outcome.code == 2
    assert outcome.err.startswith("Error: ")
