"""Damage of any kind in a store is found, named, set aside, and rebuilt."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from helpers.chains import SETTINGS, SOURCES, STAGES, Chain, Outcome, run_main
from helpers.experiments import build
from helpers.jobs import on_cpu
from helpers.store import RECIPE, publish
from rlhf import digests
from rlhf.config import ConfigError
from rlhf.data.prepared import PreparedData
from rlhf.digests import digest_of, directory_digest, file_digest
from rlhf.models.base import ModelConfig, check_hub_files
from rlhf.pipeline import store as artifacts
from rlhf.pipeline.runner import Pipeline
from rlhf.pipeline.store import DamagedError, Store, read_manifest, recipe_key, write_manifest
from rlhf.training.checkpoint import CHECKPOINT_FORMAT

KEY = recipe_key(RECIPE)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def flip(path: Path) -> None:
    """Change a bit in the middle of a file, which keeps its size and its mtime."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_unnoticed(artifact: Path, name: str) -> None:
    """Flip a bit as on the disk itself: size, times and inode do not change."""
    flip(artifact / name)
    memory = artifact.with_name(f".{artifact.name}.digests.json")
    known = json.loads(memory.read_text())
    known[name]["state"] = [*digests._state((artifact / name).stat())]
    memory.write_text(json.dumps(known))


def flip_weights(path: Path) -> str:
    flip(path / "part" / "model.bin")
    return "part/model.bin is not what was written"


def cut_weights(path: Path) -> str:
    os.truncate(path / "part" / "model.bin", 3)
    return "part/model.bin is not what was written"


def remove_weights(path: Path) -> str:
    (path / "part" / "model.bin").unlink()
    return "part/model.bin is missing"


def change_a_metric(path: Path) -> str:
    """Metrics matter, because PPO normalises with those of `generate`."""
    text = (path / "manifest.json").read_text()
    assert '"loss": 1.5' in text
    (path / "manifest.json").write_text(text.replace('"loss": 1.5', '"loss": 2.5'))
    return "its manifest.json is not what was written"


def rename_a_field(path: Path) -> str:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"digest"', '"digesu"'))
    return "its manifest.json is not what was written"


def cut_manifest(path: Path) -> str:
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:50])
    return "its manifest.json cannot be read"


def empty_manifest(path: Path) -> str:
    (path / "manifest.json").write_text("{}")
    return "its manifest.json cannot be read"


def remove_manifest(path: Path) -> str:
    (path / "manifest.json").unlink()
    return "manifest.json is missing"


