"""Rotary positions that depend on the longest row of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Phi3Config

from helpers.models import scale, small_of
from rlhf.config import ConfigError
from rlhf.generation.sampler import generate
from rlhf.models import packed_attention
from rlhf.models.base import context_length
from rlhf.models.logprobs import pack_sequences, response_statistics


def test_long_rope_is_read_up_to_where_its_frequencies_change() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    phi = Phi3Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
        original_max_position_embeddings=64, rope_parameters={**rope, "rope_theta": 10000.0},
    )  # fmt: skip
    assert context_length(phi) == 64
    assert context_length(Phi3Config(max_position_embeddings=256)) == 256


LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "positions", "rope"),
    [
        ("phi3", 256, LONG),
        ("llama", 64, DYNAMIC),
        ("gemma3_text", 256, {"full_attention": LONG, "sliding_attention": {"rope_type": "default"}}),
    ],
)
def test_a_row_is_refused_that_would_change_the_positions_of_others(
    kind: str, positions: int, rope: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, dict[str, Any]] = {
        "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
        "phi3": {"original_max_position_embeddings": 64},
    }
    shape = {
        "max_position_embeddings": positions,
        "rope_parameters": rope,
        "head_dim": 16,
        **options.get(kind, {}),
    }
    model = small_of(kind, shape)
    scale(model, 6.0)
    rows = [torch.arange(3, 3 + length) for length in (20, 64, 66)]

    def said(*numbers: int) -> Tensor:
        """Of the first row, beside others."""
        some = [rows[number] for number in numbers]
        batch = pack_sequences([row[:3] for row in some], [row[3:] for row in some], torch.device("cpu"))
        return response_statistics(model, batch, 1.0).logp_N[:17]

    def sample(number: int) -> None:
        generate(
            model, [rows[number][:-4]], max_new_tokens=4, temperature=0.0, stop_ids=[], pad_id=0,
            uniform_BR=torch.zeros(1, 4), batch_rows=1,
        )  # fmt: skip

    assert context_length(model.config) == 64
    torch.testing.assert_close(said(0, 1), said(0))
    sample(1)
    for crosses in (lambda: said(0, 2), lambda: sample(2)):
        with pytest.raises(
            ConfigError, match=r"a row of 6[56] tokens. Its rope_type=(dynamic|longrope) changes"
        ):
            crosses()
    monkeypatch.setattr(packed_attention, "check_rows", lambda config, longest: None)
    assert float((said(0, 2) - said(0)).abs().max()) > 1e-3  # why
