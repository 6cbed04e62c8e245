"""Variable-length attention: the kernel of GPUs, and on a CPU what stands in its place, against fp32.

Dimensions: U tokens of all rows, A heads, G heads of keys and values, D size of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from helpers.gpu import Reaches, error
from helpers.models import small_of
from rlhf.distributed.device import has_gpu
from rlhf.models.base import ATTENTION
from rlhf.models.packed_attention import _has_kernel, attention, hidden_states
from rlhf.models.packed_batch import Packed
from rlhf.models.recompute import checkpoint_layers

pytestmark = pytest.mark.gpu
LENGTHS = {"cuda": (1, 700, 64, 257, 2048, 33), "cpu": (1, 70, 64, 33)}
WINDOW = 48
ROUNDING = 0.01
"""Relative to the norm; bf16 rounds each number by up to 0.004 of it."""


def row_by_row(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    """In fp32, [A, U, D] -> [U, A, D]: weights of all pairs, those ahead and beyond the window hidden."""
    outs, sharing = [], len(q) // len(k)
    k, v = (x.repeat_interleave(sharing, 0) for x in (k, v))
    for start, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        row = slice(start, end)
        scores = q[:, row] @ k[:, row].mT / q.shape[-1] ** 0.5
        back = torch.arange(end - start, device=q.device)[:, None] - torch.arange(
            end - start, device=q.device
        )
        hidden = (back < 0) | (back >= (window or end))
        outs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v[:, row])
    return torch.cat(outs, 1).transpose(0, 1)


def heads(device: torch.device, size: int, layout: str) -> list[Tensor]:
    """bf16 queries [8, U, size], keys and values [2, U, size]: contiguous, or views of one projection."""
    length, generator = sum(LENGTHS[device.type]), torch.Generator().manual_seed(size)
    joint = torch.randn(length, 12, size, generator=generator).to(device, torch.bfloat16)
    parts = joint.transpose(0, 1).split((8, 2, 2))
    return [part if layout == "strided" else part.contiguous() for part in parts]


def inference(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        return (attend(q, k, v),)


def with_gradients(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    asked = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*asked)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return (out.detach(), *torch.autograd.grad(out, asked, weights))


def checkpointed(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return with_gradients(lambda *x: checkpoint(attend, *x, use_reentrant=False), q, k, v)


@pytest.mark.parametrize("mode", [with_gradients, checkpointed, inference])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["causal", "window"])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_each_row_attends_to_itself_alone(
    size: int, window: int | None, layout: str, mode: Any, device: torch.device, reaches: Reaches
) -> None:
    lengths = LENGTHS[device.type]
    packed = Packed([torch.arange(length) + 10000 * row for row, length in enumerate(lengths)], device)
    q, k, v = heads(device, size, layout)
    assert _has_kernel(q) == (device.type == "cuda"), "this GPU is too old for the kernel"

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (q[None], k[None], v[None])
        return attention(nn.Module(), *rows, None, packed=packed, sliding_window=window)[0][0]

    found = mode(attend, q, k, v)
    wanted = mode(partial(row_by_row, lengths=lengths, window=window), q.float(), k.float(), v.float())
    reaches("error", max(error([x], [y]) for x, y in zip(found, wanted, strict=True)), at_most=ROUNDING)


@pytest.mark.skipif(not has_gpu(), reason="on CPUs torch's kernel knows grouped heads in fp32")
def test_grouped_heads_in_fp32_hold_no_attention_weights(device: torch.device, reaches: Reaches) -> None:
    """Of one row of 4096 tokens and 8 heads all weights would be 512 MiB."""
    length = 4096
    packed = Packed([torch.arange(length)], device)
    joint = torch.randn(12, length, 64, generator=torch.Generator().manual_seed(0)).to(device)
    q, k, v = (each[None].requires_grad_() for each in joint.split((8, 2, 2)))
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    attention(nn.Module(), q, k, v, None, packed=packed)[0].sum().backward()
    held = torch.cuda.max_memory_allocated(device) - before
    reaches("MiB beside the rows", held / 2**20, at_most=256)


KINDS: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"sliding_window": 4}, "gemma3_text": {"head_dim": 16, "sliding_window": 4},
    "granite": {}, "gpt2": {},
}  # fmt: skip


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_and_its_gradients_are_those_of_each_row_alone(
    kind: str, recomputes: bool, device: torch.device, reaches: Reaches
) -> None:
    """In fp32 on the CPU each row by itself; in bf16 on the device all together."""
    rows = [torch.randint(3, 100, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 19, 1, 16)]
    model = small_of(kind, KINDS[kind])
    assert model.config._attn_implementation == ATTENTION
    backbone = getattr(model, model.base_model_prefix)
    alone_TH = torch.cat([backbone(input_ids=row[None], use_cache=False)[0][0] for row in rows])
    weights_TH = functional.normalize(
        torch.randn(alone_TH.shape, generator=torch.Generator().manual_seed(2)), dim=0
    )
    (alone_TH * weights_TH).sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    nn.Module.to(model, device, torch.bfloat16)
    if recomputes:
        checkpoint_layers(model)
    found_TH = hidden_states(model, Packed(rows, device))
    (found_TH * weights_TH.to(found_TH)).sum().backward()
    reaches("states", error([found_TH], [alone_TH]), at_most=0.02)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    reaches("gradients", error(found.values(), wanted.values()), at_most=0.03)
