"""The kinds of rewards: how each is written, checked, digested and made; and mixes of several rewards."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    field_serializer,
    model_validator,
)

from rlhf.config import Complaint, ConfigError, Strict, validated
from rlhf.digests import DirectoryDigest, digest_of, directory_digest
from rlhf.rewards.code import imported_code
from rlhf.rewards.function import function_reward, imported_function, needed_columns
from rlhf.rewards.http import RewardServerConfig, remote_reward
from rlhf.rewards.judge import NOT_IN_KEY, Judge, check_judge, is_judge, judge_digest, judge_needs
from rlhf.rewards.reward import Reward, vader_reward
from rlhf.rewards.trl_functions import trl_digest, trl_needs, trl_reward
from rlhf.rewards.verify import VERIFIERS, check_verifier, verifier, verifier_digest, verifier_needs
from rlhf.tracking.redaction import USER_INFO, redacted, without_environment_secrets

RIGHT_ANSWERS = frozenset({
    "answer", "answers", "expected", "ground_truth", "reference", "references", "solution", "target",
    "targets", "test", "test_cases", "tests",
})  # fmt: skip
"""Names of columns that hold the right answer."""


def _no_args(source: str, args: Mapping[str, Any]) -> None:
    if args:
        raise ValueError(f"{source} takes no args. Leave them out")


@dataclass(frozen=True)
class RewardKind:
    """The kind that the word before a `RewardSource`'s colon names."""

    form: str
    """The format of a source, such as `model:DIRECTORY`."""
    check: Callable[[str], bool]
    """Whether a source has the right format. It may raise ValueError with a better message."""
    digest: Callable[[RewardPart, DirectoryDigest], dict[str, str]]
    """Digests of everything that can change a source's scores: see `reward_digest`."""
    make: Callable[[RewardPart, RewardServerConfig], Reward] | None = None
    """Makes the rule that a source names. None if a model scores."""
    directory: Callable[[str, Mapping[str, Path]], Path] | None = None
    """(source, artifacts of the reward stages) -> directory of the model that scores. None for a rule."""
    check_args: Callable[[str, Mapping[str, Any]], None] = _no_args
    """Raises ValueError for `args` that the source does not take."""
    needs: Callable[[RewardPart], frozenset[str]] = lambda part: frozenset()
    """Columns of the prompts that it requires: at least one row must have each of them."""

    not_in_key: frozenset[str] = frozenset()
    """Names of `args` that do not change a score."""
    is_remote: bool = False
    """Whether it calls a server, which may cost money."""

    @property
    def has_model(self) -> bool:
        """Whether a model scores. A critic can start from it."""
        return self.directory is not None


def reward_kind(source: str) -> RewardKind:
    """The kind of a checked source."""
    return REWARD_KINDS[_kind_name(source)]


def _kind_name(source: str) -> str:
    """`learned` for `learned@2`, `judge` for `judge:http://...`."""
    return re.split("[:@]", source, maxsplit=1)[0]


def stage_of(source: str) -> str | None:
    """The stage that trains the scoring model: `reward` for `learned`, `reward@2` for `learned@2`. None for
    any other source."""
    return f"reward{source.removeprefix('learned')}" if _kind_name(source) == "learned" else None


def _check_source(source: str) -> str:
    kind = REWARD_KINDS.get(_kind_name(source))
    if kind is None or not kind.check(source):
        *forms, last = dict.fromkeys(each.form for each in REWARD_KINDS.values())
        raise ValueError(f"use {', '.join(forms)} or {last}")
    return source


class RewardPart(Strict):
    """One reward of several."""

    source: Annotated[str, AfterValidator(_check_source)]
    """The reward, in the same form as `ppo.reward`."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Factor of its scores before they are combined."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Arguments of a `verify:` or `trl:` reward: docs/rewards.md."""

    @model_validator(mode="after")
    def _takes_args(self) -> RewardPart:
        reward_kind(self.source).check_args(self.source, self.args)
        return self

    @field_serializer("args", when_used="json")
    def _in_key(self, args: dict[str, Any]) -> dict[str, Any]:
        left_out = reward_kind(self.source).not_in_key
        return {name: value for name, value in args.items() if name not in left_out}

    @property
    def label(self) -> str:
        """Its name in metrics: the last word of its source."""
        words = [word for word in re.split(r"[^\w.-]+", redacted(self.source)) if word]
        if self.source.startswith("judge:"):
            return "judge"
        return words[1] if self.source.startswith("http") else words[-1]


