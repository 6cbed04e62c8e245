"""What one of several ranks does in test_in_step.py: every stage's passes over uneven rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from helpers.encoded import answers_of, pairs_of
from helpers.experiments import build
from helpers.jobs import TINY, small_job, tiny_base, user
from helpers.spawned import each_case
from rlhf.data.schema import Message, PairRow, PromptRow, SftRow
from rlhf.distributed.compute import Compute, Zero
from rlhf.models.base import load_tokenizer
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import ResponseModel
from rlhf.models.value_head import load_scalar_model, reset_head
from rlhf.pipeline.stage import Stage
from rlhf.ppo.ptx import PretrainingMix
from rlhf.rl.rollout import RewardRule, Rollout, make_experience
from rlhf.stages.ppo import PpoStage
from rlhf.stages.reward import RewardStage
from rlhf.stages.sft import SftStage
from rlhf.supervised.answers import answer_losses, answer_step
from rlhf.supervised.pairs import pair_step
from rlhf.training.config import OptimConfig
from rlhf.training.engine import Engine
from rlhf.training.make_engine import make_engine
from rlhf.training.trained import load_trained

OVERRIDES = (
    "model=tiny", "sft.peft=none", "reward.peft=none", "ppo.peft=none", "ppo.critic.init=sft",
    "ppo.score.normalize=none", "ppo.max_new_tokens=5", "ppo.epochs=2", "ppo.minibatch_episodes=8",
    "ppo.batch_episodes=8", "ppo.temperature=1.0",
    # the longest row alone fills a pass: one rank has two passes, where the others repeat a row with weight 0
    "sft.micro_batch_tokens=340", "reward.micro_batch_tokens=680", "ppo.micro_batch_tokens=340",
)  # fmt: skip
OPTIM = OptimConfig(
    lr=0.1, weight_decay=0.0, eps=1e-8, schedule="linear", warmup_fraction=0.0, max_grad_norm=1e9
)
LENGTHS = (300, 100, 52, 51, 50, 12, 11, 10)
"""Response tokens of the rows that are dealt out: to four ranks 300 + 50, 100 + 12, 52 + 11 and 51 + 10."""
ALONE = 100
"""Of a row that only one rank has."""


class Case(NamedTuple):
    """One way to be spread over ranks, and one model."""

    zero: Zero
    frozen: str
    sampling: Literal["whole", "layers"]
    model: str
    """Name of a directory."""


def write_large(directory: Path, tiny: Path, *, is_tied: bool) -> None:
    """A model of which every matrix has more elements than those that DeepSpeed by itself never shards (1e5),
    with an output layer of its own or the embedding's."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 400,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        vocab_size=259, bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=is_tied, **shape
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    load_tokenizer(tiny, TINY).save_pretrained(directory)


def answer(length: int) -> str:
    """So many bytes, which are tokens, with the one that ends the answer."""
    return ("rain on the roof and " * 40)[: length - 1]


def prompt(number: int) -> list[Message]:
    return user(f"{number}?")


def all_stages(
    compute: Compute,
    model: Path,
    reward: Path,
    frozen: str,
    scratch: Path,
    sampling: Literal["whole", "layers"] = "whole",
) -> dict[str, float]:
    """Every kind of pass that a stage makes, on this rank; figures of which all ranks have the same."""
    stages = build(*OVERRIDES, f"ppo.frozen_placement={frozen}").stages
    base = tiny_base(model)

    def job(name: str) -> Any:
        inputs = {"sft": model, "reward": reward}
        made = small_job(name, scratch / name / "artifact", base, inputs, compute=compute)
        return replace(made, local_sampling=sampling)

    figures: dict[str, float] = {}
    for name, learn in (("sft", sft), ("reward", reward_model), ("ppo", ppo)):
        torch.manual_seed(0)
        figures |= {f"{name}: {key}": value for key, value in learn(stages[name], job(name)).items()}
        gc.collect()  # engines hold themselves in cycles
    return figures


