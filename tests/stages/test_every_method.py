"""Method x stage on the tiny model: trains, goes on after an interruption bit for bit, publishes what was
trained beside a reference, reads it back, and samples from it with a KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.chains import Chain
from helpers.experiments import build
from helpers.jobs import TINY, SmallJob, on_cpu, run_in, small_job, tiny_base, user
from helpers.ppo import critic_of
from rlhf.config import ConfigError
from rlhf.data.schema import PairRow, PromptRow, SftRow, Split
from rlhf.distributed.signals import Stopped
from rlhf.generation.policy_model import PolicyModel
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import pack_sequences, response_statistics
from rlhf.models.peft.merge import merged_policy
from rlhf.models.peft.saved import attach_published, origin_of
from rlhf.models.value_head import ScalarModel, load_scalar_model
from rlhf.pipeline.stage import Stage
from rlhf.rewards.kinds import reward_digest
from rlhf.rewards.model import LearnedReward
from rlhf.stages.ppo import PpoStage

SETTINGS = (
    "model=tiny", "sft.batch_rows=4", "sft.epochs=1", "sft.optim.lr=1e-2", "reward.batch_pairs=4",
    "reward.optim.lr=1e-2", "dpo.batch_rows=4", "dpo.optim.lr=5e-2", "dpo.evaluations=1",
    "ppo.steps=2", "ppo.batch_episodes=8", "ppo.minibatch_episodes=4",
    "ppo.max_new_tokens=6", "ppo.evaluate_every=1", "ppo.evaluate_prompts=4", "ppo.optim.lr=5e-2",
    "ppo.score.normalize=none", "ppo.critic.init=sft", "ppo.kl.coef=0.0",
    "ppo.reward=python:test_every_method:other_than_first",
    "grpo.steps=2", "grpo.batch_episodes=8", "grpo.minibatch_episodes=4", "grpo.optim.lr=5e-2",
    "grpo.kl.coef=0.0", "grpo.score.clip=null",  # its scores are lengths: clipped, all would be the same
)  # fmt: skip
MERGING = {
    "lora": "{method: lora, rank: 4}", "dora": "{method: dora, rank: 4}", "ia3": "ia3",
    "freeze": "{method: freeze, layers: 1}",
}  # fmt: skip
BESIDE = {
    "adapter": "{method: adapter, placement: houlsby, size: 8}", "prefix": "{method: prefix, tokens: 5}",
    "prompt": "{method: prompt, tokens: 5}", "p_tuning": "{method: p_tuning, tokens: 5}",
}  # fmt: skip
POLICIES = ["sft", "ppo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dpo", "grpo"))]
HELD_OUT = [f"{n}?" for n in range(20, 24)]
ROWS = [torch.arange(3, 30), torch.arange(40, 52)]


FIRST_ANSWERS: dict[str, str] = {}
"""To the held-out prompts, of the policy that training starts from."""


def other_than_first(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward for length; for held-out prompts, for any other answer than the first: so that what PPO
    and GRPO publish is a policy that has moved."""

    def score(prompt: str, response: str) -> float:
        if prompt not in HELD_OUT:
            return float(len(response.encode()))
        return float(FIRST_ANSWERS.setdefault(prompt, response) != response)

    return [score(*pair) for pair in zip(prompts, responses, strict=True)]


def stages_of(*overrides: str) -> Mapping[str, Stage]:
    return build(*SETTINGS, *overrides).stages


def job_of(name: str, directory: Path, model: Path) -> SmallJob:
    inputs = {} if name == "sft" else {"sft": model}
    checkpoints = directory.with_name("checkpoints")
    base = tiny_base(model)
    job = small_job(name, directory, base, inputs, checkpoints=checkpoints)
    splits: dict[Split, range] = {"train": range(8), "held_out": range(20, 24)}
    for split, numbers in splits.items():
        job.data.write("sft", split, [SftRow(user(f"Say {n}"), f"It is {n}") for n in numbers])
        job.data.write(
            "pairs", split, [PairRow(user(f"Say {n}"), f"It is {n}", "No" * (n % 3 + 1)) for n in numbers]
        )
        job.data.write("ppo", split, [PromptRow(user(f"{n}?")) for n in numbers])
    return job


