"""What is to blame for a bad result, as a value."""

from __future__ import annotations

from typing import NamedTuple


class Blame(NamedTuple):
    """A part of a run that is to blame, and why."""

    sections: tuple[str, ...]
    """Sections of the config, of which one is the cause: most often a stage."""
    why: str
    """A sentence without its subject's name, or several."""
    subject: str = ""
    """What is to blame, where that is more or less than the sections: `the reward of ppo`, `ppo.init`."""

    def __str__(self) -> str:
        return f"{self.subject or ' or '.join(self.sections)}: {self.why}"
