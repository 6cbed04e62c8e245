"""A run that cannot fit is refused before a model is loaded, with the knobs that would make it fit."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rich.console import Console
from small_chain import Chain, Outcome
from small_job import on_cpu
from transformers import (
    GPT2Config,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
    RwkvConfig,
    T5Config,
)

from rlhf.checkpoint import CheckpointConfig
from rlhf.config import ConfigError, PeftConfig
from rlhf.data.prepared import Lengths, PreparedData
from rlhf.distributed import Compute
from rlhf.experiment import Experiment, build_experiment
from rlhf.generation.vllm import VllmConfig
from rlhf.methods import METHODS
from rlhf.models.load import BaseModelFiles
from rlhf.plan.demand import Demand, Worker
from rlhf.plan.machine import Machine, Speed
from rlhf.plan.preflight import (
    Checked,
    check_before_loading,
    check_tunes,
    disk_complaints,
    preflight,
    shortage,
)
from rlhf.plan.setting import Setting, Sizes
from rlhf.plan.shape import Shape, UnknownShapeError, shape_of, skeleton
from rlhf.plan.strategies import Figure, Strategy, Use, prefill, served
from rlhf.plan.written import explanation, phases, table

EIGHT_BILLION = Qwen3Config(
    hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
)  # fmt: skip
EIGHT = shape_of(EIGHT_BILLION)
MISTRAL = MistralConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
)
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64)
MAMBA = MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=64)
RWKV = RwkvConfig(hidden_size=16, num_hidden_layers=2, vocab_size=64)
GIB = 2**30
NO_CHECKPOINTS = CheckpointConfig(every_steps=None, every_minutes=None, keep=1, resume=True)


def experiment(*overrides: str) -> Experiment:
    with initialize_config_module("rlhf.conf", version_base="1.3"):
        node = compose("config", overrides=list(overrides))
    resolved: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    return build_experiment(resolved)


def gpus(gib: float, ranks: int = 1, host: float = 1000.0) -> Setting:
    machine = Machine("cuda", "a test", gib * GIB, host * GIB, 0.6 * GIB, ranks, Speed(300_000.0, 2000.0))
    lengths = Lengths(rows=1000, mean=400.0, deviation=100.0, longest=900)
    return Setting(shape_of(EIGHT_BILLION), 2, "none", machine, lambda role, split: lengths)


def check(tmp_path: Path, on: Setting, stage: str, *overrides: str) -> Checked:
    found = experiment(*overrides)
    return preflight([found.stages[stage]], found.stages, on, tmp_path, NO_CHECKPOINTS, begun={stage: 0.0})


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
        zero = key.removeprefix("zero=") if key.startswith("zero=") else "none"
        fitting = experiment(*([key] if zero == "none" else [])).stages
        setting = replace(on, zero=zero)
        assert shortage(fitting["sft"].demand(setting, fitting), setting) <= 1.0, key


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
        found = experiment("ppo.batch_episodes=64", "ppo.evaluate_prompts=32", *knobs)
        phases = found.stages["ppo"].demand(gpus(80), found.stages).phases
        (phase,) = [each for each in phases if each.name == "sampling"]
        return sum(part.size for part in phase.parts if part.kind == "KV cache")

    assert cache("ppo.batch_rows=1000") == cache("ppo.batch_rows=64") == cache()
    assert cache("ppo.batch_rows=16") == cache() / 4


def test_where_nothing_helps_that_is_said(tmp_path: Path) -> None:
    (line,) = check(tmp_path, gpus(4, host=4), "sft").refused
    assert "take a smaller model or more memory" in line


def test_a_prediction_within_the_margin_is_told_and_not_refused(tmp_path: Path) -> None:
    found = experiment("sft.peft=lora")
    demand = found.stages["sft"].demand(gpus(80), found.stages)
    need = demand.peak(on_host=False).size(on_host=False) / GIB + 0.6
    for memory, refused, warned in ((need * 1.01, 0, 0), (need / 1.1, 0, 1), (need / 1.2, 1, 0)):
        checked = check(tmp_path, gpus(memory), "sft", "sft.peft=lora")
        assert (len(checked.refused), len(checked.warned)) == (refused, warned)


def test_the_hosts_memory_counts_too(tmp_path: Path) -> None:
    on = replace(gpus(80, host=20), zero="zero3_offload")
    (line,) = check(tmp_path, on, "sft").refused
    assert "in the host's memory" in line


def test_more_ranks_need_less_each(tmp_path: Path) -> None:
    on = replace(gpus(80, ranks=8), zero="zero2")
    assert check(tmp_path, gpus(80, ranks=8), "sft").refused and not check(tmp_path, on, "sft").refused


@pytest.fixture
def other_reward(tmp_path: Path) -> tuple[Shape, str]:
    """A reward model's directory with nothing but its config, and `ppo.reward` for it."""
    config = Qwen3Config(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    return shape_of(config), f"ppo.reward=model:{tmp_path}"


def weights_beside(*overrides: str, reward: str = "lora") -> float:
    """Of PPO's models while the reference reads, where the reward stage tunes with that method."""
    stages = experiment(*overrides).stages
    tuned = stages["reward"].model_copy(update={"peft": PeftConfig.model_validate({"method": reward})})
    demand = stages["ppo"].demand(gpus(80), {**stages, "reward": tuned})
    (phase,) = [each for each in demand.phases if each.name == "reference"]
    return sum(part.size for part in phase.parts if part.kind == "weights")


RULED = ("ppo.reward=vader", "ppo.critic.init=sft", "ppo.score.normalize=none")


@pytest.mark.parametrize("policy", ["lora", "none"])
@pytest.mark.parametrize("method", sorted(name for name, each in METHODS.items() if each.merges))
def test_a_reward_model_stands_on_the_policys_weights_where_it_is_a_plain_lora(
    method: str, policy: str
) -> None:
    tuned = f"ppo.peft={policy}"
    by_rule = weights_beside(tuned, *RULED)
    learned = weights_beside(tuned, "ppo.critic.init=sft", reward=method)
    scalar = 2 * (EIGHT.parameters - EIGHT.head)
    assert learned - by_rule == (0 if method == policy == "lora" else scalar)


def test_a_reward_model_of_the_users_counts_as_large_as_it_is(
    other_reward: tuple[Shape, str],
) -> None:
    shape, reward = other_reward
    scalar = 2 * (shape.parameters - shape.head)
    same = ("ppo.critic.init=sft", "ppo.score.normalize=none")
    assert weights_beside(reward, *same) - weights_beside(*RULED) == scalar
    assert weights_beside(reward, *same, "ppo.peft=none") - weights_beside(*RULED, "ppo.peft=none") == scalar
    # the critic stands on it: on the same weights with an adapter, on a copy where all of them train
    first = ("ppo.critic.init=reward", "ppo.score.normalize=none")
    of_policy = 2 * (EIGHT.parameters - EIGHT.head)
    full = weights_beside(reward, *first, "ppo.peft=none") - weights_beside(*RULED, "ppo.peft=none")
    assert full == 2 * scalar - of_policy
    assert weights_beside(reward, *first) == pytest.approx(weights_beside(*RULED) + scalar, rel=0.01)


def test_it_reads_as_fast_as_its_own_size_allows(other_reward: tuple[Shape, str]) -> None:
    def scoring(*overrides: str) -> list[float]:
        found = experiment("ppo.critic.init=sft", "ppo.score.normalize=none", *overrides)
        work = found.stages["ppo"].demand(gpus(80), found.stages).work
        return [task.seconds for task in work if "scores: " in task.how]

    shape, reward = other_reward
    ((own,), (learned,)) = scoring(reward), scoring()
    length = 400 + experiment().stages["ppo"].model_dump()["max_new_tokens"]
    operations = [Worker(replace(gpus(80), shape=each)).forward(length) for each in (shape, EIGHT)]
    assert own / learned == pytest.approx(operations[0] / operations[1])
    assert scoring("ppo.reward=vader") == []


def test_a_reward_model_of_unknown_shape_counts_as_large_as_the_policy(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    knobs = ("ppo.critic.init=sft", "ppo.score.normalize=none")
    own = weights_beside(f"ppo.reward=model:{tmp_path}", *knobs)
    assert own - weights_beside(*RULED) == 2 * (EIGHT.parameters - EIGHT.head)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"qlora"}))