def _as_part(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


PartOrSource = Annotated[RewardPart, BeforeValidator(_as_part, json_schema_input_type=str | RewardPart)]


class RewardMix(Strict):
    """Several rewards that are combined into one score, or one reward with arguments. `ppo.reward=[...]` is
    short for `ppo.reward={of: [...]}`."""

    of: list[PartOrSource] = Field(min_length=1)
    """The rewards. A plain source, such as `learned`, has weight 1."""
    combine: Literal["sum", "minimum", "mean_minus_deviation"] = "sum"
    """How the weighted scores become one: their sum; their minimum; or their mean minus `deviation_weight`
    times their standard deviation (Coste et al. 2023, arXiv:2310.02743, subtracts the variance). The last two
    are for ensembles of reward models. A part without a score is left out."""
    deviation_weight: NonNegativeFloat = 1.0
    """mean_minus_deviation: weight of the deviation, the penalty for disagreement."""
    normalize: bool = False
    """Whether each part's scores are standardised: minus their mean, divided by their standard deviation,
    both measured by `generate`."""

    @property
    def labels(self) -> list[str]:
        """Names of the parts in metrics, all different."""
        labels: list[str] = []
        for part in self.of:
            number = sum(each.label == part.label for each in self.of[: len(labels) + 1])
            labels.append(part.label if number == 1 else f"{part.label}_{number}")
        return labels

    def __str__(self) -> str:
        return f"[{', '.join(part.source for part in self.of)}]"


def _parse(value: Any) -> Any:
    """Parse a YAML value: a source, a source with arguments, a list of these, or the full mapping."""
    if isinstance(value, str):
        reward_kind(_check_source(value)).check_args(value, {})
        return value
    if isinstance(value, Mapping) and "source" in value:
        value = [value]
    if isinstance(value, Sequence):
        value = {"of": value}
    if not isinstance(value, Mapping):
        return value
    try:
        return validated(RewardMix, value, "")
    except ConfigError as error:
        raise ValueError(str(error).removesuffix(".").replace("\n", " ")) from None


RewardSource = Annotated[
    str | RewardMix,
    BeforeValidator(_parse, json_schema_input_type=str | RewardPart | list[str | RewardPart] | RewardMix),
]
"""One reward, or several of them. One of: `learned` (the model of stage `reward`; `learned@2`: of its
instance `reward@2`), `vader`, `model:DIRECTORY` (a sequence-classification model with one label, a linear
`score` head (Llama, Mistral, Qwen, Gemma, ...), its own tokenizer and template), `python:MODULE:FUNCTION`,
`trl:FUNCTION`, `verify:NAME`, `judge:URL`, or the URL of a server (rlhf/rewards/http.py)."""


def parts_of(source: str | RewardMix) -> list[RewardPart]:
    """The rewards that a checked source names."""
    return [RewardPart(source=source)] if isinstance(source, str) else source.of


def keyed_parts(rewards: Mapping[str, str | RewardMix]) -> list[tuple[str, RewardPart]]:
    """Each reward with its config key, such as `ppo.reward` or `ppo.reward[1]`.

    Args:
        rewards: `Reads.rewards`.
    """
    return [
        (key if isinstance(source, str) else f"{key}[{index}]", part)
        for key, source in rewards.items()
        for index, part in enumerate(parts_of(source))
    ]


def models_of(source: str | RewardMix | None) -> list[RewardPart]:
    """The rewards of a source that are models."""
    return [] if source is None else [part for part in parts_of(source) if reward_kind(part.source).has_model]


def columns_needed(source: str | RewardMix) -> frozenset[str]:
    """Columns of the prompts that its rewards require: at least one row must have each of them."""
    return frozenset[str]().union(*(reward_kind(part.source).needs(part) for part in parts_of(source)))


def is_remote(source: str | RewardMix) -> bool:
    """Whether one of its rewards calls a server."""
    return any(reward_kind(part.source).is_remote for part in parts_of(source))


def is_verifier(part: RewardPart) -> bool:
    """Whether it checks answers: `verify:`, or a function that reads a column with the right answer."""
    return part.source.startswith("verify:") or bool(RIGHT_ANSWERS & {*reward_kind(part.source).needs(part)})


def critic_part(source: str | RewardMix) -> RewardPart | None:
    """The model that a critic can start from: the only one, in a sum, with a positive weight; else None."""
    models = models_of(source)
    if len(models) != 1 or (isinstance(source, RewardMix) and source.combine != "sum"):
        return None
    return models[0] if models[0].weight > 0 else None


def reward_digest(source: str | RewardMix, digest: DirectoryDigest = directory_digest) -> dict[str, str]:
    """Digests of everything that can change the scores, except the reward stage's model: a directory's
    content, a function's imported code, a scorer's version, a server's URL. They are part of the keys of
    scored artifacts.

    Args:
        digest: as in `rlhf.pipeline.key.external_digests`.

    Raises:
        ConfigError: there is no such model, it has no score head, or the function cannot be imported.
    """
    digests: dict[str, str] = {}
    for part in parts_of(source):
        digests |= reward_kind(part.source).digest(part, digest)
    return digests


def _digest_of_model(part: RewardPart, digest: DirectoryDigest) -> dict[str, str]:
    from rlhf.models.value_head import check_score_head

    directory = _named_directory(part.source, {})
    if not (directory / "config.json").is_file():
        fix = "Give a one-label classification model."
        raise ConfigError(Complaint(part.source, "no config.json there.", fix))
    check_score_head(directory)
    return {part.source: digest(directory)}


def _digest_of_function(part: RewardPart, digest: DirectoryDigest) -> dict[str, str]:
    imported_function(part.source)
    return imported_code(part.source)


def _digest_of_url(part: RewardPart, digest: DirectoryDigest) -> dict[str, str]:
    # of the full URL except secrets from the environment: ?key=A and ?key=B may be two rewards, but both
    # are shown as ?key=<redacted>
    full = digest_of(USER_INFO.sub("", without_environment_secrets(part.source)))
    return {f"{redacted(part.source.partition('?')[0])} ({full[:8]})": full}


def _is_url(source: str) -> bool:
    try:
        urlsplit(source).port  # noqa: B018
    except ValueError as error:
        raise ValueError(f"{error}: use http://HOST:PORT/PATH") from None
    return bool(source.partition(":")[2])


def reward_directory(source: str, learned: Mapping[str, Path]) -> Path | None:
    """The directory of the scoring model. None for a rule.

    Args:
        learned: the artifacts of reward stages.
    """
    directory = reward_kind(source).directory
    return None if directory is None else directory(source, learned)


def _learned_directory(source: str, learned: Mapping[str, Path]) -> Path:
    stage = stage_of(source)
    assert stage is not None
    return learned[stage]


def _named_directory(source: str, learned: Mapping[str, Path]) -> Path:
    return Path(source.removeprefix("model:"))


_SERVER = RewardKind(
    "http://HOST:PORT/PATH",
    _is_url,
    _digest_of_url,
    make=lambda part, server: remote_reward(part.source, server),
    is_remote=True,
)
REWARD_KINDS: dict[str, RewardKind] = {
    "learned": RewardKind(
        "learned",
        lambda source: re.fullmatch(r"learned(@\w+)?", source) is not None,
        lambda part, digest: {},
        directory=_learned_directory,
    ),
    "vader": RewardKind(
        "vader",
        lambda source: source == "vader",
        lambda part, digest: {"vaderSentiment": importlib.metadata.version("vaderSentiment")},
        make=lambda part, server: vader_reward,
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
        make=lambda part, server: function_reward(part.source),
        needs=lambda part: needed_columns(imported_function(part.source)),
    ),
    "trl": RewardKind(
        "trl:FUNCTION",
        lambda source: len(source) > len("trl:"),
        lambda part, digest: trl_digest(part.source, part.args),
        make=lambda part, server: trl_reward(part.source, part.args),
        check_args=lambda source, args: None,  # checked by its signature, once TRL is imported
        needs=lambda part: trl_needs(part.source, part.args),
    ),
    "verify": RewardKind(
        f"verify:{'|'.join(VERIFIERS)}",
        lambda source: source.removeprefix("verify:") in VERIFIERS,
        lambda part, digest: verifier_digest(part.source, part.args),
        make=lambda part, server: verifier(part.source, part.args),
        check_args=check_verifier,
        needs=lambda part: verifier_needs(part.source, part.args),
    ),
    "judge": RewardKind(
        "judge:URL",
        is_judge,
        lambda part, digest: judge_digest(part.source, part.args),
        make=lambda part, server: Judge(part.source, part.args, server),
        check_args=check_judge,
        needs=lambda part: judge_needs(part.args),
        not_in_key=NOT_IN_KEY,
        is_remote=True,
    ),
    "http": _SERVER,
    "https": _SERVER,
}
"""Word before the colon -> kind. A user's module may add kinds."""
