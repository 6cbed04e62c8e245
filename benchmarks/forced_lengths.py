"""Answers of given lengths, from any sampler: the end token is the only choice where an answer has to end,
and no choice before.

Used by this project (run_rlhf.py) and by peers that sample with transformers' `generate`, so without `rlhf`.
Dimensions: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


def force(logits_BV: Tensor, left_B: Tensor, stop_id: int, never: Sequence[int]) -> Tensor:
    """The logits from which only answers of the wanted lengths are sampled.

    Args:
        left_B: remaining tokens of each answer, the next one included.
        never: tokens that may not occur within an answer; contains stop_id.
    """
    forced_BV = logits_BV.clone()
    forced_BV[:, list(never)] = -torch.inf
    due_B = left_B <= 1
    forced_BV[due_B] = -torch.inf
    forced_BV[due_B, stop_id] = 0.0
    return forced_BV


def check_lengths(found: Sequence[int], wanted: Sequence[int]) -> None:
    """End the run if the answers do not have the wanted lengths."""
    if list(found) != list(wanted):
        raise RuntimeError(f"forced lengths: answers of {list(found)} tokens, asked for {list(wanted)}")


class Forced(LogitsProcessor):
    """Logits processor for transformers."""

    def __init__(self, lengths: Sequence[int], stop_id: int, never: Sequence[int], prompt_width: int) -> None:
        self._ends_B = prompt_width + torch.tensor(lengths)
        self._stop_id, self._never = stop_id, never

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return force(scores, self._ends_B - input_ids.shape[1], self._stop_id, self._never)


def force_transformers(
    model: Any, batches: Sequence[Sequence[int]], stop_id: int, never: Sequence[int]
) -> None:
    """Patch the model: its n-th `generate` samples answers with the n-th batch's lengths, row by row."""
    generate: Callable[..., Any] = model.generate
    coming = iter(batches)

    def forced(*, input_ids: Tensor, **settings: Any) -> Any:
        lengths, width = next(coming), input_ids.shape[1]
        assert len(lengths) == len(input_ids), "an answer to each prompt"
        processors = LogitsProcessorList([Forced(lengths, stop_id, never, width)])
        found = generate(input_ids=input_ids, logits_processor=processors, **settings)
        rows = (found if isinstance(found, Tensor) else found.sequences)[:, width:].tolist()
        check_lengths([row.index(stop_id) + 1 if stop_id in row else len(row) for row in rows], lengths)
        return found

    model.generate = forced
