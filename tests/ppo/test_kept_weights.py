"""Which weights PPO keeps: the best ones, or their moving average."""

from __future__ import annotations

import pytest
import torch

from helpers.ppo import ROWS, Counting, MakeTrainer, actor_critic, best_weights, equal, weights


def test_the_average_lags_behind_the_weights(make: MakeTrainer) -> None:
    trainer = make("ppo.ema_decay=0.75", "ppo.minibatch_episodes=16")
    assert trainer.update.average is not None
    before = weights(actor_critic(trainer).policy)
    trainer.step(ROWS, 1)
    after = weights(actor_critic(trainer).policy)
    assert not equal(after, before)
    with trainer.update.average.swapped_in():
        for name, value in actor_critic(trainer).policy.named_parameters():
            torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * after[name], atol=1e-7, rtol=1e-5)
    assert equal(weights(actor_critic(trainer).policy), after)


def test_the_averaged_weights_are_what_is_kept(make: MakeTrainer) -> None:
    overrides = ("ppo.steps=1", "ppo.minibatch_episodes=16", "ppo.evaluate_every=1")
    plain = make(*overrides, reward=Counting(1.0))  # rises, so that the last policy counts as the best
    averaged = make(*overrides, "ppo.ema_decay=0.9", reward=Counting(1.0))
    start = weights(actor_critic(plain).policy)
    for trainer in (plain, averaged):
        trainer.train(ROWS, ROWS[:4])
    trained = weights(actor_critic(plain).policy)
    assert equal(best_weights(plain), trained)
    assert best_weights(averaged).keys() == start.keys()
    for name, value in best_weights(averaged).items():
        torch.testing.assert_close(value, 0.9 * start[name] + 0.1 * trained[name], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("change", [+1.0, -1.0])
def test_the_best_policy_is_kept_not_the_last(make: MakeTrainer, change: float) -> None:
    trainer = make("ppo.steps=2", "ppo.evaluate_every=1", reward=Counting(change))
    start = weights(actor_critic(trainer).policy)
    summary = trainer.train(ROWS, ROWS[:4])
    last = weights(actor_critic(trainer).policy)
    assert not equal(last, start)
    assert equal(best_weights(trainer), last if change > 0 else start)
    calls = (1, 5)  # evaluation, then two steps, each with a rollout and an evaluation
    assert summary["held_out_score"] == max(change * call for call in calls)
    assert summary["held_out_score_last"] == change * 5
