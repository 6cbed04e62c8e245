"""What one PPO step must get right, in fp32 on the tiny model. B episodes, R response tokens (padded)."""

from __future__ import annotations

import math
import shutil
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.jobs import on_cpu, user
from helpers.ppo import (
    ROWS,
    SMALL,
    Counting,
    MakeTrainer,
    actor_critic,
    critic_of,
    equal,
    experience_of,
    length,
    ppo_job,
    ppo_learner,
    ppo_stage,
    shake,
    take_step,
    weights,
)
from rlhf.data.chat_template import response_text
from rlhf.data.schema import SftRow
from rlhf.models.logprobs import ResponseModel, answer_logprobs, pack_sequences
from rlhf.ppo.config import PpoConfig
from rlhf.ppo.metrics import UpdateSums
from rlhf.ppo.trainer import PolicyTrainer
from rlhf.rewards.reward import Prompts
from rlhf.rl.rollout import Rollout
from rlhf.supervised.answers import packed
from rlhf.training.engine import PlainEngine

ANSWERS = [SftRow(user(f"Say {n}"), f"It is {n}.") for n in range(8)]


def optimizer_state(trainer: PolicyTrainer) -> dict[str, Any]:
    assert isinstance(trainer.engine, PlainEngine)
    return trainer.engine.optimizer.state_dict()


def gradients(trainer: PolicyTrainer) -> list[Tensor]:
    """Of the last optimizer step, unclipped: AdamW's first moment after one step is a tenth of them."""
    state = optimizer_state(trainer)["adamw"]["state"]
    return [moments["exp_avg"] * 10 for moments in state.values()]


def test_the_policy_starts_as_its_own_reference(make: MakeTrainer) -> None:
    trainer = make("ppo.temperature=0.7", "ppo.micro_batch_tokens=150")
    metrics = take_step(trainer, ROWS, 1)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["kl_k3"] == pytest.approx(0.0, abs=1e-5)
    assert 0.0 <= metrics["first_ratio_deviation"] < 1e-4
    assert metrics["max_ratio"] > 1.0  # of all minibatches: the second one came after an update


def test_sampling_and_training_agree_on_every_log_probability(make: MakeTrainer) -> None:
    """The sampler pads on the left, keeps a cache and drops finished rows; the trainer does none of it."""
    trainer = make("ppo.temperature=0.7")
    shake(trainer)
    experience = experience_of(trainer, ROWS)[0]
    lengths = experience.rollout.response_lengths
    assert lengths.max() == 12
    assert len({len(ids) for ids in experience.rollout.prompt_ids}) > 4
    assert experience.rollout.sampled_logp is not None
    engine_BR = torch.nn.utils.rnn.pad_sequence(experience.rollout.sampled_logp, batch_first=True)
    torch.testing.assert_close(engine_BR, experience.logp_BR, atol=1e-4, rtol=1e-4)
    assert (experience.logp_BR - experience.reference_logp_BR).abs().max() > 0.1  # the reference stayed


def test_the_second_step_still_begins_at_ratio_one(make: MakeTrainer) -> None:
    """The policy that samples is the one that was just trained, not a stale copy."""
    trainer = make()
    take_step(trainer, ROWS, 1)
    metrics = take_step(trainer, ROWS, 2)
    assert metrics["first_ratio_deviation"] < 1e-4
    assert abs(metrics["kl"]) > 1e-3  # while the reference is where it was


