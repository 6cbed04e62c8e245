"""SIGKILL at any moment, and every way a checkpoint can be damaged: the same command goes on, bit for bit.

Most kills come from inside, right behind a checkpoint's rename; one in each training stage from outside."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from helpers.chains import (
    GROUPS,
    PATIENCE_SECONDS,
    RealChain,
    children_of,
    kill,
    ranks_of,
    wait_until,
)
from helpers.warm import KillAt

KILLS = int(os.environ.get("RLHF_KILLS", "6"))
"""Of each kind; `make crash-test` takes 50."""
EACH_STEP = ("checkpoint.every_steps=1",)
ZERO3 = ("launch.processes=2", "zero=zero3")
FSDP2 = ("launch.processes=2", "zero=fsdp2")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> RealChain:
    return RealChain(tmp_path_factory.mktemp("killed"))


def assert_same(chain: RealChain, undisturbed: str, name: str) -> None:
    for stage in TRAINING_STAGES:
        assert chain.weights(name, stage) == chain.weights(undisturbed, stage), stage
    assert chain.metrics(name) == chain.metrics(undisturbed)  # no gap, nothing twice
    assert not list(chain.store(name).glob("*/.*.checkpoints")), "what only the way there needed is gone"


TRAINING_STAGES = ("sft", "reward", "ppo")
IN_EACH_STAGE: dict[str, tuple[str, ...]] = {
    "plain": (),
    "zero3": ZERO3,
    "fsdp2_bf16": (*FSDP2, "sft.peft=lora", "precision=bf16", "ppo.frozen_placement=sharded"),
}
IN_PPO: dict[str, tuple[str, ...]] = {
    "two_ranks": ("launch.processes=2",),
    "zero3_lora_bf16": (
        *ZERO3, "ppo.peft=lora", "sft.peft=lora", "precision=bf16", "ppo.frozen_placement=sharded",
    ),
    "fsdp2": FSDP2,
    "background": ("checkpoint.background=true",),
    "fsdp2_background": (*FSDP2, "checkpoint.background=true"),
    "zero1": ("launch.processes=2", "zero=zero1"),
    "zero2": ("launch.processes=2", "zero=zero2"),
    "lora_mix_average": (
        "ppo.peft=lora", "ppo.ptx.coef=0.5", "ppo.kl.controller=adaptive",
        "ppo.score.normalize=running", "ppo.critic.init=sft", "precision=bf16",
    ),
}  # fmt: skip
"""Two models learn there: what the other stages keep is a part of it."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [*IN_EACH_STAGE, *IN_PPO])
def test_killed_and_resumed_it_ends_as_if_undisturbed(chain: RealChain, name: str) -> None:
    overrides = (IN_EACH_STAGE | IN_PPO)[name]
    undisturbed = chain.run_once(*overrides)
    for stage in TRAINING_STAGES if name in IN_EACH_STAGE else ("ppo",):
        if name == "plain":
            kill(chain.start_until(stage, 2, name, *EACH_STEP, *overrides))
        else:
            chain.run_killed(stage, 2, name, *EACH_STEP, *overrides)
    out, _ = chain.run(name, *EACH_STEP, *overrides)
    assert "ppo: continues from step " in out
    assert_same(chain, undisturbed, name)


