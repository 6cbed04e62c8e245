"""Where the page of `stage=label` is served."""

from __future__ import annotations

from pydantic import Field

from rlhf.config import Strict


class ServerConfig(Strict):
    """`label.server.*`: where people find the page."""

    host: str
    """The address that it listens on. 127.0.0.1: this machine alone. 0.0.0.0: everybody who can reach it."""
    port: int = Field(ge=0, le=65535)
    """The port; 0 takes a free one, so that links end with the run."""
    url: str | None = Field(pattern=r"^https?://[^/]+$")
    """How browsers reach it, if not by host and port, such as https://label.example.org in front of a
    proxy. Links begin with it."""
    new_links: list[str]
    """Annotators who get a new link, as theirs is lost. The old one then opens nothing."""
