"""The pretraining mix: a language-model loss on other data, added to the policy loss (PPO-ptx)."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from rlhf.data.answers import Answers
from rlhf.distributed.compute import Compute
from rlhf.losses.language import next_token_loss
from rlhf.models.logprobs import pack_sequences
from rlhf.ppo.config import PtxConfig
from rlhf.training.engine import Engine


class PretrainingMix:
    """Draws rows and computes their weighted loss (Ouyang et al. 2022, arXiv:2203.02155, eq. 2)."""

    def __init__(self, config: PtxConfig, answers: Answers, seed: int) -> None:
        """`answers`: the rows to mix in, cut to the policy's context."""
        self._config, self._answers = config, answers
        self._random = random.Random(seed)

    def draw(self) -> Answers:
        """The rows of the next optimizer step; the same on every rank."""
        places = range(len(self._answers))
        return self._answers.pick(self._random.sample(places, min(self._config.rows, len(places))))

    def accumulate(self, engine: Engine, compute: Compute, micro_batch_tokens: int) -> None:
        """Add the gradients of the next rows, over all ranks."""
        drawn = self.draw()
        total_tokens, lengths = int(drawn.learned.sum()), drawn.lengths.tolist()
        for group, weight, _ in compute.micro_batches(lengths, micro_batch_tokens):
            rows = [drawn[index] for index in group]
            batch = pack_sequences([row.prompt for row in rows], [row.answer for row in rows], compute.device)
            engine.backward_part(weight * self.loss(engine.model("policy", batch, 1.0).logp_N, total_tokens))

    def loss(self, logp_N: Tensor, total_tokens: int) -> Tensor:
        """coef x negative log-likelihood of these answer tokens, in nats, / total_tokens."""
        mask_N = torch.ones_like(logp_N, dtype=torch.bool)
        return self._config.coef * next_token_loss(logp_N, mask_N, total_tokens=total_tokens)

    def state_dict(self) -> dict[str, Any]:
        """The state of the draw."""
        return {"random": self._random.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the draw."""
        version, numbers, gauss = state["random"]
        self._random.setstate((version, tuple(numbers), gauss))
