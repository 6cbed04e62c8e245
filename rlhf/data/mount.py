"""Where a stage stands in a config, and what the other stages of that config offer it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from rlhf.data.roles import ROLES, Roles


class Mount(NamedTuple):
    """The context in which a stage's section is validated. It holds what a value means in this config alone:
    `sft` is a model where a stage makes it, `sft.data` are prompts where a role has that key."""

    name: str
    """Its section, and its directory in the store: `dpo`, or `dpo@2` of a named instance."""
    roles: Roles = ROLES
    """Those of the whole config."""
    own_roles: Mapping[str, str] = {}
    """The roles that it reads from a source of its own, and what these are called in `roles`: of a named
    instance, or of a stage derived from one that reads them."""
    policies: Collection[str] = ()
    """Names of the stages that make a policy."""

    @property
    def label(self) -> str:
        """Of a named instance: `2` of `dpo@2`."""
        return self.name.partition("@")[2]

    def own_role(self, role: str) -> str:
        """What a role that the stage reads is called in `roles`."""
        return self.own_roles.get(role, role)
