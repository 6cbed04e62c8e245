"""The formulas of time, latency and parts of memory, by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.costs import EIGHT, GIB, check, gpus, no_gates, with_prompts_of
from helpers.experiments import build
from rlhf.config import ConfigError
from rlhf.costs.hardware import Speed
from rlhf.costs.memory import gathered_by_layers, gathered_whole
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import (
    HAND_OVER_SECONDS,
    LAYER_WEIGHTS,
    ROW_SECONDS,
    WAKE_SECONDS,
    StageCost,
    Task,
    ThroughputModel,
)
from rlhf.data.prepared import LengthStats
from rlhf.generation.vllm import VllmConfig
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import MethodName
from rlhf.pipeline.costing import cost_of
from rlhf.planner.report import explanation, phases, table
from rlhf.planner.strategies import Figure, Strategy, UseCase, added_latency, prefill
from rlhf.training.trained import FILE_BYTES

TEN, HUNDRED = LengthStats(0, 10.0, 0.0, 10), LengthStats(0, 100.0, 0.0, 100)


@pytest.mark.parametrize(
    ("stage", "knobs", "phase", "kind"),
    [
        ("ppo", ["ppo.ptx.coef=0.5", "ppo.ptx.rows=64"], "learning", "activations"),
        (
            "sft",
            ["sft.replay=samples:prompts", "sft.replay_fraction=0.5"],
            "forward and backward",
            "activations",
        ),
    ],
)
def test_what_is_learned_beside_counts_too(stage: str, knobs: list[str], phase: str, kind: str) -> None:
    def needs(*overrides: str) -> tuple[float, float]:
        found = build("ppo.batch_episodes=8", "ppo.minibatch_episodes=4", f"{stage}.peft=none",
                           f"{stage}.micro_batch_tokens=100000", *overrides)  # fmt: skip
        cost = cost_of(found.stages[stage], gpus(80), found.stages)
        (at,) = [each for each in cost.phases if each.name == phase]
        return sum(part.size for part in at.parts if part.kind == kind), cost.seconds

    (without, fast), (beside, slow) = needs(), needs(*knobs)
    assert beside > without * 1.1
    assert slow > fast * 1.1 or kind == "weights"


def test_what_cannot_be_merged_takes_little_disk() -> None:
    on = gpus(80)
    artifacts = {}
    for method in ("none", "lora", "prompt"):
        found = build("stage=sft", f"sft.peft={method}")
        artifacts[method] = cost_of(found.stages["sft"], on, found.stages).artifact
    assert artifacts["none"] < artifacts["lora"] < 1.1 * artifacts["none"]
    assert artifacts["prompt"] == 2 * 20 * 4096


def test_what_rank_0_alone_holds_is_shared_by_the_ranks_of_a_host() -> None:
    found, on = build(), gpus(80, ranks=8)
    here = replace(on, machine=replace(on.machine, ranks_here=8))
    alone, shared = (
        cost_of(found.stages["merge"], each, found.stages).peak().size(on_host=True) for each in (on, here)
    )
    assert alone == 12 * on.shape.head and shared == pytest.approx(alone / 8)


def test_planned_steps_are_those_that_are_taken() -> None:
    found, on = build("sft.batch_rows=20", "sft.epochs=1.1"), gpus(80)
    (update,) = (
        task for task in cost_of(found.stages["sft"], on, found.stages).work if task.activity == "optimizer"
    )
    assert update.formula.startswith("55 x ")  # 1.1 x 50 > 55 in floats


def test_work_by_hand() -> None:
    # linear layers of 1000 parameters, 2 layers of 4 heads of 5; an output layer of 30 x 10
    shape = replace(EIGHT, parameters=2000, linear=1000, experts=0, layers=2, heads=4, head_size=5, hidden=10,
                    vocabulary=30)  # fmt: skip
    machine = replace(gpus(80).machine, ranks=2, speed=Speed(gflops=1e-3, gbytes=1e-3))
    on = replace(gpus(80), shape=shape, machine=machine)
    worker = ThroughputModel(on)
    # a token of 7: 2 x 1000 + 4 x 2 x 4 x 5 x 7
    assert worker.forward(7) == 3120
    # 10 of them, 4 predicted; two ranks at 0.39 of 1e6 operations a second
    seconds = (10 * 3120 + 2 * 4 * 300) / 2 / 0.39e6
    assert worker.read(10, 7, predicted=4, what="").seconds == pytest.approx(seconds)
    cases: list[tuple[MethodName, bool, int, int]] = [
        ("none", False, 3, 8), ("lora", False, 2, 6), ("lora", True, 3, 6),
    ]  # fmt: skip
    for method, checkpointing, times, logits in cases:
        task = worker.train(10, 7, method, predicted=4, checkpointing=checkpointing, what="")
        assert task.seconds == pytest.approx((10 * times * 3120 + logits * 4 * 300) / 2 / 0.43e6)
    # 5 steps, 40 bytes per parameter at 1e6 a second; a shard of it; over PCIe at 25e9
    assert worker.optimize(600, 5).seconds == pytest.approx(5 * 40 * 600 / 1e6)
    assert ThroughputModel(replace(on, zero="zero2")).optimize(600, 5).seconds == pytest.approx(
        5 * 40 * 300 / 1e6
    )
    offloaded = ThroughputModel(replace(on, zero="zero3_offload")).optimize(600, 5)
    assert offloaded.seconds == pytest.approx(5 * 40 * 300 / 25e9)
    # 3 models of 2000 parameters in bf16 at 0.3 gigabytes a second
    assert worker.load(3, what="").seconds == pytest.approx(3 * 4000 / 0.3e9)


def test_added_latency_by_hand() -> None:
    shape = replace(EIGHT, linear=1000, experts=0, layers=2, heads=4, head_size=5, hidden=10, kv_heads=1,
                    intermediate=20)  # fmt: skip
    machine = replace(gpus(80).machine, speed=Speed(gflops=1e-3, gbytes=1e-3))
    on = replace(gpus(80), shape=shape, machine=machine)
    use = UseCase(rows=9, prompt=6.0, answer=8.0, examples=0, passages=0, has_questions=True,
              deploy="many_adapters", hours=None, max_added_latency=None)  # fmt: skip
    # 7 tokens, each of 2 x 1000 + 4 x 2 x 4 x 5 x 7 operations, at 0.39 of 1e6 a second
    assert prefill(on, 7).value == pytest.approx(7 * 3120 / 0.39e6)
    # factors of 2 layers' keys and values of 5 and 20 more, 2 bytes each at 1e6 a second; and for each of 8
    # tokens the kernels of half a layer's 2e-4 s, of two layers
    ia3 = PeftConfig(method="ia3")
    assert added_latency(on, ia3, use).value == pytest.approx(
        8 * (2 * (2 * 2 * 5 + 2 * 20) / 1e6 + 2 * 2e-4 * 0.5)
    )
    assert added_latency(on, ia3, use._replace(deploy="merged")).value == 0.0
    # virtual tokens are read before each answer, also where all else is merged
    prefix = PeftConfig(method="prefix", tokens=7)
    assert added_latency(on, prefix, use._replace(deploy="merged")).value == pytest.approx(7 * 3120 / 0.39e6)


def test_the_parts_of_a_phase_add_up_to_the_tables_figure() -> None:
    for on in (gpus(80), replace(gpus(80), machine=replace(gpus(80).machine, kind="cpu", used=3 * GIB))):
        found = build("sft.peft=lora", "stage=sft")
        cost = cost_of(found.stages["sft"], on, found.stages)
        figure = Figure(0.0, "")
        strategy = Strategy("LoRA", on, cost, figure, figure, source="Hu et al.")
        (row,) = table([strategy], None).rows
        peak, name = float(row[3].split()[0]), row[3].partition("(")[2].rstrip(")")
        shown = phases(strategy)
        (cells,) = [dict(zip(shown.headings, cells, strict=True)) for cells in shown.rows if cells[0] == name]
        total = cells.pop("together" if on.on_cpu else "on the GPU")
        cells.pop("on the host", None)
        assert cells["the process itself"] == f"{on.machine.used / GIB:.2f}"
        parts = sum(float(cell) for heading, cell in cells.items() if heading != "LoRA")
        assert float(total) == pytest.approx(parts, abs=0.03) == pytest.approx(peak, abs=0.06)
        text = "\n".join(explanation([strategy], None))
        assert "- source: Hu et al." in text
        total, lines = re.findall(rf"^- {name}: ([\d.]+) GiB.*$((?:\n    - .*)+)", text, re.MULTILINE)[0]
        here = [line for line in lines.splitlines() if ", on the host" not in line]
        each = [float(size) for size in re.findall(r"([\d.]+) GiB$", "\n".join(here), re.MULTILINE)]
        assert float(total) == pytest.approx(sum(each), abs=0.01) == pytest.approx(peak, abs=0.06)


def test_a_model_that_is_not_trained_is_sharded_where_weights_are() -> None:
    """64 ranks: none holds a policy that only answers, unless it is gathered whole for the local engine."""
    found, on = build(), gpus(80, ranks=64)

    def weights(phase: str, on: CostContext) -> float:
        cost = cost_of(found.stages["evaluate"], on, found.stages)
        (at,) = [each for each in cost.phases if each.name == phase]
        return sum(part.size for part in at.parts if part.kind == "weights")

    whole = 2 * EIGHT.parameters
    assert weights("measuring", on) == weights("sampling", on) == whole
    for zero in ("zero3", "fsdp2"):
        sharded = replace(on, zero=zero)
        by_layers = replace(sharded, local_sampling="layers")
        assert weights("measuring", sharded) < 0.4 * whole
        more = weights("sampling", sharded) - weights("sampling", by_layers)
        assert more == pytest.approx(whole - gathered_by_layers(sharded).size)
        assert weights("sampling", by_layers) < 0.5 * whole


def test_what_is_gathered_to_sample_by_hand() -> None:
    shape = replace(EIGHT, parameters=5 * 10**9, layer=200, outside=1000)
    on = replace(gpus(80, ranks=4), shape=shape, zero="fsdp2")
    assert gathered_whole(on).size == 2 * 5 * 10**9
    assert gathered_by_layers(on).size == 2 * (2 * 200 + 1000)
    assert gathered_by_layers(replace(on, zero="zero3")).size == 2 * 5 * 10**9 / 16  # what it may keep


def test_publishing_holds_a_file_and_not_a_model_on_the_host() -> None:
    found = build("sft.peft=none", "stage=sft")
    machine = replace(gpus(80, ranks=64).machine, ranks_here=8)
    for zero in ("none", "zero3", "fsdp2"):
        on = replace(gpus(80), zero=zero, machine=machine)
        (phase,) = [
            each
            for each in cost_of(found.stages["sft"], on, found.stages).phases
            if each.name == "publishing"
        ]
        assert phase.size(on_host=True) == pytest.approx(2 * EIGHT.parameters / 64)
    alone = cost_of(found.stages["sft"], gpus(8000), found.stages).phases
    (phase,) = [each for each in alone if each.name == "publishing"]
    assert phase.size(on_host=True) == FILE_BYTES < 2 * EIGHT.parameters


def test_rows_that_ranks_decode_together_are_their_own() -> None:
    """64 rows at a time each: 8 ranks answer 512 in as many passes over the weights as one answers 64."""

    def passes(ranks: int, rows: int) -> str:
        _, decoding = ThroughputModel(gpus(80, ranks=ranks)).decode(rows, 64, TEN, HUNDRED, what="answers")
        return decoding.formula.partition(" times")[0]

    assert passes(1, 64) == passes(8, 512) == "answers: 100"
    assert passes(1, 512) == "answers: 800"


def test_vllm_ends_with_the_longest_answer() -> None:
    """Each answer that ends makes room for another; the last ones are waited for."""
    vllm = VllmConfig(
        tensor_parallel=1, kv_cache_gib=1000.0, max_num_seqs=64, max_model_len=None, enforce_eager=False
    )
    on = replace(gpus(80), vllm=vllm, answer_tokens=100.0)
    answers = on.answers(400)
    assert (answers.mean, answers.longest, answers.deviation) == (100, 400, 50)

    def steps(rows: int) -> str:
        _, decoding = ThroughputModel(on).decode(rows, 64, TEN, answers, what="answers")
        return decoding.formula.partition(" times")[0]

    assert steps(8) == steps(64) == "answers: 400"
    assert steps(640) == f"answers: {10 * 100 + 300}"


def test_the_host_hands_weights_to_vllm_once_a_rollout() -> None:
    vllm = VllmConfig(
        tensor_parallel=2, kv_cache_gib=1.0, max_num_seqs=64, max_model_len=None, enforce_eager=False
    )
    on = replace(gpus(80, ranks=2), vllm=vllm)
    rows, weights = ThroughputModel(on).rollouts(3, 500, what="episodes")
    assert (rows.activity, rows.seconds) == ("host", 500 * ROW_SECONDS)
    copies = 1.5 * 2 * on.shape.parameters / 2e12
    each = LAYER_WEIGHTS * on.shape.layers * HAND_OVER_SECONDS + copies + WAKE_SECONDS
    assert weights.seconds == pytest.approx(3 * each)
    assert len(ThroughputModel(replace(on, vllm=None)).rollouts(3, 500, what="episodes")) == 1
    cpu = replace(on, machine=replace(on.machine, kind="cpu"))
    assert ThroughputModel(cpu).rollouts(3, 500, what="episodes") == []


def test_a_gpu_may_be_slower_but_its_disk_is_not() -> None:
    cost = StageCost(
        work=[Task("train", 90.0, ""), Task("load", 10.0, "")], checkpoint=4e9, tokens=1800.0
    ).with_checkpoints(replace(gpus(80).machine, disk=1e9), 50.0)
    assert cost.work[-1] == ("checkpoint", 2 * 4.0, "2 x 4e+09 B at 1 GB/s a node")
    assert cost.seconds == 108 and cost.at_worst().seconds == 3 * 98 + 10
    assert cost.throughput(2) == pytest.approx(3 * cost.at_worst().throughput(2))
    assert cost.with_checkpoints(gpus(80).machine, None) == cost


def test_virtual_tokens_are_part_of_a_sequence() -> None:
    """Beside them a row of 900 tokens is cut at what the context has left, as SFT does."""

    def longest(peft: str, context: int) -> int:
        on, found = gpus(80), build("stage=sft", f"sft.peft={peft}")
        on = replace(on, shape=replace(on.shape, context=context))
        return cost_of(found.stages["sft"], on, found.stages).longest

    assert (longest("lora", 1000), longest("prefix", 1000)) == (900, 920)
    assert (longest("lora", 900), longest("prefix", 900)) == (900, 900)
    for context in (5, 20, 21):
        with pytest.raises(ConfigError, match=rf"^sft\.peft\.tokens=20: they fill .* context of {context} "):
            longest("prefix", context)


def test_virtual_tokens_are_part_of_what_is_answered_and_read(tmp_path: Path) -> None:
    """Prompts of 900 tokens leave room for 10; held-out answers and texts fill the context."""
    on = gpus(80)
    on = replace(on, shape=replace(on.shape, context=910))
    new = ("generate.max_new_tokens=10", "generate.reward=vader", "evaluate.max_new_tokens=10")
    policies = (
        "evaluate.policies=[sft]",
        "evaluate.reward=null",
        "evaluate.gold=null",
        *no_gates("evaluate"),
    )
    for stage in ("generate", "evaluate"):
        assert not check(tmp_path, on, stage, f"stage={stage}", "sft.peft=lora", *new, *policies).refused
        found = check(tmp_path, on, stage, f"stage={stage}", "sft.peft=prefix", *new, *policies).refused
        assert f"{stage}.max_new_tokens=10: the longest sequence could have 930 tokens" in "".join(found)
    read = ("evaluate.num_prompts=1", "evaluate.max_new_tokens=1")
    on = replace(on, shape=replace(on.shape, context=900), sizes=with_prompts_of(on, 100))
    assert not check(tmp_path, on, "evaluate", "stage=evaluate", "sft.peft=lora", *read, *policies).refused
    assert check(tmp_path, on, "evaluate", "stage=evaluate", "sft.peft=prefix", *read, *policies).refused
