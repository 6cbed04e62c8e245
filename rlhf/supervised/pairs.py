"""Preference pairs as token ids: how the reward model learns and ranks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf.data.chat_template import exchange_ids
from rlhf.data.schema import PairRow
from rlhf.distributed.compute import Compute

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from rlhf.evaluation.reward_model import Ranking
    from rlhf.models.value_head import ScalarModel
    from rlhf.training.engine import Engine


class EncodedPair:
    """A preference pair as token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, row: PairRow) -> None:
        self.chosen, self.chosen_length = self._encode(tokenizer, row, row.chosen)
        self.rejected, self.rejected_length = self._encode(tokenizer, row, row.rejected)
        self.row = row
        self.longest = max(len(self.chosen), len(self.rejected))
        self.gold_gap = float("nan")
        if row.chosen_gold is not None and row.rejected_gold is not None:
            self.gold_gap = row.chosen_gold - row.rejected_gold

    def as_json(self) -> dict[str, Any]:
        """The pair as the user knows it."""
        return {"prompt": self.row.prompt, "chosen": self.row.chosen, "rejected": self.row.rejected}

    @staticmethod
    def _encode(tokenizer: PreTrainedTokenizerBase, row: PairRow, response: str) -> tuple[Tensor, int]:
        import torch

        ids, prompt_length = exchange_ids(tokenizer, row.prompt, response)
        return torch.tensor(ids), len(ids) - prompt_length


def pair_step(
    engine: Engine, batch: Sequence[EncodedPair], micro_batch_tokens: int, compute: Compute, *, center: float
) -> dict[str, float]:
    """One optimizer step. The Bradley-Terry loss is the mean over all pairs of the batch, over all ranks."""
    import torch

    from rlhf.losses.pairwise import bradley_terry_loss

    sums = torch.zeros(2, device=compute.device)  # loss, right rankings
    for indices, weight, last in compute.micro_batches(
        [2 * pair.longest for pair in batch], micro_batch_tokens
    ):
        pairs = [batch[index] for index in indices]
        score_2B = engine.model([*(p.chosen for p in pairs), *(p.rejected for p in pairs)])
        chosen_B, rejected_B = score_2B.chunk(2)
        loss = weight * bradley_terry_loss(chosen_B, rejected_B, total_pairs=len(batch), center=center)
        engine.backward(loss, last=last)
        sums += torch.stack([loss.detach(), weight * (chosen_B > rejected_B).sum() / len(batch)])
    engine.step()
    loss_sum, accuracy = compute.global_sum(sums).tolist()
    return {"loss": loss_sum, "train_accuracy": accuracy}


def rank_pairs(
    model: ScalarModel, pairs: Sequence[EncodedPair], micro_batch_tokens: int, compute: Compute
) -> Ranking:
    """Score both sides of every pair."""
    import torch

    from rlhf.evaluation.reward_model import Ranking

    rows = [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs)]
    chosen_B, rejected_B = model.score(rows, micro_batch_tokens, compute).chunk(2)
    return Ranking(
        chosen_B,
        rejected_B,
        torch.tensor([pair.chosen_length for pair in pairs]),
        torch.tensor([pair.rejected_length for pair in pairs]),
        torch.tensor([pair.gold_gap for pair in pairs]),
    )
