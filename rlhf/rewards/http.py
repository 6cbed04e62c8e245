"""A reward that another process serves: `http://HOST:PORT/PATH` or https.

The request is a POST of {"prompts": [...], "responses": [...], "columns": {NAME: [...], ...}} as JSON.
`columns` are the other columns of the prompts' file, null where a row lacks one. The answer is
{"scores": [...]}: one number per response, or null for no score.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import cache
from ssl import SSLContext, create_default_context
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import NonNegativeInt, PositiveFloat

from rlhf.config import Complaint, Strict
from rlhf.rewards.reward import Prompts, Reward, RewardError, as_scores, columns_of, last_messages
from rlhf.tracking.redaction import redacted

if TYPE_CHECKING:
    from torch import Tensor

PAUSE_SECONDS = 0.5
"""Seconds before the second try; doubled before each further one."""
SUCCESS_STATUSES = range(200, 300)
RETRIED_STATUSES = (408, 425, 429)
"""Statuses below 500 that are tried again: timeout, too early, too many requests."""
MAX_SHOWN_CHARACTERS = 300
"""Characters of an answer that an error message shows."""
MAX_ERROR_BYTES, MAX_ANSWER_BYTES = 4 * MAX_SHOWN_CHARACTERS, 16 << 20
"""Bytes read of an error's body, and of an answer. The latter holds about half a million scores."""
FIX_SERVER = "Fix the URL or the server, and run the same command again."


class RewardServerConfig(Strict):
    """`reward_server.*`: how the run calls rewards at URLs and judges. Values: conf/config.yaml."""

    timeout: PositiveFloat
    """Longest wait for the server's whole answer, in seconds, before the next attempt."""
    retries: NonNegativeInt
    """Number of further attempts if it does not answer, or answers with status 408, 425, 429, or 500 and
    above. Another status, such as 401, ends the run at once."""


def remote_reward(url: str, server: RewardServerConfig) -> Reward:
    """The reward of a server. Further attempts give a restarting server a few seconds."""

    def score(prompts: Prompts, completions: Sequence[str]) -> Tensor:
        body = {
            "prompts": last_messages(prompts),
            "responses": list(completions),
            "columns": columns_of(prompts),
        }
        answer = ask(url, json.dumps(body).encode(), server)
        scores = answer.get("scores") if isinstance(answer, dict) else None
        try:
            if not isinstance(scores, list) or len(scores) != len(completions):
                raise TypeError
            if any(isinstance(value, str) for value in scores):
                raise TypeError
            numbers = [None if value is None else float(value) for value in scores]
        except (OverflowError, TypeError):
            shown = repr(str(answer)[:MAX_SHOWN_CHARACTERS])
            raise RewardError(
                Complaint(
                    redacted(url),
                    f"it answered {shown} to {len(completions)} responses.",
                    'It must answer {"scores": [one number for each]}.',
                )
            ) from None
        return as_scores(numbers, len(numbers), url)

    return score


def ask(
    url: str,
    body: bytes,
    server: RewardServerConfig,
    headers: Mapping[str, str] | None = None,
    source: str | None = None,
) -> object:
    """POST JSON, with further attempts if needed, and return the JSON of the answer. Redirects are not
    followed: they would send the headers, with an API key, to another host.

    Args:
        source: the reward that error messages name; None for the URL.

    Raises:
        RewardError: the server refuses, or does not answer.
    """
    from anyio.from_thread import start_blocking_portal
    from httpx import HTTPError

    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **(headers or {})}
    is_answered, about = False, redacted(source or url)
    for attempt in range(server.retries + 1):
        try:
            with start_blocking_portal() as portal:  # its own event loop: the caller may run another
                status, answer = portal.call(_post, url, body, headers, server.timeout)
            if status in SUCCESS_STATUSES:
                return _json_of(answer)
            reason, is_answered = f"status {status}, {_first_line(answer)!r}", False
            if status < 500 and status not in RETRIED_STATUSES:
                raise RewardError(Complaint(about, f"the server refuses: {reason}.", FIX_SERVER))
        except TimeoutError:
            reason, is_answered = "timed out", False
        except (HTTPError, OSError, ValueError) as error:  # such as a truncated answer
            reason, is_answered = str(error), isinstance(error, NoJsonError)
        if attempt < server.retries:
            time.sleep(PAUSE_SECONDS * 2**attempt)
    if is_answered:
        why = f"what the server answers is no JSON, asked {server.retries + 1} times: {reason}."
        raise RewardError(Complaint(about, why, FIX_SERVER))
    raise RewardError(
        Complaint(
            about,
            f"the server does not answer, asked {server.retries + 1} times ({reason}).",
            f"Start it, or raise reward_server.timeout={server.timeout:g} or "
            f"reward_server.retries={server.retries}, and run the same command again.",
        )
    )


