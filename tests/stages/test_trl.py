"""TRL's trainers between our stages: on our rows, in our store; and what ours and TRL's agree on."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _telemetry
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from helpers.chains import Chain, RealChain
from helpers.encoded import answers_of, pairs_of
from helpers.experiments import build, build_stage
from helpers.gradients import Gradients, agree, gradients_in, ours
from helpers.grpo import grpo_trainer
from helpers.jobs import TINY, on_cpu, small_job, tiny_base, user
from helpers.ppo import experience_of, prompts, shake
from helpers.spawned import start_ranks
from rlhf.config import ConfigError
from rlhf.data.chat_template import exchange_ids
from rlhf.data.prepared import PreparedData
from rlhf.data.schema import PairRow, PromptRow, SftRow, Split
from rlhf.distributed.compute import Compute
from rlhf.distributed.signals import Stopped
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import ResponseModel
from rlhf.models.value_head import load_scalar_model
from rlhf.pipeline.checks import check
from rlhf.pipeline.graph import inputs
from rlhf.pipeline.job import Job
from rlhf.pipeline.stage import View
from rlhf.ppo.metrics import UpdateSums
from rlhf.ppo.trainer import repeated
from rlhf.report.page.collect import read_run, stage_charts
from rlhf.stages.trl import TrlStage
from rlhf.supervised.answers import answer_step
from rlhf.supervised.pairs import pair_step

trl = pytest.importorskip("trl")

FEW = "max_steps: 3, per_device_train_batch_size: 4, learning_rate: 1e-3"
GRPO = "num_generations: 4, max_completion_length: 6"
SPLITS: tuple[Split, ...] = ("train", "held_out")
SHADED = {"Reward": {"accuracy", "eval_accuracy"}, "DPO": {"rewards/accuracies", "eval_rewards/accuracies"}}
"""Trainer -> the curves of the run's page with a healthy range; TRL's others have none that is known."""


def trained(chain: Chain, trainer: str, *overrides: str, args: str = FEW) -> Any:
    args += f", {GRPO}" if trainer == "GRPO" else ""
    return chain.run(
        "stage=trl", f"trl.trainer={trainer}", "trl.init=base", f"trl.args={{{args}}}", "precision=fp32",
        *overrides,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("trainer", "peft"),
    [
        ("SFT", "lora"), ("GRPO", "none"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (
            ("SFT", "none"), ("GRPO", "lora"), ("Reward", "none"), ("Reward", "lora"), ("DPO", "none"),
            ("DPO", "lora"),
        )),
    ],
)  # fmt: skip
def test_each_trainer_publishes_a_plain_model(
    trainer: str, peft: str, tmp_path: Path, tiny_model: Path
) -> None:
    chain = Chain(tmp_path)
    (tmp_path / "lengths.py").write_text(
        "def score(prompts, responses):\n    return [float(len(each)) for each in responses]\n"
    )
    outcome = trained(chain, trainer, f"trl.peft={peft}", "ppo.reward=python:lengths:score")
    assert outcome.code == 0, outcome.err
    assert "Warning" not in outcome.err
    artifact = outcome.artifact("trl")
    kind: Any = AutoModelForSequenceClassification if trainer == "Reward" else AutoModelForCausalLM
    model, found = kind.from_pretrained(artifact, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(artifact).chat_template
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.state_dict()[name], base.state_dict()[name]), "it learned nothing"
    recipe = json.loads((artifact / "manifest.json").read_text())["recipe"]
    assert recipe["external"]["trl"] == trl.__version__
    lines = [json.loads(line) for line in (outcome.directory / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines if "trl/loss" in line} == {1, 2, 3}
    assert outcome.summary["stages"]["trl"]["metrics"]["trl/steps"] == 3
    shaded = {chart.y for chart in stage_charts(read_run(outcome.directory), "trl") if chart.healthy}
    assert shaded == SHADED.get(trainer, set())
    (gate,) = [each for each in outcome.summary["gates"] if each["stage"] == "trl"]
    assert gate["name"] == "held_out_accuracy"
    assert (gate["outcome"] == "not checked") is (trainer not in SHADED)
    if trainer in SHADED:
        data = PreparedData(outcome.artifact("prepare"))
        assert gate["rows"] == len(data.rows("pairs", "held_out")) > 1
        assert gate["low"] < gate["value"] <= gate["high"]
    again = trained(chain, trainer, f"trl.peft={peft}", "ppo.reward=python:lengths:score")
    assert again.statuses["trl"] == "reused"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("trl.args={lerning_rate: 1e-3}",), "trl.args.lerning_rate: SFTConfig (TRL "),
        (("trl.args={lerning_rate: 1e-3}",), "Did you mean learning_rate?"),
        (("trl.args={output_dir: here}",), "trl.args.output_dir: this project's own keys decide that."),
        (("trl.args={lr_scheduler_type: steep}",), "trl.args={'lr_scheduler_type': 'steep'}: "),
        (("trl.peft=prefix",), "trl.peft=prefix: TRL gets none, lora, dora, ia3."),
    ],
)
def test_what_trl_is_not_asked_for_is_refused(overrides: tuple[str, ...], said: str, tmp_path: Path) -> None:
    outcome = Chain(tmp_path).run("stage=trl", "trl.init=base", *overrides)
    assert outcome.code == 2
    assert said in outcome.err


def test_other_stages_start_from_its_policy_but_not_from_its_reward_model() -> None:
    chain = build("ppo.init=trl").stages
    assert "trl" in inputs(chain["ppo"], chain)
    chain = build("stage=generate", "generate.policy=trl", "trl.trainer=DPO").stages
    assert "trl" in inputs(chain["generate"], chain)
    with pytest.raises(ConfigError, match=r"ppo\.init=trl: no stage of that name makes a policy"):
        build("ppo.init=trl", "trl.trainer=Reward")


def test_it_shards_nothing() -> None:
    with pytest.raises(ConfigError, match=r"zero=fsdp2: TRL would shard in its own way. Use zero=none."):
        check(build().stages["trl"], View({}, compute=replace(on_cpu(), zero="fsdp2")))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["SFT", "DPO"])
def test_two_ranks_learn_what_one_learns(trainer: str, tmp_path: Path) -> None:
    def settings_for(ranks: int) -> tuple[str, ...]:
        args = "max_steps: 3, learning_rate: 1e-3, lr_scheduler_type: constant, adam_epsilon: 1e-4"
        return (
            "stage=trl", f"trl.trainer={trainer}", "trl.init=base", f"launch.processes={ranks}",
            "precision=fp32", f"trl.args={{per_device_train_batch_size: {4 // ranks}, {args}}}",
        )  # fmt: skip

    one = Chain(tmp_path).run(*settings_for(1))
    two = RealChain(tmp_path / "two")
    two.run("two", *settings_for(2))
    (artifact,) = two.store("two").glob("trl/[!.]*/model.safetensors")
    assert {file.name for file in artifact.parent.iterdir()} == {
        file.name for file in one.artifact("trl").iterdir()
    }
    weights = load_file(artifact)
    for name, weight in load_file(one.artifact("trl") / "model.safetensors").items():
        assert torch.allclose(weights[name], weight, rtol=0, atol=1e-6), name
    losses = [value for (_, _, name), value in two.curve("two").items() if name == "trl/loss"]
    assert len(losses) == 3 and losses[2] < losses[0]


@pytest.mark.slow
def test_each_rank_gets_the_scores_of_its_own_answers(tmp_path: Path, tiny_model: Path) -> None:
    """As many as each has, of a reward that all ranks ask for all answers."""
    found = start_ranks(scores_of_own, 2, tmp_path, tiny_model, timeout=60.0, seconds=120.0)()
    assert found == {0: [1.0, 0.0, 1.0], 1: [0.0, 1.0, 0.0]}


def scores_of_own(compute: Compute, directory: Path, model: Path) -> list[float | None]:
    from accelerate import PartialState

    PartialState(cpu=True)
    stage = build_stage(TrlStage, "trl.trainer=GRPO", "ppo.reward=python:helpers.ppo:starts_with_e")
    job = small_job("trl", directory / str(compute.rank) / "job", tiny_base(model), compute=compute)
    job.data.write("ppo", "train", prompts(range(6)))
    texts = ["eel" if (number + compute.rank) % 2 == 0 else "cat" for number in range(3)]
    answers = [[{"role": "assistant", "content": text}] for text in texts]
    score: list[float | None] = stage._reward_function(job)([], answers, row=[0, 1, 2])
    return score


@pytest.mark.slow
def test_stopped_by_a_signal_it_goes_on_from_trls_own_checkpoint(tmp_path: Path) -> None:
    """On two ranks, each with its own random numbers in it."""
    chain = RealChain(tmp_path)
    args = (
        "stage=trl", "trl.init=base", "trl.args={max_steps: 30, per_device_train_batch_size: 2}",
        "checkpoint.every_steps=2", "launch.processes=2",
    )  # fmt: skip
    process = chain.start_until("trl", 4, "run", *args)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode != 0
    (checkpoint, *_) = chain.store("run").glob("trl/.*.checkpoints/step-*")
    assert len([*checkpoint.glob("rng_state_*.pth")]) == 2
    out, _ = chain.run("run", *args)
    assert "trl: continues from step " in out
    steps = [row["step"] for row in chain.metrics("run") if "trl/loss" in row]
    assert steps == [*range(1, 31)]


def first_steps(directory: Path, model: Path) -> tuple[TrlStage, Callable[[str], Job]]:
    """A short SFT, and what makes jobs for it that share their checkpoints."""

    def job_of(name: str) -> Job:
        job = small_job("trl", directory / name, tiny_base(model), checkpoints=directory / "checkpoints")
        for split in SPLITS:
            job.data.write("sft", split, [SftRow(user(f"{n}?"), "rain " * n) for n in range(1, 9)])
        return job

    return build_stage(TrlStage, "model=tiny", "trl.init=base", f"trl.args={{{FEW}}}"), job_of


@pytest.mark.parametrize("damaged", [False, True])
def test_a_damaged_checkpoint_of_trl_is_not_gone_on_from(
    damaged: bool, tmp_path: Path, tiny_model: Path
) -> None:
    stage, job_of = first_steps(tmp_path, tiny_model)
    first = job_of("first")
    first.checkpoints.signals.received = signal.SIGTERM
    with pytest.raises(Stopped):
        stage.run(first)
    (weights,) = (tmp_path / "checkpoints").glob("step-*/model.safetensors")
    if damaged:
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    second = job_of("second")
    assert (second.checkpoints.newest is None) == damaged
    stage.run(second)
    lines = map(json.loads, (second.directory / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "trl/loss" in line] == [1, 2, 3]


def test_trl_tells_nobody_that_it_is_used(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trainers do when they are made, unless the Hub's library is told not to."""
    told: Queue[object] = Queue()
    monkeypatch.setattr(_telemetry, "_TELEMETRY_QUEUE", told)
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", lambda: None)  # nothing leaves this test
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    stage, job_of = first_steps(tmp_path, tiny_model)
    stage._trainer(job_of("job"), tmp_path / "scratch")
    assert told.empty()


