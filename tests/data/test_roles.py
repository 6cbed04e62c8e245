"""The table of roles: what mypy is told of it, and what a stage may add."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args, get_origin, get_overloads, get_type_hints

import pytest

from helpers.experiments import build
from helpers.verdicts import mounted
from rlhf.config import ConfigError
from rlhf.data.formats import prompt_row
from rlhf.data.prepared import PreparedData
from rlhf.data.roles import ROLES, Role
from rlhf.data.schema import PromptRow
from rlhf.pipeline.experiment import check_roles, collect_roles
from rlhf.pipeline.fields import Reads
from rlhf.pipeline.graph import named_sources
from rlhf.pipeline.stage import Stage
from rlhf.stages.merge import MergeStage


def test_the_types_of_rows_are_those_of_the_table() -> None:
    told: dict[str, tuple[tuple[type, ...], tuple[str, ...]]] = {}
    for overload in get_overloads(PreparedData.rows):
        hints = get_type_hints(overload)
        if get_origin(hints["role"]) is Literal:
            (row_type,) = get_args(hints["return"])
            of_row = get_args(row_type) or (row_type,)
            told |= {role: (of_row, get_args(hints["split"])) for role in get_args(hints["role"])}
    assert told == {name: (role.row_types, role.splits) for name, role in ROLES.items()}


def own(key: str) -> Role:
    return Role(key, (PromptRow,), prompt_row, ("prompt",))


def with_roles(**roles: Role) -> type[Stage]:
    class OwnStage(MergeStage):
        roles: ClassVar[dict[str, Role]]

    OwnStage.roles = roles
    return OwnStage


def test_a_config_has_the_roles_of_its_mounted_stages_alone() -> None:
    first, second = with_roles(mine=own("mine.data")), with_roles(theirs=own("theirs.data"))
    assert [*collect_roles({"merge": first})] == [*ROLES, "mine"]
    assert [*collect_roles({"merge": second, "sft": second})] == [*ROLES, "theirs"]  # a subclass has the same
    assert collect_roles({"merge": MergeStage}) == ROLES


@pytest.mark.parametrize("name", ["sft", "mine"])
def test_two_roles_of_one_name_are_refused(name: str) -> None:
    stages = {"mine": with_roles(mine=own("mine.data")), "merge": with_roles(**{name: own("merge.data")})}
    with pytest.raises(ConfigError, match=f"merge: it brings a role {name} along, and there is one already"):
        collect_roles(stages)


def test_a_role_that_does_not_exist_is_told() -> None:
    class OwnStage(MergeStage):
        def reads(self) -> Reads:
            return Reads(roles=("pair",))

    with pytest.raises(ConfigError, match=r"merge: it reads the data of pair, .* Did you mean pairs\?"):
        check_roles(mounted("merge", OwnStage.model_construct(gates={}, alpha=0.5, policy="sft")))


@pytest.mark.parametrize("key", ["merge.data", "mine.data"])
def test_a_role_whose_key_does_not_exist_is_told(key: str) -> None:
    stages = build("model=tiny").stages
    roles = collect_roles({"merge": with_roles(mine=own(key))})
    mounted("prepare", stages["prepare"], roles)
    with pytest.raises(ConfigError, match=f"{key}: the role mine is read from there, and there is no such"):
        named_sources(stages)
