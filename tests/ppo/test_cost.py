"""PPO's models: which share weights, which are loaded when, and how large a reward model of the user's is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import (
    Qwen3Config,
    T5Config,
)

from helpers.costs import EIGHT, EIGHT_BILLION, check, gpus
from helpers.experiments import build
from rlhf.costs.model_shape import ModelShape, shape_of
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import ROW_SECONDS, ThroughputModel
from rlhf.data.prepared import LengthStats
from rlhf.distributed.compute import Zero
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.methods import METHODS, MethodName
from rlhf.pipeline.costing import cost_of
from rlhf.planner.strategies import UseCase, with_method
from rlhf.ppo.config import PpoConfig
from rlhf.ppo.cost import mix_activations, mix_lengths, policy_cost


@pytest.fixture
def other_reward(tmp_path: Path) -> tuple[ModelShape, str]:
    """A reward model's directory with nothing but its config, and `ppo.reward` for it."""
    config = Qwen3Config(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    return shape_of(config), f"ppo.reward=model:{tmp_path}"


def weights_beside(*overrides: str, reward: str = "lora") -> float:
    """Of PPO's models while the reference reads, where the reward stage tunes with that method."""
    stages = build(*overrides).stages
    tuned = stages["reward"].model_copy(update={"peft": PeftConfig.model_validate({"method": reward})})
    cost = cost_of(stages["ppo"], gpus(80), {**stages, "reward": tuned})
    (phase,) = [each for each in cost.phases if each.name == "reference"]
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
    other_reward: tuple[ModelShape, str],
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


def test_every_model_of_an_ensemble_counts(other_reward: tuple[ModelShape, str]) -> None:
    shape, reward = other_reward
    one = reward.removeprefix("ppo.reward=")
    same = ("ppo.critic.init=auto", "ppo.score.normalize=none")
    three = weights_beside(f"ppo.reward={{of:['{one}','{one}',vader,'{one}'],combine:minimum}}", *same)
    assert three - weights_beside(*RULED) == 3 * 2 * (shape.parameters - shape.head)


def test_it_reads_as_fast_as_its_own_size_allows(other_reward: tuple[ModelShape, str]) -> None:
    def scoring(*overrides: str) -> list[float]:
        found = build("ppo.critic.init=sft", "ppo.score.normalize=none", *overrides)
        work = cost_of(found.stages["ppo"], gpus(80), found.stages).work
        return [task.seconds for task in work if "scores: " in task.formula]

    shape, reward = other_reward
    ((own,), (learned,)) = scoring(reward), scoring()
    length = 400 + build().stages["ppo"].model_dump()["max_new_tokens"]
    operations = [ThroughputModel(replace(gpus(80), shape=each)).forward(length) for each in (shape, EIGHT)]
    assert own / learned == pytest.approx(operations[0] / operations[1])
    assert scoring("ppo.reward=vader") == []


def test_a_reward_model_of_unknown_shape_counts_as_large_as_the_policy(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    knobs = ("ppo.critic.init=sft", "ppo.score.normalize=none")
    own = weights_beside(f"ppo.reward=model:{tmp_path}", *knobs)
    assert own - weights_beside(*RULED) == 2 * (EIGHT.parameters - EIGHT.head)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"qlora"}))
