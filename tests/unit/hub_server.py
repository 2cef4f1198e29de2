"""A small Hugging Face Hub for tests: the HTTP protocol that huggingface_hub speaks, on a local port.

It serves and stores repositories held in memory: model info, ``resolve`` with HEAD and ranges, commit and
etag headers, LFS files, repository creation, upload and commit. Faults are set on the ``Hub`` object.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf")


@dataclass
class Refusal:
    """Answer ``status`` to requests whose path holds ``part``: the first ``skip`` pass, then ``times`` are
    refused, or all."""

    part: str
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    times: int | None = None
    skip: int = 0
    method: str | None = None


@dataclass
class Hub:
    """Repositories (name, revision, file, bytes) and faults. ``requests`` logs (method, path, Range).

    ``cuts`` lists after how many bytes a file's answers break off; ``stalls`` make them stop half-way until set.
    """

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    token: str | None = None
    refusals: list[Refusal] = field(default_factory=list)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    stalls: dict[str, threading.Event] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    url: str = ""

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Store ``files`` and return the commit."""
        self.repos.setdefault(repo, {})[revision] = files
        return commit_of(files)

    def find(self, repo: str, revision: str) -> dict[str, bytes] | None:
        revisions = self.repos.get(repo, {})
        if revision in revisions:
            return revisions[revision]
        return next((files for files in revisions.values() if commit_of(files) == revision), None)

    def bodies(self, name: str) -> list[str | None]:
        """The Range header of every GET of file ``name``."""
        return [range_ for method, path, range_ in self.requests if method == "GET" and path.endswith(name)]


def commit_of(files: dict[str, bytes]) -> str:
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + hashlib.sha1(files[name]).digest())
    return digest.hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve ``hub`` on a free port; ``hub.url`` is what HF_ENDPOINT should be."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route()

    def do_HEAD(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self._refused(path):
            return
        signed = path.startswith("/upload/")  # the address is the permission, as on the Hub's storage
        allowed = signed or self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if self.hub.token and not allowed:
            self._json(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self._create()
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/.+", path):
            self._preupload()
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self._commit(found[1], found[2])
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch()
        elif found := re.fullmatch(r"/upload/(\w+)", path):
            self.hub.uploads[found[1]] = self.body
            self._json(200, {})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+?)/([^/]+)", path):
            self._resolve(found[1], found[2], found[3])
        else:
            self._json(404, {"error": "no such path"})

    def _refused(self, path: str) -> bool:
        for refusal in self.hub.refusals:
            if refusal.part in path and refusal.times != 0 and refusal.method in (None, self.command):
                if refusal.skip:
                    refusal.skip -= 1
                    continue
                if refusal.times is not None:
                    refusal.times -= 1
                self._json(refusal.status, {"error": "refused"}, refusal.headers)
                return True
        return False

    def _info(self, repo: str, revision: str) -> None:
        if repo not in self.hub.repos:
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif (files := self.hub.find(repo, revision)) is None:
            self._json(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            with_sizes = "blobs" in parse_qs(urlsplit(self.path).query)
            siblings = [self._sibling(name, data, with_sizes) for name, data in sorted(files.items())]
            self._json(200, {"id": repo, "modelId": repo, "sha": commit_of(files), "siblings": siblings})

    def _sibling(self, name: str, data: bytes, with_sizes: bool) -> dict[str, object]:
        entry: dict[str, object] = {"rfilename": name}
        if with_sizes:
            entry |= {"size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if name.endswith(LFS_SUFFIXES):
                entry["lfs"] = {
                    "size": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "pointerSize": 130,
                }
        return entry

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        files = self.hub.find(repo, revision)
        if files is None or name not in files:
            code = "RevisionNotFound" if files is None else "EntryNotFound"
            self._json(404, {"error": "not found"}, {"X-Error-Code": code})
            return
        data = files[name]
        digest = hashlib.sha256(data) if name.endswith(LFS_SUFFIXES) else hashlib.sha1(data)
        headers = {
            "X-Repo-Commit": commit_of(files),
            "ETag": f'"{digest.hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        if name in self.hub.damaged:
            data = bytes(len(data))
        status, start = 200, 0
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            status, start = 206, int(wanted[1])
            stop = int(wanted[2]) + 1 if wanted[2] else len(data)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data = data[start:stop]
        self._head(status, headers, len(data))
        if self.command == "HEAD":
            return
        if (stall := self.hub.stalls.get(name)) is not None:
            self.wfile.write(data[: len(data) // 2])
            stall.wait()
            self.close_connection = True
            return
        cuts = self.hub.cuts.get(name)
        if cuts:
            self.wfile.write(data[: cuts.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        else:
            self.wfile.write(data)

    def _create(self) -> None:
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.repos:
            self._json(409, {"error": "You already created this model repo", "url": url})
        else:
            self.hub.add(repo, {})
            self._json(200, {"url": url, "id": repo})

    def _preupload(self) -> None:
        files = json.loads(self.body)["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self._json(200, {"files": modes})

    def _batch(self) -> None:
        objects = [
            {
                "oid": wanted["oid"],
                "size": wanted["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/upload/{wanted['oid']}"}},
            }
            for wanted in json.loads(self.body)["objects"]
        ]
        self._json(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, revision: str) -> None:
        files = dict(self.hub.find(repo, revision) or {})
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        commit = self.hub.add(repo, files, revision)
        self._json(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True})

    def _json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._head(status, {"Content-Type": "application/json", **(headers or {})}, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
