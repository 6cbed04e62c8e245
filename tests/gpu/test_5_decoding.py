"""The local engine on a GPU: rows that leave, nuclei, and frozen models that wait in the host's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from helpers.gpu import Reaches, error
from helpers.jobs import TINY
from helpers.models import scale
from helpers.ppo import ppo_job, ppo_stage
from helpers.vllm import lists, own_logp, uniform
from rlhf.data.schema import Message, PromptRow
from rlhf.distributed.compute import Compute
from rlhf.generation.policy_model import PolicyModel
from rlhf.generation.sampler import _draw, _nucleus, generate
from rlhf.models.load import load_causal_lm
from rlhf.models.value_head import reset_head
from rlhf.models.weight_sharing import offload
from rlhf.ppo.models import load_critic, score_normalizer
from rlhf.rewards.model import LearnedReward
from rlhf.rl.rollout import Rollout
from rlhf.training.engine import Access

pytestmark = pytest.mark.gpu
VOCABULARY = 151_936
"""Qwen's: a parallel sum over so many numbers is put together of parts."""


def sharp(tiny: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """An untrained model's logits hardly differ: here they do."""
    model = load_causal_lm(tiny, TINY, dtype, device)
    scale(model, 4.0)
    return model


def answers(model: PreTrainedModel, rows: range, **changes: Any) -> Rollout:
    """Prompts of different lengths, with stop tokens that end some rows early."""
    lengths = [3 + 5 * row % 29 for row in rows]
    prompts = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    settings: dict[str, Any] = {
        "max_new_tokens": 24, "temperature": 1.0, "top_p": 0.9, "stop_ids": range(3, 23), "pad_id": 0,
        "uniform_BR": uniform(64, 24)[rows.start : rows.stop], "batch_rows": 64,
    }  # fmt: skip
    return generate(model, prompts, **(settings | changes))


@pytest.mark.parametrize("changes", [{}, {"top_p": 1.0}, {"temperature": 0.0}], ids=["p09", "p1", "greedy"])
def test_rows_that_leave_change_nothing_for_those_that_stay(
    changes: dict[str, Any], tiny_model: Path, device: torch.device, reaches: Reaches
) -> None:
    """Each row alone on the CPU, against all together on the device; both in fp32."""
    rows = range(32)
    together = answers(sharp(tiny_model, device), rows, **changes)
    on_cpu = sharp(tiny_model, torch.device("cpu"))
    alone = [answers(on_cpu, range(row, row + 1), **changes) for row in rows]
    assert 0 < int(together.stopped.sum()) < len(rows) and len({*map(len, together.response_ids)}) > 3
    same = [found == lists(wanted)[0] for found, wanted in zip(lists(together), alone, strict=True)]
    reaches("share of equal answers", sum(same) / len(same), at_least=0.96)


def test_a_drawn_token_has_weight_and_is_in_the_nucleus(device: torch.device, reaches: Reaches) -> None:
    """At each place where the sum rises, and just beside: rounding there may raise it without a weight."""
    generator = torch.Generator().manual_seed(0)
    weight_BV = torch.randn(4, VOCABULARY, generator=generator).mul(3).exp().to(device)
    weight_BV /= weight_BV.amax(-1, keepdim=True)
    outside = 0
    for top_p in (0.5, 0.9, 0.99):
        kept_BV = _nucleus(weight_BV.clone(), weight_BV.sum(-1), top_p)
        reached = kept_BV.sum(-1) / weight_BV.sum(-1)
        reaches(f"share of the nucleus {top_p}", float(reached.min()), at_least=top_p - 1e-4)
        cumulative_BV = kept_BV.cumsum(-1)
        edges_BV = cumulative_BV / cumulative_BV[:, -1:]
        some = torch.randint(VOCABULARY, (128,), generator=generator).to(device)
        for uniform_B in edges_BV[:, some].T:
            for beside_B in (uniform_B, uniform_B.nextafter(torch.zeros_like(uniform_B))):
                token_B = _draw(kept_BV, beside_B.clamp(0.0, 1.0 - 2**-24))
                outside += int((kept_BV.gather(-1, token_B[:, None]) <= 0.0).sum())
    reaches("tokens drawn without a weight", outside, at_most=0)


def test_draws_follow_the_distribution(device: torch.device, reaches: Reaches) -> None:
    """The largest deviation of a token's share, in standard errors."""
    draws = 200_000 if device.type == "cuda" else 20_000
    weight_V = torch.randn(1000, generator=torch.Generator().manual_seed(1)).mul(2).exp().to(device)
    parts = uniform(draws, seed=2).to(device).split(10_000)
    token_B = torch.cat([_draw(weight_V.expand(len(part), -1), part) for part in parts])
    share_V, wanted_V = torch.bincount(token_B, minlength=1000) / draws, weight_V / weight_V.sum()
    deviation_V = (share_V - wanted_V) / (wanted_V * (1 - wanted_V) / draws).sqrt()
    reaches("standard errors", float(deviation_V[wanted_V * draws > 50].abs().max()), at_most=4.5)


def test_bf16_samples_what_a_pass_says(tiny_model: Path, device: torch.device, reaches: Reaches) -> None:
    """Log-probabilities of the engine, against a pass over each whole row in fp32."""
    rollout = answers(sharp(tiny_model, device, torch.bfloat16), range(32), top_p=1.0)
    assert rollout.sampled_logp is not None
    wanted = torch.cat(own_logp(sharp(tiny_model, torch.device("cpu")), rollout, 1.0))
    away = (torch.cat(rollout.sampled_logp) - wanted).abs()
    reaches("nats a token", float(away.mean()), at_most=0.05)


def test_offloaded_models_give_the_memory_back_and_the_same_scores(
    tiny_model: Path, tmp_path: Path, device: torch.device, on_gpu: bool, reaches: Reaches
) -> None:
    """The reference and the reward model, as ppo.frozen_placement=offloaded has them."""
    compute = Compute(str(device), "float32")
    stage, job = ppo_stage(), ppo_job(tmp_path, tiny_model)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    policy = PolicyModel.load(tiny_model, TINY, compute)
    scalar = load_critic(
        stage, job, lambda *_: torch.zeros(0), score_normalizer(stage, job), policy.tokenizer
    )
    reset_head(scalar, deviation=1.0)
    reward = LearnedReward(tiny_model, scalar.to(device), policy.tokenizer, 1000, compute)
    rollout = Rollout([torch.tensor([5, 6, 7])], [torch.tensor([8, 9])], torch.tensor([True]))
    prompt = PromptRow([Message(role="user", content="Hi")])

    def scores() -> list[Tensor]:
        return [policy.log_probabilities(rollout, 1.0, 1000), reward([prompt], ["Hello"])]

    wanted = scores()
    weights = sum(p.nbytes for model in (policy.model, scalar) for p in {*model.parameters()})
    for each in (policy, reward):
        each.access = Access(offload(each.model, device))
    reaches("error of the scores", error(scores(), wanted), at_most=1e-6)
    devices = {p.device.type for model in (policy.model, scalar) for p in model.parameters()}
    assert devices == {"cpu"}
    if on_gpu:
        left = torch.cuda.memory_allocated(device) - before
        reaches("share of the weights that stays", left / weights, at_most=0.1)
