"""Types of a stage's fields. They say what the stage reads, and which of its fields decide the result."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args

from pydantic import AfterValidator, BaseModel, Field, GetCoreSchemaHandler, PositiveInt, ValidationInfo
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from rlhf.data.mount import Mount
from rlhf.models.peft.config import PeftConfig
from rlhf.models.start import parse_model
from rlhf.rewards.kinds import RewardMix, RewardSource
from rlhf.training.config import OptimConfig

if TYPE_CHECKING:
    from rlhf.pipeline.stage import Stage


class Mark(Enum):
    """What a field means, apart from its value."""

    MODEL = auto()
    POLICY = auto()
    SCORE = auto()
    BATCH = auto()
    MEMORY = auto()
    UNKEYED = auto()
    """It cannot change the result (sizes of micro-batches, intervals), so it is in no key."""
    LENGTH = auto()
    """How long the stage trains: a larger number only adds steps to the end."""


@dataclass(frozen=True)
class Rows:
    """Marks a field that names the source of a role's rows: `Annotated[SourceConfig | None, Rows("sft")]`.
    The content of the prepared rows decides the result, not the source."""

    role: str
    """A name in `Mount.roles`."""
    otherwise: str | None = None
    """The role that is read instead if the field is null. None: `role` is read, and has no rows."""


@dataclass(frozen=True)
class Function:
    """Marks a field that names a function: a built-in one, or `python:MODULE:FUNCTION`, whose code is in the
    key: `Annotated[str, Function("grpo", "rloo")]`."""

    names: tuple[str, ...]
    """Names of the built-in functions."""

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self.checked, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {"anyOf": [{"enum": [*self.names]}, {"type": "string", "pattern": "^python:.+:.+"}]}

    def checked(self, name: str | None) -> str | None:
        """The name, unchanged.

        Raises:
            PydanticCustomError: there is no such function. It reads like the error of a `Literal`.
        """
        if name is None or name in self.names or (name.startswith("python:") and name.count(":") > 1):
            return name
        names = ", ".join(f"'{each}'" for each in self.names)
        raise PydanticCustomError("literal_error", f"Input should be {names} or 'python:MODULE:FUNCTION'")


def _checked_model(name: str, info: ValidationInfo) -> str:
    return (
        parse_model(name, info.context.policies) if isinstance(info.context, Mount) else parse_model(name, ())
    )


UNKEYED = Mark.UNKEYED
LENGTH = Mark.LENGTH
Model = Annotated[str, Field(min_length=1, validate_default=True), AfterValidator(_checked_model), Mark.MODEL]
"""A stage that makes a policy (`sft`, `dpo`, ...), `base` or a `save_pretrained` directory. Its name is
checked, its stage becomes an input, and the model's content is in the key. A stage's first field of this type
is the model that it trains or samples from."""
Policy = Annotated[str, Mark.POLICY]
"""A stage that makes a policy."""
Score = Annotated[RewardSource, Mark.SCORE]
"""A reward. It is tested on two rows before anything trains, and its content is in the key."""
Batch = Annotated[PositiveInt, Mark.BATCH]
"""The size of a batch over all ranks. The ranks must be able to share it equally."""
Memory = Annotated[PositiveInt, Mark.MEMORY]
"""How much is computed at once. It changes memory and speed but not the result, so it is in no key."""


class Reads(NamedTuple):
    """What a stage reads."""

    models: Mapping[str, str] = {}
    """Key -> base, a stage or a directory. The first is the model that the stage trains or samples from."""
    policies: tuple[tuple[str, str], ...] = ()
    """(key with the stage's name, the stage whose policy it names)."""
    rewards: Mapping[str, str | RewardMix] = {}
    """Key with the stage's name -> the reward, such as `ppo.reward` -> `vader`."""
    roles: tuple[str, ...] = ()
    """Roles of the prepared data: names in `Mount.roles`."""
    stages: tuple[str, ...] = ()
    """Other stages whose artifacts it reads."""
    base: bool = False
    """Whether it reads the base model even if no key names it."""
    sampled: tuple[tuple[str, str], ...] = ()
    """(key with the stage's name, the model that it samples from, as in `models`)."""


def reads_of(stage: Stage, without: Collection[str] = ()) -> Reads:
    """What the stage's fields name.

    Args:
        without: fields that other fields turn off, such as `replay` or `ptx.data`.
    """
    fields = [each for each in marked_fields(stage) if each.key not in without]

    def values_of(mark: Mark, prefix: str = "") -> dict[str, Any]:
        with_mark = (each for each in fields if mark in each.marks and each.value is not None)
        return {f"{prefix}{each.key}": each.value for each in with_mark}

    with_name = f"{stage.name}."
    return Reads(
        models=values_of(Mark.MODEL),
        policies=tuple(values_of(Mark.POLICY, with_name).items()),
        rewards=values_of(Mark.SCORE, with_name),
        roles=tuple(
            mark.role if each.value is not None else mark.otherwise or mark.role
            for each in fields
            for mark in each.marks
            if isinstance(mark, Rows)
        ),
        sampled=tuple(values_of(Mark.MODEL, with_name).items())[:1] if stage.samples else (),
    )


class MarkedField(NamedTuple):
    """A field of a stage, or of a section in it."""

    key: str
    """Without the stage's name: `ptx.data`."""
    value: Any
    marks: list[Any]


def marked_fields(config: BaseModel, prefix: str = "") -> Iterator[MarkedField]:
    """The fields that have a mark, also those of sections in the config."""
    for name, info in type(config).model_fields.items():
        value, marks = getattr(config, name), _marks(info)
        if marks:
            yield MarkedField(f"{prefix}{name}", value, marks)
        elif isinstance(value, BaseModel):
            yield from marked_fields(value, f"{prefix}{name}.")


def fields_of(kind: type[BaseModel], mark: Mark) -> list[str]:
    """Names of a stage's own fields with this mark."""
    return [name for name, info in kind.model_fields.items() if mark in _marks(info)]


def optims_of(config: BaseModel) -> Iterator[OptimConfig]:
    """The settings of a stage's optimizers, also those of sections in the config."""
    for _, value in config:
        if isinstance(value, OptimConfig):
            yield value
        elif isinstance(value, BaseModel):
            yield from optims_of(value)


def peft_of(stage: Stage) -> PeftConfig | None:
    """Which parameters a stage trains; None if it trains none."""
    return next((value for _, value in stage if isinstance(value, PeftConfig)), None)


def _marks(info: FieldInfo) -> list[Any]:
    metadata = [*info.metadata]
    for each in get_args(info.annotation):  # the members of a union such as `Model | None`
        metadata += getattr(each, "__metadata__", ())
    return [each for each in metadata if isinstance(each, Mark | Rows | Function)]
