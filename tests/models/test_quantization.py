"""Weights held in 4 bits under a low-rank update, on a CPU where bitsandbytes is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.models import LINEARS, load, logits, train
from rlhf.models.peft.attach import attach, count_parameters
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.quantization import round_to_4_bits
from rlhf.models.peft.saved import attach_to_merge
from rlhf.training.trained import put_weights

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.slow, pytest.mark.qlora]
CONFIG = PeftConfig(method="qlora", rank=4, alpha=8)


def test_what_trained_on_4_bits_merges_into_the_same_weights_rounded(tiny_model: Path) -> None:
    model = load(tiny_model)
    plain = logits(model)
    torch.manual_seed(0)
    adapter = attach(model, CONFIG)
    held = [layer for layer in model.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
    assert len(held) == 2 * len(LINEARS)
    assert all(layer.weight.dtype == torch.uint8 for layer in held)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert count_parameters(model)[0] == 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    rounded = load(tiny_model)
    round_to_4_bits(rounded, LINEARS)
    assert 1e-3 < (logits(rounded) - plain).abs().max() < 0.5
    torch.testing.assert_close(logits(model), logits(rounded), atol=1e-4, rtol=1e-4)

    train(model)
    expected = logits(model)
    assert (expected - logits(rounded)).abs().max() > 1e-2
    with adapter.merged():  # there is nothing that it could be folded into
        assert torch.equal(logits(model), expected)
    merged = load(tiny_model)
    found = attach_to_merge(merged, CONFIG, lambda weight: weight)
    assert found.in_4_bits == LINEARS
    put_weights(
        merged, {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}
    )
    found.merge()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
