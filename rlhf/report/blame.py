"""The cause of a bad result, as a value."""

from __future__ import annotations

from typing import NamedTuple


class Blame(NamedTuple):
    """A part of a run that is to blame, and the reason."""

    sections: tuple[str, ...]
    """Sections of the config, usually stages. One of them is the cause."""
    why: str
    """One or more sentences, the first without its subject."""
    subject: str = ""
    """The subject, if it is not simply the sections: `the reward of ppo`, `ppo.init`."""

    def __str__(self) -> str:
        return f"{self.subject or ' or '.join(self.sections)}: {self.why}"
