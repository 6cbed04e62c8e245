"""A policy: a causal model with its tokenizer, that answers conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.chat import prompt_ids, response_text, stop_ids
from rlhf.data.schema import Message
from rlhf.distributed import Compute
from rlhf.generation.local import generate
from rlhf.models.load import ModelConfig, load_causal_lm, load_tokenizer
from rlhf.models.policy import response_statistics, rollout_rows
from rlhf.rl.rollout import Rollout


class Policy:
    """What samples answers, and says how likely they were."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        compute: Compute,
        whole: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`whole` opens a context in which this rank can run the model by itself (sharded weights)."""
        self.model, self.tokenizer, self.compute, self._whole = model, tokenizer, compute, whole
        eos = None if model.generation_config is None else model.generation_config.eos_token_id
        self.stop_ids = stop_ids(tokenizer, eos)
        assert isinstance(tokenizer.pad_token_id, int)
        self.pad_id: int = tokenizer.pad_token_id

    @classmethod
    def load(
        cls,
        directory: Path,
        config: ModelConfig,
        compute: Compute,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Policy:
        """A published model, frozen. A base model's tokenizer is given: only published ones carry the
        chat template that the config asks for."""
        model = load_causal_lm(directory, config, compute.dtype, compute.device)
        model.requires_grad_(False)
        return cls(model, tokenizer or load_tokenizer(directory, config), compute)

    def sample(
        self,
        prompts: Sequence[list[Message]],
        *,
        max_new_tokens: int,
        temperature: float,
        generator: torch.Generator,
        batch_rows: int,
        top_p: float = 1.0,
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> tuple[Rollout, list[str]]:
        """One response a prompt, as ids and as text. Ranks share the work, and each gets all responses.

        Args:
            generator: on the CPU, in the same state on every rank.
            batch_rows: rows decoded together, on each rank.
            on_rows: told how many more prompts are answered, over all ranks if they are equally fast.
        """
        ids = [torch.tensor(prompt_ids(self.tokenizer, prompt)) for prompt in prompts]
        uniform_BR = torch.rand(len(ids), max_new_tokens, generator=generator)
        lengths = [len(row) for row in ids]
        mine = self.compute.share(lengths)
        with self._whole():
            part = generate(
                self.model,
                [ids[index] for index in mine],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                stop_ids=self.stop_ids,
                pad_id=self.pad_id,
                uniform_BR=uniform_BR[mine],
                batch_rows=batch_rows,
                on_rows=lambda rows: on_rows(rows * self.compute.world_size),
            )
        assert part.sampled_logp is not None
        rows = list(zip(part.response_ids, part.stopped.tolist(), part.sampled_logp, strict=True))
        rows = self.compute.collect(rows, lengths)
        rollout = Rollout(
            ids, [row[0] for row in rows], torch.tensor([row[1] for row in rows]), [row[2] for row in rows]
        )
        return rollout, [response_text(self.tokenizer, ids.tolist()) for ids in rollout.response_ids]

    def log_probabilities(self, rollout: Rollout, temperature: float, micro_batch_tokens: int) -> Tensor:
        """Nats, fp32 [B, R] on the CPU, 0 on padding; without gradient."""
        with self._whole():
            rows = rollout_rows(
                rollout,
                micro_batch_tokens,
                self.compute,
                lambda batch: (response_statistics(self.model, batch, temperature).logp_N,),
            )
        return rows[0]
