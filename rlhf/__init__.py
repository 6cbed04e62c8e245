"""From a base model to an aligned one: prepare, sft, reward, generate, ppo, evaluate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.cli.api import compose, open_run, run

__version__ = "0.1.0"
__all__ = ["compose", "open_run", "run"]


def __dir__() -> list[str]:
    """The names of this module, with those that are imported when they are used."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is used: the command line shows its help without it."""
    if name in __all__:
        from rlhf.cli import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