def theirs(trainer: Any) -> tuple[float, Gradients]:
    """Of all rows as one batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return float(loss.detach()), {name: each.grad for name, each in trainer.model.named_parameters()}


def settings(kind: Any, directory: Path, **more: Any) -> Any:
    return kind(**{
        "output_dir": str(directory), "report_to": "none", "use_cpu": True, "bf16": False,
        "per_device_train_batch_size": 9, "gradient_checkpointing": False, "disable_tqdm": True, **more,
    })  # fmt: skip


def test_sft_has_trls_loss_and_gradients(tmp_path: Path, tiny_model: Path) -> None:
    import datasets

    rows = [SftRow(user(f"{n}?"), "rain on the roof " * n) for n in (1, 4, 2)]
    tokenizer = tiny_base(tiny_model).load_tokenizer()
    policy = load_causal_lm(tiny_model, TINY, torch.float32)
    mine = ours(
        policy, ResponseModel(policy),
        lambda engine: answer_step(engine, answers_of(tokenizer, rows), 10_000, on_cpu()),
    )  # fmt: skip
    encoded = []
    for row in rows:
        ids, begin = exchange_ids(tokenizer, row.prompt, row.completion)
        encoded.append({"input_ids": ids, "completion_mask": [0] * begin + [1] * (len(ids) - begin)})
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32),
        args=settings(trl.SFTConfig, tmp_path, completion_only_loss=True),
        train_dataset=datasets.Dataset.from_list(encoded), processing_class=tokenizer,
    )  # fmt: skip
    agree(mine, theirs(trainer))


@pytest.mark.parametrize("center", [0.0, 0.1])
def test_the_reward_model_has_trls_loss_and_gradients(
    center: float, tmp_path: Path, tiny_model: Path
) -> None:
    import datasets

    rows = [PairRow(user(f"{n}?"), "rain on the roof " * n, "sun " * (5 - n)) for n in (1, 4, 2)]
    tokenizer = tiny_base(tiny_model).load_tokenizer()
    torch.manual_seed(0)
    scored = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, dtype=torch.float32)
    scored.config.pad_token_id = tokenizer.pad_token_id
    scored.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    scalar = load_scalar_model(tmp_path / "start", TINY, torch.float32)
    scalar.requires_grad_(True)
    scalar.offset.requires_grad_(False)
    mine = ours(
        scalar, scalar,
        lambda engine: pair_step(engine, pairs_of(tokenizer, rows), 10_000, on_cpu(), center=center),
    )  # fmt: skip
    # transformers gives the padding token's embedding no gradient. In this model it also ends each turn
    padding = scored.get_input_embeddings().padding_idx
    assert float(mine[1]["model.model.embed_tokens.weight"][padding].norm()) > 0
    mine[1]["model.model.embed_tokens.weight"][padding] = 0.0
    of_head = {"head.weight": "score.weight"}
    mine = mine[0], {of_head.get(name, name.removeprefix("model.")): each for name, each in mine[1].items()}
    encoded = [
        {
            f"{side}_ids": exchange_ids(tokenizer, row.prompt, text)[0]
            for side, text in (("chosen", row.chosen), ("rejected", row.rejected))
        }
        for row in rows
    ]
    trainer = trl.RewardTrainer(
        model=scored, args=settings(trl.RewardConfig, tmp_path, center_rewards_coefficient=center or None),
        train_dataset=datasets.Dataset.from_list(encoded), processing_class=tokenizer,
    )  # fmt: skip
    agree(mine, theirs(trainer))


SEQUENCE = ("grpo.loss_mean=sequence",)


@pytest.mark.parametrize("moved", [False, True], ids=["first step", "after a step"])
@pytest.mark.parametrize(
    ("overrides", "of_trl"),
    [
        (SEQUENCE, {"loss_type": "grpo"}),
        (
            ("grpo.loss_mean=token", "grpo.clip_high=0.3", "grpo.dual_clip=1.4"),
            {"loss_type": "dapo", "epsilon_high": 0.3, "delta": 1.4},
        ),
        (
            ("grpo.loss_mean=constant", "grpo.divide_by_deviation=false"),
            {"loss_type": "dr_grpo", "scale_rewards": "none"},
        ),
        (
            (*SEQUENCE, "grpo.policy_loss=gspo"),
            {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        ),
    ],
    ids=["grpo", "dapo", "dr_grpo", "gspo"],
)
def test_grpo_has_trls_loss_and_gradients(
    overrides: tuple[str, ...], of_trl: dict[str, Any], moved: bool, tmp_path: Path, tiny_model: Path
) -> None:
    """For the same answers, sampled by a policy that has left its reference: at the policy that sampled, and
    at one that has moved on, where some tokens' ratios are clipped.

    TRL's default differs in one point: `use_bias_correction_kl` multiplies the KL by the ratio.
    """
    of_trl = {"use_bias_correction_kl": False, **of_trl}
    ours, theirs, _ = group_step(
        trl.GRPOTrainer, trl.GRPOConfig, overrides, of_trl, moved, tmp_path, tiny_model
    )
    agree(ours, theirs)


def test_rloo_has_trls_gradients_up_to_the_limit_of_an_answer(tmp_path: Path, tiny_model: Path) -> None:
    """TRL's loss is a mean over answers of the sum over their tokens. `loss_mean=constant` divides by the
    limit of an answer too. Its loss has one ratio an answer, the product of those of its tokens, so that away
    from the policy that sampled, and as a number, it is another: -mean(A) when the ratios are 1.
    """
    overrides = (
        "grpo.advantage=rloo", "grpo.loss_mean=constant", "grpo.kl.place=reward", "grpo.kl.estimator=k1",
    )  # fmt: skip
    of_trl = {"normalize_advantages": False}
    (_, ours), (loss, theirs), advantages = group_step(
        trl.RLOOTrainer, trl.RLOOConfig, overrides, of_trl, False, tmp_path, tiny_model
    )
    longest = 8
    agree((loss, {name: longest * each for name, each in ours.items()}), (loss, theirs))
    assert loss == pytest.approx(-float(advantages.mean()), abs=1e-5)


def group_step(
    kind: Any,
    config: Any,
    overrides: tuple[str, ...],
    of_trl: dict[str, Any],
    moved: bool,
    directory: Path,
    start: Path,
) -> tuple[tuple[float, Gradients], tuple[float, Gradients], Tensor]:
    """Loss and gradients of our trainer, and of TRL's, for the same answers; and the answers' advantages."""
    import datasets

    trainer = grpo_trainer(
        directory / "job", start, "grpo.kl.coef=0.5", "ppo.temperature=0.7", "grpo.clip=0.2", *overrides
    )
    trainer.policy.stop_ids = list(range(0, 259, 15))  # answers of many lengths
    shake(trainer)
    sampled_by = deepcopy(trainer.policy.model.state_dict())
    rows = repeated([PromptRow(user(f"{n}{' and the sea' * n}")) for n in range(4)], 4)
    experience, _ = experience_of(trainer, rows)
    answers = [ids.tolist() for ids in experience.rollout.response_ids]
    assert len({*map(len, answers)}) > 3
    if moved:
        shake(trainer)
    sums = UpdateSums(trainer.objective.figures)
    trainer.accumulate(experience, [sums], critic_only=False)
    figures = sums.means(trainer.compute)
    assert figures["clip_fraction"] > 0.05 if moved else figures["clip_fraction"] == 0.0
    mine = figures["policy_loss"], gradients_in(trainer.engine, trainer.policy.model)

    asked = [{"prompt": row.prompt} for row in rows]
    other = kind(
        model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        reward_funcs=lambda **_: experience.score_B.tolist(),
        args=settings(
            config, directory, beta=0.5, temperature=0.7, epsilon=0.2, num_generations=4, num_iterations=2,
            max_completion_length=8, per_device_train_batch_size=len(rows), **of_trl,
        ),
        train_dataset=datasets.Dataset.from_list(asked),
        processing_class=tiny_base(start).load_tokenizer(),
    )  # fmt: skip
    other._generate_single_turn = lambda *_: (answers, None) if kind is trl.GRPOTrainer else answers
    other.model.load_state_dict(sampled_by)
    other.model.train()
    other.current_gradient_accumulation_steps = 1
    batch = other._generate_and_score_completions(asked)
    other.model.load_state_dict(trainer.policy.model.state_dict())
    loss = other.compute_loss(other.model, batch)
    loss.backward()
    gradients = {name: each.grad for name, each in other.model.named_parameters()}
    return mine, (float(loss.detach()), gradients), batch["advantages"]
