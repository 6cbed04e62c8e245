"""One set of frozen weights under several models.

While only adapters and heads train, PPO's policy, reference, critic and reward model can stand on the same
backbone. Each keeps a tree of modules of its own, with its own adapters in it, so nothing has to be switched
between one model's pass and another's; only the weights are held once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Backbone:
    """A causal model for others to share the weights of, without an adapter."""

    directory: Path
    """Where it was read."""
    model: PreTrainedModel


def sharing(module: ModuleT, own: Iterable[nn.Parameter] = ()) -> ModuleT:
    """A second tree of modules on the very same weights, frozen in it.

    Its parameters are new objects on the old storage. So what one tree points elsewhere for a while
    (`Adapter.folded_in`) stays as it is in the other; what is written into a weight is seen by both.

    Args:
        own: parameters that are copied instead.
    """
    copied = {id(parameter) for parameter in own}
    memo = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in module.parameters()
        if id(parameter) not in copied
    }
    return copy.deepcopy(module, memo)
