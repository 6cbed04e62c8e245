"""The kinds of rewards, in one table: how each is written, checked, digested and made."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

from rlhf.config import ConfigError
from rlhf.digests import DirectoryDigest, digest_of, directory_digest
from rlhf.rewards.code import imported_code
from rlhf.rewards.function import function_reward
from rlhf.rewards.http import RewardServerConfig, remote_reward
from rlhf.rewards.reward import Reward, vader_reward
from rlhf.tracking.redaction import USER_INFO, redacted, without_environment


@dataclass(frozen=True)
class RewardKind:
    """What the word before a `RewardSource`'s colon stands for."""

    form: str
    """How it is written, such as `model:DIRECTORY`."""
    check: Callable[[str], bool]
    """Whether a source is written correctly. It may raise ValueError with a better message."""
    digest: Callable[[str, DirectoryDigest], dict[str, str]]
    """Digests of what decides a source's scores: see `reward_digest`."""
    make: Callable[[str, RewardServerConfig], Reward] | None = None
    """Makes the rule that a source names; None if a model scores."""
    directory: Callable[[str, Path | None], Path] | None = None
    """The directory of the model that scores: of a source, or the reward stage's; None for a rule."""

    @property
    def has_model(self) -> bool:
        """Whether a model scores. A critic can start from it."""
        return self.directory is not None


def reward_kind(source: str) -> RewardKind:
    """The kind of a checked source."""
    return REWARD_KINDS[source.partition(":")[0]]


def _checked(source: str) -> str:
    kind = REWARD_KINDS.get(source.partition(":")[0])
    if kind is None or not kind.check(source):
        *forms, last = dict.fromkeys(each.form for each in REWARD_KINDS.values())
        raise ValueError(f"use {', '.join(forms)} or {last}")
    return source


RewardSource = Annotated[str, AfterValidator(_checked)]
"""`learned` (the reward stage's model), `vader`, `model:DIRECTORY` (a sequence-classification model with one
label and a linear `score` head (Llama, Mistral, Qwen, Gemma, GPT-2, ...), its own tokenizer and template),
`python:MODULE:FUNCTION`, or the URL of a server (rlhf/rewards/http.py)."""


def reward_digest(source: str, digest: DirectoryDigest = directory_digest) -> dict[str, str]:
    """Digests of what decides the scores, except the reward stage's model. They are in the key of what it
    scored: a directory's content, a function's imported code, a scorer's version, a server's URL.

    Args:
        digest: as of `Stage.external_digests`.

    Raises:
        ConfigError: there is no such model, it has no head that scores, or the function cannot be imported.
    """
    return reward_kind(source).digest(source, digest)


def _digest_of_model(source: str, digest: DirectoryDigest) -> dict[str, str]:
    from rlhf.models.value_head import check_score_head

    directory = _named_directory(source)
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{source}: no config.json there. Give a one-label classification model.")
    check_score_head(directory)
    return {source: digest(directory)}


def _digest_of_function(source: str, digest: DirectoryDigest) -> dict[str, str]:
    function_reward(source)
    return imported_code(source)


def _digest_of_url(source: str, digest: DirectoryDigest) -> dict[str, str]:
    # whole, but for what the environment calls a secret: ?key=A and ?key=B may be two rewards, and both
    # are written down as ?key=<redacted>
    whole = digest_of(USER_INFO.sub("", without_environment(source)))
    return {f"{redacted(source.partition('?')[0])} ({whole[:8]})": whole}


def _is_url(source: str) -> bool:
    try:
        urlsplit(source).port  # noqa: B018
    except ValueError as error:
        raise ValueError(f"{error}: use http://HOST:PORT/PATH") from None
    return bool(source.partition(":")[2])


def reward_directory(source: str, learned: Path | None) -> Path | None:
    """The directory of the model that scores, or None for a rule."""
    directory = reward_kind(source).directory
    return None if directory is None else directory(source, learned)


def _learned_directory(source: str, learned: Path | None) -> Path:
    assert learned is not None
    return learned


def _named_directory(source: str, learned: Path | None = None) -> Path:
    return Path(source.removeprefix("model:"))


_SERVER = RewardKind("http://HOST:PORT/PATH", _is_url, _digest_of_url, make=remote_reward)
REWARD_KINDS: dict[str, RewardKind] = {
    "learned": RewardKind(
        "learned", lambda source: source == "learned", lambda source, digest: {}, directory=_learned_directory
    ),
    "vader": RewardKind(
        "vader",
        lambda source: source == "vader",
        lambda source, digest: {"vaderSentiment": importlib.metadata.version("vaderSentiment")},
        make=lambda source, server: vader_reward,
    ),
    "model": RewardKind(
        "model:DIRECTORY",
        lambda source: len(source) > len("model:"),
        _digest_of_model,
        directory=_named_directory,
    ),
    "python": RewardKind(
        "python:MODULE:FUNCTION",
        lambda source: source.count(":") > 1,
        _digest_of_function,
        make=lambda source, server: function_reward(source),
    ),
    "http": _SERVER,
    "https": _SERVER,
}
"""The word before the colon -> the kind. A module of the user's own may add one."""
