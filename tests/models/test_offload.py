"""Frozen models that wait in the host's memory. Another place in it stands in for a GPU's memory."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers.experiments import build
from helpers.jobs import TINY, on_cpu, user
from helpers.ppo import ppo_job, ppo_stage
from rlhf.config import ConfigError
from rlhf.data.schema import PromptRow
from rlhf.generation.policy_model import PolicyModel
from rlhf.models.value_head import reset_head
from rlhf.models.weight_sharing import offload
from rlhf.pipeline.checks import check
from rlhf.pipeline.stage import View
from rlhf.ppo.models import load_critic, score_normalizer
from rlhf.rewards.model import LearnedReward
from rlhf.rl.rollout import Rollout
from rlhf.training.engine import Access

ROLLOUT = Rollout([torch.tensor([5, 6, 7])], [torch.tensor([8, 9])], torch.tensor([True]))
PROMPT = user("Hi")


def places(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def test_weights_are_copied_while_they_are_used_and_are_then_where_they_were(tiny_model: Path) -> None:
    model = PolicyModel.load(tiny_model, TINY, on_cpu()).model
    on_device = offload(model, torch.device("cpu"))
    on_host, weights = places(model), [parameter.clone() for parameter in model.parameters()]
    for error in (None, KeyError):
        with contextlib.suppress(KeyError), on_device():
            assert not set(places(model)) & set(on_host)
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                assert torch.equal(parameter, weight)
            assert model.lm_head.weight is model.model.embed_tokens.weight
            if error is not None:
                raise error
        assert places(model) == on_host


def test_policy_and_reward_compute_with_the_copies(tiny_model: Path, tmp_path: Path) -> None:
    policy = PolicyModel.load(tiny_model, TINY, on_cpu())
    stage, job = ppo_stage(), ppo_job(tmp_path, tiny_model)
    normalizer = score_normalizer(stage, job)
    scalar = load_critic(stage, job, lambda *_: torch.zeros(0), normalizer, policy.tokenizer)
    reset_head(scalar, deviation=1.0)
    reward = LearnedReward(tiny_model, scalar, policy.tokenizer, 1000, on_cpu())

    def scores() -> tuple[Tensor, Tensor]:
        return policy.log_probabilities(ROLLOUT, 1.0, 1000), reward([PromptRow(PROMPT)], ["Hello"])

    expected = scores()
    for each in (policy, reward):
        each.access = Access(offload(each.model, torch.device("cpu")))
    used: list[int] = []
    for model in (policy.model, scalar.model):
        model.model.register_forward_pre_hook(lambda backbone, _: used.extend(places(backbone)))
    for found, value in zip(scores(), expected, strict=True):
        assert torch.equal(found, value) and value.any()
    assert used and not set(used) & {*places(policy.model), *places(scalar)}


VIEW = View(build().stages, compute=on_cpu())


def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"ppo\.frozen_placement=offloaded: it .* no GPU\. Use ppo\.frozen_placement=replicated",
    ):
        check(ppo_stage("ppo.frozen_placement=offloaded"), VIEW)


def test_weights_that_the_policy_shares_cannot_be_away() -> None:
    with pytest.raises(
        ConfigError, match=r"ppo\.frozen_placement=offloaded: with ppo\.peft=lora .*policy's weights"
    ):
        check(ppo_stage("ppo.frozen_placement=offloaded", "ppo.peft=lora"), VIEW)
