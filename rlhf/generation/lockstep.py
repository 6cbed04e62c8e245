"""Forward passes of ranks that share a model's weights, each with its own rows and number of passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from rlhf.distributed.compute import Compute
from rlhf.models.peft.virtual_tokens import virtual_tokens

PASS, OVER = "pass", "over"
"""Messages of rank 0 to the ranks that answer its passes: before each pass, and at the end."""
Result = TypeVar("Result")


@contextmanager
def in_step(model: PreTrainedModel, compute: Compute) -> Iterator[None]:
    """While open, no rank calls the model alone. All ranks must make the same number of passes, because every
    layer is gathered by all ranks; otherwise they would deadlock.

    A rank announces each pass to the others. At the end it answers their passes with passes over one token,
    until all ranks are at the end. A rank without rows only answers.
    """

    def announce(*call: Any) -> None:
        compute.global_sum(torch.ones(1))

    virtual = virtual_tokens(model)
    with ExitStack() as stack:
        if virtual is not None:
            with torch.no_grad():
                stack.enter_context(virtual.computed_once(model))
        hook = model.register_forward_pre_hook(announce, prepend=True)
        try:
            yield
        finally:
            hook.remove()
        while float(compute.global_sum(torch.zeros(1))) > 0:
            _answer(model)


def on_main(model: PreTrainedModel, compute: Compute, work: Callable[[], Result]) -> Result:
    """`Compute.main_only` for work that calls a model whose weights the ranks share: the others answer rank
    0's passes.

    Raises:
        Exception: what rank 0's work raised.
    """
    outcome: list[Result | Exception] = []  # of rank 0
    if compute.is_main:
        with ExitStack() as hooks, ExitStack() as waiting:

            def call(*call: Any) -> None:
                waiting.close()
                compute.broadcast(PASS)

            def leave(*call: Any) -> None:
                waiting.enter_context(compute.others_waiting())

            hooks.callback(model.register_forward_pre_hook(call, prepend=True).remove)
            hooks.callback(model.register_forward_hook(leave).remove)
            leave()
            try:
                outcome.append(work())
            except Exception as error:  # raised below, on every rank
                outcome.append(error)
        compute.broadcast(OVER)
    else:
        while (message := compute.broadcast(None)) != OVER:
            if message == PASS:
                _answer(model)

    def result() -> Result:
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    return compute.main_only(result)


@torch.no_grad()
def _answer(model: PreTrainedModel) -> None:
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
