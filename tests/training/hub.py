"""As much of the Hugging Face Hub as an upload speaks to, on this machine: a repository is made, files come by way of
Git LFS or in the commit itself, and a commit names them all."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What was uploaded.

    Attributes:
        address: for HF_ENDPOINT.
        tokens: with which requests came.
        files: by repository, by path: their bytes, as the last commit left them.
        requests: method and path of every request, for messages of tests.
    """

    def __init__(self) -> None:
        self.address = ""
        self.tokens: set[str | None] = set()
        self.files: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.objects: dict[str, bytes] = {}

    def answer(self, method: str, path: str, body: bytes) -> Any:
        """What is answered, as JSON; None where there is no such thing."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
            self.files.setdefault(name, {})
            return {"url": f"{self.address}/{name}", "name": name, "id": "1"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/whoami-v2":
            return {"name": "me", "type": "user", "orgs": []}
        if path.startswith("/objects/"):
            oid = path.removeprefix("/objects/")
            assert hashlib.sha256(body).hexdigest() == oid
            self.objects[oid] = body
            return {}
        if path.endswith(".git/info/lfs/objects/batch"):
            found = [
                {**each, "actions": {"upload": {"href": f"{self.address}/objects/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return {"transfer": "basic", "objects": found}
        name = next((name for name in self.files if path.startswith(f"/api/models/{name}/")), None)
        if name is None:
            return None
        if path.endswith("/preupload/main"):
            return {
                "files": [
                    {
                        "path": each["path"],
                        "uploadMode": "regular" if each["path"].endswith(".md") else "lfs",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for each in json.loads(body)["files"]
                ]
            }
        if path.endswith("/commit/main"):
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.files[name][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                elif item["key"] == "lfsFile":
                    self.files[name][item["value"]["path"]] = self.objects[item["value"]["oid"]]
            return {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40, "hookOutput": ""}
        return None


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """One that answers while this lasts."""
    there = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.split("?")[0]
            there.requests.append(f"{self.command} {self.path}")
            there.tokens.add(self.headers.get("Authorization"))
            found = there.answer(self.command, path, body)
            text = json.dumps({"error": f"nothing at {path}"} if found is None else found).encode()
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815 (names that the server looks for)

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    there.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield there
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
