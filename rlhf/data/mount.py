"""The place of a stage in a config, and what the other stages of that config offer it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from rlhf.data.roles import ROLES, Roles


class Mount(NamedTuple):
    """The context in which a stage's section is validated. The meaning of some values depends on the config:
    `sft` is a model if a stage makes it, and `sft.data` names prompts if a role has that key."""

    name: str
    """Its section, and its directory in the store: `dpo`, or `dpo@2` for a named instance."""
    roles: Roles = ROLES
    """The roles of the full config."""
    own_roles: Mapping[str, str] = {}
    """Role that the stage reads from a source of its own -> its name in `roles`. Named instances have such
    roles, and so do stages derived from a stage that reads them."""
    policies: Collection[str] = ()
    """Names of the stages that make a policy."""

    @property
    def label(self) -> str:
        """The label of a named instance: `2` for `dpo@2`. Otherwise empty."""
        return self.name.partition("@")[2]

    def own_role(self, role: str) -> str:
        """The name in `roles` of a role that the stage reads."""
        return self.own_roles.get(role, role)
