"""Advantages and losses that a user names: `python:MODULE:FUNCTION`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.experiments import build
from helpers.grpo import grpo_stage, grpo_trainer
from helpers.jobs import on_cpu
from helpers.ppo import equal, experience_of, length, prompts, weights
from rlhf.config import ConfigError
from rlhf.pipeline.checks import check
from rlhf.pipeline.key import external_digests
from rlhf.pipeline.stage import View
from rlhf.ppo.objective import Rewarded
from rlhf.ppo.trainer import repeated
from rlhf.rewards.reward import Prompts
from rlhf.rl.advantage import generalized_advantage
from rlhf.rl.group import leave_one_out_advantage

TRAIN, HELD_OUT = prompts(range(100, 140)), prompts(range(700, 704))
NAMED = "python:own_rules:"
RULES = """
import torch

def rloo(rewarded, config):
    totals_GN = rewarded.reward_BR.sum(1, dtype=torch.float64).view(-1, rewarded.group_size)
    others_GN = (totals_GN.sum(1, keepdim=True) - totals_GN) / (rewarded.group_size - 1)
    return (totals_GN - others_GN).view(-1, 1).expand(rewarded.mask_BR.shape)  # fp64

def reinforce(logp_BR, sampled_logp_BR, advantage_BR, mask_BR, *, total_tokens, weight_B, config):
    return -(advantage_BR * torch.where(mask_BR, logp_BR, 0.0)).sum() / total_tokens

def too_short(rewarded, config):
    return rewarded.reward_BR.sum(1)

def short_returns(rewarded, config):
    from rlhf.rl.rollout import Advantages, Values
    return Advantages(rewarded.reward_BR, Values(rewarded.value_BR, rewarded.reward_BR[:, :1]))

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

def nan(rewarded, config):
    return rewarded.reward_BR * float("nan")

def nan_loss(logp_BR, *rest, **named):
    return logp_BR.sum() * float("nan")

def quits(*rest, **named):
    raise SystemExit(0)

calls = []

def third_time(rewarded, config):
    calls.append(1)
    if len(calls) == 3:
        raise ValueError("no more")
    return rewarded.reward_BR

number = 3

def broken_key(rewarded, config):
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
    ("key", "name", "said"),
    [
        (
            "advantage", "too_short",
            ": it must return a tensor of shape (8, 3) (episodes, tokens), and returned tensors of (8,).",
        ),
        ("advantage", "nan", ": it returned nan or inf for 15 of 15 tokens. Fix it."),
        (
            "advantage", "broken_key",
            ": it raised AttributeError: 'Rewarded' object has no attribute 'rewards' (",
        ),
        ("advantage", "number", ": it names a value of the type int. Name a function."),
        (
            "policy_loss", "by_token",
            ": it must return a tensor with one number that carries the gradient of logp_BR, and returned a "
            "tensor of (8, 3). Fix it.",
        ),
        ("policy_loss", "detached", " and returned a tensor of () without a gradient. Fix it."),
        ("policy_loss", "nan_loss", ": it returned nan for made-up answers. Fix it."),
        ("policy_loss", "quits", ": it raised SystemExit: 0 ("),
    ],
)  # fmt: skip
def test_what_cannot_be_called_is_refused_before_anything_trains(key: str, name: str, said: str) -> None:
    experiment = build(f"grpo.{key}={NAMED}{name}", "ppo.reward=vader")
    with pytest.raises(ConfigError) as error:
        check(experiment.stages["grpo"], View(experiment.stages, compute=on_cpu()))
    told = str(error.value)
    assert told.startswith(f"grpo.{key}={NAMED}{name}: it ") and said in told
    assert ("own_rules.py, line " in told) == ("raised" in said)


@pytest.mark.usefixtures("rules")
def test_a_name_that_the_module_has_not_is_told_with_its_key_and_the_nearest() -> None:
    experiment = build(f"grpo.policy_loss={NAMED}reinfore", "ppo.reward=vader")
    with pytest.raises(ConfigError) as error:
        external_digests(experiment.stages["grpo"], experiment.stages)
    assert str(error.value) == (
        f"grpo.policy_loss={NAMED}reinfore: module 'own_rules' has no attribute 'reinfore'. Did you mean "
        "reinforce? Name a function of that module."
    )


