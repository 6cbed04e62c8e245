"""What is advised where a run does not fit: it was tried by the same formulas, and the run would take it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.costs import GIB, check, gpus
from helpers.experiments import build
from rlhf.distributed.compute import Compute
from rlhf.pipeline.checks import check as check_stage
from rlhf.pipeline.costing import cost_of
from rlhf.pipeline.preflight import (
    shortage,
)
from rlhf.pipeline.stage import View


def test_the_advice_makes_it_fit(tmp_path: Path) -> None:
    # 8.2e9 parameters: 18 bytes each are 137 GiB, too much for one 80 GiB GPU
    on = gpus(80)
    checked = check(tmp_path, on, "sft")
    (line,) = checked.refused
    assert line.startswith("sft needs about ") and "optimizer 91" in line and "there are 80.0 GiB" in line
    offered = re.findall(r"[a-z0-9_.]+=[a-z0-9_]+", line.partition("It would fit with ")[2])
    assert "sft.peft=lora" in offered and "zero=zero3_offload" in offered
    assert not [key for key in offered if key.startswith("sft.micro_batch_tokens")]  # it alone would not do
    for key in offered:
        found = build(key, "device=cpu")
        fitting, setting = found.stages, replace(on, zero=found.settings.zero)
        assert shortage(cost_of(fitting["sft"], setting, fitting), setting) <= 0.9, key


def test_several_knobs_where_one_is_not_enough(tmp_path: Path) -> None:
    (line,) = check(tmp_path, gpus(20), "sft", "sft.peft=lora", "sft.micro_batch_tokens=8192").refused
    advice = line.partition("It would fit with ")[2]
    assert "sft.micro_batch_tokens=2048" in advice and "sft.activation_checkpointing=true" in advice


@pytest.mark.parametrize(("ranks", "knobs", "proposed"), [
    (1, [], 128),
    (2, ["ppo.batch_episodes=1024"], 128),
    (1, ["ppo.batch_rows=400"], 100),
])  # fmt: skip
def test_where_a_rollout_is_too_large_fewer_rows_are_decoded_together(
    tmp_path: Path, ranks: int, knobs: list[str], proposed: int
) -> None:
    # a cache of 512 rows x (900 + 40 + 64) tokens x 144 KiB is 71 GiB
    (line,) = check(tmp_path, gpus(60, ranks), "ppo", "ppo.batch_episodes=512", *knobs).refused
    assert line.startswith("ppo needs about ") and "GPU (sampling: " in line
    assert f"ppo.batch_rows={proposed}" in line.partition("It would fit with ")[2]


def test_rows_of_a_rollout_are_no_more_than_there_are(tmp_path: Path) -> None:
    def cache(*knobs: str) -> float:
        found = build("ppo.batch_episodes=64", "ppo.evaluate_prompts=32", *knobs)
        phases = cost_of(found.stages["ppo"], gpus(80), found.stages).phases
        (phase,) = [each for each in phases if each.name == "sampling"]
        return sum(part.size for part in phase.parts if part.kind == "KV cache")

    assert cache("ppo.batch_rows=1000") == cache("ppo.batch_rows=64") == cache()
    assert cache("ppo.batch_rows=16") == cache() / 4


def test_where_nothing_helps_that_is_said(tmp_path: Path) -> None:
    (line,) = check(tmp_path, gpus(4, host=4), "sft").refused
    assert "take a smaller model or more memory" in line


def test_a_prediction_within_the_margin_is_told_and_not_refused(tmp_path: Path) -> None:
    found = build("sft.peft=lora")
    cost = cost_of(found.stages["sft"], gpus(80), found.stages)
    need = cost.peak(on_host=False).size(on_host=False) / GIB + 0.6
    for memory, refused, warned in (
        (need / 0.89, 0, 0), (need / 0.91, 0, 1), (need / 1.1, 0, 1), (need / 1.2, 1, 0),
    ):  # fmt: skip
        checked = check(tmp_path, gpus(memory), "sft", "sft.peft=lora")
        assert (len(checked.refused), len(checked.warned)) == (refused, warned)
    (line,) = check(tmp_path, gpus(need / 0.91), "sft", "sft.peft=lora").warned
    assert line.endswith("It may fail: less than 10% is left.")


def test_the_hosts_memory_counts_too(tmp_path: Path) -> None:
    on = replace(gpus(80, host=20), zero="zero3_offload")
    (line,) = check(tmp_path, on, "sft").refused
    assert "in the host's memory" in line


def test_more_ranks_need_less_each(tmp_path: Path) -> None:
    on = replace(gpus(80, ranks=8), zero="zero2")
    assert check(tmp_path, gpus(80, ranks=8), "sft").refused and not check(tmp_path, on, "sft").refused


@pytest.mark.parametrize(
    ("on", "given"),
    [
        # frozen models that wait in the host's memory do not go with the LoRA that is needed too
        (1, ("ppo.peft=none", "ppo.optim.lr=1e-6", "ppo.critic.optim.lr=1e-5")),
        (8, ("ppo.peft=none", "ppo.optim.lr=1e-6", "ppo.critic.optim.lr=1e-5")),
    ],
)
def test_what_is_advised_is_what_the_run_would_take(on: int, given: tuple[str, ...], tmp_path: Path) -> None:
    ways: set[str] = set()
    for memory in range(20, 160, 10):
        for line in check(tmp_path, gpus(memory, ranks=on), "ppo", *given).refused:
            advice = line.partition("It would fit with ")[2].removesuffix(".")
            ways |= {way for way in advice.split(" or with ") if way}
    assert ways
    for way in ways:
        sizes = ("ppo.batch_episodes=64", "ppo.minibatch_episodes=32")
        accepted = build(*sizes, *given, *way.split())
        compute = Compute("cuda", "bfloat16", accepted.settings.zero, world_size=on)
        check_stage(accepted.stages["ppo"], View(accepted.stages, compute=compute))


def test_sharding_is_not_advised_where_it_would_be_refused(tmp_path: Path) -> None:
    advised = {
        method: check(tmp_path, gpus(20, ranks=8), "sft", f"sft.peft={method}").refused
        for method in ("lora", "dora")
    }
    assert advised["lora"] and all("zero=zero3" in line for line in advised["lora"])
    assert advised["dora"] and not any("zero=" in line for line in advised["dora"])
