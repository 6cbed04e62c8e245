"""The pretraining mix: a language-model loss on SFT rows beside the policy loss (PPO-ptx)."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.chat import exchange_ids
from rlhf.data.schema import SftRow
from rlhf.losses.language import next_token_loss
from rlhf.models.policy import pad_sequences, response_statistics
from rlhf.ppo.config import PtxConfig


class PretrainingMix:
    """Draws SFT rows and computes their weighted loss (Ouyang et al. 2022, arXiv:2203.02155, eq. 2)."""

    def __init__(
        self, config: PtxConfig, tokenizer: PreTrainedTokenizerBase, rows: Sequence[SftRow], seed: int
    ) -> None:
        self._config, self._tokenizer, self._rows = config, tokenizer, list(rows)
        self._random = random.Random(seed)

    def loss(self, model: PreTrainedModel) -> Tensor:
        """coef x mean negative log-likelihood per answer token, in nats, of the next few rows."""
        chosen = self._random.sample(self._rows, min(self._config.rows, len(self._rows)))
        encoded = [exchange_ids(self._tokenizer, row.prompt, row.completion) for row in chosen]
        batch = pad_sequences(
            [torch.tensor(ids[:prompt]) for ids, prompt in encoded],
            [torch.tensor(ids[prompt:]) for ids, prompt in encoded],
            0,
            model.device,
        )
        logp_BR = batch.to_rows(response_statistics(model, batch, temperature=1.0).logp_N)
        total = int(batch.mask_BR.sum())
        return self._config.coef * next_token_loss(logp_BR, batch.mask_BR, total_tokens=total)
