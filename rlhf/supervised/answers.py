"""Examples of answers as token ids: how SFT reads, replays and learns them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from rlhf.data.chat_template import TurnsApartError, conversation_ids
from rlhf.data.schema import SftRow, each_turn
from rlhf.distributed.compute import Compute

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from rlhf.training.engine import Engine


class EncodedAnswer:
    """A training row as token ids. Its end is cut off if it is too long."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        row: SftRow,
        max_tokens: int,
        conversation: SftRow | None = None,
    ) -> None:
        """`conversation` is the row of the data that this row is a turn of.

        Raises:
            TurnsApartError: the chat template renders its turns differently together.
        """
        import torch

        ids, spans = conversation_ids(tokenizer, row.prompt, row.completion, row.turns)
        self.row, self.conversation, self.is_cut = row, conversation or row, len(ids) > max_tokens
        mask = torch.zeros(len(ids), dtype=torch.bool)
        for start, end in spans:
            mask[start:end] = True
        ids, begin = ids[:max_tokens], spans[0][0]
        self.prompt, self.answer = torch.tensor(ids[:begin]), torch.tensor(ids[begin:])
        self.mask = mask[begin:max_tokens]
        """Of the answer: true on what is learned, false on turns between."""
        self.learned = int(self.mask.sum())

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[SftRow], max_tokens: int, *, all_turns: bool
) -> list[EncodedAnswer]:
    """The rows whose first `max_tokens` tokens leave anything to learn.

    Args:
        all_turns: learn every assistant turn of a conversation, not only the last one. Where the chat
            template renders a turn in another way once later ones follow, each turn is its own sequence.
    """
    found = [
        each
        for row in rows
        for each in _sequences(tokenizer, row if all_turns else replace(row, turns=1), max_tokens)
    ]
    return [row for row in found if row.learned]


def _sequences(tokenizer: PreTrainedTokenizerBase, row: SftRow, max_tokens: int) -> Iterator[EncodedAnswer]:
    try:
        yield EncodedAnswer(tokenizer, row, max_tokens)
    except TurnsApartError:
        yield from (EncodedAnswer(tokenizer, turn, max_tokens, row) for turn in each_turn(row))


def num_conversations(rows: Iterable[EncodedAnswer]) -> int:
    """How many different rows of the data these sequences are made of."""
    return len({id(row.conversation) for row in rows})


def with_replay(
    batches: Sequence[Sequence[EncodedAnswer]], rows: Sequence[EncodedAnswer], fraction: float, seed: int
) -> list[Sequence[EncodedAnswer]]:
    """Append replayed rows to each batch, so that they are `fraction` of all tokens learned so far.

    The rows come in passes, and each pass shuffles them anew.
    """
    found: list[Sequence[EncodedAnswer]] = []
    replayed, wanted, drawn = 0, 0.0, _passes(rows, seed)
    for batch in batches:
        wanted += fraction / (1 - fraction) * sum(row.learned for row in batch)
        mixed = list(batch)
        while replayed < wanted:
            mixed.append(next(drawn))
            replayed += mixed[-1].learned
        found.append(mixed)
    return found


def _passes(rows: Sequence[EncodedAnswer], seed: int) -> Iterator[EncodedAnswer]:
    """All rows, then all again in another order, without end."""
    for number in count():
        yield from random.Random(f"replay {seed} {number}").sample(rows, len(rows))


def answer_step(
    engine: Engine, rows: Sequence[EncodedAnswer], micro_batch_tokens: int, compute: Compute
) -> dict[str, float]:
    """One optimizer step. The loss is the mean over all learned tokens of the batch, over all ranks."""
    import torch

    from rlhf.models.logprobs import pack_sequences

    total_tokens = sum(row.learned for row in rows)
    loss_sum = torch.zeros((), device=compute.device)
    for indices, weight, last in compute.micro_batches([len(row) for row in rows], micro_batch_tokens):
        batch = pack_sequences(
            [rows[index].prompt for index in indices],
            [rows[index].answer for index in indices],
            compute.device,
        )
        logp_N = engine.model(batch, temperature=1.0).logp_N
        learned_N = torch.cat([rows[index].mask for index in indices]).to(logp_N.device)
        loss = -weight * (logp_N * learned_N).sum() / total_tokens
        engine.backward(loss, last=last)
        loss_sum += loss.detach()
    engine.step()
    return {"loss": float(compute.global_sum(loss_sum)), "tokens": float(total_tokens)}


def answer_losses(
    engine: Engine, rows: Sequence[EncodedAnswer], micro_batch_tokens: int, compute: Compute
) -> Tensor:
    """Negative log-likelihood of each row's learned tokens, in nats, fp64 [B]."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from rlhf.models.logprobs import answer_logprobs
    from rlhf.rl.rollout import Responses

    answers = Responses([row.prompt for row in rows], [row.answer for row in rows])
    logp_BR = answer_logprobs(engine.model, answers, 1.0, micro_batch_tokens, compute)
    learned_BR = pad_sequence([row.mask for row in rows], batch_first=True)
    return -(logp_BR * learned_BR).sum(-1, dtype=torch.float64)