def sft(stage: Stage, job: Any) -> dict[str, float]:
    assert isinstance(stage, SftStage)
    compute, tokenizer = job.compute, job.base.load_tokenizer()
    policy = load_causal_lm(job.base.directory, TINY, compute.dtype, compute.loads_on)
    engine = make_engine(ResponseModel(policy), [(policy.parameters(), stage.optim)], compute)
    engine.set_rates(0, 10)
    rows = answers_of(tokenizer, [SftRow(prompt(n), answer(n)) for n in (*LENGTHS, ALONE)])
    counted, budget = Gathers(engine, policy), stage.micro_batch_tokens
    figures = {"held-out loss": float(answer_losses(engine, rows[-1:], budget, compute).sum())}
    counted.check("held-out loss", passes=1, each=1)
    for step, batch in enumerate((rows[:-1], rows[-1:], rows[:-1])):
        passes = len(list(compute.micro_batches([len(row) for row in batch], budget)))
        figures[f"loss {step}"] = answer_step(engine, batch, budget, compute)["loss"]
        figures[f"norm {step}"] = engine.grad_norm
        counted.check(f"step {step}", passes=passes, each=2)
    return figures | {"loss behind": float(answer_losses(engine, rows, budget, compute).mean())}


def reward_model(stage: Stage, job: Any) -> dict[str, float]:
    assert isinstance(stage, RewardStage)
    compute, tokenizer = job.compute, job.base.load_tokenizer()
    model = load_scalar_model(job.base.directory, TINY, compute.dtype, new_head=True)
    reset_head(model)
    model.to(compute.loads_on)
    model.offset.requires_grad_(False)
    engine = make_engine(model, [(model.parameters(), stage.optim)], compute)
    engine.set_rates(0, 10)
    rows = pairs_of(tokenizer, [PairRow(prompt(n), answer(n), answer(n // 2)) for n in (*LENGTHS, ALONE)])
    figures: dict[str, float] = {}
    for step, batch in enumerate((rows[:-1], rows[-1:], rows[:-1])):
        learned = pair_step(engine, batch, stage.micro_batch_tokens, compute, center=stage.center)
        figures[f"loss {step}"] = learned["loss"]
        figures[f"norm {step}"] = engine.grad_norm
    return figures


def ppo(stage: Stage, job: Any) -> dict[str, float]:
    assert isinstance(stage, PpoStage)
    trainer = stage.trainer(job)
    trainer.engine.set_rates(0, 10)
    tokenizer = trainer.policy.tokenizer
    rows = answers_of(tokenizer, [SftRow(prompt(n), answer(n)) for n in (*LENGTHS, ALONE)])
    mixed = answers_of(tokenizer, [SftRow(prompt(ALONE), answer(ALONE))], 1024)
    trainer.mix = PretrainingMix(stage.ptx.model_copy(update={"coef": 0.5}), mixed, 0)
    counted = Gathers(trainer.engine, trainer.policy.model)
    frozen = Gathers(trainer.reference.model, trainer.reference.model)

    figures: dict[str, float] = {}
    for name, some in (("all", rows[:-1]), ("one", rows[-1:])):
        rollout = Rollout(
            [row.prompt for row in some], [row.answer for row in some], torch.ones(len(some)) > 0
        )
        passes = len(list(job.compute.micro_batches([len(row) for row in some], stage.micro_batch_tokens)))
        (logp_BR, reference_BR, value_BR), graph = trainer.score(rollout)
        assert value_BR is not None
        counted.check(f"scoring {name}", passes=passes, each=1)
        frozen.check(f"reference {name}", passes=passes, each=1)
        score_B = trainer.reward(
            [PromptRow(prompt(0)) for _ in some], [answer(len(row.answer)) for row in some]
        )
        figures |= {
            f"logp {name}": float(logp_BR.sum()), f"value {name}": float(value_BR.abs().sum()),
            f"reference {name}": float(reference_BR.sum()), f"score {name}": float(score_B.sum()),
        }  # fmt: skip
        if len(some) > 1:
            experience = make_experience(
                rollout, logp_BR=logp_BR, reference_logp_BR=reference_BR, score_B=score_B,
                rule=RewardRule(trainer.normalizer, 0.05, None, 0.0),
                advantages=partial(trainer.objective.advantages, value_BR=value_BR),
            )  # fmt: skip
            learned = trainer.learn(experience, graph, critic_only=False)
            counted.check("learning", passes=stage.epochs * (passes + 1), each=2)  # and the mix, of one row
            names = ("policy_loss", "value_loss", "grad_norm", "critic_grad_norm", "entropy")
            figures |= {key: learned[key] for key in names}
    rollout, _ = trainer.policy.sample(
        [prompt(3)], max_new_tokens=5, temperature=1.0, generator=torch.Generator(), batch_rows=1
    )
    alone_BR = trainer.policy.log_probabilities(rollout, 1.0, stage.micro_batch_tokens)
    held_out = trainer.evaluate([PromptRow(prompt(n)) for n in (1, 20)])
    return figures | {
        "held-out score": float(held_out.score_B.sum()), "held-out kl": float(held_out.kl_B.sum()),
        "held-out logp": float(alone_BR.sum()),
    }  # fmt: skip


class Slope(nn.Module):
    """A weight in bf16, and the gradient that it gets on this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))

    def forward(self, slope: float) -> Tensor:
        return slope * self.weight.sum()


def norms_of_sums(compute: Compute) -> dict[str, float]:
    """By engine, the norm over all ranks of a gradient of 64 numbers: 1 on rank 0 and 1/512 on the others.

    bf16 holds each of both, and not their sum.
    """
    norms = {}
    for zero in ("none", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "hsdp"):
        here = replace(compute, zero=zero, dtype_name="bfloat16", node_ranks=2)
        model = Slope()
        engine = make_engine(model, [(model.parameters(), OPTIM)], here)
        engine.set_rates(0, 1)
        engine.backward(engine.model(1.0 if compute.is_main else 1 / 512), last=True)
        engine.step()
        norms[zero] = engine.grad_norm
    return norms


class Layers(nn.Module):
    """Two matrices, a norm's gain and a bias, of sizes that ranks cannot share evenly."""

    bias: nn.Parameter
    matrix: nn.Parameter
    gain: nn.Parameter
    last: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        values = torch.Generator().manual_seed(0)
        for name, shape in {"bias": (7,), "matrix": (5, 7), "gain": (3,), "last": (3, 5)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=values)))

    def forward(self, x_I: Tensor) -> Tensor:
        found: Tensor = (self.gain * (self.last @ (self.matrix @ (x_I + self.bias)))).sum()
        return found


def decayed(compute: Compute, scratch: Path) -> dict[str, dict[str, float]]:
    """By engine, what each weight is after steps with a large decay: a sum in which every place counts. Two
    of the weights begin a step later."""
    found = {}
    optim = OPTIM.model_copy(update={"weight_decay": 0.5, "max_grad_norm": 1.0})
    for zero in ("none", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "hsdp"):
        model = Layers()
        groups = [([model.bias, model.matrix], optim), ([model.gain, model.last], optim)]
        engine = make_engine(model, groups, replace(compute, zero=zero, node_ranks=2))
        for step in range(3):
            engine.set_rates(step, 4, first_steps={0: 1})
            engine.backward(engine.model(torch.arange(7.0) + compute.rank), last=True)
            engine.step()
        engine.save_trained(model, scratch / zero)
        found[zero] = {
            name: float((value.flatten() * torch.arange(1.0, value.numel() + 1)).sum())
            for name, value in load_trained(scratch / zero).items()
        }
    return found


class Gathers:
    """Counts how often a sharded output layer is gathered; nothing for a whole one, or the embedding's."""

    def __init__(self, owner: Engine | nn.Module, policy: PreTrainedModel) -> None:
        self.count = 0
        weight = policy.get_output_embeddings().weight
        model = owner.model if isinstance(owner, Engine) else owner
        is_sharded = hasattr(weight, "ds_status") and not getattr(weight, "ds_persist", False)
        self.is_counted = is_sharded and weight is not policy.get_input_embeddings().weight
        parameters: Iterable[Any] = model.parameters()  # DeepSpeed gives them methods
        for parameter in parameters if self.is_counted else ():
            parameter.all_gather_coalesced = self._counting(parameter.all_gather_coalesced, weight)

    def _counting(self, gather: Callable[..., Any], weight: Tensor) -> Callable[..., Any]:
        def counted(parameters: Sequence[Tensor], **options: Any) -> Any:
            self.count += sum(each is weight for each in parameters)
            return gather(parameters, **options)

        return counted

    def check(self, what: str, *, passes: int, each: int) -> None:
        """Since it was last called there were so many passes; then begin anew."""
        if self.is_counted:
            assert 1 <= self.count <= passes * each, f"{what}: {self.count} gathers in {passes} passes"
        self.count = 0


def go_through(compute: Compute, cases: Sequence[Case], models: Path, scratch: Path) -> dict[Any, Any]:
    """All cases, in step with the other ranks, and what does not depend on a model."""

    def figures(case: Case) -> dict[str, float]:
        return all_stages(
            replace(compute, zero=case.zero), models / case.model, models / f"{case.model}-reward",
            case.frozen, scratch / "-".join(case), case.sampling,
        )  # fmt: skip

    return {"sums": norms_of_sums(compute), "decayed": decayed(compute, scratch), **each_case(cases, figures)}