@pytest.mark.slow
def test_killed_without_a_critic_it_ends_as_if_undisturbed(chain: RealChain) -> None:
    settings = (*GROUPS, *EACH_STEP)
    undisturbed = chain.run_once(*settings)
    chain.run_killed("grpo", 2, "groups", *settings)
    out, _ = chain.run("groups", *settings)
    assert "grpo: continues from step " in out
    assert chain.weights("groups", "grpo") == chain.weights(undisturbed, "grpo")
    assert chain.metrics("groups") == chain.metrics(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "before", "after", "stages"),
    [
        ("zero3", 2, 1, TRAINING_STAGES),
        ("zero2", 1, 2, ("ppo",)),
        ("fsdp2", 4, 2, ("ppo",)),
        ("none", 2, 4, ("ppo",)),
    ],
)
def test_on_another_number_of_ranks_it_goes_on_with_the_same_losses(
    chain: RealChain, zero: str, before: int, after: int, stages: tuple[str, ...]
) -> None:
    name, undisturbed = f"world_{zero}", chain.run_once()
    for stage in stages:
        stopped = chain.start_until(stage, 2, name, *EACH_STEP, f"zero={zero}", f"launch.processes={before}")
        stopped.send_signal(signal.SIGTERM)
        _, err = stopped.communicate()
        assert stopped.returncode == 75, err
        out, _ = chain.run(name, f"stage={stage}", f"zero={zero}", f"launch.processes={after}")
        assert f"{stage}: continues from step " in out
    expected, found = chain.curve(undisturbed), chain.curve(name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-3), key


@pytest.mark.slow
@pytest.mark.parametrize("is_before", [True, False])
def test_killed_at_its_publication_it_is_there_or_not(chain: RealChain, is_before: bool) -> None:
    """Right behind it, what only the way there needed is still there, and nothing but `gc` takes it."""
    undisturbed, name = chain.run_once(*EACH_STEP), f"published_{is_before}"
    process = chain.start(name, *EACH_STEP, kill_at=KillAt(r"/ppo/[0-9a-f]{16}$", is_before=is_before))
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == -signal.SIGKILL
    out, _ = chain.run(name, *EACH_STEP)
    assert ("ppo: continues from step" in out, "ppo reused" in out) == (is_before, not is_before)
    assert bool(list(chain.store(name).glob("ppo/.*.checkpoints"))) == (not is_before)
    assert_same_behind_any_kill(chain, undisturbed, name)


@pytest.mark.slow
def test_killed_at_random_renames_it_never_breaks_and_ends_the_same(chain: RealChain) -> None:
    """Right before or behind one, of a checkpoint or of any other file."""
    longer = ("ppo.steps=30", "ppo.evaluate_every=5", *EACH_STEP)
    undisturbed = chain.run_once(*longer)
    moments, kills, finished = random.Random(0), 0, 0
    chain.run("renames", "stage=[reward,generate]")
    while kills < KILLS:
        moment = KillAt("", moments.randint(1, 100), moments.random() < 0.5)
        process = chain.start("renames", *longer, kill_at=moment)
        _, err = process.communicate(timeout=PATIENCE_SECONDS)
        kills += process.returncode == -signal.SIGKILL
        finished += check_what_is_left(chain, "renames", undisturbed, process.returncode, err)
    chain.run("renames", *longer)
    assert_same_behind_any_kill(chain, undisturbed, "renames")
    print(f"{kills} kills, of runs that ended {finished + 1} times")


@pytest.mark.nightly
def test_killed_at_random_moments_it_never_breaks_and_ends_the_same(chain: RealChain) -> None:
    longer = ("ppo.steps=30", "ppo.evaluate_every=5", *EACH_STEP)
    undisturbed = chain.run_once(*longer)
    chain.run("random", "stage=[reward,generate]")
    moments, kills, finished = random.Random(0), 0, 0
    while kills < KILLS:
        process = chain.start("random", *longer)
        scratch = chain.store("random") / "ppo"
        wait_until(lambda: process.poll() is not None or any(scratch.glob(".*.part-*")), process)  # noqa: B023
        time.sleep(moments.uniform(0.0, 2.0))  # the moment itself is what is tried
        if process.poll() is None:
            kill(process)
        _, err = process.communicate()
        kills += process.returncode == -signal.SIGKILL
        finished += check_what_is_left(chain, "random", undisturbed, process.returncode, err)
    chain.run("random", *longer)
    assert_same_behind_any_kill(chain, undisturbed, "random")
    print(f"{kills} kills, of runs that ended {finished + 1} times")


