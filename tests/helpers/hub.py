"""A small stand-in for the Hub: what huggingface_hub asks when it uploads a folder."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_word_that_nobody_may_see"


class Hub:
    """Keeps what is uploaded."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        """Name -> path -> content."""
        self.private: dict[str, bool] = {}
        self.refused = 0
        """Requests without the right token."""
        self._blobs: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    hub.refused += 1
                    self.answer(401, {"error": "Invalid username or password."})
                else:
                    self.answer(200, hub.answer(self.path, body))

            def do_PUT(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
                hub._blobs[self.path.rpartition("/")[2]] = content
                self.answer(200, {})

            def answer(self, code: int, content: Any) -> None:
                text = json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, path: str, body: bytes) -> Any:
        """What the Hub says."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, {})
            private = asked.get("private", asked.get("visibility") == "private")  # by hub's version
            self.private.setdefault(name, private)
            return {"url": f"{self.endpoint}/{name}", "name": name}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return {"errors": [], "warnings": []}
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/main", path):
            modes = {True: "lfs", False: "regular"}
            return {
                "files": [
                    {
                        "path": each["path"],
                        "uploadMode": modes[each["path"].endswith(".safetensors")],
                        "shouldIgnore": False,
                    }
                    for each in json.loads(body)["files"]
                ]
            }
        if re.fullmatch(r"/[\w.-]+/[\w.-]+\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            upload = {
                each["oid"]: {"upload": {"href": f"{self.endpoint}/lfs/{each['oid']}"}} for each in objects
            }
            return {
                "transfer": "basic",
                "objects": [{**each, "actions": upload[each["oid"]]} for each in objects],
            }
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", path)
        assert found is not None, path
        files = self.repositories[found[1]]
        for line in body.splitlines():
            said = json.loads(line)
            if said["key"] == "file":
                files[said["value"]["path"]] = base64.b64decode(said["value"]["content"])
            elif said["key"] == "lfsFile":
                files[said["value"]["path"]] = self._blobs[said["value"]["oid"]]
        return {"commitUrl": f"{self.endpoint}/{found[1]}/commit/1", "commitOid": "1" * 40, "success": True}


@contextmanager
def hub() -> Iterator[Hub]:
    """A Hub on this machine."""
    found = Hub()
    thread = Thread(target=found.http.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        found.http.shutdown()
        thread.join()
        found.http.server_close()
