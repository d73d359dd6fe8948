"""A stand-in for the hub on this machine that takes uploads: repositories, git-lfs objects and commits over HTTP."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Uploads:
    """What was uploaded: files by repository; `sent`, the git-lfs objects that came over the line, each time.

    tokens: by token the organisations that it may write to. fails: an upload of an object ends with status 500 once
    that many came.
    """

    tokens: dict[str, set[str]]
    fails: int | None = None
    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    visibility: dict[str, str | None] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    sent: list[str] = field(default_factory=list)

    def post(self, path: str, token: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON document."""
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if token not in self.tokens:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._place(one) for one in json.loads(body)["objects"]]}
        repository, action = path.removeprefix("/api/models/").rsplit("/", 2)[:2]
        if action == "preupload":
            files = [self._mode(repository, one["path"]) for one in json.loads(body)["files"]]
            return 200, {"files": files}
        assert action == "commit", path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.repositories[repository][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[repository][value["path"]] = self.objects[value["oid"]]
        return 200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.address}/{repository}/commit/{COMMIT}"}

    def _create(self, asked: dict[str, Any], token: str) -> tuple[int, Any]:
        repository = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in self.tokens[token]:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        known = repository in self.repositories
        if not known:
            self.repositories[repository] = {}
            self.visibility[repository] = asked.get("visibility") or ("private" if asked.get("private") else None)
        return 409 if known else 200, {"url": f"{self.address}/{repository}", "error": "You already created this model"}

    def _mode(self, repository: str, path: str) -> dict[str, Any]:
        return {
            "path": path,
            "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
            "shouldIgnore": False,
            "oid": None,
        }

    def _place(self, asked: dict[str, Any]) -> dict[str, Any]:
        place = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] in self.objects:
            return place
        return place | {"actions": {"upload": {"href": f"{self.address}/lfs/{asked['oid']}"}}}

    def put(self, oid: str, body: bytes) -> int:
        if self.fails is not None and len(self.sent) >= self.fails:
            return 400
        assert hashlib.sha256(body).hexdigest() == oid
        self.objects[oid] = body
        self.sent.append(oid)
        return 200


@contextmanager
def hub_with_uploads(tokens: dict[str, set[str]], fails: int | None = None) -> Iterator[Uploads]:
    """The stand-in; its `address` is where it listens."""
    uploads = Uploads(tokens, fails)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            token = self.headers.get("authorization", "").removeprefix("Bearer ")
            self.send(*uploads.post(self.place, token, self.body))

        def do_PUT(self) -> None:
            self.send(uploads.put(self.place.removeprefix("/lfs/"), self.body), {})

        def do_GET(self) -> None:
            known = self.place.removeprefix("/api/models/") in uploads.repositories
            self.send(200 if known else 404, {"id": self.place, "sha": COMMIT, "siblings": [], "error": "not found"})

        @property
        def place(self) -> str:
            return unquote(self.path.partition("?")[0])

        @property
        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("content-length", 0)))

        def send(self, status: int, document: Any) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    uploads.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield uploads
    finally:
        server.shutdown()
        server.server_close()