def test_ppo_shares_weights_where_the_method_does(method: str) -> None:
    def weights(*overrides: str) -> float:
        found = experiment(*overrides)
        (phase,) = [
            each
            for each in found.stages["ppo"].demand(gpus(80), found.stages).phases
            if each.name == "reference"
        ]
        return sum(part.size for part in phase.parts if part.kind == "weights")

    shape = shape_of(EIGHT_BILLION)
    model, scalar = 2 * shape.parameters, 2 * (shape.parameters - shape.head)  # its output layer is its own
    found = weights(f"ppo.peft={method}", "ppo.gates.first_kl=null")
    if METHODS[method].shares:
        assert model < found < 1.1 * model  # all four on one backbone
        # the reward model, and the critic on it
        assert model + scalar < weights(f"ppo.peft={method}", "reward.peft=none") < 1.1 * (model + scalar)
    else:
        assert 2 * (model + scalar) < found < 2.6 * (model + scalar)


def test_whole_models_are_loaded_before_they_are_sharded(tmp_path: Path) -> None:
    on, lora = gpus(12, ranks=8), ("sft.peft=lora", "sft.micro_batch_tokens=1024")
    (line,) = check(tmp_path, replace(on, zero="zero3"), "sft", *lora).refused
    assert line.startswith("sft needs about 15.9 GiB on each GPU (loading: weights 15.3)")
    assert not check(tmp_path, replace(gpus(24, ranks=8), zero="zero3"), "sft", *lora).refused
    # FSDP2 moves them from the host, layer by layer
    assert not check(tmp_path, replace(on, zero="fsdp2"), "sft", *lora).refused
    (line,) = check(tmp_path, on, "sft", *lora).refused
    assert "zero=fsdp2" in line and "zero=zero3" not in line
    (line,) = check(tmp_path, replace(gpus(12, ranks=8, host=10), zero="fsdp2"), "sft", *lora).refused
    assert "sft needs about 15.3 GiB in the host's memory" in line