def test_ppo_shares_weights_where_the_method_does(method: MethodName) -> None:
    def weights(*overrides: str) -> float:
        found = build(*overrides)
        (phase,) = [
            each
            for each in cost_of(found.stages["ppo"], gpus(80), found.stages).phases
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
        assert 2 * (model + scalar) <= found < 2.1 * (model + scalar)


def test_a_sharded_model_is_never_whole_on_a_rank(tmp_path: Path) -> None:
    on, lora = gpus(15, ranks=8), ("sft.peft=lora", "sft.micro_batch_tokens=1024")
    (line,) = check(tmp_path, replace(on, zero="zero2"), "sft", *lora).refused
    assert "zero=fsdp2" in line and "zero=zero3" in line
    for zero in ("zero3", "fsdp2"):
        assert not check(tmp_path, replace(on, zero=zero), "sft", *lora).refused


@pytest.mark.parametrize("zero", ["zero2", "zero3", "fsdp2"])
def test_loras_reference_holds_no_weights(zero: Zero) -> None:
    def held(*overrides: str) -> list[str]:
        found = build("ppo.peft=lora", f"zero={zero}", "device=cpu", *overrides)
        on = replace(gpus(80, ranks=8), zero=zero)
        parts = [
            part for phase in cost_of(found.stages["ppo"], on, found.stages).phases for part in phase.parts
        ]
        return [part.formula for part in parts if part.formula.startswith("reference")]

    assert not held()
    assert bool(held("ppo.frozen_placement=replicated")) == (zero != "zero2")


def test_ppo_reads_slices_of_its_models_or_whole_ones() -> None:
    """Policy and critic are read before the engine takes them, and a reward model stays."""

    def loading(zero: Zero, *overrides: str) -> tuple[float, float]:
        found = build("reward.peft=none", f"zero={zero}", "device=cpu", *overrides)
        on = replace(gpus(80, ranks=8), zero=zero)
        (phase,) = [
            each for each in cost_of(found.stages["ppo"], on, found.stages).phases if each.name == "loading"
        ]
        return phase.size(on_host=False), phase.size(on_host=True)

    shape = shape_of(EIGHT_BILLION)
    model, scalar = 2 * shape.parameters, 2 * (shape.parameters - shape.head)
    full = ("ppo.peft=none",)
    assert loading("zero2", *full) == (model + 2 * scalar, 0)
    for zero in ("zero3", "fsdp2"):
        small = 2 * shape.small * 7 / 8 if zero == "zero3" else 0  # DeepSpeed keeps norms' gains whole
        assert loading(zero, *full) == ((model + 2 * scalar) / 8 + small, 0)
        assert loading(zero, *full, "ppo.frozen_placement=replicated") == ((model + scalar) / 8 + scalar, 0)


def test_a_reward_model_has_no_output_layer() -> None:
    found, on = build("reward.peft=none"), gpus(80)
    sizes = {}
    for stage in ("sft", "reward"):
        phases = cost_of(found.stages[stage], on, found.stages).phases
        (step,) = [phase for phase in phases if phase.name == "optimizer step"]
        sizes[stage] = step.size()
    assert sizes["sft"] - sizes["reward"] == pytest.approx(on.shape.head * (2 + 12 + 4))


def test_the_mix_is_cut_where_virtual_tokens_leave_no_room() -> None:
    """As `PretrainingMix` cuts it."""
    endless = LengthStats(rows=10, mean=90_000.0, deviation=0.0, longest=90_000)
    on = replace(gpus(80), sizes=lambda role, split: endless)
    for peft, longest in (("lora", 40_960), ("{method: prefix, tokens: 100}", 40_860)):
        config = build(f"ppo.peft={peft}", "ppo.ptx.coef=0.5").stages["ppo"]
        assert isinstance(config, PpoConfig)
        assert mix_lengths(config, on).longest == longest


EVERYTHING = (
    "ppo.peft=none", "ppo.ptx.coef=0.5", "ppo.ptx.rows=8", "ppo.steps=12",
    "ppo.batch_episodes=48", "ppo.minibatch_episodes=24", "ppo.epochs=1", "ppo.max_new_tokens=40",
    "ppo.evaluate_every=6", "ppo.evaluate_prompts=48",
)  # fmt: skip
STATES = ["policy and critic", "trained", "reference", "reward model"]


def test_the_work_of_ppo_by_hand() -> None:
    """12 x 48 = 576 episodes, 3 x 48 = 144 answers of evaluations; prompts of 400 tokens, answers of 40."""
    found = build(*EVERYTHING)
    work = cost_of(found.stages["ppo"], gpus(80), found.stages).work
    assert [(task.activity, task.formula.lstrip("(").partition(":")[0]) for task in work] == [
        ("load", "policy, reference, published model"), ("load", "critic"), ("load", "reward model"),
        ("read", "scores"), ("read", "episodes"), ("decode", "episodes"), ("read", "evaluations"),
        ("decode", "evaluations"), ("host", "episodes"), ("read", "log-probabilities"), ("read", "values"),
        ("train", "policy"), ("train", "critic"), ("train", "pretraining mix"),
        ("optimizer", "24 x 1.58e+10 parameters x 40 B / 2000 GB/s"),
    ]  # fmt: skip
    (host,) = (task.seconds for task in work if task.activity == "host")
    assert host == (576 + 144) * ROW_SECONDS
    tokens = {
        task.formula.lstrip("(").partition(":")[0]: task.formula
        for task in work
        if " tokens " in task.formula
    }
    expected = {
        "scores": (576 + 144) * 440, "episodes": 576 * 400, "evaluations": 144 * 400,
        # the reference reads all, the policy what it is evaluated on, and its episodes before it learns
        "log-probabilities": (576 + 2 * 144 + 576) * 440,
        "values": 576 * 440, "policy": 576 * 440, "critic": 576 * 440, "pretraining mix": 24 * 8 * 400,
    }  # fmt: skip
    assert {name: float(how.partition(" tokens ")[0].rpartition(" ")[2]) for name, how in tokens.items()} == {
        name: pytest.approx(value, rel=0.005) for name, value in expected.items()
    }


def test_what_ppo_holds_and_when_by_hand() -> None:
    found = build(*EVERYTHING)
    cost = cost_of(found.stages["ppo"], gpus(80), found.stages)

    def parts(phase: str) -> list[str]:
        (held,) = [each.parts for each in cost.phases if each.name == phase]
        return [part.formula.partition(":")[0] for part in held]

    assert [phase.name for phase in cost.phases] == [
        "loading", "sampling", "reward model", "reference", "learning", "optimizer step", "publishing",
    ]  # fmt: skip
    assert parts("loading") == ["2 whole models", "reward model"]
    for phase in cost.phases[1:]:
        held = parts(phase.name)
        assert all(name.find(state) >= 0 for name, state in zip(held, STATES, strict=False)), held
    trained = EIGHT.parameters
    scalar = EIGHT.parameters - EIGHT.head + 4096  # a score's head instead of the vocabulary's
    # masters and two moments in fp32 of both; the best policy so far in bf16
    assert cost.checkpoint == pytest.approx(3 * 4 * (trained + scalar) + 2 * trained, rel=1e-6)
    assert cost.artifact == pytest.approx(2 * trained, rel=1e-3)
    assert (cost.longest, cost.sampled, cost.context) == (940, 940, 40_960)


def work_of(on: CostContext, *overrides: str) -> dict[str, float]:
    """Task -> seconds, of PPO with a rule."""
    stage = build(*RULED, *overrides).stages["ppo"]
    assert isinstance(stage, PpoConfig)
    work = policy_cost(stage, on, reward_method=None).work
    return {task.formula.lstrip("(").partition(":")[0]: task.seconds for task in work}


def test_a_rollout_that_is_one_pass_is_not_scored_before_it_is_learned_from() -> None:
    whole = ("ppo.batch_episodes=8", "ppo.minibatch_episodes=8")
    once = work_of(gpus(80), *whole, "ppo.micro_batch_tokens=1000000")
    twice = work_of(gpus(80), *whole, "ppo.micro_batch_tokens=1000")
    assert once["values"] == 0 < twice["values"]
    assert once["log-probabilities"] < twice["log-probabilities"]


def test_the_policys_training_counts_its_logits() -> None:
    on = gpus(80)
    more = replace(on, shape=replace(on.shape, vocabulary=2 * on.shape.vocabulary))
    first, second = (work_of(each)["policy"] for each in (on, more))
    assert second > first * 1.001
    assert work_of(on)["critic"] == work_of(more)["critic"]


def test_the_mix_lies_beside_a_minibatch_under_deepspeed_alone() -> None:
    stage = build(*RULED, "ppo.ptx.coef=0.5", "ppo.ptx.rows=64", "ppo.micro_batch_tokens=4000").stages["ppo"]
    assert isinstance(stage, PpoConfig)
    sizes = {}
    zeros: tuple[Zero, ...] = ("none", "fsdp2", "zero2")
    for zero in zeros:
        (found,) = mix_activations(stage, replace(gpus(80), zero=zero), once=False)
        sizes[zero] = found.size
    assert sizes["none"] == sizes["fsdp2"] < sizes["zero2"]


def test_without_a_critic_there_is_none_of_its_memory_and_work() -> None:
    stages = build(*RULED, "ppo.peft=none", "grpo.peft=none").stages
    ppo, grpo = (cost_of(stages[name], gpus(80), stages) for name in ("ppo", "grpo"))
    weights, optimizers = (
        [
            sum(part.size for part in cost.phases[1].parts if part.kind == kind)  # while it samples
            for cost in (ppo, grpo)
        ]
        for kind in ("weights", "optimizer")
    )
    scalar = EIGHT.parameters - EIGHT.head
    assert weights[0] - weights[1] == 2 * scalar
    assert optimizers[0] - optimizers[1] == pytest.approx(3 * 4 * scalar, rel=1e-3)
    named = {task.formula.lstrip("(").partition(":")[0] for task in grpo.work}
    assert not {"values", "critic"} & named and "policy" in named


def test_on_a_cpu_a_group_reads_its_prompt_once() -> None:
    """400 tokens of a prompt and 40 of each answer: 8 answers are 400 + 8 x 40 instead of 8 x 440 tokens."""
    on = gpus(80)
    on = replace(on, machine=replace(on.machine, kind="cpu"))

    def seconds(samples: int) -> float:
        sizes = (f"grpo.samples_per_prompt={samples}", "grpo.batch_episodes=48", "grpo.minibatch_episodes=24")
        stages = build(*RULED, *sizes, "grpo.advantage=reinforce_plus_plus").stages
        work = cost_of(stages["grpo"], on, stages).work
        (found,) = (task.seconds for task in work if task.formula.lstrip("(").startswith("policy:"))
        return found

    assert seconds(8) < 0.35 * seconds(1)


def test_proposed_batches_have_whole_groups() -> None:
    """Over 5 ranks the planner takes multiples of 20, not of 5."""
    use = UseCase(100, 10.0, 10.0, 1, 1, True, "many_adapters", None, None)
    planned = dict(with_method(build(*RULED).stages["grpo"], "lora", 0, "lora", gpus(80, ranks=5), use))
    assert (planned["batch_episodes"], planned["minibatch_episodes"]) == (60, 40)
