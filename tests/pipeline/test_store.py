"""The store: keys, atomic publishing, explanations, and two processes that want the same artifact."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from helpers.store import RECIPE, manifest_of, publish
from rlhf.config import ConfigError
from rlhf.data.roles import ROLES
from rlhf.digests import file_digest
from rlhf.disk import content_of
from rlhf.locks import HeldError, Lock
from rlhf.pipeline.store import KEY_LENGTH, Store, recipe_key
from rlhf.pipeline.why import in_words


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "deep" / "store")


def test_a_key_does_not_depend_on_the_order_of_the_recipe() -> None:
    backwards = json.loads(json.dumps(RECIPE), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert list(backwards) != list(RECIPE)
    assert recipe_key(backwards) == recipe_key(RECIPE)
    assert len(recipe_key(RECIPE)) == KEY_LENGTH


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "reward"}, {"version": 2}, {"knobs": {"epochs": 2.0, "optim": {"lr": 3e-5, "eps": 1e-5}}},
        {"knobs": {"epochs": 2.0}}, {"external": {"sft": "x"}}, {"inputs": {"prepare": "fedcba9876543210"}},
        {"inputs": {}}, {"data": {"sft": "d2"}}, {"data": {"reward": "d1"}}, {"model": "m2"}, {"seed": 1},
        {"dtype": "bfloat16"}, {"more": None},
    ],
    ids=str,
)  # fmt: skip
def test_each_ingredient_changes_the_key(change: dict[str, Any]) -> None:
    assert recipe_key({**RECIPE, **change}) != recipe_key(RECIPE)


def test_what_was_published_is_found_with_all_that_is_known_of_it(store: Store) -> None:
    published = publish(store)
    found = store.find("sft", recipe_key(RECIPE))
    assert found == published
    assert found is not None
    assert found.key == found.path.name == recipe_key(RECIPE)
    assert found.manifest.recipe == RECIPE
    assert found.manifest.metrics == {"loss": 1.5}
    assert found.manifest.files == {"part/model.bin": file_digest(found.path / "part" / "model.bin")}
    assert store.find("sft", "0" * KEY_LENGTH) is None
    assert store.find("reward", recipe_key(RECIPE)) is None


def test_figures_that_are_not_finite_come_back(store: Store) -> None:
    publish(store, metrics={"nan": math.nan, "up": math.inf, "down": -math.inf})
    found = store.find("sft", recipe_key(RECIPE))
    assert found is not None
    assert math.isnan(found.manifest.metrics["nan"])
    assert (found.manifest.metrics["up"], found.manifest.metrics["down"]) == (math.inf, -math.inf)


def test_nothing_can_be_found_before_the_rename(store: Store) -> None:
    key = recipe_key(RECIPE)
    with store.lock("sft", key):
        scratch = store.scratch("sft", key)
        (scratch / "model.bin").write_text("half")
        (scratch / "manifest.json").write_text(manifest_of().model_dump_json())  # killed before the rename
        assert store.find("sft", key) is None
    assert explained(store, "sft", {**RECIPE, "seed": 1}) == "none was made before"
    assert not (store.root / "sft" / key).exists()


def test_the_next_holder_of_the_lock_cleans_up(store: Store) -> None:
    key, other = recipe_key(RECIPE), recipe_key({**RECIPE, "seed": 1})
    with store.lock("sft", key):  # interrupted
        (store.scratch("sft", key) / "half.bin").write_text("half")
    others = store.scratch("sft", other)
    published = publish(store)
    assert sorted(path.name for path in published.path.rglob("*")) == ["manifest.json", "model.bin", "part"]
    assert not list((store.root / "sft").glob(f".{key}.part-*"))
    assert others.exists()  # another artifact's, perhaps being written right now


def test_publishing_again_replaces_the_whole_directory(store: Store) -> None:
    first = publish(store, text="old")
    (first.path / "stray.txt").write_text("x")
    second = publish(store, text="new")
    assert second.path == first.path
    assert (second.path / "part" / "model.bin").read_text() == "new"
    assert not (second.path / "stray.txt").exists()


def test_what_an_interrupted_replacement_left_is_in_nobodys_way(store: Store) -> None:
    path = publish(store, text="old").path
    left = path.with_name(f".{path.name}.replaced")
    left.mkdir()
    (left / "model.bin").write_text("older")
    assert (publish(store, text="new").path / "part" / "model.bin").read_text() == "new"
    assert not left.exists()


def test_a_store_of_another_version_is_refused_by_name(store: Store) -> None:
    path = publish(store).path
    values = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(values | {"format": 99}))
    for look in (store.find, store.set_aside):
        with pytest.raises(
            ConfigError, match=r"store format 99, this version reads 3\. .* remove the directory"
        ):
            look("sft", recipe_key(RECIPE))
    assert path.exists()


def test_a_store_that_cannot_be_made_is_a_mistake_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="store_dir="):
        Store(tmp_path / "file")


def explained(store: Store, stage: str, recipe: dict[str, Any]) -> str:
    return in_words(stage, store.differences(stage, recipe), store.root, ROLES)


def test_explain_names_the_changed_knob(store: Store) -> None:
    assert explained(store, "sft", RECIPE) == "none was made before"
    publish(store)
    changed = {**RECIPE, "knobs": {"epochs": 2.0, "optim": {"lr": 1e-4, "eps": 1e-8}}}
    assert explained(store, "sft", changed) == "sft.optim.lr: 3e-05 -> 0.0001"
    assert explained(store, "reward", changed) == "none was made before"


def test_explain_compares_with_the_most_similar_one(store: Store) -> None:
    publish(store, {**RECIPE, "seed": 7, "model": "m2", "dtype": "bfloat16"})
    publish(store, {**RECIPE, "seed": 7})
    publish(store, {**RECIPE, "seed": 7, "version": 2})
    assert explained(store, "sft", RECIPE) == "seed: 7 -> 0"


def test_explain_tells_new_and_lost_ingredients_and_skips_damage(store: Store) -> None:
    (publish(store, {**RECIPE, "seed": 3}).path / "manifest.json").write_text("{")
    without_model = {name: value for name, value in RECIPE.items() if name != "model"}
    publish(store, without_model)
    assert explained(store, "sft", RECIPE) == "model: null -> m1"


def test_explain_goes_on_where_another_run_replaces_what_it_reads(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced, read = publish(store, {**RECIPE, "seed": 3}).path, content_of
    publish(store, {**RECIPE, "seed": 3, "version": 2})

    def read_too_late(path: Path) -> bytes:
        if path.parent == replaced:
            replaced.rename(replaced.with_name(f".{replaced.name}.replaced"))
        return read(path)

    monkeypatch.setattr("rlhf.pipeline.store.content_of", read_too_late)
    assert explained(store, "sft", RECIPE) == "seed: 3 -> 0; version: 2 -> 1"


def make_or_take(root: str, start: Any, results: Any) -> None:
    """What the pipeline does for one stage: under the lock, take the artifact or make it."""
    store, key = Store(Path(root)), recipe_key(RECIPE)
    start.wait()  # both want it at the same moment
    with store.lock("sft", key):
        found = store.find("sft", key)
        if found is None:
            scratch = store.scratch("sft", key)
            (scratch / "model.bin").write_bytes(b"x" * 5_000_000)
            found = store.publish(scratch, manifest_of())
            results.put(("made", str(found.path)))
        else:
            results.put(("taken", str(found.path)))


def test_two_processes_make_an_artifact_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(3), context.Queue()
    workers = [
        context.Process(target=make_or_take, args=(str(tmp_path), start, results), daemon=True)
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    found = sorted(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert [how for how, _ in found] == ["made", "taken", "taken"]
    assert len({path for _, path in found}) == 1


def die_while_making(root: str, reached: Any) -> None:
    store, key = Store(Path(root)), recipe_key(RECIPE)
    lock = store.lock("sft", key)
    lock.acquire()
    (store.scratch("sft", key) / "half.bin").write_text("half")
    reached.set()
    multiprocessing.Event().wait()  # until killed
    lock.release()


def test_a_killed_process_frees_the_lock_and_leaves_no_artifact(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    reached = context.Event()
    worker = context.Process(target=die_while_making, args=(str(tmp_path), reached), daemon=True)
    worker.start()
    assert reached.wait(timeout=60)
    store = Store(tmp_path)
    was_free = try_lock(store.lock("sft", recipe_key(RECIPE)))
    worker.kill()
    worker.join()
    assert not was_free
    assert store.find("sft", recipe_key(RECIPE)) is None
    published = publish(store)  # does not wait for the dead
    assert not (published.path / "half.bin").exists()
    assert not list((tmp_path / "sft").glob(".*part-*"))


def test_whoever_the_umask_allows_can_read_what_is_published(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        store, key = Store(tmp_path), recipe_key(RECIPE)
        with store.lock("sft", key):
            scratch = store.scratch("sft", key)
            (scratch / "adapter").mkdir()
            for weights in (scratch / "model.safetensors", scratch / "adapter" / "model.safetensors"):
                weights.touch(mode=0o600)
            artifact = store.publish(scratch, manifest_of(RECIPE))
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in artifact.path.rglob("*")}
    assert modes == {"adapter": "0o750", "model.safetensors": "0o640", "manifest.json": "0o640"}


def test_a_note_of_a_holder_that_was_killed_is_not_believed(tmp_path: Path) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    lock, waiting = (Lock(tmp_path / "lock") for _ in range(2))
    with lock:
        assert waiting.holder().startswith(f"pid {os.getpid()} on host {socket.gethostname()}, started ")
        note = json.loads((tmp_path / "lock.holder").read_text())
        for change in ({"pid": child.pid}, {"started": note["started"] - 60}):
            (tmp_path / "lock.holder").write_text(json.dumps(note | change))
            assert waiting.holder() == "which one is not known"
        (tmp_path / "lock.holder").write_text(json.dumps(note | {"pid": child.pid, "host": "n7"}))
        with pytest.raises(HeldError, match=f"^pid {child.pid} on host n7, started "):
            waiting.acquire(timeout=0)


def try_lock(lock: Any) -> bool:
    try:
        lock.acquire(timeout=0)
    except TimeoutError:
        return False
    lock.release()
    return True