@pytest.mark.usefixtures("rules")
def test_a_loss_that_ignores_its_weights_is_refused() -> None:
    experiment = build("ppo.reward=vader", "grpo.loss_mean=sequence", f"grpo.policy_loss={NAMED}reinforce")
    with pytest.raises(ConfigError, match=r"so loss_mean=sequence would do nothing\. Multiply"):
        check(experiment.stages["grpo"], View(experiment.stages, compute=on_cpu()))


@pytest.mark.usefixtures("rules")
def test_what_it_raises_later_is_told_in_a_line_and_costs_no_step(tmp_path: Path, tiny_model: Path) -> None:
    first = grpo_trainer(tmp_path / "first", tiny_model, f"grpo.advantage={NAMED}third_time")
    with pytest.raises(
        ConfigError, match=r"^\{stage\}\.advantage=python:own_rules:third_time: it raised ValueError"
    ):
        first.train(TRAIN, HELD_OUT)
    asked: list[int] = []

    def reward(prompts: Prompts, completions: Sequence[str]) -> Tensor:
        asked.append(len(completions))
        return length(prompts, completions)

    second = grpo_trainer(tmp_path / "second", tiny_model, reward=reward)
    second.train(TRAIN, HELD_OUT)
    assert asked.count(16) == 1 and len(second.history) == 3


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
@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("no_returns", "a tensor of (2, 2)"),
        ("short_returns", "tensors of (2, 2), (2, 2), (2, 1)"),
    ],
)
def test_a_critic_needs_returns(name: str, got: str) -> None:
    experiment = build(f"ppo.advantage={NAMED}{name}", "ppo.reward=vader", "ppo.critic.init=sft")
    with pytest.raises(ConfigError) as error:
        check(experiment.stages["ppo"], View(experiment.stages, compute=on_cpu()))
    assert str(error.value) == (
        f"ppo.advantage={NAMED}{name}: it must return rlhf.rl.rollout.Advantages(advantage_BR, "
        f"Values(value_BR, return_BR)), all of shape (2, 2) (episodes, tokens), and returned {got}. Fix it."
    )


def test_a_name_that_there_is_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as error:
        grpo_stage("grpo.advantage=rlo")
    assert str(error.value) == (
        "grpo.advantage='rlo': it must be 'grpo', 'rloo', 'reinforce_plus_plus', "
        "'reinforce_plus_plus_baseline' or 'python:MODULE:FUNCTION'. Did you mean rloo?"
    )


def documented() -> dict[str, Any]:
    """The functions of docs/extending.md."""
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    section = page.partition("## Add an advantage estimator")[2].partition("\n## ")[0]
    found: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(block, found)
    return found


def test_the_documented_functions_are_right() -> None:
    """Of eight answers to two prompts one has no score."""
    mask_BR = torch.ones(8, 3, dtype=torch.bool)
    mask_BR[2] = False
    mask_BR[5, 2:] = False
    reward_BR = torch.where(mask_BR, torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), 0.0)
    rewarded, given = Rewarded(reward_BR, mask_BR, 4, torch.ones(8, 3)), documented()
    found_BR = torch.where(mask_BR, given["leave_one_out"](rewarded, None), 0.0)
    torch.testing.assert_close(found_BR, leave_one_out_advantage(reward_BR, mask_BR, rewarded.group_B))
    returns_BR = generalized_advantage(reward_BR, torch.zeros(8, 3), mask_BR, gamma=1.0, lam=1.0)[1]
    torch.testing.assert_close(
        torch.where(mask_BR, given["monte_carlo"](rewarded, None).values[1], 0.0), returns_BR
    )
    logp_BR = torch.full((8, 3), -2.0)
    for weight_B, expected in (
        (None, 2 * 20 / 30),
        (torch.arange(8.0), 2 * (3 * (0 + 1 + 3 + 4 + 6 + 7) + 2 * 5) / 30),
    ):
        loss = given["reinforce"](
            logp_BR, logp_BR, torch.ones(8, 3), mask_BR, total_tokens=30, weight_B=weight_B, config=None
        )
        assert float(loss) == pytest.approx(expected)