def test_ppo_loads_its_models_one_after_the_other() -> None:
    """Policy and critic are read before the engine takes them, and a reward model stays."""

    def loading(zero: str, *overrides: str) -> tuple[float, float]:
        found = experiment("reward.peft=none", f"zero={zero}", "device=cpu", *overrides)
        on = replace(gpus(80, ranks=8), zero=zero)
        (phase,) = [
            each for each in found.stages["ppo"].demand(on, found.stages).phases if each.name == "loading"
        ]
        return phase.size(on_host=False), phase.size(on_host=True)

    shape = shape_of(EIGHT_BILLION)
    model, scalar = 2 * shape.parameters, 2 * (shape.parameters - shape.head)
    full = ("ppo.peft=none",)
    assert loading("zero3", *full) == (model + 2 * scalar, model)
    assert loading("fsdp2", *full) == (scalar, model + scalar)
    assert loading("fsdp2", *full, "ppo.frozen=sharded") == (0, model + 2 * scalar)


def test_a_reward_model_has_no_output_layer() -> None:
    found, on = experiment("reward.peft=none"), gpus(80)
    sizes = {}
    for stage in ("sft", "reward"):
        phases = found.stages[stage].demand(on, found.stages).phases
        (step,) = [phase for phase in phases if phase.name == "optimizer step"]
        sizes[stage] = step.size()
    assert sizes["sft"] - sizes["reward"] == pytest.approx(on.shape.head * (2 + 12 + 4))


@pytest.mark.parametrize(
    ("stage", "knobs", "phase", "kind"),
    [
        ("ppo", ["ppo.ptx.coef=0.5", "ppo.ptx.rows=64"], "learning", "activations"),
        ("ppo", ["ppo.ema_decay=0.9"], "learning", "weights"),
        ("sft", ["sft.replay=x.txt", "sft.replay_fraction=0.5"], "forward and backward", "activations"),
    ],
)
def test_what_is_learned_beside_counts_too(stage: str, knobs: list[str], phase: str, kind: str) -> None:
    def needs(*overrides: str) -> tuple[float, float]:
        found = experiment("ppo.batch_episodes=8", "ppo.minibatch_episodes=4", f"{stage}.peft=none",
                           f"{stage}.micro_batch_tokens=100000", *overrides)  # fmt: skip
        demand = found.stages[stage].demand(gpus(80), found.stages)
        (at,) = [each for each in demand.phases if each.name == phase]
        return sum(part.size for part in at.parts if part.kind == kind), demand.seconds

    (without, fast), (beside, slow) = needs(), needs(*knobs)
    assert beside > without * 1.1
    assert slow > fast * 1.1 or kind == "weights"


