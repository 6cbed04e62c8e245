"""Which figure goes where while PPO learns: each could be swapped for a neighbour without a crash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.jobs import WithIdlePasses, user
from helpers.ppo import (
    ROWS,
    MakeTrainer,
    best_weights,
    equal,
    experience_of,
    length,
    prompts,
    resumed_learner,
    shake,
    take_step,
    weights,
)
from rlhf.data.schema import SftRow
from rlhf.ppo.metrics import UpdateSums
from rlhf.ppo.trainer import PolicyTrainer
from rlhf.rewards.reward import Prompts, RewardError
from rlhf.rl.advantage import AdaptiveKL
from rlhf.training.engine import PlainEngine

ANSWERS = [SftRow(user(f"Say {n}"), "It is " + "very " * n + f"{n}.") for n in range(8)]
FREE = ("ppo.optim.max_grad_norm=1e9", "ppo.critic.optim.max_grad_norm=1e9")
TRAIN, HELD_OUT = prompts(range(100, 140)), prompts(range(700, 704))


def gradients(trainer: PolicyTrainer) -> list[Tensor]:
    """Of the optimizer step that is taken now: AdamW's first moment after one step is a tenth of them."""
    trainer.engine.step()
    assert isinstance(trainer.engine, PlainEngine)
    state: dict[str, Any] = trainer.engine.optimizer.state_dict()["adamw"]["state"]
    return [moments["exp_avg"] * 10 for moments in state.values()]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert max(float(each.abs().max()) for each in expected) > 1e-4
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-7)


def test_epochs_end_by_the_last_epochs_own_kl_not_by_the_mean_of_all(make: MakeTrainer) -> None:
    one, two = (take_step(make(f"ppo.epochs={n}"), ROWS, 1)["approximate_kl"] for n in (1, 2))
    second = 2 * two - one  # both epochs have the same tokens
    assert one < two < second
    bound = (two + second) / 2
    metrics = take_step(make("ppo.epochs=3", f"ppo.stop_epochs_kl={bound}"), ROWS, 1)
    assert metrics["epochs"] == 2.0


@pytest.mark.parametrize("mixed", [False, True])
def test_passes_without_weight_change_no_gradient(make: MakeTrainer, mixed: bool) -> None:
    results = []
    for idle in (False, True):
        settings = (*FREE, "ppo.micro_batch_tokens=150", f"ppo.ptx.coef={1.0 if mixed else 0.0}")
        trainer = make(*settings, mix_rows=ANSWERS if mixed else ())
        experience = experience_of(trainer, ROWS)[0]
        shake(trainer)
        if idle:
            compute = trainer.compute
            trainer.compute = WithIdlePasses(compute.device_name, compute.dtype_name)
        sums = UpdateSums(trainer.objective.figures)
        trainer.accumulate(experience, [sums], critic_only=False)
        results.append((sums.means(trainer.compute), gradients(trainer)))
    (expected_means, expected), (means, found) = results
    assert means == pytest.approx(expected_means, rel=1e-5, abs=1e-7)
    assert_close(found, expected)


def test_the_pretraining_mix_is_learned_at_temperature_one_whatever_its_micro_batches(
    make: MakeTrainer,
) -> None:
    results = []
    for temperature, micro_batch_tokens in ((1.0, 100_000), (0.5, 100_000), (1.0, 60)):
        trainer = make(
            *FREE, f"ppo.temperature={temperature}", f"ppo.micro_batch_tokens={micro_batch_tokens}",
            "ppo.ptx.coef=1.0", mix_rows=ANSWERS,
        )  # fmt: skip
        assert trainer.mix is not None
        trainer.mix.accumulate(trainer.engine, trainer.compute, micro_batch_tokens)
        results.append(gradients(trainer))
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


