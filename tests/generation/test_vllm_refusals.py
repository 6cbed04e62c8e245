"""Which of vLLM's errors are about what the user chose, and which are not."""

from __future__ import annotations

import pytest
import torch

from rlhf.generation.vllm import is_refusal


@pytest.mark.parametrize(
    ("error", "can_be_mended"),
    [
        (ValueError("To serve at least one request, 1.5 GiB KV cache is needed, more than there is"), True),
        (NotImplementedError("no such layer"), True),
        (RuntimeError("Unsupported CPU attention configuration: head_dim=16"), True),
        (RuntimeError("FlashAttention with sinks is not supported on this device"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("Connection closed by peer [127.0.0.1]:3456"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_only_what_another_choice_mends_is_the_users(error: Exception, *, can_be_mended: bool) -> None:
    assert is_refusal(error) is can_be_mended
