"""Policy gradients without a critic: the loop, what is refused, and what a run leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.grpo import OfSomePrompts, constant, grpo_job, grpo_stage, grpo_trainer
from helpers.jobs import run_in, user
from helpers.ppo import best_weights, equal, experience_of, prompts, shake, signal_at, take_step, weights
from rlhf.config import ConfigError
from rlhf.data.schema import PromptRow
from rlhf.pipeline.metrics import check_metric
from rlhf.ppo.metrics import UpdateSums
from rlhf.ppo.trainer import PolicyTrainer, repeated
from rlhf.rewards.reward import Prompts
from rlhf.training.engine import PlainEngine

TRAIN, HELD_OUT = prompts(range(100, 140)), prompts(range(700, 704))
GROUPS = repeated(TRAIN[:4], 4)
ADVANTAGES = ("grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
KL_IN_REWARD = ("grpo.kl.place=reward", "grpo.kl.estimator=k1")


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_a_run_of_each_estimator(tmp_path: Path, tiny_model: Path, advantage: str) -> None:
    stage = grpo_stage(f"grpo.advantage={advantage}", *KL_IN_REWARD)
    trainer = grpo_trainer(tmp_path / "job", tiny_model, f"grpo.advantage={advantage}", *KL_IN_REWARD)
    found = trainer.train(TRAIN, HELD_OUT)
    for name in found:
        check_metric(stage, name, "test")
    assert found["episodes"] == 3 * 16 and found["bad_steps"] == 0
    assert found["first_kl"] == pytest.approx(0.0, abs=1e-5) and 0.0 <= found["groups_without_spread"] < 1.0
    (first, *_), lengths = trainer.history, {len(each) for each in trainer.history}
    assert len(lengths) == 1 and math.isfinite(first["policy_loss"]) and first["grad_norm"] > 0.0
    assert not {"value", "return", "value_loss", "critic_grad_norm", "explained_variance"} & {*first}
    assert "explained_variance" not in found


@pytest.mark.parametrize("method", ["lora", "ia3", "freeze", "prefix"])
def test_a_step_with_other_methods_of_tuning(tmp_path: Path, tiny_model: Path, method: str) -> None:
    trainer = grpo_trainer(tmp_path / "job", tiny_model, f"grpo.peft={method}")
    before = weights(trainer.policy.model)
    metrics = take_step(trainer, GROUPS, 1)
    assert metrics["grad_norm"] > 0.0 and metrics["bad_steps"] == 0
    assert not equal(weights(trainer.policy.model), before)


def test_a_group_is_the_answers_to_one_prompt(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side by side, and together in a minibatch."""
    trainer = grpo_trainer(tmp_path / "job", tiny_model)
    asked: list[list[str]] = []
    step = trainer.step

    def noted(rows: Sequence[PromptRow]) -> dict[str, float]:
        asked.append([row.prompt[-1]["content"] for row in rows])
        return step(rows)

    monkeypatch.setattr(trainer, "step", noted)
    trainer.train(TRAIN, HELD_OUT)
    for rows in asked:
        assert rows == [row for row in rows[::4] for _ in range(4)] and len(set(rows)) == 4


def test_no_critic_is_trained(tmp_path: Path, tiny_model: Path) -> None:
    trainer = grpo_trainer(tmp_path / "job", tiny_model)
    trained = sum(each.numel() for each in trainer.engine.model.parameters())
    assert trained == sum(each.numel() for each in trainer.policy.model.parameters())
    experience, _ = experience_of(trainer, GROUPS)
    assert experience.values is None


@pytest.mark.parametrize(
    "overrides",
    [
        ("grpo.loss_mean=token", "grpo.dual_clip=1.5"),
        ("grpo.loss_mean=constant", "grpo.clip_high=0.3"),
        ("grpo.loss_mean=sequence", "grpo.policy_loss=gspo", "grpo.clip=0.05"),
    ],
)
def test_micro_batches_add_up_to_the_whole(
    tmp_path: Path, tiny_model: Path, overrides: tuple[str, ...]
) -> None:
    found = []
    for tokens in (100_000, 60, 1):
        name = tmp_path / str(tokens) / "job"
        trainer = grpo_trainer(
            name, tiny_model, *overrides, "grpo.optim.max_grad_norm=1e9", "grpo.kl.coef=0.5",
            f"grpo.micro_batch_tokens={tokens}",
        )  # fmt: skip
        trainer.policy.stop_ids = list(range(0, 259, 15))
        experience, _ = experience_of(trainer, GROUPS)
        assert len(set(experience.rollout.response_lengths.tolist())) > 3
        shake(trainer)
        sums = UpdateSums(trainer.objective.figures)
        trainer.accumulate(experience, [sums], critic_only=False)
        assert isinstance(trainer.engine, PlainEngine)
        trainer.engine.step()
        found.append((sums.means(trainer.compute), weights(trainer.engine.model), trainer.engine.grad_norm))
    whole = found[0]
    assert whole[0]["clip_fraction"] > 0.05 and whole[0]["kl_loss"] > 0.01
    for split in found[1:]:
        assert split[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-6)
        assert split[2] == pytest.approx(whole[2], rel=1e-4)