def test_what_cannot_be_merged_takes_little_disk() -> None:
    on = gpus(80)
    artifacts = {}
    for method in ("none", "lora", "prompt"):
        found = experiment("stage=sft", f"sft.peft={method}")
        artifacts[method] = found.stages["sft"].demand(on, found.stages).artifact
    assert artifacts["none"] < artifacts["lora"] < 1.1 * artifacts["none"]
    assert artifacts["prompt"] == 2 * 20 * 4096


def test_what_rank_0_alone_holds_is_shared_by_the_ranks_of_a_host() -> None:
    found, on = experiment(), gpus(80, ranks=8)
    here = replace(on, machine=replace(on.machine, ranks_here=8))
    alone, shared = (
        found.stages["sft"].demand(each, found.stages).peak(on_host=True).size(on_host=True)
        for each in (on, here)
    )
    assert shared == pytest.approx(max(alone / 8, 2 * on.shape.parameters))  # one is read on every rank
    alone, shared = (
        found.stages["merge"].demand(each, found.stages).peak().size(on_host=True) for each in (on, here)
    )
    assert (alone, shared) == (4 * on.shape.parameters, pytest.approx(alone / 8))


def test_planned_steps_are_those_that_are_taken() -> None:
    found, on = experiment("sft.batch_rows=20", "sft.epochs=1.1"), gpus(80)
    (update,) = (
        task for task in found.stages["sft"].demand(on, found.stages).work if task.activity == "optimizer"
    )
    assert update.how.startswith("55 x ")  # 1.1 x 50 > 55 in floats


def test_a_model_that_writes_no_text_is_told() -> None:
    with pytest.raises(UnknownShapeError, match="T5Config: Unrecognized configuration class"):
        shape_of(T5Config())


def test_what_is_not_checked_of_an_unknown_shape_is_said(
    finished_chain: tuple[Chain, Outcome], tmp_path: Path
) -> None:
    T5Config().save_pretrained(tmp_path)
    said = before(finished_chain[1], on_cpu(), "sft", base=tmp_path)
    assert said.startswith("Memory, time, disk and context are not checked: T5Config: Unrecognized")


def test_work_by_hand() -> None:
    # linear layers of 1000 parameters, 2 layers of 4 heads of 5; an output layer of 30 x 10
    shape = replace(EIGHT, parameters=2000, linear=1000, experts=0, layers=2, heads=4, head_size=5, hidden=10,
                    vocabulary=30)  # fmt: skip
    machine = replace(gpus(80).machine, ranks=2, speed=Speed(gflops=1e-3, gbytes=1e-3))
    on = replace(gpus(80), shape=shape, machine=machine)
    worker = Worker(on)
    # a token of 7: 2 x 1000 + 4 x 2 x 4 x 5 x 7
    assert worker.forward(7) == 3120
    # 10 of them, 4 predicted; two ranks at 0.45 of 1e6 operations a second
    seconds = (10 * 3120 + 2 * 4 * 300) / 2 / 0.45e6
    assert worker.read(10, 7, predicted=4, what="").seconds == pytest.approx(seconds)
    for method, checkpointing, times, logits in (
        ("none", False, 3, 8), ("lora", False, 2, 6), ("lora", True, 3, 6),
    ):  # fmt: skip
        task = worker.train(10, 7, method, predicted=4, checkpointing=checkpointing, what="")
        assert task.seconds == pytest.approx((10 * times * 3120 + logits * 4 * 300) / 2 / 0.5e6)
    # 5 steps, 40 bytes a parameter at 1e6 a second; a shard of it; over PCIe at 25e9
    assert worker.optimize(600, 5).seconds == pytest.approx(5 * 40 * 600 / 1e6)
    assert Worker(replace(on, zero="zero2")).optimize(600, 5).seconds == pytest.approx(5 * 40 * 300 / 1e6)
    offloaded = Worker(replace(on, zero="zero3_offload")).optimize(600, 5)
    assert offloaded.seconds == pytest.approx(5 * 40 * 300 / 25e9)
    # 3 models of 2000 parameters in bf16 at half a gigabyte a second
    assert worker.load(3, what="").seconds == pytest.approx(3 * 4000 / 0.5e9)


