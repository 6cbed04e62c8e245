"""SFT's optimizer step, replay, and measurements of its data."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from rlhf.data.answers import Answers, EncodedAnswer
from rlhf.data.schema import SftRow, text_of
from rlhf.distributed.batching import Batches
from rlhf.distributed.compute import Compute

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf.evaluation.sampled import Sampled
    from rlhf.models.logprobs import Sequences
    from rlhf.training.engine import Engine

SENTENCE_ENDS = ".!?:;…。)]}>\"'”`*\uff01\uff1f"
"""Characters that a complete answer may end with."""
MIN_CUT_LENGTH = 16
"""Fewest characters of cut-off answers: shorter ones may have the same length by chance."""
MAX_PROBED_ANSWERS = 256
"""Largest number of held-out answers that `prompt_gain` reads."""


def with_replay(
    batches: Sequence[Sequence[int]], task: Answers, general: Answers, fraction: float, seed: int
) -> Batches[int]:
    """Append replayed answers to each batch, so that they are `fraction` of all tokens learned so far.

    They are replayed in passes over the general data, each newly shuffled.

    Args:
        batches: indices of `task`.

    Returns:
        Indices of `Answers.joined(task, general)`.
    """
    order, ends = array("i"), array("q")
    replayed, wanted, drawn = 0, 0.0, _passes(len(general), seed)
    for batch in batches:
        wanted += fraction / (1 - fraction) * int(task.learned[batch].sum())
        order.extend(batch)
        while replayed < wanted:
            index = next(drawn)
            order.append(len(task) + index)
            replayed += int(general.learned[index])
        ends.append(len(order))
    return Batches(range(len(task) + len(general)), order, ends)


def _passes(num_rows: int, seed: int) -> Iterator[int]:
    """Endless passes over all indices, each in a new random order."""
    for number in count():
        yield from random.Random(f"replay {seed} {number}").sample(range(num_rows), num_rows)


def answer_step(
    engine: Engine, answers: Answers, micro_batch_tokens: int, compute: Compute
) -> dict[str, float]:
    """One optimizer step. The loss is the mean over all learned tokens of the batch, over all ranks."""
    import torch

    total_tokens = int(answers.learned.sum())

    def loss(rows: list[EncodedAnswer]) -> tuple[Tensor, dict[str, Tensor]]:
        logp_N = engine.model(packed(rows, compute), temperature=1.0).logp_N
        learned_N = torch.cat([row.mask for row in rows]).to(logp_N.device)
        mean = -(logp_N * learned_N).sum() / total_tokens
        return mean, {"loss": mean}

    metrics = engine.learn(
        answers.lengths.tolist(), lambda indices: [answers[index] for index in indices], loss,
        micro_batch_tokens,
    )  # fmt: skip
    return {**metrics, "tokens": float(total_tokens)}


def answer_losses(
    engine: Engine, answers: Answers | list[EncodedAnswer], micro_batch_tokens: int, compute: Compute
) -> Tensor:
    """Negative log-likelihood of each answer's learned tokens, in nats, fp64 [B] on the CPU. Each rank
    computes its share, and all ranks get all results."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    lengths = answers.lengths.tolist() if isinstance(answers, Answers) else [len(row) for row in answers]
    loss_B = torch.zeros(len(answers), dtype=torch.float64)
    with torch.no_grad():
        for indices, weight, _ in compute.micro_batches(lengths, micro_batch_tokens):
            rows = [answers[index] for index in indices]
            batch = packed(rows, compute)
            logp_BR = batch.to_rows(engine.model(batch, temperature=1.0).logp_N.float()).cpu()
            learned_BR = pad_sequence([row.mask for row in rows], batch_first=True)
            if weight:
                loss_B[indices] = -(logp_BR * learned_BR).sum(-1, dtype=torch.float64)
    return compute.global_sum(loss_B)


def prompt_gain(
    engine: Engine,
    answers: Answers,
    loss_B: Tensor,
    max_tokens: int,
    micro_batch_tokens: int,
    compute: Compute,
) -> Sampled:
    """How much an answer's own prompt lowers its loss, in nats per learned token, compared with the prompt of
    another row. About 0 if answers do not depend on their prompts. Has no rows if no two prompts differ.

    Source: after V-information, Ethayarajh et al. 2022 (arXiv:2110.08420), where the other prompt is empty.

    Args:
        loss_B: the losses of `answers` behind their own prompts, from `answer_losses`.
        max_tokens: longer exchanges are left out.
    """
    import torch

    from rlhf.evaluation.intervals import ratio

    probed = [answers[index] for index in range(min(len(answers), MAX_PROBED_ANSWERS))]
    indices, swapped = [], []
    for index, row in enumerate(probed):
        others = (probed[(index + step) % len(probed)].prompt for step in range(1, len(probed)))
        fitting = (
            prompt for prompt in others
            if len(prompt) + len(row.answer) <= max_tokens and not torch.equal(prompt, row.prompt)
        )  # fmt: skip
        prompt = next(fitting, None)
        if prompt is not None:
            indices.append(index)
            swapped.append(replace(row, prompt=prompt))
    swapped_B = answer_losses(engine, swapped, micro_batch_tokens, compute) if swapped else torch.zeros(0)
    return ratio(swapped_B - loss_B[indices], torch.tensor([row.learned for row in swapped]))


def cut_share(rows: Iterable[SftRow]) -> Sampled:
    """Share of the distinct answers that were cut off in the data, for example by a database column of
    limited width. These have as many characters as the longest answer, and end within a sentence. One of them
    is not counted, as it may be complete. 0 if the longest has fewer than `MIN_CUT_LENGTH` characters."""
    import torch

    from rlhf.evaluation.intervals import share

    texts = {text_of(row.completion) for row in rows}
    longest = max(map(len, texts), default=0)
    cut = [len(text) == longest >= MIN_CUT_LENGTH and text[-1] not in SENTENCE_ENDS for text in texts]
    if any(cut):
        cut.remove(True)
        cut.append(False)
    return share(torch.tensor(cut, dtype=torch.float64))


def packed(rows: Sequence[EncodedAnswer], compute: Compute) -> Sequences:
    """The prompts with their answers as one packed batch."""
    from rlhf.models.logprobs import pack_sequences

    return pack_sequences([row.prompt for row in rows], [row.answer for row in rows], compute.device)
