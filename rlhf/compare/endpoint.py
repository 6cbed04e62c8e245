"""A model behind an OpenAI-compatible endpoint, as a candidate: `http://HOST:PORT/v1#NAME`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pydantic import NonNegativeFloat, field_validator

from rlhf.config import Strict
from rlhf.data.schema import Message
from rlhf.rewards.http import RewardServerConfig, ask_chat
from rlhf.tracking.redaction import ENVIRONMENT_NAME


class EndpointConfig(Strict):
    """`endpoint.*`: how models behind an endpoint are asked."""

    key_variable: str
    """Name of the environment variable with the API key; it may be unset. The name must contain KEY, TOKEN or
    SECRET, so that the value is redacted wherever the run writes it."""
    price_in: NonNegativeFloat | None
    """Price of a million input tokens; null: unknown."""
    price_out: NonNegativeFloat | None
    """Price of a million output tokens; null: unknown."""

    @field_validator("key_variable")
    @classmethod
    def _is_redacted(cls, name: str) -> str:
        if not ENVIRONMENT_NAME.search(name):
            raise ValueError("use a name with KEY, TOKEN or SECRET")
        return name


class Reply(NamedTuple):
    """An endpoint's answer."""

    text: str
    stopped: bool
    """Whether it ended by itself, not at the length limit."""
    seconds: float
    cost: float | None
    """None if a price is unknown, or the endpoint does not count its tokens."""


class Endpoint(NamedTuple):
    """Where to ask, and how."""

    source: str
    """As the user wrote it."""
    config: EndpointConfig
    server: RewardServerConfig
    max_new_tokens: int
    temperature: float
    top_p: float

    def answers(self, prompts: Sequence[list[Message]], on_answer: Callable[[], None]) -> list[Reply]:
        """One reply per prompt, asked one at a time.

        Raises:
            RewardError: the endpoint does not answer, or the answer has another format.
        """
        replies = []
        for prompt in prompts:
            replies.append(self.answer(prompt))
            on_answer()
        return replies

    def answer(self, prompt: list[Message]) -> Reply:
        """The reply to one conversation."""
        url, _, model = self.source.partition("#")
        body = {
            "model": model, "messages": prompt, "max_tokens": self.max_new_tokens,
            "temperature": self.temperature, "top_p": self.top_p,
        }  # fmt: skip
        start = time.perf_counter()
        reply = ask_chat(
            url, body, self.config.key_variable, self.server, self.source, "http://localhost:8000/v1#NAME"
        )
        seconds = time.perf_counter() - start
        prices, cost = (self.config.price_in, self.config.price_out), None
        if prices[0] is not None and prices[1] is not None and reply.tokens_in:
            cost = (prices[0] * reply.tokens_in + prices[1] * reply.tokens_out) / 1e6
        return Reply(reply.text, not reply.is_cut, seconds, cost)