def test_a_group_reads_its_prompt_once_in_every_pass(tmp_path: Path, tiny_model: Path) -> None:
    """Sampling, the reference, scoring and learning, where two groups fit into a pass. Spread over passes of
    mixed groups each would be read several times."""
    long = [PromptRow(user(f"{n}{' and the sea' * 4}")) for n in range(4)]
    one = grpo_trainer(tmp_path / "one" / "job", tiny_model)
    prompt = len(experience_of(one, repeated(long[:1], 4))[0].rollout.prompt_ids[0])
    budget = 2 * 4 * (prompt + 8)
    trainer = grpo_trainer(tmp_path / "job", tiny_model, f"grpo.micro_batch_tokens={budget}")
    trainer.policy.stop_ids = list(range(0, 259, 15))  # answers of many lengths, by which passes are filled
    experience_of(trainer, GROUPS)  # the first one also tests how the model decodes
    read: list[int] = []
    for model in (trainer.policy.model, trainer.reference.model):
        model.get_input_embeddings().register_forward_pre_hook(lambda _, ids: read.append(ids[0].numel()))
    experience, scored = experience_of(trainer, repeated(long, 4))
    lengths = {len(ids) for ids in experience.rollout.prompt_ids}
    assert lengths == {prompt} and scored is None
    new = sum(map(len, experience.rollout.response_ids))
    prompts_read, *passes = (tokens for tokens in read if tokens > 16)  # not each step of decoding
    assert prompts_read <= 4 * prompt
    assert len(passes) == 2 * 2 and sum(passes) <= 2 * (4 * prompt + new)  # of reference and policy
    read.clear()
    trainer.learn(experience, None, critic_only=False)
    assert len(read) == 2 and sum(read) <= 4 * prompt + new


def test_the_kl_is_paid_in_the_loss_or_in_the_reward(tmp_path: Path, tiny_model: Path) -> None:
    losses, rewards = {}, {}
    for name, overrides in {
        "free": ("grpo.kl.coef=0.0",),
        "loss": ("grpo.kl.coef=0.5",),
        "reward": ("grpo.kl.coef=0.5", *KL_IN_REWARD),
    }.items():
        trainer = grpo_trainer(tmp_path / name / "job", tiny_model, *overrides)
        shake(trainer)  # away from the reference
        experience, _ = experience_of(trainer, GROUPS)
        sums = UpdateSums(trainer.objective.figures)
        trainer.accumulate(experience, [sums], critic_only=False)
        losses[name], rewards[name] = sums.means(trainer.compute), experience.reward_BR
    assert losses["loss"]["policy_loss"] == pytest.approx(
        losses["free"]["policy_loss"] + 0.5 * losses["loss"]["kl_loss"], abs=1e-6
    )
    assert losses["loss"]["kl_loss"] > 1e-3 and "kl_loss" not in losses["reward"]
    assert torch.equal(rewards["loss"], rewards["free"])
    assert not torch.equal(rewards["reward"], rewards["free"])


def test_the_adaptive_coefficient_reaches_the_loss(tmp_path: Path, tiny_model: Path) -> None:
    trainer = grpo_trainer(
        tmp_path / "job", tiny_model, "grpo.kl.controller=adaptive", "grpo.kl.horizon=100", "grpo.kl.coef=1.0"
    )
    shake(trainer)
    experience, _ = experience_of(trainer, GROUPS)
    losses = []
    for _ in range(2):
        sums = UpdateSums(trainer.objective.figures)
        trainer.accumulate(experience, [sums], critic_only=False)
        losses.append(sums.means(trainer.compute))
        trainer.kl.update(1e9, 16)
    assert trainer.kl.coef > 1.03
    difference = losses[1]["policy_loss"] - losses[0]["policy_loss"]
    assert difference == pytest.approx(0.2 * 16 / 100 * losses[0]["kl_loss"], rel=1e-3)


