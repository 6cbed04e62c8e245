"""The page of `stage=label`. All text from models and annotators is untrusted: Jinja2 escapes it, and the
content security policy allows only scripts that are files of this package.

An annotator's link opens a page with a button, whose form sets the cookie. The link itself must not set it: a
browser that follows a link from another site does not send a SameSite=Strict cookie on the redirect, and
programs that preview links in chats must not use them up.
"""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

import uvicorn
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.config import STAGE, Complaint, ConfigError
from rlhf.label.connection import Connection, one_line_complaints
from rlhf.label.desk import BUTTONS, MAX_COMMENT_CHARACTERS, Desk
from rlhf.label.server_config import ServerConfig

COOKIE = "rlhf_label"
WEEK_SECONDS = 7 * 24 * 3600
MAX_BODY_BYTES = 64 * 1024
"""Largest body of a request. Only its comment is long."""
BODY_SECONDS = 10.0
"""Time in which the body must arrive."""
BURST, PER_SECOND = 60, 4.0
"""Requests of one annotator (or of one address without a cookie): most at once, and refill per second."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # not no-referrer: then forms send `Origin: null`
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
UNDONE_QUERY = "undone"
"""Query in the page's address which says that the last vote was undone."""
FILES = {"label.css": "text/css", "label.js": "text/javascript"}


class RateLimit:
    """A token bucket per client: it holds `BURST` requests, and refills at `PER_SECOND`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.buckets: dict[str, tuple[float, float]] = {}

    def allows(self, client: str) -> bool:
        """Take a request from the client's bucket; False if it is empty."""
        now = self.clock()
        level, then = self.buckets.get(client, (BURST, now))
        level = min(BURST, level + (now - then) * PER_SECOND)
        if len(self.buckets) > 10_000:  # many addresses without a cookie: full buckets need no entry
            self.buckets = {
                name: old for name, old in self.buckets.items() if now - old[1] < BURST / PER_SECOND
            }
        self.buckets[client] = (level - 1 if level >= 1 else level, now)
        return level >= 1


class Guard:
    """Sets the headers, and refuses requests that are too frequent or come from another site."""

    def __init__(self, app: ASGIApp, annotator_of: Callable[[str], str | None], site: str | None) -> None:
        """Args:
        site: host and port of `server.url`. Needed because a proxy may change the Host header.
        """
        self.app, self.annotator_of, self.site, self.limit = app, annotator_of, site, RateLimit()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name for name, _ in message["headers"]}
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(each for each in own if each[0] not in known)]
            await send(message)

        request = Request(scope)
        refusal = self.refusal(request)
        await (refusal or self.app)(scope, receive, with_headers)

    def refusal(self, request: Request) -> Response | None:
        """The response that refuses a request; None if the request is allowed."""
        annotator = self.annotator_of(request.cookies.get(COOKIE, ""))
        if not self.limit.allows(annotator or f"at {request.client.host if request.client else ''}"):
            return PlainTextResponse("Too many requests. Wait a moment.", 429, {"Retry-After": "5"})
        if request.method == "POST":
            origin = request.headers.get("origin")
            site = request.headers.get("sec-fetch-site", "same-origin")
            if site not in ("same-origin", "none") or (
                origin is not None and urlsplit(origin).netloc not in (request.headers.get("host"), self.site)
            ):
                return PlainTextResponse("This form belongs to another site.", 403)
        return None


