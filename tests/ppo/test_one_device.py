"""Where tensors live, without a GPU: on torch's meta device, which computes shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.ppo import critic_of, ppo_job, ppo_stage, reward_model
from rlhf.models.logprobs import pack_sequences, response_statistics
from rlhf.ppo.trainer import PolicyTrainer
from rlhf.rewards.model import LearnedReward

pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")

META = torch.device("meta")
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
"""Places may be the host's."""


class OneDevice(TorchDispatchMode):
    """An operation on tensors of several devices is an error, as it is on CUDA. Meta's own lets many pass."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {each.device.type for each in tensors if each.dim() > 0}
        if func in INDEXING and args[0].device == META:
            devices.discard("cpu")
        assert func in MOVES or len(devices) <= 1, f"{func} of {devices}"
        return func(*args, **(kwargs or {}))


def learner_on_meta(tmp_path: Path, sft: Path, *overrides: str) -> PolicyTrainer:
    job = ppo_job(tmp_path / "ppo", sft)
    job = replace(job, compute=replace(job.compute, device_name="meta"))
    return ppo_stage(*overrides).trainer(job)


@pytest.mark.parametrize("peft", ["none", "lora", "adapter", "ia3"])
@pytest.mark.parametrize("init", ["reward", "sft"])
def test_all_weights_and_all_they_meet_are_on_the_device(
    peft: str, init: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for check in ("models.packed_attention._leaks", "pipeline.trainable.check_policy"):
        monkeypatch.setattr(f"rlhf.{check}", lambda *_: False)  # of numbers, of which there are none
    reward = reward_model(tmp_path / "reward", tiny_model, "lora")
    trainer = learner_on_meta(
        tmp_path,
        tiny_model,
        f"ppo.peft={peft}",
        f"ppo.reward=model:{reward}",
        f"ppo.critic.init={init}",
        "ppo.gates.first_kl=null",
    )
    assert isinstance(trainer.reward, LearnedReward)
    policy, critic = trainer.policy.model, critic_of(trainer)
    modules: list[nn.Module] = [policy, critic, trainer.reference.model, trainer.reward.model]
    for module in modules:
        elsewhere = [name for name, weight in module.named_parameters() if weight.device != META]
        assert [name for name in elsewhere if ".lora_" not in name] == []
        module.to(META)  # where the first adapter is on it peft leaves the second one alone
    rows = [torch.arange(3, 3 + length) for length in (5, 9)]
    with OneDevice():  # type: ignore[no-untyped-call]  # torch's
        batch = pack_sequences(rows, rows, META)
        for model in (policy, trainer.reference.model):
            logp_N, entropy_N = response_statistics(model, batch, 0.7)
            assert logp_N.shape == entropy_N.shape == (14,)
        response_statistics(policy, batch, 0.7).logp_N.sum().backward()
        critic.values(batch).sum().backward()
        with trainer.reward.access.alone():
            assert trainer.reward.model.last_values(rows).shape == (2,)
