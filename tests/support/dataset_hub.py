"""A stand-in for the hub on this machine: one data set over HTTP, whose files are read in ranges as streams are."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

import pytest

COMMIT = "da7a5e7" + "0" * 33


@contextmanager
def dataset_hub(repository: str, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Make the libraries ask this server. Yields the names of the files whose contents were sent."""
    sent: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(self.path.partition("?")[0])
            resolve, api = f"/datasets/{repository}/resolve/", f"/api/datasets/{repository}"
            if path.startswith(resolve):
                name = path.removeprefix(resolve).partition("/")[2]
                self.send(files.get(name), body, "EntryNotFound")
                if body:
                    sent.append(name)
            elif path == api or path.startswith(f"{api}/revision/"):
                siblings = [{"rfilename": name} for name in files]
                self.send(json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode(), body)
            elif path.startswith(f"{api}/tree/"):
                folder = path.removeprefix(f"{api}/tree/").partition("/")[2]
                self.send(json.dumps(listing(files, folder, "recursive=true" in self.path.lower())).encode(), body)
            else:
                self.send(None, body, "RepoNotFound")

        def send(self, data: bytes | None, body: bool, error: str = "") -> None:
            wanted, part = self.headers.get("Range"), data or b""
            self.send_response(404 if data is None else 206 if wanted else 200)
            if data is None:
                self.send_header("X-Error-Code", error)
            else:
                if wanted:
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    part = data[int(first) : int(last) + 1 if last else None]
                    self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
                self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if body:
                self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    ask(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    try:
        yield sent
    finally:
        server.shutdown()
        server.server_close()


def listing(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, object]]:
    """Entries of a folder of the repository ("": its root), with those of its folders if recursive."""
    inside = {name: data for name, data in files.items() if not folder or name.startswith(f"{folder}/")}
    depth = folder.count("/") + 1 if folder else 0
    entries: list[dict[str, object]] = [
        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name, data in inside.items()
        if recursive or name.count("/") == depth
    ]
    folders = {"/".join(name.split("/")[: depth + 1]) for name in inside if name.count("/") > depth}
    return entries + [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)]


def ask(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the hub's libraries ask an address."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", address)
    monkeypatch.setattr("datasets.config.HUB_DATASETS_URL", address + "/datasets/{repo_id}/resolve/{revision}/{path}")
