"""Which weights PPO keeps: the best ones."""

from __future__ import annotations

import pytest

from helpers.ppo import ROWS, Counting, MakeTrainer, actor_critic, best_weights, equal, weights


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
