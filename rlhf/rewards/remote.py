"""A reward that another process serves: `http://HOST:PORT/PATH` or https.

It is sent {"prompts": [...], "responses": [...]} as JSON by POST, and answers {"scores": [...]}: one
number for each response; null says that there is none.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException

import torch
from torch import Tensor

from rlhf.rewards.source import Exchange, Reward, RewardError
from rlhf.secrets import redacted

TRIES, TIMEOUT_SECONDS = 4, 60.0
PAUSE_SECONDS = 0.5
"""Before the second try; doubled before each further one."""


def remote_reward(url: str) -> Reward:
    """Ask the server for a batch's scores; a server that restarts is given a few seconds."""

    def score(exchanges: Sequence[Exchange]) -> Tensor:
        prompts = [exchange.prompt[-1]["content"] if exchange.prompt else "" for exchange in exchanges]
        body = {"prompts": prompts, "responses": [exchange.response for exchange in exchanges]}
        answer = _ask(url, json.dumps(body).encode())
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if (
            not isinstance(scores, list)
            or len(scores) != len(exchanges)
            or not all(value is None or isinstance(value, int | float) for value in scores)
        ):
            raise RewardError(
                f"{redacted(url)} answered {str(answer)[:200]!r} to {len(exchanges)} responses; it must "
                'answer {"scores": [one number for each]}.'
            )
        return torch.tensor([float("nan") if value is None else float(value) for value in scores])

    return score


def _ask(url: str, body: bytes) -> object:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    for attempt in range(TRIES):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                return json.loads(response.read())
        # HTTP errors, refused connections and timeouts are OSErrors; an answer cut short is an HTTPException
        except (OSError, ValueError, HTTPException) as error:
            if attempt == TRIES - 1:
                raise RewardError(
                    f"{redacted(url)}: the reward server does not answer, asked {TRIES} times ({error}). "
                    "Start it, and run the same command again."
                ) from None
            time.sleep(PAUSE_SECONDS * 2**attempt)
    raise AssertionError
