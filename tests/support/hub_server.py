"""A stand-in for the hub on this machine: one repository of small files over HTTP."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

COMMIT = "c0ffee" + "0" * 34
REVISIONS = ("main", "v1", "refs/pr/1", COMMIT)


@contextmanager
def hub(repository: str, files: dict[str, bytes], gated: bool = False) -> Iterator[tuple[str, list[str]]]:
    """The address, and the names of the files that are fetched from it, as they are.

    gated: what the repository is and has is told to everyone, its files to nobody. It has one revision, COMMIT, which
    the branch main and the tag v1 name.
    """
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(self.path.partition("?")[0])
            prefix, api = f"/{repository}/resolve/", f"/api/models/{repository}"
            if path.startswith(prefix) and gated:
                self.send(None, body, "GatedRepo", 403)
            elif path.startswith(prefix):
                name = path.removeprefix(prefix).partition("/")[2]
                if body:
                    fetched.append(name)
                self.send(files.get(name), body)
            elif path in (api, *(f"{api}/revision/{name}" for name in REVISIONS)):
                siblings = [{"rfilename": name} for name in files]
                self.send(json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode(), body)
            elif path.startswith(f"{api}/tree/"):
                entries = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                self.send(json.dumps(entries).encode(), body)
            elif path == f"{api}/refs":
                refs = {"branches": ["main"], "tags": ["v1"]}
                named = {
                    kind: [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": COMMIT} for name in names]
                    for kind, names in refs.items()
                }
                self.send(json.dumps(named | {"converts": []}).encode(), body)
            else:
                self.send(None, body, "RevisionNotFound" if path.startswith(f"{api}/revision/") else "RepoNotFound")

        def send(self, data: bytes | None, body: bool, error: str = "EntryNotFound", status: int = 404) -> None:
            self.send_response(status if data is None else 200)
            if data is None:
                self.send_header("X-Error-Code", error)
            else:
                self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            if body and data:
                self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