def test_groups_without_spread_are_replaced_as_often_as_allowed(tmp_path: Path, tiny_model: Path) -> None:
    """The prompts 100 to 109 are dull, so with enough attempts none of them is left."""
    dull = repeated([*TRAIN[:3], TRAIN[20]], 4)  # three dull groups, and one that is not
    trainer = grpo_trainer(tmp_path / "job", tiny_model, "grpo.max_resamples=20", reward=OfSomePrompts("10"))
    trainer.prompts = TRAIN
    metrics = take_step(trainer, dull, 1)
    assert metrics["groups_without_spread"] == 0.0 and metrics["resampled_groups"] >= 3
    asked = [row.prompt[-1]["content"] for row in trainer.rows]
    assert asked[12:] == [dull[12].prompt[-1]["content"]] * 4, "a group with spread stays"
    assert not any(text.startswith("10") for text in asked)
    assert asked == [text for text in asked[::4] for _ in range(4)]
    assert len(trainer.texts) == 16

    never = grpo_trainer(tmp_path / "never" / "job", tiny_model, "grpo.max_resamples=2", reward=constant)
    never.prompts = TRAIN
    metrics = take_step(never, dull, 1)
    assert (metrics["groups_without_spread"], metrics["resampled_groups"]) == (1.0, 2 * 4)
    kept = grpo_trainer(tmp_path / "kept" / "job", tiny_model, reward=OfSomePrompts("10"))
    metrics = take_step(kept, dull, 1)
    assert metrics["groups_without_spread"] == 0.75 and "resampled_groups" not in metrics


