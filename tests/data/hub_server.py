"""The Hugging Face hub's API for one repository, on this machine: what `huggingface_hub` and `datasets` ask of it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote, urlsplit

FILE = "train.jsonl"


class Hub:
    """A data set or model `NAME`, with its files by commit (`bytes`: a single `FILE`); `refs` are branches and tags."""

    def __init__(
        self,
        name: str,
        contents: Mapping[str, bytes | Mapping[str, bytes]],
        refs: dict[str, str],
        kind: Literal["datasets", "models"] = "datasets",
    ) -> None:
        self.name, self.refs, self.kind = name, refs, kind
        self.contents = {
            commit: {FILE: files} if isinstance(files, bytes) else dict(files) for commit, files in contents.items()
        }
        self.asked: list[str] = []
        self.url = ""


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serve it while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def missing(self, code: str) -> None:
            self.answer(b"{}", 404, X_Error_Code=code, X_Error_Message=code)

        def json(self, content: object) -> None:
            self.answer(json.dumps(content).encode(), Content_Type="application/json")

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(path)
            api = f"/api/{hub.kind}/{hub.name}"
            files = f"{'/datasets' if hub.kind == 'datasets' else ''}/{hub.name}/resolve/"
            if path.startswith(files):
                revision, _, name = path.removeprefix(files).partition("/")
                commit = hub.refs.get(revision, revision)
                if (content := hub.contents.get(commit, {}).get(name)) is None:
                    return self.missing("EntryNotFound")
                return self.answer(content, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
            if not path.startswith(api):
                return self.missing("RepoNotFound")
            what, _, rest = path.removeprefix(api).lstrip("/").partition("/")
            revision = rest.partition("/")[0] or "main"
            commit = hub.refs.get(revision, revision)
            if commit not in hub.contents:
                return self.missing("RevisionNotFound")
            held = hub.contents[commit]
            if what in ("", "revision"):
                siblings = [{"rfilename": name} for name in held]
                return self.json({"id": hub.name, "sha": commit, "siblings": siblings, "tags": []})
            if what in ("tree", "paths-info"):
                oids = {name: hashlib.sha1(content).hexdigest() for name, content in held.items()}
                return self.json(
                    [{"type": "file", "path": name, "size": len(held[name]), "oid": oids[name]} for name in held]
                )
            return self.missing("EntryNotFound")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.do_GET()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
