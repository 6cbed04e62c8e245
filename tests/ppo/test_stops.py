"""What ends a PPO run early, what is kept of it, and how the same command goes on."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from helpers.ppo import actor_critic, best_weights, equal, prompts, resumed_learner, signal_at
from rlhf.config import ConfigError
from rlhf.ppo.trainer import PolicyTrainer
from rlhf.rewards.reward import Prompts

SMALL = (
    "ppo.batch_episodes=8", "ppo.minibatch_episodes=4", "ppo.max_new_tokens=6", "ppo.evaluate_every=2",
    "ppo.score.normalize=running", "ppo.kl.controller=adaptive", "ppo.kl.coef=0.05",
)  # fmt: skip
TRAIN, HELD_OUT = prompts(range(100, 140)), prompts(range(700, 704))


class Length:
    """The response's length in bytes; infinite in the chosen rollouts (of 8 rows; held-out prompts are 4)."""

    def __init__(self, *bad: int) -> None:
        self.bad, self.rollouts = bad, 0

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        scores = torch.tensor([float(len(completion.encode())) for completion in completions])
        if len(completions) == 8:
            self.rollouts += 1
            if self.rollouts in self.bad:
                scores[3] = math.inf
        return scores


def learner_in(directory: Path, model: Path, reward: Length, *overrides: str) -> PolicyTrainer:
    return resumed_learner(directory, model, reward, *SMALL, *overrides)


def train(trainer: PolicyTrainer) -> dict[str, float]:
    return trainer.train(TRAIN, HELD_OUT)


