"""A policy's chat session: its conversation and its streamed answers. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor

from rlhf.cli.run_files import RunFiles
from rlhf.config import ConfigError
from rlhf.data.chat_template import prompt_ids, response_text
from rlhf.data.schema import Message
from rlhf.distributed.compute import Compute, make_compute
from rlhf.generation.decoding_check import check_decoding
from rlhf.generation.policy_model import PolicyModel
from rlhf.generation.sampler import generate
from rlhf.models.base import ModelConfig, base_files, base_identity, fetch_weights
from rlhf.pipeline.store import Store
from rlhf.pipeline.stored_base import stored_base

if TYPE_CHECKING:
    from rlhf.cli.chat import SamplingParams

FinishReason = Literal["ended", "cut", "stopped"]
"""Why an answer ended: its stop token, the limit of its length, or Ctrl-C."""


@dataclass
class Stream:
    """Streams the text of an answer, token by token."""

    decode: Callable[[Sequence[int]], str]
    show: Callable[[str], None]
    ids: list[int] = field(default_factory=list)
    shown: str = ""

    def add(self, ids: Tensor) -> None:
        """Show the text that the new tokens add. One character may need several tokens."""
        self.ids += ids.tolist()
        text = self.decode(self.ids)
        if not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> None:
        """Show the rest: an incomplete character."""
        self._show(self.decode(self.ids))

    def _show(self, text: str) -> None:
        self.show(text[len(self.shown) :])
        self.shown = text


class ChatSession:
    """A policy and its conversation with the user."""

    def __init__(self, name: str, policy: PolicyModel, params: SamplingParams) -> None:
        self.name, self._policy, self._params = name, policy, params
        self._generator = torch.Generator().manual_seed(params.seed)
        self.turns: list[Message] = []
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        system = self._params.system
        self.turns = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str, show: Callable[[str], None]) -> FinishReason:
        """Answer a message of the user, and add both to the conversation.

        Args:
            show: gets the text, piece by piece.

        Raises:
            ConfigError: the template refuses the conversation, or the context is full. The conversation stays
                as it was.
        """
        policy, params = self._policy, self._params
        turns: list[Message] = [*self.turns, {"role": "user", "content": text}]
        try:
            ids = prompt_ids(policy.tokenizer, turns)
        except TemplateError as error:
            raise ConfigError(f"{self.name}: its chat template refuses this ({error}).") from None
        context_budget = policy.context_length - len(ids)
        if context_budget < 1:
            raise ConfigError(
                f"{self.name}: the conversation has {len(ids)} tokens, and the model reads "
                f"{policy.context_length}. /reset forgets it."
            )
        stream = Stream(partial(_text, policy), show)
        uniform_BR = torch.rand(
            1, limit := min(context_budget, params.max_new_tokens), generator=self._generator
        )
        finish_reason: FinishReason = "stopped"
        with suppress(KeyboardInterrupt):
            rollout = generate(
                policy.model, [torch.tensor(ids)], max_new_tokens=limit, temperature=params.temperature,
                top_p=params.top_p, stop_ids=policy.stop_ids, pad_id=policy.pad_id, uniform_BR=uniform_BR,
                batch_rows=1, on_token=stream.add,
            )  # fmt: skip
            finish_reason = "ended" if bool(rollout.stopped[0]) else "cut"
        stream.end()
        answer = response_text(policy.tokenizer, stream.ids)
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        return finish_reason


def _text(policy: PolicyModel, ids: Sequence[int]) -> str:
    return str(policy.tokenizer.decode(list(ids), skip_special_tokens=True)).lstrip()


def load_sessions(names: Sequence[str], run: RunFiles | None, params: SamplingParams) -> list[ChatSession]:
    """A session for each policy: `base`, a stage of the run, or a directory.

    Raises:
        ConfigError: there is no such policy, or it cannot be loaded.
    """
    compute, _ = make_compute(params.device, params.precision)
    sessions = []
    for name in names:
        policy = load_policy(name, run, compute)
        check_decoding(policy.model)
        sessions.append(ChatSession(name, policy, params))
    return sessions


def load_policy(name: str, run: RunFiles | None, compute: Compute) -> PolicyModel:
    """Load a policy: a stage of the run, `base`, or a model's directory.

    Raises:
        ConfigError: it cannot be loaded.
    """
    if run is not None and name in run.policies:
        settings = ModelConfig.model_validate(run.config["model"])
        return PolicyModel.load(run.artifact(name).path, settings, compute, check=True)
    if run is not None and name == "base":
        settings = ModelConfig.model_validate(run.config["model"])
        store = Store(run.store_dir)
        fetch_weights(settings)
        base = base_files(
            settings,
            base_identity(settings, memory=store.digest_cache),
            lambda content, write: stored_base(store, content, write, lambda line: None).path,
        )
        return PolicyModel.load(base.directory, settings, compute, base.load_tokenizer(), check=True)
    directory = Path(name)
    return PolicyModel.load(directory, ModelConfig(kind="local", path=name), compute, check=True)