class Page:
    """The requests that the page answers."""

    def __init__(
        self, desk: Desk, on_vote: Callable[[int], object], log: Callable[[str], object], *, is_secure: bool
    ) -> None:
        """Args:
        on_vote: called with the change in the number of votes.
        log: called with messages for the person who runs the stage.
        is_secure: whether browsers use https.
        """
        self.desk, self.on_vote, self.log, self.is_secure = desk, on_vote, log, is_secure
        self.done = threading.Event()
        self.templates = Environment(
            loader=PackageLoader("rlhf.label", "page"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
        )
        self.files = {name: files("rlhf.label").joinpath("page", name).read_bytes() for name in FILES}

    def app(self, hosts: list[str], site: str | None) -> Starlette:
        """The application.

        Args:
            hosts: allowed host names.
            site: see `Guard`.
        """
        return Starlette(
            routes=[
                Route("/", self.pair),
                Route("/enter/{token}", self.link),
                Route("/enter", self.enter, methods=["POST"]),
                Route("/vote", self.vote, methods=["POST"]),
                Route("/undo", self.undo, methods=["POST"]),
                *(Route(f"/{name}", self.file) for name in FILES),
            ],
            middleware=[
                Middleware(Guard, self.desk.file.annotator_of, site),
                Middleware(TrustedHostMiddleware, allowed_hosts=hosts),
            ],
            exception_handlers={sqlite3.OperationalError: self.not_saved},
        )

    def render(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """Render a page."""
        return HTMLResponse(self.templates.get_template(template).render(**values), status)

    def annotator(self, request: Request) -> str | None:
        """The annotator who sent the request; None if unknown."""
        token = request.cookies.get(COOKIE)
        found = None if token is None else self.desk.file.annotator_of(token)
        return found if found in self.desk.annotators else None

    def stranger(self) -> Response:
        """The page for a client without a valid cookie or link."""
        return self.render(
            "message.html",
            403,
            title="No link",
            text="Open the link that you were given; it tells who you are.",
        )

    async def not_saved(self, request: Request, error: Exception) -> Response:
        """The page for an annotator whose vote cannot be written."""
        self.log(f"{self.desk.stage}: a vote is not saved: {self.desk.file.path}: {error}")
        text = f"Not saved: {error}. Free some space on the disk of the votes, then vote again."
        return self.render("message.html", 507, title="Not saved", text=text)

    async def form(self, request: Request) -> dict[str, str] | Response:
        """The fields of a form; a response if the form is refused."""
        body = b""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > MAX_BODY_BYTES:
                        return PlainTextResponse("That is too long.", 413)
        except TimeoutError:
            return PlainTextResponse("That took too long.", 408)
        except ClientDisconnect:
            return PlainTextResponse("", 400)
        try:
            fields = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=20)
        except ValueError:  # too many fields
            return PlainTextResponse("That is no form of this page.", 400)
        return {name: values[-1] for name, values in fields.items()}

    async def file(self, request: Request) -> Response:
        """A style sheet or a script. Browsers cache it, because the server stops after the last page."""
        name = request.url.path.removeprefix("/")
        return Response(self.files[name], 200, {"Cache-Control": "private, max-age=3600"}, FILES[name])

    async def link(self, request: Request) -> Response:
        """The page behind an annotator's link."""
        token = request.path_params["token"]
        annotator = self.desk.file.annotator_of(token)
        if annotator not in self.desk.annotators:
            return self.stranger()
        return self.render("enter.html", annotator=annotator, token=token)

    async def enter(self, request: Request) -> Response:
        """Give a browser its cookie."""
        fields = await self.form(request)
        if isinstance(fields, Response):
            return fields
        token = fields.get("token", "")
        if self.desk.file.annotator_of(token) not in self.desk.annotators:
            return self.stranger()
        response = RedirectResponse("/", 303)
        response.set_cookie(
            COOKIE, token, max_age=WEEK_SECONDS, httponly=True, samesite="strict", secure=self.is_secure
        )
        return response

    async def pair(self, request: Request) -> Response:
        """The pair that waits for a vote."""
        annotator = self.annotator(request)
        if annotator is None:
            return self.stranger()
        notice = "Your last vote is taken back. Vote again." if UNDONE_QUERY in request.query_params else ""
        return self.show(annotator, notice)

    def show(self, annotator: str, notice: str = "") -> Response:
        """The page with the annotator's pair, or with the message that no pair is left."""
        shown = None if self.done.is_set() else self.desk.page(annotator)
        progress = self.desk.progress(annotator)
        if shown is None:
            text = (
                "There are enough votes. Thank you."
                if self.done.is_set() or progress.votes >= progress.wanted
                else "No pair is left for you. Others are still at work. Thank you."
            )
            return self.render("message.html", title="Done", text=text)
        first, second = shown.pair.first, shown.pair.second
        left, right = (first, second) if shown.left == "first" else (second, first)
        return self.render(
            "pair.html",
            annotator=annotator,
            shown=shown.id,
            prompt=shown.pair.prompt,
            left=left,
            right=right,
            progress=progress,
            notice=notice,
            comment=shown.comment,
            most_comment=MAX_COMMENT_CHARACTERS,
        )

    async def vote(self, request: Request) -> Response:
        """Take a vote. It is on the disk before the next pair is shown."""
        annotator = self.annotator(request)
        if annotator is None:
            return self.stranger()
        fields = await self.form(request)
        if isinstance(fields, Response):
            return fields
        button = next((each for each in BUTTONS if each == fields.get("choice")), None)
        if button is None or not fields.get("shown", "").isdecimal() or len(fields["shown"]) > 18:
            return PlainTextResponse("That is no vote.", 400)
        before = self.desk.progress().votes
        if not self.desk.vote(annotator, int(fields["shown"]), button, fields.get("comment", "")):
            return self.show(annotator, "That pair was not on your page any more, so nothing was counted.")
        self.on_vote(self.desk.progress().votes - before)
        if self.desk.is_done():
            self.done.set()  # not a redirect: the server stops before it could answer another request
            return self.show(annotator)
        return RedirectResponse("/", 303)

    async def undo(self, request: Request) -> Response:
        """Undo the annotator's last vote."""
        annotator = self.annotator(request)
        if annotator is None:
            return self.stranger()
        fields = await self.form(request)
        if isinstance(fields, Response):
            return fields
        shown = self.desk.page(annotator)
        if shown is not None and fields.get("shown") != str(shown.id):
            return self.show(annotator, "That page was old, so nothing was taken back.")
        before = self.desk.progress().votes
        if not self.desk.undo(annotator):
            return self.show(annotator, "There is no vote of yours to take back.")
        self.on_vote(self.desk.progress().votes - before)
        return RedirectResponse(f"/?{UNDONE_QUERY}", 303)  # so that reloading the page undoes nothing more


def serve(
    desk: Desk,
    config: ServerConfig,
    log: Callable[[str], object],
    on_vote: Callable[[int], object] = lambda count: None,
    stop: threading.Event | None = None,
) -> None:
    """Serve until there are enough votes or no pair is left. The link of each new annotator is logged once.

    Args:
        stop: an event that stops the server.

    Raises:
        ConfigError: the address is in use.
    """
    listener = _listener(config)
    host, port = listener.getsockname()[:2]
    if desk.is_done():
        listener.close()
        return
    root = config.url or f"http://{_shown_host(config.host)}:{port}"
    log(
        f"{desk.stage}: the page is at {root}/ until there are {desk.progress().wanted} votes; Ctrl-C "
        "publishes what is there"
    )
    for annotator in desk.annotators:
        token = desk.file.invite(annotator, again=annotator in config.new_links)
        how = (
            f"has a link already; for a new one: {desk.stage}.server.new_links=[{annotator}]"
            if token is None
            else f"{root}/enter/{token}"
        )
        log(f"{desk.stage}: {annotator}: {how}")
    page = Page(desk, on_vote, log, is_secure=root.startswith("https:"))
    hosts = ["*"] if host not in LOOPBACK else [*LOOPBACK, "[::1]"]
    if host in LOOPBACK and config.url:
        hosts.append(str(urlsplit(config.url).hostname))
    server = uvicorn.Server(
        uvicorn.Config(
            page.app(hosts, urlsplit(config.url).netloc if config.url else None),
            http=Connection,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
            proxy_headers=False,
            ws="none",
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    with one_line_complaints(lambda text: log(f"{desk.stage}: {text}")):
        thread.start()
        try:
            while not page.done.wait(0.2) and not (stop and stop.is_set()):
                if not thread.is_alive():
                    raise RuntimeError("the server of the page ended by itself")
        finally:
            server.should_exit = True
            thread.join()
            listener.close()


def _listener(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(128)  # from here on clients that follow a link wait
    except OSError as error:
        listener.close()
        raise ConfigError(
            Complaint(
                f"{STAGE}.server.host={config.host} {STAGE}.server.port={config.port}",
                f"{error.strerror}. Another run may use it.",
                "Choose another port, or 0 for a free one.",
            )
        ) from None
    return listener


def _shown_host(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