def trained(name: str, directory: Path, model: Path, method: str) -> SmallJob:
    """The stage's artifact, made by a run that was stopped behind its first step, and by another that went
    on from there; it must be that of an undisturbed run."""
    chosen = "prepare" if "qlora" in method else name
    stage = stages_of(f"stage={chosen}", f"{name}.peft={method}")[name]
    through = job_of(name, directory / "through" / "job", model)
    FIRST_ANSWERS.clear()
    torch.manual_seed(0)
    run_in(stage, through)
    first = job_of(name, directory / "first", model)
    first.checkpoints.signals.received = 15
    torch.manual_seed(0)
    with pytest.raises(Stopped):
        run_in(stage, first)
    second = job_of(name, directory / "second", model)
    assert second.checkpoints.newest is not None
    assert second.checkpoints.newest["step"] == 1
    torch.manual_seed(1)  # all that is random comes from the checkpoint
    run_in(stage, second)
    files = sorted(path.relative_to(through.directory) for path in through.directory.rglob("*.safetensors"))
    assert files
    for file in files:
        expected, found = load_file(through.directory / file), load_file(second.directory / file)
        assert expected.keys() == found.keys()
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert second.summary["trained_parameters"] > 0
    adapter = list(second.directory.glob("adapter/*"))
    assert (adapter == []) == (method == "none")
    assert second.summary.get("adapter_bytes", 0) == sum(path.stat().st_size for path in adapter)
    assert second.summary["artifact_bytes"] == size_of_model(second.directory)
    return second


def size_of_model(artifact: Path) -> int:
    """Of what lies in it, without data, metrics and manifest."""
    files = [path for path in artifact.rglob("*") if path.is_file()]
    beside = ("manifest.json", "reference.arrow")
    return sum(path.stat().st_size for path in files if path.suffix != ".jsonl" and path.name not in beside)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return torch.cat([model(input_ids=row[None]).logits[0] for row in ROWS])


