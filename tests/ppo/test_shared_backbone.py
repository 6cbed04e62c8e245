"""PPO's four models on one set of frozen weights, against four that were each loaded for themselves."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers.jobs import TINY, on_cpu
from helpers.models import embedding
from helpers.ppo import best_weights, experience_of, ppo_job, ppo_stage, prompts, reward_model
from helpers.spawned import start_ranks
from rlhf.data.chat_template import exchange_ids
from rlhf.distributed.compute import Compute
from rlhf.models.base import load_tokenizer
from rlhf.models.load import load_causal_lm
from rlhf.models.peft.attach import attach
from rlhf.models.peft.config import PeftConfig
from rlhf.models.save import save_policy
from rlhf.models.value_head import ScalarModel, load_scalar_model
from rlhf.models.weight_sharing import Backbone
from rlhf.pipeline.trainable import TunedPolicy
from rlhf.ppo.metrics import UpdateSums
from rlhf.ppo.trainer import PolicyTrainer
from rlhf.rewards.model import LearnedReward, load_learned_reward
from rlhf.rewards.reward import RewardError
from rlhf.rl.rollout import RewardRule, Rollout, make_experience
from rlhf.training.engine import PlainEngine

ROWS = prompts(range(16))
SETTINGS = (
    "ppo.peft=lora", "ppo.steps=3", "ppo.batch_episodes=16", "ppo.minibatch_episodes=8",
    "ppo.max_new_tokens=12", "ppo.evaluate_every=3", "ppo.optim.lr=1e-3", "ppo.critic.optim.lr=1e-3",
    "ppo.kl.coef=0.1",
)  # fmt: skip
COMPLETIONS = ["An answer. " * n for n in range(len(ROWS))]


def learners(tmp_path: Path, sft: Path, *overrides: str) -> tuple[PolicyTrainer, PolicyTrainer]:
    """The stage's own, with shared weights, and with separate ones."""
    stage = ppo_stage(*SETTINGS, *overrides)
    torch.manual_seed(0)
    shared = stage.trainer(ppo_job(tmp_path / "shared", sft))
    with pytest.MonkeyPatch.context() as patch:
        load = partial(TunedPolicy.load, share=False)
        patch.setattr(TunedPolicy, "load", lambda *given, **options: load(*given))
        patch.setattr(type(stage), "shares_reference", lambda *_, **options: False)
        torch.manual_seed(0)
        return shared, stage.trainer(ppo_job(tmp_path / "separate", sft))


def models(trainer: PolicyTrainer) -> list[nn.Module]:
    reward = [trainer.reward.model] if isinstance(trainer.reward, LearnedReward) else []
    return [trainer.engine.model, trainer.reference.model, *reward]