def assert_same_behind_any_kill(chain: RealChain, undisturbed: str, name: str) -> None:
    """A kill between the publication and the end of its checkpoints leaves these to `gc`."""
    if list(chain.store(name).glob("*/.*.checkpoints")):
        chain.command_of("gc", "yes=true", f"store_dir=store-{name}")
    assert_same(chain, undisturbed, name)


def check_what_is_left(chain: RealChain, name: str, undisturbed: str, code: int | None, errors: str) -> bool:
    """Whether that run was done before it could be killed; then once more from the start."""
    ppo = chain.store(name) / "ppo"
    for artifact in ppo.glob("[!.]*"):
        json.loads((artifact / "manifest.json").read_bytes())  # whole, if it is there at all
    if code == -signal.SIGKILL:
        return False
    assert code == 0, errors
    assert_same_behind_any_kill(chain, undisturbed, name)
    for directory in (ppo, chain.directory / "runs" / name):
        shutil.rmtree(directory)
    chain.run(name, "stage=[reward,generate]")
    return True


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["bit_flipped", "truncated", "manifest", "missing"])
def test_a_damaged_checkpoint_is_named_kept_aside_and_skipped(chain: RealChain, damage: str) -> None:
    name, short = f"damage_{damage}", ("stage=sft",)
    undisturbed = chain.run_once()
    chain.run_killed("sft", 4, name, *EACH_STEP, *short)
    (newest,) = chain.store(name).glob("sft/.*.checkpoints/step-00000004")
    spoil(newest, damage)

    out, _ = chain.run(name, *EACH_STEP, *short)

    assert "checkpoint step-00000004 is damaged" in out
    assert "sft: continues from step 3 " in out
    assert chain.weights(name, "sft") == chain.weights(undisturbed, "sft")


def spoil(checkpoint: Path, damage: str) -> None:
    file = checkpoint / ("manifest.json" if damage == "manifest" else "optimizer.pt")
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "bit_flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "manifest":
        file.write_bytes(content.replace(b'"step": ', b'"step": 1'))
    else:
        file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "is_group"),
    [
        (signal.SIGTERM, False),
        (signal.SIGUSR1, False),
        (signal.SIGINT, False),
        (signal.SIGTERM, True),
    ],
)
def test_a_signal_saves_then_stops_and_the_same_command_goes_on(
    chain: RealChain, signum: signal.Signals, is_group: bool
) -> None:
    """Also of a whole control group: each rank has it twice, as the launcher passes its own on."""
    name, longer = f"signal_{signum.name}_{is_group}", ("ppo.steps=12", "checkpoint.every_minutes=null")
    process = chain.start(name, *longer, *(["launch.processes=2"] if is_group else []))
    metrics = chain.directory / "runs" / name / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and '"ppo/policy_loss"' in metrics.read_text(), process)
    for pid in [*(ranks_of(process.pid).values() if is_group else []), process.pid]:
        os.kill(pid, signum)
    out, err = process.communicate()
    assert process.returncode == (130 if signum == signal.SIGINT else 75), err
    assert "saving step" in out and "the same command continues" in err and "Traceback" not in err
    summary = json.loads((chain.directory / "runs" / name / "summary.json").read_text())
    assert summary["stages"]["ppo"]["status"] == "stopped"
    out, _ = chain.run(name, *longer)
    assert "ppo: continues from step " in out


@pytest.mark.slow
def test_ctrl_c_while_workers_read_rows_leaves_nothing(chain: RealChain) -> None:
    with (chain.directory / "many.jsonl").open("w") as file:
        for number in range(2500):
            file.write(json.dumps({"prompt": f"Say {number}", "completion": "Go on. " * 3000}) + "\n")
    process = chain.start("reading", "stage=prepare", "sft.data=many.jsonl")
    wait_until(lambda: len(children_of(process.pid)) >= 2, process)
    workers = children_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    left = [path.name for path in (chain.store("reading") / "prepare").iterdir()]
    assert [name for name in left if ".lock" not in name] == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