def assert_samples_with_a_cache(artifact: Path) -> None:
    """What the cache led to is as likely as without one."""
    policy = PolicyModel.load(artifact, TINY, on_cpu())
    rollout, _ = policy.sample(
        [user("Say 3"), user("Say")], max_new_tokens=8, temperature=1.0,
        generator=torch.Generator().manual_seed(0), batch_rows=2,
    )  # fmt: skip
    batch = pack_sequences(rollout.prompt_ids, rollout.response_ids, torch.device("cpu"))
    with torch.no_grad():
        logp_N = response_statistics(policy.model, batch, 1.0).logp_N
    assert rollout.sampled_logp is not None
    torch.testing.assert_close(logp_N, torch.cat(list(rollout.sampled_logp)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_all_parameters(name: str, tmp_path: Path, tiny_model: Path) -> None:
    artifact = trained(name, tmp_path, tiny_model, "none").directory
    if name == "reward":
        assert load_scalar_model(artifact, TINY, torch.float32).last_values(ROWS).std() > 1e-3
        return
    published, start = (load_causal_lm(path, TINY, torch.float32) for path in (artifact, tiny_model))
    assert not torch.allclose(logits(published), logits(start), atol=1e-3)
    assert_samples_with_a_cache(artifact)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("method", MERGING)
def test_a_policy(name: str, method: str, tmp_path: Path, tiny_model: Path) -> None:
    artifact = trained(name, tmp_path, tiny_model, MERGING[method]).directory
    origin = origin_of(artifact)
    assert origin is not None
    start = load_causal_lm(origin.checked_directory(artifact), TINY, torch.float32)
    beside = load_causal_lm(origin.checked_directory(artifact), TINY, torch.float32)
    attach_published(beside, artifact)
    published = load_causal_lm(artifact, TINY, torch.float32)
    assert not torch.allclose(logits(published), logits(start), atol=1e-3)
    torch.testing.assert_close(logits(published), logits(beside), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(published), logits(merged_policy(artifact, TINY, torch.float32)))
    assert_samples_with_a_cache(artifact)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("method", BESIDE)
def test_a_policy_that_stays_beside_its_base(
    name: str, method: str, tmp_path: Path, tiny_model: Path
) -> None:
    artifact = trained(name, tmp_path, tiny_model, BESIDE[method]).directory
    assert not list(artifact.glob("*.safetensors"))  # nobody takes the base model for it
    beside = load_causal_lm(tiny_model, TINY, torch.float32)
    start = logits(beside)
    attach_published(beside, artifact)
    published = load_causal_lm(artifact, TINY, torch.float32)
    assert not torch.allclose(logits(published), start, atol=1e-3)
    assert torch.equal(logits(published), logits(beside))
    assert published.generation_config is not None
    assert published.generation_config.eos_token_id == [2]
    with pytest.raises(ConfigError, match="cannot be merged"):
        merged_policy(artifact, TINY, torch.float32)
    assert_samples_with_a_cache(artifact)


@pytest.mark.parametrize("method", [*MERGING, *BESIDE])
def test_a_reward_model(method: str, tmp_path: Path, tiny_model: Path) -> None:
    artifact = trained("reward", tmp_path, tiny_model, {**MERGING, **BESIDE}[method]).directory
    assert list(reward_digest(f"model:{artifact}"))  # it may score another run's answers
    load = partial(load_scalar_model, config=TINY, dtype=torch.float32)
    published = load(artifact).last_values(ROWS)
    trunk = load(tiny_model, new_head=True).model
    _, head = attach_published(trunk, artifact)
    assert head is not None
    found = ScalarModel(trunk, torch.nn.Parameter(head)).last_values(ROWS)
    assert published.std() > 1e-3
    torch.testing.assert_close(found, published, atol=1e-5, rtol=1e-5)


def test_dora_and_ia3_were_not_tried_with_sharded_weights() -> None:
    with pytest.raises(ConfigError) as error:
        stages_of("stage=sft", "zero=zero3", "sft.peft=dora")
    assert str(error.value) == (
        "zero=zero3: sft.peft=dora is not tested with sharded weights. "
        "Use zero=none, or sft.peft=none or lora."
    )
    stages_of("stage=sft", "zero=zero3", "sft.peft=lora", "ppo.peft=ia3")  # ppo is not run


def test_what_vllm_cannot_be_handed() -> None:
    with pytest.raises(ConfigError, match=r"vLLM cannot use what ppo\.peft=ia3 trains"):
        stages_of("stage=ppo", "generation=vllm", "ppo.peft=ia3", "ppo.score.normalize=none")
    stages_of("stage=sft", "generation=vllm", "sft.peft=ia3")  # published as a plain model


@pytest.mark.parametrize(
    ("method", "peft"), [("adapter", "lora"), ("adapter", "adapter"), ("prompt", "lora"), ("prefix", "none")]
)
def test_a_critic_stands_on_a_reward_model_beside_its_base(
    method: str, peft: str, tmp_path: Path, tiny_model: Path
) -> None:
    reward = trained("reward", tmp_path / "reward", tiny_model, BESIDE[method]).directory
    overrides = (f"ppo.peft={peft}", f"ppo.reward=model:{reward}", "ppo.critic.init=reward")
    stage = stages_of("stage=ppo", *overrides)["ppo"]
    assert isinstance(stage, PpoStage)
    trainer = stage.trainer(job_of("ppo", tmp_path / "ppo", tiny_model))
    assert isinstance(trainer.reward, LearnedReward)
    critic = critic_of(trainer)
    with torch.no_grad():
        scores = trainer.reward.model.last_values(ROWS)
        torch.testing.assert_close(critic.last_values(ROWS), scores, atol=1e-5, rtol=1e-5)
    trainer.train([PromptRow(user(f"{n}?")) for n in range(8)], [PromptRow(user(f"{n}?")) for n in (8, 9)])
    with torch.no_grad():
        assert torch.equal(trainer.reward.model.last_values(ROWS), scores)
        assert not torch.allclose(critic.last_values(ROWS), scores, atol=1e-3)


@pytest.mark.parametrize("reward", ["prefix", "prompt", "p_tuning"])
def test_a_critic_gets_virtual_tokens_where_its_start_has_none(reward: str) -> None:
    learned = ("stage=ppo", "ppo.reward=learned", "ppo.critic.init=reward")
    with pytest.raises(ConfigError) as error:
        stages_of(*learned, f"reward.peft={reward}", "ppo.peft=prompt")
    assert str(error.value) == (
        f"ppo.critic.init=reward: the reward model has virtual tokens (reward.peft={reward}), and a critic "
        "on it cannot get those of ppo.peft=prompt too. Use ppo.critic.init=sft, or another ppo.peft."
    )
    stages_of(*learned, "ppo.critic.init=sft", f"reward.peft={reward}", "ppo.peft=prompt")
    stages_of(*learned, f"reward.peft={reward}", "ppo.peft=lora")
    stages_of(*learned, "reward.peft=lora", "ppo.peft=prompt")


def test_nor_on_a_reward_model_from_elsewhere(tmp_path: Path, tiny_model: Path) -> None:
    made = {
        method: trained("reward", tmp_path / method, tiny_model, {**MERGING, **BESIDE}[method]).directory
        for method in ("prompt", "lora")
    }
    on = {name: (f"ppo.reward=model:{path}", "ppo.critic.init=reward") for name, path in made.items()}
    with pytest.raises(ConfigError, match=r"the reward model has virtual tokens \(ppo\.reward=model:"):
        stages_of("stage=ppo", *on["prompt"], "ppo.peft=prefix")
    stages_of("stage=ppo", *on["lora"], "ppo.peft=prefix")


@pytest.mark.parametrize(
    "method",
    [pytest.param("qlora", marks=[pytest.mark.slow, pytest.mark.qlora]), "prefix", "prompt", "p_tuning"],
)
def test_a_policy_that_starts_apart_from_its_reference(
    method: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate would fail after all steps; how far apart it starts is seen in the first one."""
    monkeypatch.setattr("rlhf.pipeline.experiment.check_qlora", lambda key, device: None)
    assert stages_of("stage=ppo", f"ppo.peft={method}")["ppo"].not_checked() == {
        "first_kl": f"with ppo.peft={method} the policy does not start as its own reference"
    }
    assert stages_of("stage=ppo", "ppo.peft=lora")["ppo"].not_checked() == {}
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    stage = stages_of("stage=ppo", f"ppo.peft={method}")["ppo"]
    job = job_of("ppo", tmp_path / "ppo", tiny_model)
    run_in(stage, job)
    assert job.summary["first_kl"] > 1e-4


def test_what_is_not_merged_is_nothing_to_train_on() -> None:
    with pytest.raises(
        ConfigError, match=r"sft\.peft=adapter: it is not merged .* so reward, which trains on"
    ):
        stages_of("stage=reward", "sft.peft=adapter")
    stages_of("stage=sft", "sft.peft=adapter")
    stages_of("stage=ppo", "ppo.peft=adapter", "reward.peft=adapter")
    with pytest.raises(
        ConfigError, match=r"generation=vllm: sft\.peft=adapter is not merged into the weights"
    ):
        stages_of("stage=sft", "generation=vllm", "sft.peft=adapter")
    stages_of("stage=reward", "generation=vllm", "reward.peft=adapter")  # nobody samples from it


def test_the_command_line_evaluates_what_stays_beside_its_base(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    arguments = (
        "stage=evaluate", "sft.peft={method: prompt, tokens: 4}", "evaluate.policies=[base,sft]",
        "evaluate.reward=null", "evaluate.gates.win_rate=null",
    )  # fmt: skip
    outcome = chain.run(*arguments)
    assert outcome.code == 0, outcome.err
    artifact = outcome.artifact("sft")
    origin = origin_of(artifact)
    assert origin is not None
    assert origin.directory.startswith("../../base/")  # so the store can be moved
    assert not list(artifact.glob("*.safetensors"))
    metrics = outcome.summary["stages"]["sft"]["metrics"]
    assert metrics["sft/trained_parameters"] == 4 * 64
    assert metrics["sft/artifact_bytes"] == size_of_model(artifact)
    assert f"artifact MB {metrics['sft/artifact_bytes'] / 1e6:.2f}" in outcome.out
    assert metrics["sft/held_out_loss"] != metrics["sft/held_out_loss_before"]
    assert chain.run(*arguments).statuses["sft"] == "reused"


@pytest.mark.slow
@pytest.mark.qlora
@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_low_rank_updates_of_weights_in_4_bits(name: str, tmp_path: Path, tiny_model: Path) -> None:
    """bitsandbytes computes on CPUs too, slowly; no GPU has run this. It has no wheels for some platforms."""
    pytest.importorskip("bitsandbytes")
    artifact = trained(name, tmp_path, tiny_model, "{method: qlora, rank: 4}").directory
    if name == "reward":
        published = load_scalar_model(artifact, TINY, torch.float32).last_values(ROWS)
        trunk = load_scalar_model(tiny_model, TINY, torch.float32, new_head=True).model
        _, head = attach_published(trunk, artifact)
        assert head is not None
        found = ScalarModel(trunk, torch.nn.Parameter(head)).last_values(ROWS)
        torch.testing.assert_close(found, published, atol=1e-5, rtol=1e-5)
        return
    policy = load_causal_lm(artifact, TINY, torch.float32)
    assert torch.equal(logits(policy), logits(merged_policy(artifact, TINY, torch.float32)))
    assert_samples_with_a_cache(artifact)


def test_4_bits_want_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"reward\.peft=qlora: 4-bit weights need a GPU, and this"):
        stages_of("stage=reward", "reward.peft=qlora", "device=cpu")