def held(modules: list[nn.Module]) -> int:
    """Bytes of all weights, each storage once."""
    storages = [p.untyped_storage() for module in modules for p in module.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def trained(trainer: PolicyTrainer) -> int:
    parameters = [p for p in trainer.engine.model.parameters() if p.requires_grad]
    return sum(p.untyped_storage().nbytes() for p in parameters)


def shake(trainer: PolicyTrainer) -> None:
    """Move what trains away from where it was, always to the same place: no adapter is the identity then."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.engine.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def relative(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm().clamp(min=1e-12))


def assert_same_step(shared: PolicyTrainer, separate: PolicyTrainer) -> None:
    """Scores, values, log-probabilities, losses and gradients, in fp32 to 1e-5."""
    pair = (shared, separate)
    for trainer in pair:
        shake(trainer)
    experiences = [experience_of(trainer, ROWS)[0] for trainer in pair]
    for name in ("logp_BR", "reference_logp_BR", "value_BR", "advantage_BR", "score_B"):
        assert relative(*(getattr(each, name) for each in experiences)) < 1e-5, name
    assert relative(experiences[0].logp_BR, experiences[0].reference_logp_BR) > 1e-3
    sums = [UpdateSums(trainer.objective.figures) for trainer in pair]
    for trainer, each, experience in zip(pair, sums, experiences, strict=True):
        trainer.accumulate(experience, [each], critic_only=False)
    losses = [each.means(on_cpu()) for each in sums]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5, abs=1e-6)
    for group in range(2):  # policy, critic
        first, second = (gradients(trainer, group) for trainer in pair)
        assert len(first) == len(second) == 2 * 2 * 7 + 2 * group  # A and B; layers; linears; head and offset
        assert all(each.abs().max() > 0.0 for each in first)
        assert relative(*(torch.cat([each.flatten() for each in every]) for every in (first, second))) < 1e-5


def gradients(trainer: PolicyTrainer, group: int) -> list[Tensor]:
    """What the optimizer has of the policy's weights (0) or the critic's (1)."""
    assert isinstance(trainer.engine, PlainEngine)
    optimizer = trainer.engine.optimizer
    return [master.grad for master in optimizer._inner.param_groups[group]["params"]]


def assert_same_training(shared: PolicyTrainer, separate: PolicyTrainer) -> None:
    """All that three steps log, and what would be published."""
    summaries = [trainer.train(ROWS, ROWS[:4]) for trainer in (shared, separate)]
    assert summaries[0] == pytest.approx(summaries[1], rel=1e-4, abs=1e-5)
    for steps in zip(shared.history, separate.history, strict=True):
        first, second = (
            {name: each for name, each in step.items() if "seconds" not in name} for step in steps
        )
        assert first == pytest.approx(second, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(best_weights(shared), best_weights(separate), rtol=1e-4, atol=1e-5)


def test_one_backbone_where_the_reward_model_is_an_adapter_on_the_sft_model(
    tmp_path: Path, tiny_model: Path
) -> None:
    reward = reward_model(tmp_path / "reward", tiny_model, "lora")
    adapter = (reward / "adapter" / "adapter_model.safetensors").stat().st_size
    one = held([load_causal_lm(tiny_model, TINY, torch.float32)])
    for assert_same in (assert_same_step, assert_same_training):
        shared, separate = learners(
            tmp_path, tiny_model, f"ppo.reward=model:{reward}", "ppo.critic.init=reward"
        )
        assert held(models(separate)) - trained(separate) > 3.9 * one
        assert_same(shared, separate)
        assert one < held(models(shared)) - trained(shared) < one + adapter  # nothing folded is left


@pytest.mark.parametrize(
    ("reward", "init", "num_backbones"),
    [("none", "reward", 2), ("none", "sft", 2), ("dora", "sft", 2), ("python", "sft", 1)],
)
def test_as_many_backbones_as_there_are_different_ones(
    tmp_path: Path, tiny_model: Path, reward: str, init: str, num_backbones: int
) -> None:
    """A reward model that was trained in full, or by another method than lora, has its own."""
    source = "python:helpers.ppo:starts_with_e"
    if reward != "python":
        source = f"model:{reward_model(tmp_path / 'reward', tiny_model, reward)}"
    heads = 4 * 64 * 4  # fp32
    one = held([load_causal_lm(tiny_model, TINY, torch.float32)])
    for assert_same in (assert_same_step, assert_same_training):
        shared, separate = learners(tmp_path, tiny_model, f"ppo.reward={source}", f"ppo.critic.init={init}")
        assert_same(shared, separate)
        assert 0 <= held(models(shared)) - trained(shared) - num_backbones * one < heads


def scores(learned: LearnedReward) -> Tensor:
    found = learned(ROWS, COMPLETIONS)
    assert found.std() > 0.05
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_scores_as_the_merged_model_that_was_published(
    tmp_path: Path, tiny_model: Path, dtype: torch.dtype
) -> None:
    reward, compute = reward_model(tmp_path / "reward", tiny_model, "lora", dtype), on_cpu(dtype=dtype)
    backbone = Backbone(tiny_model, load_causal_lm(tiny_model, TINY, dtype))
    published = load_learned_reward(reward, TINY, compute, 1000)
    shared = load_learned_reward(reward, TINY, compute, 1000, backbone)
    assert embedding(shared.model.model).data_ptr() == (embedding(backbone.model).data_ptr())
    for _ in range(2):
        torch.testing.assert_close(scores(shared), scores(published), rtol=1e-5, atol=1e-5)
    merged = dict(published.model.named_parameters())
    with shared.access.alone():
        folded = {
            name.replace(".base_layer", ""): value
            for name, value in shared.model.named_parameters()
            if "lora_" not in name and "lm_head" not in name
        }
        assert folded.keys() == merged.keys() - {"model.score.weight"} | {"head.weight"}
        for name, value in folded.items():
            assert torch.equal(value, merged[name.replace("head.weight", "model.score.weight")]), name


def test_in_bf16_a_critic_of_two_adapters_is_as_near_to_fp32_as_a_merged_one(
    tmp_path: Path, tiny_model: Path
) -> None:
    """It computes W + BA as it stands, the other rounds the sum to bf16: they are not the same bits."""
    reward = reward_model(tmp_path / "reward", tiny_model, "lora", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 259, (40,), generator=generator) for _ in range(64)]

    def values(model: ScalarModel, dtype: torch.dtype) -> Tensor:
        attach(model.model, PeftConfig(method="lora"))
        return model.score(rows, 1000, on_cpu(dtype=dtype))

    found = []
    for dtype in (torch.float32, torch.bfloat16):
        backbone = Backbone(tiny_model, load_causal_lm(tiny_model, TINY, dtype))
        shared = load_learned_reward(reward, TINY, on_cpu(dtype=dtype), 1000, backbone)
        found.append(values(shared.model.shared_copy(), dtype))
    exact_B, factored_B = found
    merged_B = values(load_scalar_model(reward, TINY, torch.bfloat16), torch.bfloat16)
    factored, merged = (float((each_B - exact_B).std() / exact_B.std()) for each_B in (factored_B, merged_B))
    assert 0.0 < merged < 0.06
    assert 0.0 < factored < 1.5 * merged


def test_an_adapter_on_another_model_keeps_its_own_weights(tmp_path: Path, tiny_model: Path) -> None:
    reward, other = reward_model(tmp_path / "reward", tiny_model, "lora"), tmp_path / "other"
    model = load_causal_lm(tiny_model, TINY, torch.float32)
    with torch.no_grad():
        embedding(model)[7, 7] += 1e-3
    save_policy(model, load_tokenizer(tiny_model, TINY), other)
    published = load_learned_reward(reward, TINY, on_cpu(), 1000)
    found = load_learned_reward(reward, TINY, on_cpu(), 1000, Backbone(other, model))
    assert torch.equal(scores(found), scores(published))


def test_a_response_that_fills_the_context_is_scored_with_its_end(tmp_path: Path, tiny_model: Path) -> None:
    learned = load_learned_reward(reward_model(tmp_path / "reward", tiny_model, "none"), TINY, on_cpu(), 2000)
    prompt = ROWS[0]
    room = 1024 - len(exchange_ids(learned.tokenizer, prompt.prompt, "")[0])
    fits, cut = learned([prompt, prompt], ["a" * room, "a" * (room + 8)])
    assert fits == cut
    broken = "\N{REPLACEMENT CHARACTER}" * (room // 2)  # one token each when they were sampled
    assert learned([prompt], [broken]).isfinite().all()
    with pytest.raises(RewardError, match=r"the reward model reads 1024 tokens, and a prompt .* has 1033"):
        learned([prompt], ["a" * (room + 9)])


def references(compute: Compute, model: Path, directory: Path) -> dict[str, tuple[bool, list[float]]]:
    """By `zero=`: whether the reference is the policy, and what of a response moves when the policy does."""
    found = {}
    for zero in ("zero2", "zero3", "fsdp2"):
        stage = ppo_stage(*SETTINGS, f"zero={zero}", "ppo.critic.init=sft")
        job = replace(
            ppo_job(directory / f"{zero}{compute.rank}", model), compute=replace(compute, zero=zero)
        )
        trainer = stage.trainer(job)
        prompt = torch.tensor(list(range(3, 15)))
        rollout = Rollout([prompt, prompt[:5]], [prompt[2:8], prompt[1:5]], torch.ones(2) > 0)

        def sums(trainer: PolicyTrainer = trainer, rollout: Rollout = rollout) -> Tensor:
            both = (trainer.policy, trainer.reference)
            return torch.stack([each.log_probabilities(rollout, 1.0, 1000).sum() for each in both])

        before = sums()
        trainer.engine.set_rates(0, 10)
        (logp_BR, _, _), graph = trainer.score(rollout)
        experience = make_experience(
            rollout, logp_BR=logp_BR, reference_logp_BR=logp_BR, score_B=torch.tensor([1.0, -1.0]),
            rule=RewardRule(trainer.normalizer, 0.05, None, 0.0),
            advantages=partial(trainer.objective.advantages, value_BR=torch.zeros_like(logp_BR)),
        )  # fmt: skip
        trainer.learn(experience, graph, critic_only=False)
        moved = (sums() - before).abs().tolist()
        found[zero] = (trainer.reference.model is trainer.policy.model, [float(before.diff()), *moved])
    return found


@pytest.mark.slow
def test_sharded_weights_are_the_references_too_with_the_adapter_turned_off(
    tiny_model: Path, tmp_path: Path
) -> None:
    for cases in start_ranks(references, 2, tiny_model, tmp_path, timeout=60, seconds=300)().values():
        assert isinstance(cases, dict), cases
        for is_policy, (apart, policy, reference) in cases.values():
            assert is_policy
            assert apart == reference == 0.0 < 1e-4 < policy


def test_a_reference_that_is_wanted_whole_has_weights_of_its_own() -> None:
    def shares(*overrides: str, shards: bool) -> bool:
        return ppo_stage(*overrides).shares_reference(shards_weights=shards)

    lora = "ppo.peft=lora"
    assert shares(lora, shards=True) and shares(lora, shards=False)
    assert not shares(lora, "ppo.frozen_placement=replicated", shards=True)
    assert shares(lora, "ppo.frozen_placement=replicated", shards=False)
    assert not shares("ppo.peft=none", shards=True) and not shares("ppo.peft=none", shards=False)