def test_in_bf16_the_first_ratios_are_one_up_to_its_rounding(tmp_path: Path, tiny_model: Path) -> None:
    """Scored in one pass and learned from in two; wide enough for products that round differently by then."""
    config = AutoConfig.from_pretrained(tiny_model)
    config.update({"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128})
    torch.manual_seed(0)
    wide = shutil.copytree(tiny_model, tmp_path / "wide")
    AutoModelForCausalLM.from_config(config).save_pretrained(wide)

    def deviation(name: str, minibatch: int) -> float:
        torch.manual_seed(0)
        job = ppo_job(tmp_path / name, wide)
        job.compute = on_cpu(dtype=torch.bfloat16)
        stage = ppo_stage(*SMALL, "ppo.temperature=0.7", f"ppo.minibatch_episodes={minibatch}")
        trainer = ppo_learner(stage, job, length)
        assert trainer.policy.model.dtype == torch.bfloat16
        return take_step(trainer, ROWS, 1)["first_ratio_deviation"]

    assert 0.0 <= deviation("two", 8) < 0.01
    assert deviation("one", 16) == 0.0  # by construction: one pass both scored and is learned from


def most_rows(trainer: PolicyTrainer, work: Callable[[], object]) -> int:
    """The most rows that went through the policy beside each other; packed ones are a single row."""
    rows: list[int] = []
    embeddings = trainer.policy.model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda _, ids: rows.append(len(ids[0])))
    work()
    hook.remove()
    return max(rows)


def test_no_more_rows_are_decoded_together_than_asked_for(make: MakeTrainer) -> None:
    every, few = make(), make("ppo.batch_rows=3")
    found: list[Rollout] = []

    def sample(trainer: PolicyTrainer) -> None:
        found.append(experience_of(trainer, ROWS)[0].rollout)

    for trainer in (every, few):
        shake(trainer)
        trainer.policy.stop_ids = list(range(0, 259, 15))
        sampled = most_rows(trainer, partial(sample, trainer))
        evaluated = most_rows(trainer, partial(trainer.evaluate, ROWS))
        assert (sampled, evaluated) == (3, 3) if trainer is few else min(sampled, evaluated) > 6
    expected, split = found
    assert len(set(expected.response_lengths.tolist())) > 3
    assert [ids.tolist() for ids in split.response_ids] == [ids.tolist() for ids in expected.response_ids]
    assert split.sampled_logp is not None and expected.sampled_logp is not None
    for left, right in zip(split.sampled_logp, expected.sampled_logp, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
    scores = [trainer.evaluate(ROWS).score for trainer in (every, few)]
    assert scores[0] == pytest.approx(scores[1])


@pytest.mark.parametrize("critic_only", [False, True])
def test_micro_batches_add_up_to_the_whole(make: MakeTrainer, critic_only: bool) -> None:
    settings = (
        "ppo.value_clip=0.2", "ppo.dual_clip=1.5", "ppo.clip_high=0.3", "ppo.optim.max_grad_norm=1e9",
        "ppo.critic.optim.max_grad_norm=1e9",
    )  # fmt: skip
    results = []
    for micro_batch_tokens in (100_000, 150, 1):
        trainer = make(*settings, f"ppo.micro_batch_tokens={micro_batch_tokens}")
        experience = experience_of(trainer, ROWS)[0]
        shake(trainer)  # ratios, values and clips of all kinds
        with torch.no_grad():
            critic_of(trainer).offset.add_(0.35)  # towards the returns, past the clip for some
        moved_BR = trainer.policy.log_probabilities(experience.rollout, 1.0, 100_000)
        by_hand = (moved_BR - experience.logp_BR)[experience.mask_BR].exp().sub(1.0).abs().mean()
        sums = UpdateSums(trainer.objective.figures)
        deviation = trainer.accumulate(experience, [sums], critic_only)
        assert deviation == pytest.approx(float(by_hand), rel=1e-4)
        trainer.engine.step()
        compute = trainer.compute
        results.append((deviation, sums.means(compute), sums.max_ratio(compute), gradients(trainer)))
    whole = results[0]
    assert whole[1]["clip_fraction"] > 0.05
    assert 0.05 < whole[1]["value_clip_fraction"] < 0.95
    assert whole[0] > 0.05
    for split in results[1:]:
        assert split[0] == pytest.approx(whole[0], rel=1e-5)
        assert split[1] == pytest.approx(whole[1], rel=1e-5, abs=1e-6)
        assert split[2] == pytest.approx(whole[2], rel=1e-5)
        for gradient, expected in zip(split[3], whole[3], strict=True):
            scale = float(expected.abs().max())
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=max(1e-5 * scale, 1e-7))


class Kept:
    """A tensor that a graph keeps for its gradients."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def most_kept(work: Callable[[], object]) -> int:
    """The most bytes that graphs kept at any moment of the work."""
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()
    sizes = [0]

    def keep(tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        alive.add(kept)
        sizes.append(sum(each.tensor.nbytes for each in alive))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        work()
    return max(sizes)


def test_policy_and_critic_keep_their_graphs_one_after_the_other(make: MakeTrainer) -> None:
    trainer = make()
    experience, model = experience_of(trainer, ROWS)[0], trainer.engine.model
    rollout = experience.rollout
    batch = pack_sequences(rollout.prompt_ids, rollout.response_ids, torch.device("cpu"))
    halves = [most_kept(partial(model, half, batch)) for half in ("policy", "critic")]
    assert min(halves) > 0.8 * max(halves)
    both = most_kept(lambda: trainer.accumulate(experience, [UpdateSums()], critic_only=False))
    assert max(halves) <= both < 1.1 * max(halves)


def test_experience_does_not_depend_on_micro_batches(make: MakeTrainer) -> None:
    whole, split = (experience_of(make(f"ppo.micro_batch_tokens={n}"), ROWS)[0] for n in (100_000, 100))
    for name in ("logp_BR", "reference_logp_BR", "value_BR", "advantage_BR", "return_BR"):
        torch.testing.assert_close(getattr(split, name), getattr(whole, name), atol=1e-5, rtol=1e-5)


def test_critic_warm_up_leaves_the_policy_alone(make: MakeTrainer) -> None:
    trainer = make(
        "ppo.critic.warmup_steps=2", "ppo.ptx.coef=1.0", "ppo.optim.weight_decay=0.1", mix_rows=ANSWERS
    )
    policy, critic = weights(actor_critic(trainer).policy), weights(critic_of(trainer))
    steps = [take_step(trainer, ROWS, step) for step in (1, 2)]
    value_losses = [metrics["value_loss"] for metrics in steps]
    assert [metrics["grad_norm"] for metrics in steps] == [0.0, 0.0]
    assert equal(weights(actor_critic(trainer).policy), policy)
    assert not equal(weights(critic_of(trainer)), critic)
    assert value_losses[1] < value_losses[0]
    take_step(trainer, ROWS, 3)
    assert not equal(weights(actor_critic(trainer).policy), policy)


def test_the_policys_schedules_begin_behind_the_critics_warm_up(make: MakeTrainer) -> None:
    knobs = ("ppo.optim.warmup_fraction=0.5", "ppo.kl.controller=adaptive", "ppo.kl.coef=0.1")
    trainer, alone = make(*knobs, "ppo.steps=6", "ppo.critic.warmup_steps=2"), make(*knobs, "ppo.steps=4")
    rates = [take_step(trainer, ROWS, step)["lr"] for step in (1, 2)]
    assert rates == [0.0, 0.0]
    assert trainer.kl.coef == 0.1
    for step in range(1, 5):
        assert take_step(trainer, ROWS, step + 2)["lr"] == take_step(alone, ROWS, step)["lr"] > 0.0
    assert trainer.kl.coef != 0.1


def test_special_tokens_inside_an_answer_are_counted(make: MakeTrainer) -> None:
    """The reward sees the text, which is without them: they cost nothing, so that they show in no score."""
    policy = make().policy
    bos, pad, letter = (
        policy.tokenizer.bos_token_id,
        policy.pad_id,
        policy.tokenizer.convert_tokens_to_ids("e"),
    )
    responses = [[letter, policy.stop_ids[0]], [letter, bos, letter], [pad, letter], [letter]]
    rollout = Rollout(
        prompt_ids=[torch.tensor([letter])] * 4,
        response_ids=[torch.tensor(ids) for ids in responses],
        stopped=torch.tensor([True, False, False, False]),
    )
    assert policy.special_token_rate(rollout) == 0.5
    assert response_text(policy.tokenizer, responses[1]) == "ee"


def test_the_pretraining_mix_teaches_the_answers(make: MakeTrainer) -> None:
    def answer_loss(trainer: PolicyTrainer) -> float:
        mix = trainer.mix
        assert mix is not None
        drawn = mix.draw()
        with torch.no_grad():
            batch = packed(drawn, trainer.compute)
            logp_N = trainer.engine.model("policy", batch, 1.0).logp_N
            assert isinstance(trainer.config, PpoConfig)
            return float(mix.loss(logp_N, len(logp_N))) / trainer.config.ptx.coef

    changes = {}
    for coef in (0.001, 5.0):
        trainer = make(
            f"ppo.ptx.coef={coef}", "ppo.clip=1e-6", "ppo.optim.max_grad_norm=100",
            reward=Counting(0.0), mix_rows=ANSWERS,
        )  # fmt: skip
        before = answer_loss(trainer)
        for step in range(1, 5):
            take_step(trainer, ROWS, step)
        changes[coef] = answer_loss(trainer) - before
    assert changes[5.0] < -0.5
    assert changes[5.0] < changes[0.001]


def test_without_reward_the_mix_is_all_that_moves_the_policy(make: MakeTrainer) -> None:
    """All advantages are 0 then, so a policy without the mix stays exactly where it was."""
    still = make(reward=Counting(0.0))
    moved = make("ppo.ptx.coef=1.0", reward=Counting(0.0), mix_rows=ANSWERS)
    start = weights(actor_critic(still).policy)
    take_step(still, ROWS, 1)
    take_step(moved, ROWS, 1)
    assert equal(weights(actor_critic(still).policy), start)
    assert not equal(weights(actor_critic(moved).policy), start)


def test_epochs_end_early_when_the_policy_has_moved(make: MakeTrainer) -> None:
    free, stopped = make("ppo.epochs=3"), make("ppo.epochs=3", "ppo.stop_epochs_kl=1e-6")
    full, short = take_step(free, ROWS, 1), take_step(stopped, ROWS, 1)
    assert (full["epochs"], short["epochs"]) == (3.0, 1.0)
    assert full["approximate_kl"] > 1e-6
    patient = take_step(make("ppo.epochs=3", "ppo.stop_epochs_kl=1000"), ROWS, 1)
    assert patient["epochs"] == 3.0
    steps = [optimizer_state(trainer)["adamw"]["state"][0]["step"] for trainer in (free, stopped)]
    assert [int(step) for step in steps] == [6, 2]  # two minibatches an epoch


def test_an_update_that_is_not_finite_is_not_taken(make: MakeTrainer) -> None:
    trainer = make("ppo.minibatch_episodes=16")
    with torch.no_grad():
        critic_of(trainer).offset.fill_(float("nan"))
    before = weights(actor_critic(trainer).policy)
    metrics = take_step(trainer, ROWS, 1)
    assert metrics["bad_steps"] == 1
    assert "policy_loss" not in metrics
    assert equal(weights(actor_critic(trainer).policy), before)


def test_a_first_step_without_a_finite_gradient_does_not_spoil_the_summary(make: MakeTrainer) -> None:
    def breaks_the_critic_once(prompts: Prompts, completions: Sequence[str]) -> Tensor:
        calls.append(len(completions))
        with torch.no_grad():  # the second call scores the first rollout
            critic_of(trainer).offset.fill_(float("nan") if len(calls) == 2 else 0.0)
        return length(prompts, completions)

    calls: list[int] = []
    trainer = make("ppo.steps=3", "ppo.evaluate_every=3", reward=breaks_the_critic_once)
    summary = trainer.train(ROWS, ROWS[:4])
    assert summary["bad_steps"] == 1
    assert all(math.isfinite(value) for value in summary.values())
    assert summary["first_ratio_deviation"] < 1e-4


def test_hidden_padding_does_not_reach_a_log_probability(make: MakeTrainer) -> None:
    """Alone or beside a longer row, an episode measures the same."""
    trainer = make()
    rollout = experience_of(trainer, ROWS)[0].rollout

    def logp(indices: list[int]) -> Tensor:
        model, some = ResponseModel(actor_critic(trainer).policy), rollout.select(torch.tensor(indices))
        return answer_logprobs(model, some, 1.0, 100_000, trainer.compute)

    together_BR = logp(list(range(16)))
    for index in range(16):
        alone_BR = logp([index])
        torch.testing.assert_close(alone_BR[0], together_BR[index, : alone_BR.shape[1]], atol=1e-5, rtol=1e-5)


def test_explained_variance_is_the_mean_of_the_last_quarter(make: MakeTrainer) -> None:
    bad, good = (
        {"explained_variance": x, "explained_variance_error": e} for x, e in ((-9.0, 9.0), (0.5, 0.2))
    )
    trainer = make()
    one = trainer.explained_variance([bad, bad, bad, good])
    assert (one.value, one.low, one.high) == pytest.approx((0.5, 0.3, 0.7))
    assert one.rows == trainer.config.batch_episodes
    two = trainer.explained_variance([*[bad] * 6, good, {**good, "explained_variance": 0.1}])
    half = math.hypot(0.2, 0.2) / 2
    assert (two.value, two.low, two.high) == pytest.approx((0.3, 0.3 - half, 0.3 + half))
    assert two.rows == 2 * trainer.config.batch_episodes