def test_added_latency_by_hand() -> None:
    shape = replace(EIGHT, linear=1000, experts=0, layers=2, heads=4, head_size=5, hidden=10, kv_heads=1,
                    intermediate=20)  # fmt: skip
    machine = replace(gpus(80).machine, speed=Speed(gflops=1e-3, gbytes=1e-3))
    on = replace(gpus(80), shape=shape, machine=machine)
    use = Use(rows=9, prompt=6.0, answer=8.0, examples=0, passages=0, has_questions=True,
              deploy="many_adapters", hours=None, max_added_latency=None)  # fmt: skip
    # 7 tokens, each of 2 x 1000 + 4 x 2 x 4 x 5 x 7 operations, at 0.45 of 1e6 a second
    assert prefill(on, 7).value == pytest.approx(7 * 3120 / 0.45e6)
    # factors of 2 layers' keys and values of 5 and 20 more, 2 bytes each at 1e6 a second; and for each of 8
    # tokens the kernels of half a layer's 2e-4 s, of two layers
    ia3 = PeftConfig(method="ia3")
    assert served(on, ia3, use).value == pytest.approx(8 * (2 * (2 * 2 * 5 + 2 * 20) / 1e6 + 2 * 2e-4 * 0.5))
    assert served(on, ia3, use._replace(deploy="merged")).value == 0.0
    # virtual tokens are read before each answer, also where all else is merged
    prefix = PeftConfig(method="prefix", tokens=7)
    assert served(on, prefix, use._replace(deploy="merged")).value == pytest.approx(7 * 3120 / 0.45e6)


def test_the_parts_of_a_phase_add_up_to_the_tables_figure() -> None:
    for on in (gpus(80), replace(gpus(80), machine=replace(gpus(80).machine, kind="cpu", used=3 * GIB))):
        found = experiment("sft.peft=lora", "stage=sft")
        demand = found.stages["sft"].demand(on, found.stages)
        figure = Figure(0.0, "")
        strategy = Strategy("LoRA", on, demand, figure, figure, 0, "", source="Hu et al.")
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


def test_a_model_that_is_not_trained_is_loaded_whole_and_once() -> None:
    found = experiment()
    whole, sharded = (
        found.stages["evaluate"].demand(replace(gpus(80, ranks=8), zero=zero), found.stages).peak().size()
        for zero in ("none", "zero3")
    )
    assert sharded == whole


def test_rows_that_ranks_decode_together_are_their_own() -> None:
    """64 rows at a time each: 8 ranks answer 512 in as many passes over the weights as one answers 64."""

    def passes(ranks: int, rows: int) -> str:
        _, decoding = Worker(gpus(80, ranks=ranks)).decode(rows, 64, 10.0, 100, what="answers")
        return decoding.how.partition(" times")[0]

    assert passes(1, 64) == passes(8, 512) == "answers: 100"
    assert passes(1, 512) == "answers: 800"


def test_virtual_tokens_are_part_of_a_sequence(tmp_path: Path) -> None:
    on = gpus(80)
    on = replace(on, shape=replace(on.shape, context=900))
    assert not check(tmp_path, on, "sft", "stage=sft", "sft.peft=lora").refused
    (complaint,) = check(tmp_path, on, "sft", "stage=sft", "sft.peft=prefix").refused
    assert "the longest sequence could have 920 tokens" in complaint


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


def with_prompts_of(on: Setting, tokens: int) -> Sizes:
    short = Lengths(rows=1000, mean=float(tokens), deviation=0.0, longest=tokens)
    return lambda role, split: short if role == "evaluate" else on.sizes(role, split)


def no_gates(stage: str) -> list[str]:
    return [f"{stage}.gates.{name}=null" for name in experiment().stages[stage].gates]


def test_what_vllm_may_not_sample_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    limited = VllmConfig(kv_cache_gib=1.0, max_num_seqs=8, max_model_len=920, enforce_eager=True)
    on, stage = replace(gpus(80), vllm=limited), "generate"
    (line,) = check(tmp_path, on, stage, "stage=generate", "generate.max_new_tokens=40").refused
    assert line.endswith("are 940 tokens, and vllm.max_model_len=920. Use 940 or more.")
    assert not check(tmp_path, on, stage, "stage=generate", "generate.max_new_tokens=20").refused
    assert not check(tmp_path, replace(on, vllm=None), stage, "stage=generate").refused