def test_replacements_without_a_score_leave_the_other_groups_to_learn_from(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Three of four groups have no score, and neither has any answer to the prompts that are drawn."""
    rows, reward = repeated([*TRAIN[:3], TRAIN[20]], 4), OfSomePrompts("10", math.nan)
    trainer = grpo_trainer(tmp_path / "job", tiny_model, "grpo.max_resamples=2", reward=reward)
    trainer.prompts = TRAIN[:10]
    metrics = take_step(trainer, rows, 1)
    assert metrics["bad_steps"] == 0.0 and metrics["grad_norm"] > 0.0
    assert (metrics["unscored"], metrics["resampled_groups"]) == (12.0, 2 * 3)


@pytest.mark.parametrize(
    ("score", "attempts", "said"),
    [
        (math.nan, 3, "and no score for any of 16 responses."),
        (math.inf, 1, "the reward gave inf for the response "),  # no other draw takes it away
    ],
)
def test_a_batch_of_which_nothing_can_be_used_is_a_bad_step(
    score: float, attempts: int, said: str, tmp_path: Path, tiny_model: Path
) -> None:
    asked: list[int] = []

    def reward(prompts: Prompts, completions: Sequence[str]) -> Tensor:
        asked.append(len(completions))
        return torch.tensor([score, *[math.nan] * (len(completions) - 1)])

    trainer = grpo_trainer(tmp_path / "job", tiny_model, "grpo.max_resamples=2", reward=reward)
    trainer.prompts = TRAIN
    metrics = take_step(trainer, GROUPS, 1)
    assert metrics["bad_steps"] == 1.0 and "grad_norm" not in metrics
    assert said in trainer.learner.last_bad_reason and asked == [16] * attempts


def test_a_reward_that_cannot_be_learned_moves_nothing_and_says_so(tmp_path: Path, tiny_model: Path) -> None:
    trainer = grpo_trainer(tmp_path / "job", tiny_model, reward=constant)
    before = weights(trainer.policy.model)
    found = trainer.train(TRAIN, HELD_OUT)
    assert equal(weights(trainer.policy.model), before)
    assert found["groups_without_spread"] == 1.0 and found["held_out_score_gain"] == 0.0
    assert found["bad_steps"] == 0
    bound = grpo_stage().gates["groups_without_spread"]
    assert bound is not None and not bound.holds(1.0) and "teach nothing" in bound.advice


def test_one_answer_to_a_prompt(tmp_path: Path, tiny_model: Path) -> None:
    overrides = ("grpo.samples_per_prompt=1", "grpo.advantage=reinforce_plus_plus")
    found = grpo_trainer(tmp_path / "job", tiny_model, *overrides).train(TRAIN, HELD_OUT)
    assert "groups_without_spread" not in found and found["episodes"] == 48
    assert "groups_without_spread" in grpo_stage(*overrides).not_checked()


def test_an_interrupted_run_ends_as_one_that_was_not(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with groups that are replaced on the way."""
    overrides = ("grpo.steps=5", "grpo.max_resamples=3", "grpo.epochs=2")

    def trainer_in(name: str) -> PolicyTrainer:
        return grpo_trainer(tmp_path / name, tiny_model, *overrides, reward=OfSomePrompts("10"))

    through = trainer_in("through/job")
    expected = through.train(TRAIN, HELD_OUT)
    assert expected["resampled_groups"] > 0
    first = trainer_in("first")
    signal_at(first, 3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        first.train(TRAIN, HELD_OUT)
    second = trainer_in("second")
    assert second.train(TRAIN, HELD_OUT) == expected
    assert equal(best_weights(second), best_weights(through))
    untimed = [
        [{name: value for name, value in step.items() if not name.startswith("seconds")} for step in history]
        for history in (second.history, through.history)
    ]
    assert untimed[0] == untimed[1]


@pytest.mark.parametrize("advantage", ["grpo", "reinforce_plus_plus"])
def test_a_common_property_is_learned_in_few_steps(tmp_path: Path, tiny_model: Path, advantage: str) -> None:
    """Through the stage; about every second answer has it before training."""
    job = grpo_job(tmp_path / "job", tiny_model)
    job.data.write("ppo", "train", prompts(range(100, 612)))
    job.data.write("ppo", "held_out", prompts(range(700, 828)))
    stage = grpo_stage(
        "ppo.reward=python:test_learns:is_ascii", f"grpo.advantage={advantage}", "grpo.steps=12",
        "grpo.batch_episodes=64", "grpo.minibatch_episodes=16", "ppo.max_new_tokens=1",
        "grpo.evaluate_every=12", "grpo.evaluate_prompts=128",
    )  # fmt: skip
    torch.manual_seed(0)
    run_in(stage, job)
    assert 0.35 < job.summary["held_out_score_before"] < 0.7
    assert job.summary["held_out_score_last"] > 0.85
    lines = [json.loads(line) for line in (job.directory / "metrics.jsonl").read_text().splitlines()]
    assert any("grpo/groups_without_spread" in line for line in lines)


def test_a_policy_too_far_away_is_told_by_the_stages_own_keys(tmp_path: Path, tiny_model: Path) -> None:
    trainer = grpo_trainer(tmp_path / "job", tiny_model, "grpo.max_kl=0.001")
    shake(trainer)
    with pytest.raises(ConfigError) as error:
        trainer.train(TRAIN, HELD_OUT)
    told = str(error.value)
    assert told.startswith("grpo: step 1: the policy is ")
    assert "more than grpo.max_kl=0.001. Raise grpo.kl.coef, or lower grpo.optim.lr." in told


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("grpo.batch_episodes=18",), "grpo.batch_episodes=18 is no multiple of grpo.samples_per_prompt=4"),
        (("grpo.minibatch_episodes=6",), "Use 4 or 8."),
        (("grpo.samples_per_prompt=1",), "grpo.advantage=grpo compares the answers to a prompt"),
        (
            ("grpo.samples_per_prompt=1", "grpo.advantage=reinforce_plus_plus", "grpo.max_resamples=1"),
            "Use grpo.max_resamples=0.",
        ),
        (("grpo.kl.estimator=k1",), "grpo.kl.estimator=k1 does nothing with grpo.kl.place=loss"),
        (("grpo.policy_loss=gspo",), "Use grpo.loss_mean=sequence, or grpo.policy_loss=clip."),
        (
            ("grpo.policy_loss=gspo", "grpo.loss_mean=sequence", "grpo.advantage=reinforce_plus_plus",
             *KL_IN_REWARD),
            "each token has an advantage of its own",
        ),
        (("grpo.overlong.buffer=9",), "grpo.overlong.buffer=9 is more than grpo.max_new_tokens=8"),
        (
            ("grpo.overlong.buffer=4", "grpo.score.missing_stop_penalty=0.5"),
            "a response that is cut would be punished twice",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_together_is_refused(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        grpo_stage(*overrides)
    assert said in str(error.value)


def test_long_answers_lose_their_share(tmp_path: Path, tiny_model: Path) -> None:
    """No answer of the untrained model ends by itself: each has 8 tokens, and loses everything."""
    trainer = grpo_trainer(
        tmp_path / "job", tiny_model, "grpo.overlong.buffer=4", "grpo.overlong.penalty=2.5", *KL_IN_REWARD,
        reward=constant,
    )  # fmt: skip
    trainer.policy.stop_ids = []
    experience, _ = experience_of(trainer, GROUPS)
    torch.testing.assert_close(experience.reward_BR.sum(1), torch.full((16,), 0.3 - 2.5))
