"""Activation checkpointing changes what is kept for the gradients, never the gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from helpers.jobs import TINY
from rlhf.config import ConfigError
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import ResponseModel, pack_sequences
from rlhf.models.packed_attention import pack_where_possible
from rlhf.models.peft.attach import attach
from rlhf.models.peft.config import PeftConfig
from rlhf.models.recompute import checkpoint_layers
from rlhf.models.value_head import ActorCritic, ScalarModel, load_scalar_model, reset_head

CPU = torch.device("cpu")
generator = torch.Generator().manual_seed(0)
PROMPTS, RESPONSES = (
    [torch.randint(3, 100, (length,), generator=generator) for length in lengths]
    for lengths in ((30, 9, 70, 12), (50, 80, 20, 65))
)


def policy(directory: Path, peft: Any) -> PreTrainedModel:
    model = load_causal_lm(directory, TINY, torch.float32)
    attach(model, PeftConfig(method=peft))
    return model


def sft(directory: Path, peft: Any) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    batch = pack_sequences(PROMPTS, RESPONSES, CPU)
    return ResponseModel(policy(directory, peft)), lambda model: -model(batch, 1.0).logp_N.sum()


def reward(directory: Path, peft: Any) -> tuple[ScalarModel, Callable[[nn.Module], Tensor]]:
    model = load_scalar_model(directory, TINY, torch.float32, new_head=True)
    reset_head(model, deviation=1.0)
    attach(model.model, PeftConfig(method=peft))
    model.head.requires_grad_(True)
    return model, lambda model: model([*PROMPTS, *RESPONSES]).square().sum()


def ppo(directory: Path, peft: Any) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    batch, (critic, _) = pack_sequences(PROMPTS, RESPONSES, CPU), reward(directory, peft)

    def loss(model: nn.Module) -> Tensor:
        found: Tensor = -model("policy", batch, 0.7).logp_N.sum() + model("critic", batch).square().sum()
        return found

    return ActorCritic(policy(directory, peft), critic), loss


def train(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> tuple[float, dict[str, Tensor], int]:
    """The loss, the gradients, and the bytes that were kept for them beside the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(model)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    value.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(value.detach()), gradients, size


@pytest.mark.parametrize("peft", ["none", "lora"])
@pytest.mark.parametrize("stage", [sft, reward, ppo])
def test_loss_and_gradients_are_the_same_and_less_is_kept(
    tiny_model: Path, stage: Callable[[Path, str], tuple[nn.Module, Callable[[nn.Module], Tensor]]], peft: str
) -> None:
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model, loss = stage(tiny_model, peft)
        with torch.no_grad():  # LoRA starts with zeros, which would hide half of it
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        if checkpointed:
            checkpoint_layers(model)
        found.append(train(model, loss))
    (plain_loss, plain_gradients, plain_size), (found_loss, gradients, size) = found
    assert found_loss == plain_loss
    assert gradients.keys() == plain_gradients.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        assert torch.equal(gradient, plain_gradients[name]), name
    assert any(gradient.any() for gradient in gradients.values())
    assert size < 0.3 * plain_size


def test_dropout_stays_off(tiny_model: Path) -> None:
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=100)
    assert config.resid_pdrop > 0.0
    batch = pack_sequences(PROMPTS, RESPONSES, CPU)
    model = AutoModelForCausalLM.from_config(config).eval()
    pack_where_possible(model)
    model = ResponseModel(model)
    plain = train(model, lambda model: model(batch, 1.0).logp_N.sum())[:2]
    model.zero_grad()
    checkpoint_layers(model)
    loss, gradients = train(model, lambda model: model(batch, 1.0).logp_N.sum())[:2]
    assert loss == plain[0]
    for name, gradient in gradients.items():
        assert torch.equal(gradient, plain[1][name]), name


def test_a_model_without_known_layers_is_refused() -> None:
    words = (
        r"^\{stage\}\.activation_checkpointing=true: Linear has no layers that transformers can checkpoint\. "
        r"Use \{stage\}\.activation_checkpointing=false and a smaller \{stage\}\.micro_batch_tokens\.$"
    )
    with pytest.raises(ConfigError, match=words):
        checkpoint_layers(nn.Linear(2, 2))
