"""A policy: a causal model with its tokenizer. It answers conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.chat_template import prompt_ids, response_text, special_ids, stop_ids
from rlhf.data.schema import Message
from rlhf.distributed.compute import Compute
from rlhf.generation.decoding_check import check_decoding
from rlhf.generation.lockstep import on_main
from rlhf.generation.sampler import generate
from rlhf.generation.vllm import Vllm
from rlhf.models.base import ModelConfig, load_tokenizer
from rlhf.models.load import context_left, load_causal_lm
from rlhf.models.logprobs import ResponseModel, answer_logprobs, check_policy
from rlhf.models.weight_sharing import Placement, load_frozen
from rlhf.rl.rollout import Responses, Rollout
from rlhf.training.engine import FULL_MODEL, Access

Result = TypeVar("Result")


class PolicyModel:
    """Samples answers, and computes their log-probabilities."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        compute: Compute,
        access: Access = FULL_MODEL,
        vllm: Vllm | None = None,
        local_sampling: Literal["whole", "layers"] = "whole",
    ) -> None:
        """Combine a model and its tokenizer.

        Args:
            access: how to run the model.
            vllm: the engine that samples; None for the local engine.
            local_sampling: how the local engine samples from sharded weights: `whole` gathers all weights for
                the rollout, `layers` gathers them layer by layer, with all ranks in step. See
                `Job.local_sampling`.
        """
        self._local_sampling = local_sampling
        self.model, self.tokenizer, self.compute, self.access = model, tokenizer, compute, access
        self.vllm = vllm
        eos = None if model.generation_config is None else model.generation_config.eos_token_id
        self.stop_ids = stop_ids(tokenizer, eos)
        self.special_ids = special_ids(tokenizer)
        assert isinstance(tokenizer.pad_token_id, int)
        self.pad_id: int = tokenizer.pad_token_id
        self._is_checked, self._is_ready = False, False

    @classmethod
    def load(
        cls,
        directory: Path,
        config: ModelConfig,
        compute: Compute,
        tokenizer: PreTrainedTokenizerBase | None = None,
        vllm: Vllm | None = None,
        *,
        placement: Placement | None = None,
        local_sampling: Literal["whole", "layers"] = "whole",
        check: bool = False,
    ) -> PolicyModel:
        """A published model, frozen.

        Args:
            tokenizer: needed for a base model; None for a published model, whose own tokenizer has the
                config's chat template.
            placement: None for that of the weights that train.
            check: whether to run `check_policy`.

        Raises:
            ConfigError: `check_policy` refuses the model.
        """
        model, access = load_frozen(
            lambda device: load_causal_lm(directory, config, compute.dtype, device, compute),
            compute,
            placement,
            (lambda model: compute.ask_once(lambda: check_policy(model))) if check else lambda model: None,
        )
        tokenizer = tokenizer or load_tokenizer(directory, config)
        return cls(model, tokenizer, compute, access, vllm, local_sampling=local_sampling)

    @property
    def context_length(self) -> int:
        """Largest number of tokens of prompt and response together, for the model and the sampling engine."""
        own = context_left(self.model)
        return own if self.vllm is None else min(own, self.vllm.max_model_len or own)

    def hand_over(self) -> None:
        """Copy the weights into vLLM, if it is the engine. `sample` calls this if needed."""
        if self.vllm is not None:
            self.vllm.hand_over(self.model, self.access.weights)

    @property
    def _in_step(self) -> bool:
        """Whether all ranks sample together, layer by layer."""
        return self.vllm is None and self.access.together is not None and self._local_sampling == "layers"

    @contextmanager
    def ready(self) -> Iterator[None]:
        """While open, the weights are ready for `sample`. So sharded weights are gathered once for many
        calls."""
        if self._is_ready or self.vllm is not None:
            yield
            return
        with self.access.reading() if self._in_step else self.access.alone():
            self._is_ready = True
            try:
                yield
            finally:
                self._is_ready = False

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Run `work`, which calls the model, on rank 0. Every rank gets its result, or its error.

        Raises:
            Exception: what rank 0's work raised.
        """
        if self.access.together is None:
            return self.compute.main_only(work)
        with self.access.together():
            return on_main(self.model, self.compute, work)

    def special_token_rate(self, rollout: Rollout) -> float:
        """Share of responses with a special token before their stop token. Rewards and readers do not see
        these tokens, because the text leaves them out."""
        inside = (
            ids[:-1] if stopped else ids
            for ids, stopped in zip(rollout.response_ids, rollout.stopped.tolist(), strict=True)
        )
        return sum(not self.special_ids.isdisjoint(ids.tolist()) for ids in inside) / len(rollout.stopped)

    def sample(
        self,
        prompts: Sequence[list[Message]],
        *,
        max_new_tokens: int,
        generator: torch.Generator,
        temperature: float = 1.0,
        batch_rows: int | None = None,
        top_p: float = 1.0,
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> tuple[Rollout, list[str]]:
        """Sample one response per prompt, as ids and as text. Ranks share the work, and each gets all
        responses.

        Args:
            generator: on the CPU, in the same state on every rank.
            batch_rows: rows decoded together on each rank; None for all. vLLM uses vllm.max_num_seqs instead.
            on_rows: called with the number of newly answered prompts, estimated as if all ranks were equally
                fast.

        Raises:
            ConfigError: the local engine cannot decode this model; raised before the first answer.
        """
        ids = [torch.tensor(prompt_ids(self.tokenizer, prompt)) for prompt in prompts]
        uniform_BR = torch.rand(len(ids), max_new_tokens, generator=generator)
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p,
            "stop_ids": self.stop_ids,
        }  # fmt: skip
        if self.vllm is None:
            rollout = self._sample_locally(ids, uniform_BR, batch_rows or len(ids), on_rows, settings)
        else:
            if not self.vllm.holds(self.model):
                self.hand_over()
            rollout = self.vllm.generate(ids, uniform_BR=uniform_BR, on_rows=on_rows, **settings)
        return rollout, [response_text(self.tokenizer, ids.tolist()) for ids in rollout.response_ids]

    def _sample_locally(
        self,
        ids: list[Tensor],
        uniform_BR: Tensor,
        batch_rows: int,
        on_rows: Callable[[int], None],
        settings: Mapping[str, Any],
    ) -> Rollout:
        """`sample` with the local engine. Each rank samples its share, then all responses are collected."""
        lengths = [len(row) for row in ids]
        mine = self.compute.shard_indices(lengths)
        together = self.compute if self._in_step else None
        with self.ready():
            if not self._is_checked:
                check_decoding(self.model, together=together)
                self._is_checked = True
            part = generate(
                self.model,
                [ids[index] for index in mine],
                pad_id=self.pad_id,
                batch_rows=batch_rows,
                together=together,
                on_token=lambda ids: self.compute.count_progress(),
                uniform_BR=uniform_BR[mine],
                on_rows=lambda rows: on_rows(rows * self.compute.world_size),
                **settings,
            )
        logps: Sequence[Tensor | None] = part.sampled_logp or [None] * len(mine)
        rows = list(zip(part.response_ids, part.stopped.tolist(), logps, strict=True))
        rows = self.compute.collect(rows, lengths)
        known = [row[2] for row in rows if row[2] is not None]
        return Rollout(
            ids,
            [row[0] for row in rows],
            torch.tensor([row[1] for row in rows]),
            known if len(known) == len(rows) else None,
        )

    def log_probabilities(self, responses: Responses, temperature: float, micro_batch_tokens: int) -> Tensor:
        """Log-probability of every response token, without gradient: nats, fp32 [B, R] on the CPU, 0 on
        padding."""
        with nullcontext() if self._is_ready else self.access.reading():
            model = ResponseModel(self.model)
            return answer_logprobs(model, responses, temperature, micro_batch_tokens, self.compute)
