"""An update is that of the plain implementation: padded rows, whole logits, autograd, in fp32.

Dimensions: B episodes, L tokens of prompt and response (padded on the right), V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from helpers.ppo import ROWS, MakeTrainer, critic_of, experience_of, shake
from rlhf.ppo.metrics import UpdateSums
from rlhf.ppo.trainer import PolicyTrainer
from rlhf.rl.rollout import Experience
from rlhf.training.engine import PlainEngine

CLIP, VALUE_CLIP, TEMPERATURE = 0.2, 0.2, 0.7
SETTINGS = (
    f"ppo.clip={CLIP}", f"ppo.value_clip={VALUE_CLIP}", f"ppo.temperature={TEMPERATURE}",
    "ppo.micro_batch_tokens=150", "ppo.optim.max_grad_norm=1e9", "ppo.critic.optim.max_grad_norm=1e9",
)  # fmt: skip


def plain_update(
    experience: Experience, tiny_model: Path, weights: dict[str, Tensor]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Mean losses a token, and gradients by name."""
    policy = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation="eager"
    )
    trunk = AutoModel.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    head, offset = (
        nn.Parameter(weights[f"critic.{name}"].clone()) for name in ("model.score.weight", "head.offset")
    )
    named: dict[str, nn.Parameter] = {
        **{f"policy.{name}": parameter for name, parameter in policy.named_parameters()},
        **{f"critic.model.model.{name}": parameter for name, parameter in trunk.named_parameters()},
        "critic.model.score.weight": head, "critic.head.offset": offset,
    }  # fmt: skip
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(weights[name])

    prompts, responses = experience.rollout.prompt_ids, experience.rollout.response_ids
    rows = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    ids_BL, mask_BL = torch.zeros(2, len(rows), max(map(len, rows)), dtype=torch.long)
    sampled_BL = torch.zeros(mask_BL.shape, dtype=torch.bool)
    old_logp_BL, old_value_BL, advantage_BL, return_BL = torch.zeros(4, *mask_BL.shape)
    for row, (prompt, ids) in enumerate(zip(prompts, rows, strict=True)):
        ids_BL[row, : len(ids)], mask_BL[row, : len(ids)] = ids, 1
        new = slice(len(prompt), len(ids))
        sampled_BL[row, new] = True
        count = len(ids) - len(prompt)
        old_logp_BL[row, new], old_value_BL[row, new], advantage_BL[row, new], return_BL[row, new] = (
            each[row, :count]
            for each in (
                experience.logp_BR, experience.value_BR, experience.advantage_BR, experience.return_BR
            )
        )  # fmt: skip
    call = {
        "input_ids": ids_BL, "attention_mask": mask_BL, "position_ids": (mask_BL.cumsum(-1) - 1).clamp(min=0),
        "use_cache": False,
    }  # fmt: skip
    # the logits and values at a token belong to the one behind it
    logp_BLV = (policy(**call).logits[:, :-1] / TEMPERATURE).log_softmax(-1)
    value_BL = (trunk(**call).last_hidden_state[:, :-1] @ head[0]) + offset
    sampled_BL, old_logp_BL, old_value_BL, advantage_BL, return_BL = (
        each[:, 1:] for each in (sampled_BL, old_logp_BL, old_value_BL, advantage_BL, return_BL)
    )
    tokens = sampled_BL.sum()
    logp_BL = logp_BLV.gather(-1, ids_BL[:, 1:, None]).squeeze(-1)
    ratio_BL = (logp_BL - old_logp_BL).exp()
    policy_BL = -torch.minimum(ratio_BL * advantage_BL, ratio_BL.clamp(1 - CLIP, 1 + CLIP) * advantage_BL)
    near_BL = old_value_BL + (value_BL - old_value_BL).clamp(-VALUE_CLIP, VALUE_CLIP)
    squares_BL = torch.maximum((value_BL - return_BL) ** 2, (near_BL - return_BL) ** 2)
    policy_loss = policy_BL[sampled_BL].sum() / tokens
    value_loss = 0.5 * squares_BL[sampled_BL].sum() / tokens
    entropy = -(logp_BLV.exp() * logp_BLV).sum(-1)[sampled_BL].sum() / tokens
    (policy_loss + value_loss).backward()
    losses = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    found = {name: parameter.grad for name, parameter in named.items() if parameter.grad is not None}
    assert len(found) == len(named)
    return {name: loss.item() for name, loss in losses.items()}, found


def own_update(trainer: PolicyTrainer, experience: Experience) -> tuple[dict[str, float], dict[str, Tensor]]:
    sums = UpdateSums(trainer.objective.figures)
    trainer.accumulate(experience, [sums], critic_only=False)
    trainer.engine.step()
    assert isinstance(trainer.engine, PlainEngine)
    moments = trainer.engine.optimizer.state_dict()["adamw"]["state"].values()
    names = [name for name, _ in trainer.engine.model.named_parameters()]
    # the first moment after one step is a tenth of the gradient
    found = {name: each["exp_avg"] * 10 for name, each in zip(names, moments, strict=True)}
    return sums.means(trainer.compute), found


def test_losses_and_gradients_are_those_of_the_plain_implementation(
    make: MakeTrainer, tiny_model: Path
) -> None:
    trainer = make(*SETTINGS)
    trainer.policy.stop_ids = list(range(0, 259, 15))  # an untrained model hardly ever says one of its own
    experience, scored = experience_of(trainer, ROWS)
    lengths = [len(ids) for ids in experience.rollout.response_ids]
    total = sum(map(len, experience.rollout.prompt_ids)) + sum(lengths)
    assert scored is None and len(set(lengths)) > 1 and total > 4 * 150  # several micro-batches
    shake(trainer)
    with torch.no_grad():
        critic_of(trainer).offset.add_(0.35)
    weights = {name: value.detach().clone() for name, value in trainer.engine.model.named_parameters()}
    expected, plain_gradients = plain_update(experience, tiny_model, weights)
    found, gradients = own_update(trainer, experience)
    assert found["clip_fraction"] > 0.05 and found["value_clip_fraction"] > 0.05
    for name, loss in expected.items():
        assert found[name] == pytest.approx(loss, rel=1e-5), name
    assert gradients.keys() == plain_gradients.keys()
    for half in ("policy", "critic"):
        names = [name for name in gradients if name.startswith(half)]
        own, plain = (
            torch.cat([each[name].flatten().double() for name in names])
            for each in (gradients, plain_gradients)
        )
        assert float((own - plain).norm() / plain.norm()) < 1e-5, half
