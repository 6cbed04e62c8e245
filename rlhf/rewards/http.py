"""A reward that another process serves: `http://HOST:PORT/PATH` or https.

The request is a POST of {"prompts": [...], "responses": [...], "columns": {NAME: [...], ...}} as JSON. The
columns are the others of the prompts' file, null where a row lacks one. The answer is {"scores": [...]}: one
number per response, or null for no score.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import TYPE_CHECKING
from urllib.error import HTTPError

from pydantic import NonNegativeInt, PositiveFloat

from rlhf.config import Strict
from rlhf.rewards.reward import Prompts, Reward, RewardError, as_scores, columns_of, last_messages
from rlhf.tracking.redaction import redacted

if TYPE_CHECKING:
    from torch import Tensor

PAUSE_SECONDS = 0.5
"""Seconds before the second try; doubled before each further one."""
MAY_PASS = (408, 425, 429)
"""Statuses below 500 that are tried again: too slow, too early, too many."""
LONGEST_SHOWN = 300
"""Characters of an answer that an error shows."""


class RewardServerConfig(Strict):
    """`reward_server.*`: how the run calls a reward at http://.... Values: conf/config.yaml."""

    timeout: PositiveFloat
    """Longest wait for the server's answer, in seconds, before the next attempt."""
    retries: NonNegativeInt
    """Number of further attempts if it does not answer, or answers with status 408, 425, 429, or 500 and
    above. Another status, such as 401, ends the run at once."""


def remote_reward(url: str, server: RewardServerConfig) -> Reward:
    """The reward of a server. A server that restarts gets a few seconds."""

    def score(prompts: Prompts, completions: Sequence[str]) -> Tensor:
        body = {
            "prompts": last_messages(prompts),
            "responses": list(completions),
            "columns": columns_of(prompts),
        }
        answer = ask(url, json.dumps(body).encode(), server)
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if (
            not isinstance(scores, list)
            or len(scores) != len(completions)
            or not all(value is None or isinstance(value, int | float) for value in scores)
        ):
            raise RewardError(
                f"{redacted(url)} answered {str(answer)[:LONGEST_SHOWN]!r} to {len(completions)} responses; "
                'it must answer {"scores": [one number for each]}.'
            )
        return as_scores([None if value is None else float(value) for value in scores], len(scores), url, "")

    return score


def ask(
    url: str, body: bytes, server: RewardServerConfig, headers: Mapping[str, str] | None = None
) -> object:
    """POST JSON, several times if need be; the JSON of the answer.

    Raises:
        RewardError: the server refuses, or does not answer.
    """
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **(headers or {})})
    for attempt in range(server.retries + 1):
        try:
            with urllib.request.urlopen(request, timeout=server.timeout) as response:
                return json.loads(response.read())
        except HTTPError as error:
            reason = f"status {error.code} {error.reason}, {_shown(error)}"
            if error.code < 500 and error.code not in MAY_PASS:
                raise RewardError(
                    f"{redacted(url)}: the reward server refuses: {reason}. Fix the URL or the server, and "
                    "run the same command again."
                ) from None
        # refused connections and timeouts are OSErrors; an answer cut short is an HTTPException
        except (OSError, ValueError, HTTPException) as error:
            reason = str(error)
        if attempt < server.retries:
            time.sleep(PAUSE_SECONDS * 2**attempt)
    raise RewardError(
        f"{redacted(url)}: the reward server does not answer, asked {server.retries + 1} times ({reason}). "
        f"Start it, or raise reward_server.timeout={server.timeout:g} or "
        f"reward_server.retries={server.retries}, and run the same command again."
    )


def _shown(error: HTTPError) -> str:
    """The body of an error answer. The connection may break while it is read."""
    try:
        body = error.read(4 * LONGEST_SHOWN).decode(errors="replace")
    except (OSError, HTTPException) as broken:
        return f"and an answer that broke off ({broken})"
    return f"{body[:LONGEST_SHOWN]!r}"