class ChatReply(NamedTuple):
    """A chat completion."""

    text: str
    tokens_in: int
    tokens_out: int
    is_cut: bool
    """Whether it ended at the length limit."""


def ask_chat(
    url: str,
    body: Mapping[str, Any],
    key_variable: str,
    server: RewardServerConfig,
    source: str,
    example: str,
) -> ChatReply:
    """Ask an OpenAI-compatible endpoint.

    Args:
        url: the endpoint, without `/chat/completions`.
        body: the request.
        key_variable: name of the environment variable with the API key, which may be unset.
        source: what error messages name.
        example: a right value of the source, for error messages.

    Raises:
        RewardError: the endpoint does not answer, or the answer has another format.
    """
    key = os.environ.get(key_variable)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    place = url.rstrip("/") + "/chat/completions"
    answer = ask(place, json.dumps(body).encode(), server, headers, source)
    try:
        choice = answer["choices"][0]  # type: ignore[index]  # checked by the except clause
        usage = answer.get("usage") or {}  # type: ignore[attr-defined]  # as above
        tokens_in, tokens_out = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
        text = str(choice["message"]["content"] or "")
        return ChatReply(text, tokens_in, tokens_out, choice.get("finish_reason") == "length")
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
        raise RewardError(
            Complaint(
                redacted(source),
                f"it answered {str(answer)[:MAX_SHOWN_CHARACTERS]!r}, which is no chat completion.",
                f"Give the URL of an OpenAI-compatible endpoint, such as {example}.",
            )
        ) from None


async def _post(url: str, body: bytes, headers: Mapping[str, str], timeout: float) -> tuple[int, bytes]:
    """Status and body of the answer; of an error, the beginning of the body.

    Raises:
        TimeoutError: the whole answer did not come within `timeout` seconds.
        ValueError: the answer is larger than `MAX_ANSWER_BYTES`.
    """
    from anyio import fail_after
    from httpx import AsyncClient

    with fail_after(timeout):
        async with (
            AsyncClient(timeout=None, verify=_certificates()) as client,
            client.stream("POST", url, content=body, headers=headers) as response,
        ):
            if response.has_redirect_location:
                place = redacted(response.headers["Location"])
                return response.status_code, f"to {place}: redirects are not followed".encode()
            answer = bytearray()
            async for chunk in response.aiter_bytes():
                answer += chunk
                if response.status_code not in SUCCESS_STATUSES and len(answer) >= MAX_ERROR_BYTES:
                    break
                if len(answer) > MAX_ANSWER_BYTES:
                    raise ValueError(f"its answer is larger than {MAX_ANSWER_BYTES >> 20} MiB")
            return response.status_code, bytes(answer)


@cache
def _certificates() -> SSLContext:
    """The system's certificates, which include a company's own. Cached, because loading them is slow."""
    return create_default_context()


class NoJsonError(ValueError):
    """An answer is not JSON."""


def _json_of(answer: bytes) -> object:
    try:
        return json.loads(answer)
    except ValueError as error:
        raise NoJsonError(f"{_first_line(answer)!r} ({error})") from None
    except RecursionError:
        raise NoJsonError("its JSON is nested too deeply") from None


def _first_line(answer: bytes) -> str:
    return next(iter(answer.decode(errors="replace").strip().splitlines()), "")[:MAX_SHOWN_CHARACTERS]
