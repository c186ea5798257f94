"""The Hugging Face hub's API for one data set, on this machine: what `huggingface_hub` and `datasets` ask of it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

FILE = "train.jsonl"


class Hub:
    """A data set `NAME` of a single file, with `contents` by commit; `refs` are branches and tags."""

    def __init__(self, name: str, contents: dict[str, bytes], refs: dict[str, str]) -> None:
        self.name, self.contents, self.refs = name, contents, refs
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

        def entry(self, commit: str) -> dict[str, object]:
            content = hub.contents[commit]
            return {"type": "file", "path": FILE, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(path)
            api, files = f"/api/datasets/{hub.name}", f"/datasets/{hub.name}/resolve/"
            if path.startswith(files):
                revision, _, name = path.removeprefix(files).partition("/")
                commit = hub.refs.get(revision, revision)
                if name != FILE or commit not in hub.contents:
                    return self.missing("EntryNotFound")
                content = hub.contents[commit]
                return self.answer(content, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
            if not path.startswith(api):
                return self.missing("RepoNotFound")
            what, _, rest = path.removeprefix(api).lstrip("/").partition("/")
            revision = rest.partition("/")[0] or "main"
            commit = hub.refs.get(revision, revision)
            if commit not in hub.contents:
                return self.missing("RevisionNotFound")
            if what in ("", "revision"):
                facts = {"id": hub.name, "sha": commit, "siblings": [{"rfilename": FILE}], "tags": []}
                return self.answer(json.dumps(facts).encode(), Content_Type="application/json")
            if what in ("tree", "paths-info"):
                return self.answer(json.dumps([self.entry(commit)]).encode(), Content_Type="application/json")
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
