"""The pretraining mix: a language-model loss on other data beside the policy loss (PPO-ptx)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.chat_template import exchange_ids
from rlhf.data.schema import SftRow
from rlhf.losses.language import next_token_loss
from rlhf.ppo.config import PtxConfig
from rlhf.rl.rollout import Responses


class PretrainingMix:
    """Draws rows and computes their weighted loss (Ouyang et al. 2022, arXiv:2203.02155, eq. 2)."""

    def __init__(
        self,
        config: PtxConfig,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[SftRow],
        seed: int,
        context: int,
    ) -> None:
        """Rows are cut at `context` tokens, which is what the policy can read."""
        self._context = context
        self._config, self._tokenizer, self._rows = config, tokenizer, list(rows)
        self._random = random.Random(seed)

    def draw(self) -> Responses:
        """The next few rows; the same on every rank."""
        chosen = self._random.sample(self._rows, min(self._config.rows, len(self._rows)))
        encoded = [exchange_ids(self._tokenizer, row.prompt, row.completion) for row in chosen]
        return Responses(
            [torch.tensor(ids[:prompt]) for ids, prompt in encoded],
            [torch.tensor(ids[prompt : self._context]) for ids, prompt in encoded],
        )

    def loss(self, logp_N: Tensor, total_tokens: int) -> Tensor:
        """coef x negative log-likelihood of these answer tokens, in nats, / total_tokens."""
        mask_N = torch.ones_like(logp_N, dtype=torch.bool)
        return self._config.coef * next_token_loss(logp_N, mask_N, total_tokens=total_tokens)

    def state_dict(self) -> dict[str, Any]:
        """Which rows come next."""
        return {"random": self._random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the rows that come next."""
        version, numbers, gauss = state["random"]
        self._random.setstate((version, tuple(numbers), gauss))