@pytest.mark.parametrize(
    ("on", "given"),
    [
        # frozen models that wait in the host's memory do not go with the LoRA that is needed too
        (1, ("ppo.peft=none", "ppo.optim.lr=1e-6", "ppo.critic.optim.lr=1e-5")),
        # whole weights on each rank are what the moving average needs
        (8, ("ppo.peft=none", "ppo.optim.lr=1e-6", "ppo.critic.optim.lr=1e-5", "ppo.ema_decay=0.9")),
    ],
)
def test_what_is_advised_is_what_the_run_would_take(on: int, given: tuple[str, ...], tmp_path: Path) -> None:
    for memory in range(20, 160, 10):
        setting = gpus(memory, ranks=on)
        for line in check(tmp_path, setting, "ppo", *given).refused:
            advice = line.partition("It would fit with ")[2].removesuffix(".")
            for way in filter(None, advice.split(" or with ")):
                sizes = ("ppo.batch_episodes=64", "ppo.minibatch_episodes=32")
                accepted = experiment(*sizes, *given, *way.split())
                compute = Compute(
                    torch.device("cuda"), torch.bfloat16, accepted.settings.zero, world_size=setting.ranks
                )
                accepted.stages["ppo"].check_compute(compute)


def test_sharding_is_not_advised_where_it_would_be_refused(tmp_path: Path) -> None:
    advised = {
        method: check(tmp_path, gpus(20, ranks=8), "sft", f"sft.peft={method}").refused
        for method in ("lora", "dora")
    }
    assert advised["lora"] and all("zero=zero3" in line for line in advised["lora"])
    assert advised["dora"] and not any("zero=" in line for line in advised["dora"])


def test_the_store_needs_room_for_artifacts_and_checkpoints(tmp_path: Path) -> None:
    every = NO_CHECKPOINTS.model_copy(update={"every_steps": 5, "keep": 2})
    huge = Demand(artifact=1.0, checkpoint=1e18)
    assert list(disk_complaints({"sft": huge}, tmp_path, NO_CHECKPOINTS, {"sft": 0.0})) == []
    assert list(disk_complaints({"sft": huge}, tmp_path, every, {"sft": 3e18})) == []  # they are written
    (line,) = disk_complaints({"sft": huge}, tmp_path, every, {"sft": 0.0})
    assert line.startswith(f"store_dir={tmp_path}") and "checkpoint.keep" in line


@pytest.fixture(scope="module")
def chain(finished_chain: tuple[Chain, Outcome]) -> Chain:
    return finished_chain[0]


def test_the_chain_says_what_is_to_come(finished_chain: tuple[Chain, Outcome]) -> None:
    out = finished_chain[1].out
    (line,) = [line for line in out.splitlines() if line.startswith("About ")]
    assert re.match(
        r"About \S+ to go: sft \S+ \(\d+\.\d GiB\), reward .*, generate .*, ppo .*, evaluate ", line
    )
    assert out.index(line) < out.index("sft runs")