def logged_steps(trainer: PolicyTrainer) -> list[int]:
    lines = [json.loads(line) for line in (trainer.job.directory / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "ppo/kl_coef" in line]


def checkpoints_in(directory: Path) -> set[str]:
    """Without the answers to held-out prompts, which lie beside them."""
    names = {path.name for path in (directory / "checkpoints").iterdir()}
    return {name for name in names if not name.startswith("kept-")}


def dumped(trainer: PolicyTrainer, step: int) -> list[dict[str, Any]]:
    path = trainer.job.run_directory / f"ppo-step{step}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_same_result(one: PolicyTrainer, other: PolicyTrainer) -> None:
    """The same weights and the same figures of every step, bit for bit."""
    assert equal(best_weights(one), best_weights(other))
    for name, tensor in other.engine.model.state_dict().items():
        assert torch.equal(one.engine.model.state_dict()[name], tensor), name
    histories = [
        [{name: value for name, value in step.items() if not name.startswith("seconds")} for step in history]
        for history in (one.history, other.history)
    ]
    assert histories[0] == histories[1]


def mapped(directory: Path, name: str) -> bool:
    """Whether a file of this process's memory is called so."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return any(str(directory) in line and line.endswith(f"/{name}") for line in maps)


def test_no_rank_holds_a_checkpoint_that_it_goes_on_from(tmp_path: Path, tiny_model: Path) -> None:
    first = learner_in(tmp_path / "first", tiny_model, Length(2), "ppo.steps=4", "ppo.max_bad_steps=0")
    with pytest.raises(ConfigError, match="1 steps were skipped"):
        train(first)

    during: list[bool] = []

    class Looking(Length):
        def __call__(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
            during.append(mapped(tmp_path, "loop.pt") or mapped(tmp_path, "optimizer.pt"))
            return super().__call__(prompts, completions)

    second = learner_in(tmp_path / "second", tiny_model, Looking(), "ppo.steps=4", "ppo.max_bad_steps=1")
    state = second.job.checkpoints.restore(second.engine)
    assert state is not None and mapped(tmp_path, "loop.pt")  # not copied into memory
    said = io.StringIO()
    second.job.progress.console = Console(file=said, width=300)
    second.load_state_dict(state["state"])
    assert said.getvalue() == ""
    second.load_state_dict(state["state"] | {"local_sampling": "layers"})
    assert "gathered for sampling whole from here on, and were layer by layer until step" in said.getvalue()
    del state
    train(second)
    assert during and not any(during)


def test_too_many_bad_steps_end_the_run(tmp_path: Path, tiny_model: Path) -> None:
    overrides = ("ppo.steps=6", "ppo.max_bad_steps=1")
    first = learner_in(tmp_path / "first", tiny_model, Length(2, 4), *overrides)
    with pytest.raises(ConfigError) as error:
        train(first)
    message = str(error.value)
    assert message.startswith("ppo: step 4: 2 steps were skipped, more than ppo.max_bad_steps=1")
    assert (
        "the reward gave inf for the response" in message
        and "ppo.reward=python:helpers.ppo:starts_with_e" in message
    )
    assert str(first.job.run_directory / "ppo-step4.jsonl") in message
    assert logged_steps(first) == [1, 2, 3, 4]

    rows = dumped(first, 4)
    assert [row["response"] for row in rows] == first.texts
    seen_before = [row.prompt for row in TRAIN]
    assert len(rows) == 8 and all(row["prompt"] in seen_before for row in rows)
    assert checkpoints_in(tmp_path) == {"best", "step-00000004"}
    best = best_weights(first)
    restored = learner_in(tmp_path / "restored", tiny_model, Length(), *overrides)
    state = restored.job.checkpoints.restore(restored.engine)
    assert state is not None
    restored.evaluations.load_state_dict(state["evaluations"])
    for name in ("first", "best"):
        pair = (getattr(trainer.evaluations, name) for trainer in (restored, first))
        for restored_B, expected_B in zip(*pair, strict=True):
            assert torch.equal(restored_B, expected_B)
    assert restored.evaluations.best_step == first.evaluations.best_step
    assert best and equal(best_weights(restored), best)

    asked = Length()
    again = learner_in(tmp_path / "again", tiny_model, asked, *overrides)
    with pytest.raises(ConfigError, match=r"^ppo\.max_bad_steps=1: 2 steps .* last one was step 4\. Raise"):
        train(again)
    assert asked.rollouts == 0

    second = learner_in(tmp_path / "second", tiny_model, asked, "ppo.steps=6", "ppo.max_bad_steps=2")
    summary = train(second)
    assert asked.rollouts == 2  # steps 5 and 6
    assert summary["bad_steps"] == 2
    assert all(math.isfinite(value) for value in summary.values())
    assert logged_steps(second) == [1, 2, 3, 4, 5, 6]

    through = learner_in(
        tmp_path / "through" / "job", tiny_model, Length(2, 4), "ppo.steps=6", "ppo.max_bad_steps=2"
    )
    assert train(through) == summary
    assert_same_result(second, through)


def test_a_policy_too_far_away_ends_the_run(tmp_path: Path, tiny_model: Path) -> None:
    overrides = ("ppo.steps=6", "ppo.optim.lr=0.05", "ppo.optim.warmup_fraction=0.0")
    free = learner_in(tmp_path / "free" / "job", tiny_model, Length(), *overrides, "ppo.max_kl=null")
    train(free)
    kls = [metrics["kl"] for metrics in free.history]
    assert kls[0] == pytest.approx(0.0, abs=1e-4)
    passed = next(step for step, kl in enumerate(kls, 1) if kl > 0.5)
    assert 1 < passed < 6

    first = learner_in(tmp_path / "first", tiny_model, Length(), *overrides, "ppo.max_kl=0.5")
    with pytest.raises(ConfigError) as error:
        train(first)
    assert str(error.value).startswith(
        f"ppo: step {passed}: the policy is {kls[passed - 1]:.4g} nats per sequence from the SFT model, more "
        "than ppo.max_kl=0.5. Raise ppo.kl.coef, or lower ppo.optim.lr. "
    )
    assert [row["response"] for row in dumped(first, passed)] == first.texts
    assert [metrics["kl"] for metrics in first.history] == kls[: passed - 1]  # the same until then
    assert checkpoints_in(tmp_path) == {"best", f"step-{passed - 1:08d}"}

    for attempt in ("again", "once more"):  # no attempt passes by skipping the step
        again = learner_in(tmp_path / attempt, tiny_model, Length(), *overrides, "ppo.max_kl=0.5")
        with pytest.raises(ConfigError) as the_same:
            train(again)
        assert str(the_same.value).replace(f"{attempt}.run", "first.run") == str(error.value)
        assert again.texts == first.texts

    asked = Length()
    second = learner_in(tmp_path / "second", tiny_model, asked, *overrides, "ppo.max_kl=1000")
    assert train(second) == free.summary()
    assert asked.rollouts == 7 - passed
    assert logged_steps(second) == [1, 2, 3, 4, 5, 6]
    assert_same_result(second, free)


def test_a_step_that_is_too_far_away_is_not_learned_from(tmp_path: Path, tiny_model: Path) -> None:
    trainer = learner_in(tmp_path / "job", tiny_model, Length(), "ppo.steps=2", "ppo.max_kl=1e-12")
    with torch.no_grad():
        for parameter in actor_critic(trainer).policy.parameters():
            parameter.mul_(1.5)
    before = [parameter.detach().clone() for parameter in trainer.engine.model.parameters()]
    with pytest.raises(ConfigError, match=r"ppo: step 1: the policy is .* ppo\.max_kl=1e-12"):
        train(trainer)
    for parameter, value in zip(trainer.engine.model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


def test_responses_of_another_policy_end_the_run(tmp_path: Path, tiny_model: Path) -> None:
    free = learner_in(tmp_path / "free" / "job", tiny_model, Length(), "ppo.steps=3")
    summary = train(free)
    found = [metrics["engine_mismatch"] for metrics in free.history]
    assert summary["engine_mismatch"] == max(found) > min(found)
    assert 0 < max(found) < 1e-5
    free.history[1]["engine_mismatch"] = math.nan
    assert math.isnan(free.summary()["engine_mismatch"])  # so its gate fails

    # fp32 rounds too: ten times this bound lies below it
    first = learner_in(tmp_path / "job", tiny_model, Length(), "ppo.gates.engine_mismatch.max=1e-12")
    before = [parameter.detach().clone() for parameter in first.engine.model.parameters()]
    with pytest.raises(ConfigError) as error:
        train(first)
    assert str(error.value).startswith(
        "ppo: step 1: the responses are not sampled from the policy that learns: their log-probabilities are "
        f"{found[0]:.3g} nats per token off, more than 1e-11, 10 times ppo.gates.engine_mismatch.max. "
    )
    assert [row["response"] for row in dumped(first, 1)] == first.texts
    for parameter, value in zip(first.engine.model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)

    without = learner_in(tmp_path / "other" / "job", tiny_model, Length(), "ppo.gates.engine_mismatch=null")
    assert without.mismatch_limit == math.inf


def test_an_interrupted_run_ends_as_one_that_was_not(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints every step; the second attempt starts from the last one, bit for bit."""
    overrides = ("ppo.steps=5", "ppo.critic.warmup_steps=1")
    through = learner_in(tmp_path / "through" / "job", tiny_model, Length(), *overrides)
    expected = train(through)

    first = learner_in(tmp_path / "first", tiny_model, Length(), *overrides)
    signal_at(first, 3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(first)
    asked = Length()
    second = learner_in(tmp_path / "second", tiny_model, asked, *overrides)
    assert train(second) == expected
    assert asked.rollouts == 2
    assert equal(best_weights(second), best_weights(through))
    untimed = [
        {name: value for name, value in metrics.items() if not name.startswith("seconds")}
        for trainer in (second, through)
        for metrics in trainer.history
    ]
    assert untimed[:5] == untimed[5:]
