"""What an adapter adds to a token's time is measured on the model that has it, and leaves that as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.jobs import TINY, on_cpu
from helpers.models import tiny_family
from rlhf.distributed.compute import Compute
from rlhf.generation.latency import token_seconds
from rlhf.models.load import load_causal_lm
from rlhf.models.peft.attach import attach, without_adapters
from rlhf.models.peft.config import PeftConfig

IDS = torch.arange(3, 35)[None]


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "adapter", "prefix", "prompt", "p_tuning"])
@torch.no_grad()
def test_without_its_adapters_a_model_is_its_base_for_a_while(method: str, tiny_model: Path) -> None:
    model = load_causal_lm(tiny_model, TINY, torch.float32)
    base = model(input_ids=IDS).logits
    attach(model, PeftConfig.model_validate({"method": method}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1)
    tuned = model(input_ids=IDS).logits
    assert (tuned - base).abs().max() > 1e-3
    with pytest.raises(KeyError), without_adapters(model):
        torch.testing.assert_close(model(input_ids=IDS).logits, base, atol=1e-6, rtol=1e-6)
        raise KeyError
    assert torch.equal(model(input_ids=IDS).logits, tuned)
    found = token_seconds(model, on_cpu())
    assert found.keys() == {"token_seconds", "token_seconds_base"}
    assert all(seconds > 0 for seconds in found.values())
    assert torch.equal(model(input_ids=IDS).logits, tuned)


def test_nothing_is_measured_where_nothing_was_added_or_weights_are_sharded(tiny_model: Path) -> None:
    model = load_causal_lm(tiny_model, TINY, torch.float32)
    attach(model, PeftConfig(method="freeze"))
    assert token_seconds(model, on_cpu()) == {}
    attach(model, PeftConfig(method="lora"))
    sharded = Compute("cpu", "float32", rank=0, world_size=1, zero="zero2")
    assert token_seconds(model, sharded) == {}


def test_nothing_is_measured_of_what_the_local_engine_does_not_decode() -> None:
    """It can be trained, for others to sample from."""
    model = tiny_family("minimax")
    attach(model, PeftConfig(method="lora"))
    assert token_seconds(model, on_cpu()) == {}