def test_a_model_too_large_is_refused_before_it_is_read(
    chain: Chain, tiny_model: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    for path in tiny_model.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config |= {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 60, "head_dim": 128,
               "num_attention_heads": 128}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()  # cannot be read
    outcome = chain.run("model=local", f"model.path={tmp_path}", "stage=sft", "sft.peft=none")
    assert outcome.code == 2
    assert "Error: sft needs about" in outcome.err and "GiB (" in outcome.err
    assert "preflight=warn" in outcome.err
    assert outcome.statuses == {"prepare": "ran"}


def before(chain: Outcome, compute: Compute, stage: str, *overrides: str, base: Path | None = None) -> str:
    """What the check of one stage says, on the finished chain's data."""
    said = io.StringIO()
    found = experiment("model=tiny", f"store_dir={chain.directory}", *overrides)
    data = PreparedData(chain.artifact("prepare"))
    files = BaseModelFiles(base or chain.artifact("sft"), "tiny", found.settings.model)
    check_before_loading(found, {stage: 0.0}, files, compute, data, Console(file=said, width=300))
    return said.getvalue()


def test_an_answer_longer_than_the_context_is_refused_unless_told_otherwise(
    finished_chain: tuple[Chain, Outcome],
) -> None:
    first, long = finished_chain[1], "evaluate.max_new_tokens=1020"
    complaint = (
        r"evaluate.max_new_tokens=1020: the longest sequence could have 10\d\d tokens, and the model's "
    )
    complaint += r"context has 1024. Lower it by \d+\."
    with pytest.raises(ConfigError, match=complaint):
        before(first, on_cpu(), "evaluate", long)
    assert re.search(complaint, before(first, on_cpu(), "evaluate", long, "preflight=warn"))
    assert "context" not in before(first, on_cpu(), "evaluate")


@pytest.mark.parametrize(
    ("stage", "peft", "complaint"),
    [
        ("sft", "{method: freeze, layers: 99}", r"sft\.peft\.layers=99: LlamaForCausalLM has 2 layers that"),
        ("ppo", "{method: freeze, layers: 99}", r"ppo\.peft\.layers=99: LlamaForCausalLM has 2 layers that"),
        (
            "reward",
            "{method: lora, target_modules: [nope]}",
            r"reward\.peft\.target_modules=\['nope'\]",
        ),
    ],
)
def test_what_the_model_cannot_be_trained_with_is_refused_before_anything_is_trained(
    stage: str, peft: str, complaint: str, finished_chain: tuple[Chain, Outcome]
) -> None:
    with pytest.raises(ConfigError, match=f"^{complaint}"):
        before(finished_chain[1], on_cpu(), stage, f"{stage}.peft={peft}", "preflight=warn")
    assert "peft" not in before(finished_chain[1], on_cpu(), stage)


@pytest.mark.parametrize(
    ("config", "peft", "complaint"),
    [
        (MISTRAL, "prefix", r"sft\.peft=prefix: not every layer of MistralForCausalLM looks at all that"),
        (GPT2, "qlora", r"sft\.peft=qlora: bitsandbytes holds no weights of GPT2LMHeadModel in 4 bits"),
        (GPT2, "adapter", r"sft\.peft=adapter: attention and feed-forward of GPT2LMHeadModel could not be"),
        (MAMBA, "ia3", r"sft\.peft=ia3: peft does not know which layers of a mamba model to scale"),
        (MAMBA, "prompt", r"sft\.peft=prompt: not every layer of MambaForCausalLM looks at all"),
        (RWKV, "prompt", r"sft\.peft=prompt: not every layer of RwkvForCausalLM looks at all"),
        (MISTRAL, "lora", None),
        (GPT2, "prefix", None),
        (GPT2, "ia3", None),
        (MAMBA, "freeze", None),
    ],
)
def test_a_method_that_does_not_know_the_model(
    config: PreTrainedConfig, peft: str, complaint: str | None
) -> None:
    stage = experiment("stage=prepare", f"sft.peft={peft}").stages["sft"]
    base = skeleton(config)
    if complaint is None:
        check_tunes(stage, base)
        return
    with pytest.raises(ConfigError, match=f"^{complaint}"):
        check_tunes(stage, base)


def test_padded_rows_are_told(finished_chain: tuple[Chain, Outcome]) -> None:
    said = before(finished_chain[1], on_cpu(), "sft", "stage=sft", "sft.peft=prefix")
    assert "sft.peft=prefix: rows are padded, one sequence a row" in said
    assert "padded" not in before(finished_chain[1], on_cpu(), "sft", "stage=sft", "sft.peft=lora")
    padded = ("stage=sft", "sft.peft=prefix", "model.attention=sdpa")  # as they would be anyway
    assert "padded" not in before(finished_chain[1], on_cpu(), "sft", *padded)


def test_virtual_tokens_and_rows_laid_end_to_end() -> None:
    with pytest.raises(ConfigError, match=r"^model\.attention=packed: .* and with sft\.peft=prompt only the"):
        experiment("stage=sft", "sft.peft=prompt", "model.attention=packed")
    experiment("stage=sft", "sft.peft=lora", "model.attention=packed")


def test_ranks_that_cannot_share_a_batch_are_told_before_anything_is_trained(
    finished_chain: tuple[Chain, Outcome],
) -> None:
    two = on_cpu(world_size=2)
    with pytest.raises(ConfigError, match=r"sft.batch_rows=7 cannot be shared equally by 2 ranks"):
        before(finished_chain[1], two, "sft", "sft.batch_rows=7")
    with pytest.raises(ConfigError, match=r"reward.batch_pairs=7 cannot"):
        before(finished_chain[1], two, "reward", "reward.batch_pairs=7")
