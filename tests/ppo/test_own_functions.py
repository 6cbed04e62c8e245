"""Advantages and losses that a user names: `python:MODULE:FUNCTION`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.experiments import build
from helpers.grpo import grpo_stage, grpo_trainer
from helpers.jobs import on_cpu
from helpers.ppo import equal, experience_of, prompts, weights
from rlhf.config import ConfigError
from rlhf.pipeline.checks import check
from rlhf.pipeline.key import external_digests
from rlhf.pipeline.stage import View
from rlhf.ppo.trainer import repeated

TRAIN, HELD_OUT = prompts(range(100, 140)), prompts(range(700, 704))
NAMED = "python:own_rules:"
RULES = """
import torch

def rloo(rewarded, config):
    totals_GN = rewarded.reward_BR.sum(1, dtype=torch.float64).view(-1, rewarded.group_size)
    others_GN = (totals_GN.sum(1, keepdim=True) - totals_GN) / (rewarded.group_size - 1)
    return (totals_GN - others_GN).view(-1, 1).expand(rewarded.mask_BR.shape).float()

def reinforce(logp_BR, sampled_logp_BR, advantage_BR, mask_BR, *, total_tokens, weight_B, config):
    return -(advantage_BR * torch.where(mask_BR, logp_BR, 0.0)).sum() / total_tokens

def too_short(rewarded, config):
    return rewarded.reward_BR.sum(1)

def no_returns(rewarded, config):
    return rewarded.reward_BR

def by_token(logp_BR, sampled_logp_BR, advantage_BR, mask_BR, *, total_tokens, weight_B, config):
    return -advantage_BR * logp_BR

def detached(logp_BR, sampled_logp_BR, advantage_BR, mask_BR, *, total_tokens, weight_B, config):
    return reinforce(logp_BR.detach(), sampled_logp_BR, advantage_BR, mask_BR, total_tokens=total_tokens,
                     weight_B=weight_B, config=config)

def by_weight(logp_BR, sampled_logp_BR, advantage_BR, mask_BR, *, total_tokens, weight_B, config):
    loss_BR = -weight_B[:, None] * advantage_BR * torch.where(mask_BR, logp_BR, 0.0)
    return loss_BR.sum() / total_tokens

def in_place(rewarded, config):
    rewarded.reward_BR.sub_(rewarded.reward_BR.mean())
    return rewarded.reward_BR

def broken(rewarded, config):
    return rewarded.rewards
