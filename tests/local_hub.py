"""A stand-in for a model hub on this machine: what huggingface_hub's own client asks of one to push and pull a folder.

Commits are whole copies of the files, named by the digest of what they hold. Nothing is checked but that paths exist.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, bytes]] = {}  # commit -> path -> bytes
        self.heads: dict[str, str] = {}  # repository -> its newest commit
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[name] = files
        self.heads[repository] = name
        return name


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def answer(self, value=None, *, status: int = 200, data: bytes | None = None, **headers: str) -> None:
        body = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(\w+)", path):
            repository, commit = found[1], self._commit(found[1], found[2])
            siblings = [{"rfilename": name} for name in self.server.commits.get(commit, {})]
            if commit in self.server.commits:
                return self.answer({"id": repository, "modelId": repository, "sha": commit, "siblings": siblings})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(\w+)(/.*)?", path):
            files = self.server.commits.get(self._commit(found[1], found[2]))
            if files is None:
                return self.answer({"error": "no such revision"}, status=404, X_Error_Code="RevisionNotFound")
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self.answer(tree)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            commit = self._commit(found[1], found[2])
            data = self.server.commits.get(commit, {}).get(found[3])
            if data is not None:
                return self.answer(data=data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=commit)
        return self.answer({"error": f"no {path}"}, status=404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlparse(self.path).path)
        self.server.asked.append(f"POST {path}")
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked['organization']}/{asked['name']}"
            self.server.heads.setdefault(repository, self.server.commit(repository, {}))
            return self.answer({"url": f"{self.server.address}/{repository}", "name": repository, "id": "0"})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            files = dict(self.server.commits[self.server.heads[found[1]]])
            for line in filter(None, body.splitlines()):
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            name = self.server.commit(found[1], files)
            address = f"{self.server.address}/{found[1]}/commit/{name}"
            return self.answer({"success": True, "commitOid": name, "commitUrl": address, "hookOutput": ""})
        return self.answer({"error": f"no {path}"}, status=404)

    def _commit(self, repository: str, revision: str) -> str:
        return self.server.heads.get(repository, "") if revision == "main" else revision


@contextmanager
def local_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
