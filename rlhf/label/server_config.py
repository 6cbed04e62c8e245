"""Config of the server of `stage=label`."""

from __future__ import annotations

from pydantic import Field

from rlhf.config import Strict


class ServerConfig(Strict):
    """`label.server.*`: the address of the page."""

    host: str
    """Address to listen on. 127.0.0.1: only this machine. 0.0.0.0: every machine that can reach this one."""
    port: int = Field(ge=0, le=65535)
    """Port. 0 takes a free one; then the links are valid only until the run ends."""
    url: str | None = Field(pattern=r"^https?://[^/]+$")
    """Address for browsers, if it is not host and port, such as a proxy's https://label.example.org. Links
    begin with it."""
    new_links: list[str]
    """Annotators who get a new link, because they lost theirs. The old link is then invalid."""