"""


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's."""
    path = tmp_path / "own_rules.py"
    path.write_text(RULES, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rules", raising=False)  # another test's
    return path


def trained(directory: Path, model: Path, *overrides: str) -> dict[str, Tensor]:
    trainer = grpo_trainer(directory, model, *overrides)
    trainer.train(TRAIN, HELD_OUT)
    return weights(trainer.policy.model)


@pytest.mark.usefixtures("rules")
def test_an_estimator_from_outside_trains_as_one_of_ours(tmp_path: Path, tiny_model: Path) -> None:
    ours = trained(tmp_path / "ours" / "job", tiny_model, "grpo.advantage=rloo")
    own = trained(tmp_path / "own" / "job", tiny_model, f"grpo.advantage={NAMED}rloo")
    other = trained(tmp_path / "other" / "job", tiny_model, "grpo.advantage=grpo")
    assert equal(own, ours) and not equal(own, other)


@pytest.mark.usefixtures("rules")
def test_a_loss_from_outside_has_its_figures(tmp_path: Path, tiny_model: Path) -> None:
    """One step a rollout: the policy is the one that sampled, and the gradients of both losses are equal."""
    once = ("grpo.minibatch_episodes=16", "grpo.kl.coef=0.0")
    ours = trained(tmp_path / "ours" / "job", tiny_model, *once)
    own = trained(tmp_path / "own" / "job", tiny_model, *once, f"grpo.policy_loss={NAMED}reinforce")
    for name, weight in ours.items():
        torch.testing.assert_close(own[name], weight, atol=2e-4, rtol=1e-3)
    trainer = grpo_trainer(
        tmp_path / "job", tiny_model, "grpo.epochs=2", f"grpo.policy_loss={NAMED}reinforce"
    )
    trainer.train(TRAIN, HELD_OUT)
    assert all(each["approximate_kl"] > 0.0 and each["max_ratio"] > 1.0 for each in trainer.history)
    assert all(each["clip_fraction"] == 0.0 for each in trainer.history)


def test_its_code_is_in_the_key(rules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rlhf.rewards.code as code

    def digests() -> dict[str, str]:
        """As a new process finds them."""
        monkeypatch.setattr(code, "_imported", {})
        monkeypatch.delitem(sys.modules, "own_rules", raising=False)
        experiment = build(f"grpo.advantage={NAMED}rloo", "ppo.reward=vader")
        return external_digests(experiment.stages["grpo"], experiment.stages)

    before = digests()
    assert f"{NAMED}rloo" in before
    rules.write_text(f"# a comment\n{RULES}", encoding="utf-8")
    assert digests() == before
    rules.write_text(RULES.replace("- others_GN", "- 2 * others_GN"), encoding="utf-8")
    assert digests() != before


@pytest.mark.usefixtures("rules")
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            [f"grpo.advantage={NAMED}too_short"],
            f"grpo.advantage={NAMED}too_short: it must return a tensor of (8, 3) (episodes, tokens), and "
            "returned torch.Size([8]). Fix it.",
        ),
        (
            [f"grpo.advantage={NAMED}broken"],
            "on answers to two made-up prompts it raised AttributeError: 'Rewarded' object has no attribute "
            "'rewards' (",
        ),
        (
            [f"grpo.policy_loss={NAMED}by_token"],
            "that carries the gradient of logp_BR, and returned a tensor of (8, 3). Fix it.",
        ),
        ([f"grpo.policy_loss={NAMED}detached"], "and returned a tensor of () without a gradient. Fix it."),
        ([f"grpo.policy_loss={NAMED}nothing"], "has no attribute 'nothing'. Name a function of that module."),
    ],
)
def test_what_cannot_be_called_is_refused_before_anything_trains(overrides: list[str], said: str) -> None:
    experiment = build(*overrides, "ppo.reward=vader")
    with pytest.raises(ConfigError) as error:
        check(experiment.stages["grpo"], View(experiment.stages, compute=on_cpu()))
    assert said in str(error.value) and "STAGE" not in str(error.value)


@pytest.mark.usefixtures("rules")
def test_a_loss_is_tried_as_it_will_be_called() -> None:
    experiment = build("ppo.reward=vader", "grpo.loss_mean=sequence", f"grpo.policy_loss={NAMED}by_weight")
    check(experiment.stages["grpo"], View(experiment.stages, compute=on_cpu()))


@pytest.mark.usefixtures("rules")
def test_an_estimator_may_write_into_what_it_gets(tmp_path: Path, tiny_model: Path) -> None:
    trainer = grpo_trainer(tmp_path / "job", tiny_model, f"grpo.advantage={NAMED}in_place")
    experience, _ = experience_of(trainer, repeated(TRAIN[:4], 4))
    assert float(experience.reward_BR.sum()) > 1.0  # lengths; not what the estimator made of them


def test_one_ratio_a_response_is_not_offered_with_a_critic() -> None:
    with pytest.raises(ConfigError, match=r"ppo\.policy_loss='gspo'"):
        build("ppo.policy_loss=gspo")


@pytest.mark.usefixtures("rules")
def test_a_critic_needs_returns() -> None:
    experiment = build(f"ppo.advantage={NAMED}no_returns", "ppo.reward=vader", "ppo.critic.init=sft")
    with pytest.raises(ConfigError, match="the critic learns the returns, so it must return"):
        check(experiment.stages["ppo"], View(experiment.stages, compute=on_cpu()))


def test_a_name_that_there_is_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as error:
        grpo_stage("grpo.advantage=rlo")
    assert str(error.value) == (
        "grpo.advantage='rlo': Input should be 'grpo', 'rloo', 'reinforce_plus_plus', "
        "'reinforce_plus_plus_baseline' or 'python:MODULE:FUNCTION'. Did you mean rloo?"
    )