DAMAGES = [
    flip_weights, cut_weights, remove_weights, change_a_metric, rename_a_field, cut_manifest, empty_manifest,
    remove_manifest,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_set_aside_by_name(store: Store, damage: Callable[[Path], str]) -> None:
    path = publish(store).path
    assert store.set_aside("sft", KEY) is None
    words = damage(path)
    with pytest.raises(DamagedError) as caught:
        store.find("sft", KEY)
    assert str(caught.value).startswith(f"{path} is damaged: {words}. ")
    told = store.set_aside("sft", KEY)
    (aside,) = path.parent.glob(f".{KEY}.damaged-*")
    assert told == f"{path} is damaged ({words}): set aside as {aside}"
    assert store.find("sft", KEY) is None and not path.exists() and any(aside.iterdir())
    assert publish(store).path == path
    assert store.set_aside("sft", KEY) is None


def test_files_too_many_are_set_aside_alone(store: Store) -> None:
    """transformers reads some files, such as adapter_config.json, merely because they are there."""
    published = publish(store)
    (published.path / "adapter_config.json").write_text("{}")
    (published.path / "part" / "more.json").write_text("{}")
    (published.path / ".nfs0001").write_text("of a file that is open elsewhere")
    (published.path / ".cache").mkdir()
    (published.path / ".cache" / "index.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"adapter_config\.json is not one of its files"):
        store.find("sft", KEY)
    assert store.set_aside("sft", KEY) is not None
    (aside,) = published.path.parent.glob(f".{KEY}.damaged-*")
    assert sorted(path.name for path in aside.rglob("*")) == ["adapter_config.json", "more.json", "part"]
    assert store.find("sft", KEY) == published  # the rest is what was published


def test_two_directories_that_changed_places_are_both_found(store: Store) -> None:
    other = {**RECIPE, "seed": 1}
    paths = [publish(store).path, publish(store, other).path]
    paths[0].rename(between := paths[0].with_name("between"))
    paths[1].rename(paths[0])
    between.rename(paths[1])
    for recipe, name in ((RECIPE, recipe_key(other)), (other, KEY)):
        with pytest.raises(DamagedError, match=rf"its manifest\.json belongs to sft/{name}"):
            store.find("sft", recipe_key(recipe))


def bytes_read() -> int:
    """Bytes that this process has read since its start."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_what_was_read_once_is_not_read_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SETTLED_NANOSECONDS", -1)  # as if the files were older
    path = publish(store, text="x" * 4_000_000).path
    digests._digests_read.clear()  # as a new process
    before = bytes_read()
    found = store.find("sft", KEY)
    assert found is not None
    assert bytes_read() - before < 1_000_000
    store.verify(found, read=True)
    assert bytes_read() - before > 4_000_000
    store.verify(found, read=True)  # by this process, which has read it
    assert bytes_read() - before < 5_000_000
    flip_weights(path)
    with pytest.raises(DamagedError, match=r"part/model\.bin is not what was written"):
        store.find("sft", KEY)


def test_a_file_that_was_just_written_is_not_remembered(store: Store) -> None:
    """Written again in the same tick of the file system's clock, it would have the same times."""
    path = publish(store).path
    store.find("sft", KEY)
    assert not path.with_name(f".{KEY}.digests.json").exists()


def test_damage_below_the_file_system_is_found_by_reading(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is going to be loaded is read, and from then on nobody trusts it."""
    monkeypatch.setattr(digests, "SETTLED_NANOSECONDS", -1)
    found = publish(store)
    flip_unnoticed(found.path, "part/model.bin")
    assert store.find("sft", KEY) == found
    with pytest.raises(DamagedError, match=r"part/model\.bin is not what was written"):
        store.verify(found, read=True)
    with pytest.raises(DamagedError, match=r"part/model\.bin is not what was written"):
        store.find("sft", KEY)


@pytest.mark.parametrize("content", ["", "[1]", '{"part/model.bin": 3}', '{"part/model.bin": {"state": []}}'])
def test_a_damaged_memory_costs_a_reading(
    store: Store, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NANOSECONDS", -1)
    found = publish(store)
    memory = found.path.with_name(f".{KEY}.digests.json")
    known = memory.read_text()
    memory.write_text(content)
    assert store.find("sft", KEY) == found
    assert memory.read_text() == known
    memory.write_text(known.replace(found.manifest.files["part/model.bin"], "0" * 64))
    assert store.find("sft", KEY) == found


def test_a_directory_outside_is_remembered_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SETTLED_NANOSECONDS", -1)
    model = store.root.parent / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"x" * 2_000_000)
    first = directory_digest(model, store.digest_cache(model))
    assert first == directory_digest(model)
    digests._digests_read.clear()
    before = bytes_read()
    assert directory_digest(model, store.digest_cache(model)) == first
    assert bytes_read() - before < 1_000_000
    flip(model / "model.safetensors")
    assert directory_digest(model, store.digest_cache(model)) not in {first, None}
    assert file_digest(model / "model.safetensors") != file_digest(store.digest_cache(model))


def test_models_of_the_users_are_not_read_at_every_start(
    finished_chain: tuple[Chain, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NANOSECONDS", -1)
    directories = {name: tmp_path / name for name in ("policy", "start", "judge", "plain")}
    for name, directory in directories.items():
        made_by = "reward" if name == "judge" else "sft"
        shutil.copytree(finished_chain[1].artifact(made_by), directory)
        (directory / "manifest.json").unlink()
        (directory / "weights.bin").write_bytes(b"x" * 5_000_000)
    found = build(
        "model=tiny", "stage=[reward,ppo,compare]", f"store_dir={tmp_path}/store",
        f"runs_dir={tmp_path}/runs",
        f"ppo.init={directories['policy']}", f"reward.init={directories['start']}",
        f"ppo.reward=model:{directories['judge']}", f"compare.artifacts=[{directories['plain']}]",
    )  # fmt: skip

    def start() -> tuple[int, dict[str, dict[str, str]]]:
        digests._digests_read.clear()  # as a new process
        before = bytes_read()
        pipeline = Pipeline(found, "run", Console(quiet=True), on_cpu())
        return bytes_read() - before, pipeline.external_digests

    first, again = start(), start()
    assert first[0] > 20_000_000
    assert again[0] < 4_000_000
    assert again[1] == first[1]
    flip(directories["judge"] / "weights.bin")
    assert 5_000_000 < start()[0] < 9_000_000


def test_what_cannot_be_set_aside_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = publish(store).path
    flip_weights(path)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", refuse)  # root may write everywhere
    with pytest.raises(ConfigError, match=r"cannot be set aside \(Read-only file system\): remove it"):
        store.set_aside("sft", KEY)


# The chain: what loads nothing else is cheap, so each copy of the finished one is damaged and run again.


@pytest.fixture
def copy(as_finished: Path, tmp_path: Path) -> Chain:
    shutil.copytree(as_finished, tmp_path / "copy", symlinks=True)
    return Chain(tmp_path / "copy")


def test_a_flipped_bit_in_the_sft_model_is_no_longer_loaded(
    finished_chain: tuple[Chain, Outcome], copy: Chain
) -> None:
    first = finished_chain[1]
    path = copy.directory / "store" / "sft" / first.key("sft")
    flip(path / "model.safetensors")
    outcome = copy.run("why=true")
    words = r"is damaged (model.safetensors is not what was written): set aside as "
    assert f"sft: store/sft/{first.key('sft')} {words}" in outcome.out
    assert f"sft runs ({first.key('sft')}): what was there is damaged" in outcome.out
    assert outcome.statuses == dict.fromkeys(STAGES, "reused") | {"sft": "ran"}  # bit for bit the same again
    assert file_digest(path / "model.safetensors") == file_digest(first.artifact("sft") / "model.safetensors")
    assert len(list(path.parent.glob(".*.damaged-*"))) == 1


def test_a_cut_file_of_prepared_rows_is_made_anew(finished_chain: tuple[Chain, Outcome], copy: Chain) -> None:
    """Cut behind a piece, it reads well."""
    first = finished_chain[1]
    path = copy.directory / "store" / "prepare" / first.key("prepare") / "sft.train.arrow"
    whole = path.read_bytes()
    data = PreparedData(path.parent)
    data.write("sft", "train", [*data.rows("sft", "train")[:3]])
    outcome = copy.run("stage=sft")
    assert outcome.statuses == {"prepare": "ran", "sft": "reused"}
    assert path.read_bytes() == whole


def test_a_damaged_base_model_is_made_anew(finished_chain: tuple[Chain, Outcome], copy: Chain) -> None:
    (path,) = (copy.directory / "store" / "base").glob("[!.]*")
    flip(path / "tokenizer.json")
    outcome = copy.run("stage=sft")
    assert "base: store/base/" in outcome.out and "(tokenizer.json is not what was written)" in outcome.out
    assert outcome.statuses == {"prepare": "reused", "sft": "reused"}


def test_what_was_made_from_another_result_is_made_anew(
    finished_chain: tuple[Chain, Outcome], copy: Chain
) -> None:
    """As after damage, or an interrupted force=[sft], where the SFT model came out otherwise."""
    first = finished_chain[1]
    path = copy.directory / "store" / "sft" / first.key("sft")
    other = copy.run("stage=sft", "sft.optim.lr=1e-4").artifact("sft")
    manifest = read_manifest(path)
    shutil.copyfile(other / "model.safetensors", path / "model.safetensors")
    manifest.files["model.safetensors"] = file_digest(path / "model.safetensors")
    write_manifest(path, manifest)
    outcome = copy.run("stage=[sft,reward]", "why=true")
    assert outcome.statuses == {"prepare": "reused", "sft": "reused", "reward": "ran"}
    assert "an input was rebuilt, with another result" in outcome.out
    assert copy.run("stage=[sft,reward]").statuses["reward"] == "reused"


def test_damage_behind_what_is_remembered_is_mended_by_the_run_that_finds_it(
    finished_chain: tuple[Chain, Outcome], copy: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NANOSECONDS", -1)
    first, store = finished_chain[1], copy.directory / "store"
    sound = file_digest((path := store / "sft" / first.key("sft")) / "model.safetensors")
    assert copy.run("stage=sft").code == 0
    flip_unnoticed(path, "model.safetensors")
    outcome = copy.run("stage=ppo", "ppo.kl.coef=0.3", "why=true")
    assert outcome.code == 0, outcome.err
    (aside,) = path.parent.glob(".*.damaged-*")
    words = f"is damaged (model.safetensors is not what was written): set aside as store/sft/{aside.name}."
    told = f"sft: store/sft/{first.key('sft')} {words} The run starts again and rebuilds it."
    assert outcome.out.count(told) == 1
    assert outcome.statuses == dict.fromkeys(STAGES[:-1], "reused") | {"sft": "ran", "ppo": "ran"}
    assert file_digest(path / "model.safetensors") == sound
    gates = [(gate["stage"], gate["name"]) for gate in outcome.summary["gates"]]
    assert len(gates) == len({*gates})
    lines = [json.loads(line) for line in (outcome.directory / "metrics.jsonl").read_text().splitlines()]
    summaries = [line["stage"] for line in lines if line.get("summary")]
    assert sorted(summaries) == sorted(STAGES[:-1])  # nothing is said twice


def test_what_was_made_from_damage_is_made_anew_by_the_same_run(
    finished_chain: tuple[Chain, Outcome], copy: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SFT model in the store is another one than the stage makes, and so is what was made from it."""
    monkeypatch.setattr(digests, "SETTLED_NANOSECONDS", -1)
    path = copy.directory / "store" / "sft" / finished_chain[1].key("sft")
    other = copy.run("stage=sft", "sft.optim.lr=1e-4").artifact("sft")
    manifest = read_manifest(path)
    shutil.copyfile(other / "model.safetensors", path / "model.safetensors")
    manifest.files["model.safetensors"] = file_digest(path / "model.safetensors")
    write_manifest(path, manifest)
    assert copy.run("stage=[sft,reward]").statuses["reward"] == "ran"
    flip_unnoticed(path, "model.safetensors")
    outcome = copy.run("stage=[sft,reward,ppo]", "force=[ppo]")
    assert outcome.code == 0, outcome.err
    ran = dict.fromkeys(("sft", "reward", "ppo"), "ran")
    assert outcome.statuses == {"prepare": "reused", "generate": "reused"} | ran  # of the sound model's


def test_a_base_model_and_rows_that_are_damaged_unnoticed_are_mended_too(
    copy: Chain, finished_chain: tuple[Chain, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NANOSECONDS", -1)
    assert copy.run("stage=sft").code == 0
    (base,) = (copy.directory / "store" / "base").glob("[!.]*")
    prepared = copy.directory / "store" / "prepare" / finished_chain[1].key("prepare")
    flip_unnoticed(base, "model.safetensors")
    flip_unnoticed(prepared, "sft.train.arrow")
    outcome = copy.run("stage=sft", "sft.optim.lr=1e-4")
    assert outcome.code == 0, outcome.err
    assert outcome.statuses == {"prepare": "ran", "sft": "ran"}
    assert outcome.out.count("The run starts again and rebuilds it.") == 2
    assert len([*base.parent.glob(".*.damaged-*"), *prepared.parent.glob(".*.damaged-*")]) == 2


def test_the_model_below_an_adapter_is_mended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers is an SFT model that is nothing but virtual tokens before the base model."""
    monkeypatch.setattr(digests, "SETTLED_NANOSECONDS", -1)
    chain, prompt = Chain(tmp_path), ("sft.peft=prompt", "gates=warn", "generate.reward=null")
    assert chain.run("stage=sft", *prompt).code == 0
    (base,) = (tmp_path / "store" / "base").glob("[!.]*")
    flip_unnoticed(base, "model.safetensors")
    outcome = chain.run("stage=generate", *prompt)
    assert outcome.code == 0, outcome.err
    assert f"base: store/base/{base.name} is damaged" in outcome.out
    assert outcome.statuses == {"prepare": "reused", "sft": "reused", "generate": "ran"}


@pytest.mark.slow
def test_two_ranks_mend_it_together(
    finished_chain: tuple[Chain, Outcome], copy: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NANOSECONDS", -1)
    path = copy.directory / "store" / "sft" / finished_chain[1].key("sft")
    assert copy.run("stage=sft").code == 0
    flip_unnoticed(path, "model.safetensors")
    two = ("stage=reward", "reward.optim.lr=1e-4", "launch.processes=2", "run_name=two")
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", *SETTINGS, *SOURCES, *two],
        cwd=copy.directory, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("starts again") == 1
    assert Outcome(0, "", "", copy.directory / "runs" / "two").statuses == {
        "prepare": "reused", "sft": "ran", "reward": "ran"
    }  # fmt: skip


def test_a_disk_that_damages_everything_ends_the_run(
    copy: Chain, finished_chain: tuple[Chain, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NANOSECONDS", -1)
    assert copy.run("stage=sft").code == 0
    path, publish = copy.directory / "store" / "sft" / finished_chain[1].key("sft"), Store.publish

    def publish_on_a_bad_disk(
        store: Store, scratch: Path, manifest: artifacts.Manifest
    ) -> artifacts.Artifact:
        artifact = publish(store, scratch, manifest)
        if manifest.stage == "sft":
            flip_unnoticed(artifact.path, "model.safetensors")
        return artifact

    monkeypatch.setattr(Store, "publish", publish_on_a_bad_disk)
    flip_unnoticed(path, "model.safetensors")
    outcome = copy.run("stage=ppo", "ppo.kl.coef=0.3")
    assert outcome.code == 2
    assert outcome.out.count("The run starts again and rebuilds it.") == 1
    assert f"{path.name} is damaged again (model.safetensors is not what was written), though" in outcome.err
    assert "check that disk and this machine's memory, or use another store_dir" in outcome.err


def test_a_local_model_that_is_damaged_unnoticed_is_not_loaded(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its digests are remembered, but before a stage loads it it is read."""
    monkeypatch.setattr(digests, "SETTLED_NANOSECONDS", -1)
    shutil.copytree(tiny_model, model := tmp_path / "model")
    local = ("model=local", f"model.path={model}", "gates=warn", "precision=fp32")
    chain = Chain(tmp_path)
    assert chain.run("stage=prepare", *local).code == 0
    flip(model / "model.safetensors")
    (memory,) = (tmp_path / "store" / ".digests").iterdir()
    known = json.loads(memory.read_text())
    known["model.safetensors"]["state"] = [*digests._state((model / "model.safetensors").stat())]
    memory.write_text(json.dumps(known))
    refused = chain.run("stage=sft", *local)
    assert refused.code == 2
    assert f"sft: model.path={model}: changed since this run began" in refused.err
    assert chain.run("stage=sft", *local).statuses == {"prepare": "ran", "sft": "ran"}  # another model


def test_a_start_of_the_users_that_is_damaged_unnoticed_is_not_loaded(
    finished_chain: tuple[Chain, Outcome], copy: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NANOSECONDS", -1)
    shutil.copytree(finished_chain[1].artifact("sft"), mine := copy.directory / "mine")
    (mine / "manifest.json").unlink()
    rate = ("stage=generate", f"ppo.init={mine}", "generate.reward=null")
    assert copy.run(*rate).code == 0
    flip(mine / "model.safetensors")
    (memory,) = (copy.directory / "store" / ".digests").iterdir()
    known = json.loads(memory.read_text())
    known["model.safetensors"]["state"] = [*digests._state((mine / "model.safetensors").stat())]
    memory.write_text(json.dumps(known))
    assert copy.run(*rate).statuses["generate"] == "reused"  # which loads nothing
    refused = copy.run(*rate, "generate.temperature=0.5", "ppo.temperature=0.5")
    assert refused.code == 2
    assert "generate: init: changed since this run began" in refused.err


def test_a_damaged_file_in_the_hubs_cache_is_named(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "commit"
    for directory in (blobs, snapshot):
        directory.mkdir(parents=True)
    config = ModelConfig(kind="hub", id="them/it")
    known = {  # sha256sum and git hash-object of these bytes
        "model.safetensors": ("9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c", b"weights"),
        "config.json": ("9e26dfeeb6e641a33dae4961196235bdb965b21b", b"{}"),
    }
    for name, (blob, content) in known.items():
        (blobs / blob).write_bytes(content)
        (snapshot / name).symlink_to(blobs / blob)
    (snapshot / "note.txt").write_text("not the Hub's")
    check_hub_files(config, snapshot, tmp_path / "memory.json")
    for name, (blob, content) in known.items():
        flip(blobs / blob)
        with pytest.raises(ConfigError, match=rf"model\.id=them/it: {name} in the Hub's cache is damaged"):
            check_hub_files(config, snapshot, tmp_path / "memory.json")
        (blobs / blob).write_bytes(content)


# python -m rlhf verify


def run_verify(directory: Path, *arguments: str) -> Outcome:
    return run_main(directory, ["verify", *arguments], directory)


def test_verify_reads_a_whole_store(finished_chain: tuple[Chain, Outcome], copy: Chain) -> None:
    sound = run_verify(copy.directory)
    assert (sound.code, sound.err) == (0, "")
    assert sound.out == "7 artifacts and checkpoints in store: all as they were written.\n"

    first, stages = finished_chain[1], copy.directory / "store"
    flip(stages / "sft" / first.key("sft") / "model.safetensors")
    (stages / "reward" / first.key("reward") / "manifest.json").unlink()
    shutil.copytree(stages / "ppo" / first.key("ppo"), stages / "ppo" / "0123456789abcdef")
    damaged = run_verify(copy.directory, "store_dir=store")
    assert (damaged.code, damaged.err) == (3, "")
    lines = damaged.out.splitlines()
    assert [line.partition(". ")[0] for line in lines] == [
        f"store/ppo/0123456789abcdef is damaged: its manifest.json belongs to ppo/{first.key('ppo')}",
        f"store/reward/{first.key('reward')} is damaged: manifest.json is missing",
        f"store/sft/{first.key('sft')} is damaged: model.safetensors is not what was written",
        "8 artifacts and checkpoints in store: 3 damaged.",
    ]


def test_verify_reads_what_is_remembered_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SETTLED_NANOSECONDS", -1)
    found = publish(store)
    flip_unnoticed(found.path, "part/model.bin")
    assert store.find("sft", KEY) == found
    outcome = run_verify(store.root.parent)
    assert outcome.code == 3
    assert f"store/sft/{KEY} is damaged: part/model.bin is not what was written." in outcome.out
    with pytest.raises(DamagedError):  # and from now on everybody knows
        store.find("sft", KEY)


def test_verify_reads_checkpoints(store: Store) -> None:
    checkpoint = store.checkpoints("sft", KEY) / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "loop.pt").write_text("x")
    values = {"format": CHECKPOINT_FORMAT, "name": checkpoint.name}
    values["files"] = {"loop.pt": file_digest(checkpoint / "loop.pt")}
    (checkpoint / "manifest.json").write_text(json.dumps(values | {"digest": digest_of(values)}))
    assert run_verify(store.root.parent).code == 0
    flip(checkpoint / "loop.pt")
    outcome = run_verify(store.root.parent)
    assert outcome.code == 3
    assert outcome.out.startswith(f"store/sft/.{KEY}.checkpoints/step-00000001 is damaged: loop.pt is not")


@pytest.mark.parametrize("content", ["null", "[]"])
def test_a_checkpoint_whose_manifest_is_no_manifest_is_damaged(store: Store, content: str) -> None:
    checkpoint = store.checkpoints("sft", KEY) / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(content)
    assert run_verify(store.root.parent).code == 3
    assert store.checkpoint_progress("sft", KEY) == (0.0, 0.0)
    assert store.stale_checkpoints("sft", RECIPE) is None


def test_a_file_that_cannot_be_read_is_named() -> None:
    """Nothing lies at a process's first byte: the kernel answers EIO, as for a bad block."""
    with pytest.raises(OSError, match=r"Input/output error: '/proc/self/mem'"):
        file_digest(Path("/proc/self/mem"))


def test_control_characters_in_the_name_of_damage_are_shown(store: Store) -> None:
    path = publish(store).path
    (path / "a\x1b[2J").touch()
    with pytest.raises(DamagedError) as caught:
        store.find(path.parent.name, path.name)
    assert "a\\x1b[2J is not one of its files" in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("store_dir=nowhere", "store_dir=nowhere: there is no"),
        ("stage=sft", "verify stage=sft: it takes store_dir=VALUE."),
    ],
)
def test_verify_tells_what_it_cannot_do(tmp_path: Path, argument: str, words: str) -> None:
    outcome = run_verify(tmp_path, argument)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err
    assert not list(tmp_path.iterdir())


def test_verify_needs_no_torch(store: Store) -> None:
    publish(store)
    code = "import sys; from rlhf.__main__ import main; main(); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "verify", f"store_dir={store.root}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"1 artifacts and checkpoints in {store.root}: all as they were written.\n"