def test_the_adaptive_coefficient_follows_the_mean_log_ratio(make: MakeTrainer) -> None:
    """k1, the KL that the penalty is made of, not k3, which is never negative."""
    found: list[dict[str, float]] = []
    for target in (1.0, None):  # close to the KL, so that the controller's step is not clipped
        wanted = target or found[0]["kl"] * 1.01
        trainer = make("ppo.kl.controller=adaptive", "ppo.kl.coef=0.1", f"ppo.kl.target={wanted}")
        shake(trainer)
        found.append(take_step(trainer, ROWS, 1))
    kl, k3 = found[1]["kl"], found[1]["kl_k3"]
    by_kl, by_k3 = (AdaptiveKL(0.1, wanted, trainer.config.kl.horizon) for _ in range(2))
    by_kl.update(kl, len(ROWS))
    by_k3.update(k3, len(ROWS))
    assert trainer.kl.coef == by_kl.coef != by_k3.coef


def test_every_evaluation_draws_the_same_and_another_seed_draws_otherwise(make: MakeTrainer) -> None:
    trainer, other = make(), make()
    shake(trainer)
    shake(other)
    other.job = replace(other.job, seed=other.job.seed + 1)
    assert trainer.evaluate(HELD_OUT).metrics() == trainer.evaluate(HELD_OUT).metrics()
    assert trainer.evaluate(HELD_OUT).metrics() != other.evaluate(HELD_OUT).metrics()


def test_of_policies_that_score_alike_the_first_is_kept(make: MakeTrainer) -> None:
    def alike_when_held_out(prompts: Prompts, completions: Sequence[str]) -> Tensor:
        return (
            length(prompts, completions) if len(completions) == len(ROWS) else torch.zeros(len(completions))
        )

    trainer = make("ppo.steps=2", "ppo.evaluate_every=1", reward=alike_when_held_out)
    start = weights(trainer.policy.model)
    trainer.train(ROWS, HELD_OUT)
    assert not equal(start, weights(trainer.policy.model))
    assert equal(best_weights(trainer), start)


def test_held_out_kl_is_nats_a_sequence_by_the_mean_log_ratio(make: MakeTrainer) -> None:
    trainer = make()
    shake(trainer)
    result = trainer.evaluate(HELD_OUT)
    rollout, _ = trainer.policy.sample(
        [row.prompt for row in HELD_OUT], max_new_tokens=12, temperature=1.0,
        generator=torch.Generator().manual_seed(trainer.job.seed), batch_rows=len(HELD_OUT),
    )  # fmt: skip
    logp_BR, reference_BR = (
        each.log_probabilities(rollout, 1.0, 100_000) for each in (trainer.policy, trainer.reference)
    )
    by_hand = sum(
        float((logp_R - reference_R)[mask_R].sum())
        for logp_R, reference_R, mask_R in zip(logp_BR, reference_BR, rollout.mask_BR, strict=True)
    ) / len(HELD_OUT)
    assert abs(by_hand) > 0.1
    assert result.metrics()["kl"] == pytest.approx(by_hand, rel=1e-4)


class AwayOnce:
    """The response's length; no server at one rollout (of 8 rows; held-out prompts are 4)."""

    def __init__(self, rollout: int = 0) -> None:
        self.away_at, self.rollouts = rollout, 0

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        if len(completions) == 8:
            self.rollouts += 1
            if self.rollouts == self.away_at:
                raise RewardError("the reward server does not answer")
        return length(prompts, completions)


def test_a_step_whose_reward_was_away_is_sampled_anew_with_the_same_numbers(
    tmp_path: Path, tiny_model: Path
) -> None:
    small = (
        "ppo.steps=3", "ppo.batch_episodes=8", "ppo.minibatch_episodes=4", "ppo.max_new_tokens=6",
        "ppo.evaluate_every=3",
    )  # fmt: skip
    through = resumed_learner(tmp_path / "through" / "job", tiny_model, AwayOnce(), *small)
    expected = through.train(TRAIN, HELD_OUT)
    first = resumed_learner(tmp_path / "first", tiny_model, AwayOnce(2), *small)
    with pytest.raises(RewardError):
        first.train(TRAIN, HELD_OUT)
    asked = AwayOnce()
    second = resumed_learner(tmp_path / "second", tiny_model, asked, *small)
    assert second.train(TRAIN, HELD_OUT) == expected
    assert asked.rollouts == 2  # steps 2 and 3
