"""A Hugging Face Hub on this machine: the endpoints that downloads and uploads use, with faults to order.

Repositories are dictionaries of files. Large files (everything but JSON, YAML and Markdown) are answered as the Hub
answers for LFS: a redirect to another path that has the bytes, with the hash and the size in headers of their own.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a_token_of_the_tests"


@dataclass
class Repository:
    """Files by name; `revisions` are names that mean its one commit."""

    files: dict[str, bytes] = field(default_factory=dict)
    revisions: set[str] = field(default_factory=lambda: {"main", COMMIT})
    private: bool = False
    gated: bool = False


@dataclass
class Hub:
    """What the server knows, does wrong, and has been asked.

    Attributes:
        broken: status to answer with, by the start of a path, and how many times.
        cut: names of files of which only this many bytes arrive, once.
        altered: names of files in place of whose bytes others are sent.
        requests: method and path of everything asked, in order.
        sent: bytes of file contents that went out.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    broken: dict[str, list[int]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    altered: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0
    lfs: dict[str, bytes] = field(default_factory=dict)

    def asked_for(self, part: str) -> int:
        """How many requests had this in their path."""
        return sum(part in path for _, path in self.requests)


def is_large(name: str) -> bool:
    return not name.endswith((".json", ".yaml", ".md", ".txt", ".gitattributes"))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub that answers until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
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

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append((self.command, path))
        for start, statuses in self.hub.broken.items():
            if start in path and statuses:
                return self._say(statuses.pop(0), {"error": "out of order"})
        for pattern, method in _ROUTES.items():
            found = re.fullmatch(pattern, path)
            if found:
                return getattr(self, method)(**found.groupdict())
        return self._say(404, {"error": f"no route {path}"})

    def _say(self, status: int, answer: object, headers: dict[str, str] | None = None) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repository(self, repo: str, revision: str | None = None) -> Repository | None:
        """The repository, or None once a refusal has been said."""
        known = self.hub.repositories.get(repo)
        may_read = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if known is None or (known.private and not may_read):
            self._say(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif known.gated and not may_read:
            self._say(403, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})
        elif revision is not None and revision not in known.revisions:
            self._say(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            return known
        return None

    def info(self, repo: str, revision: str | None = None) -> None:
        known = self._repository(repo, revision)
        if known is not None:
            siblings = [self._described(name, content) for name, content in known.files.items()]
            self._say(200, {"id": repo, "sha": COMMIT, "private": known.private, "siblings": siblings})

    def _described(self, name: str, content: bytes) -> dict:
        lfs = {"lfs": {"sha256": sha256(content), "size": len(content), "pointerSize": 130}} if is_large(name) else {}
        return {"rfilename": name, "size": len(content), "blobId": git_hash(content), **lfs}

    def paths_info(self, repo: str, revision: str) -> None:
        known = self._repository(repo, revision)
        if known is None:
            return
        asked = json.loads(self.body)["paths"] if self.body.startswith(b"{") else _form(self.body)
        found = [self._file(name, known.files[name]) for name in asked if name in known.files]
        self._say(200, found)

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        known = self._repository(repo, revision)
        if known is None:
            return
        start = f"{folder}/" if folder else ""
        below = {name: content for name, content in known.files.items() if name.startswith(start)}
        folders = {start + name.removeprefix(start).partition("/")[0] for name in below} - set(below)
        here = [self._file(name, content) for name, content in below.items() if "/" not in name.removeprefix(start)]
        self._say(200, here + [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)])

    def _file(self, name: str, content: bytes) -> dict:
        lfs = {"lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 130}} if is_large(name) else {}
        return {"type": "file", "path": name, "size": len(content), "oid": git_hash(content), **lfs}

    def resolve(self, repo: str, revision: str, name: str) -> None:
        known = self._repository(repo, revision)
        if known is None:
            return None
        if name not in known.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            return self._say(404, {"error": "Entry not found"}, headers)
        content = known.files[name]
        if not is_large(name):
            return self._send(name, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{git_hash(content)}"'})
        headers = {
            # another host, as far as a client can tell
            "Location": f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{repo}/{name}",
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{sha256(content)}"',
            "X-Linked-Size": str(len(content)),
        }
        return self._say(302, b"", headers)

    def cdn(self, repo: str, name: str) -> None:
        assert "Authorization" not in self.headers
        content = self.hub.altered.get(name, self.hub.repositories[repo].files[name])
        self._send(name, content, {"ETag": f'"{sha256(content)}"'})

    def _send(self, name: str, content: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop, status = 0, len(content), 200
        if wanted:
            start, status = int(wanted[1]), 206
            stop = min(stop, int(wanted[2]) + 1) if wanted[2] else stop
            headers = headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        part = content[start:stop]
        self.send_response(status)
        for header, value in (headers | {"Content-Length": str(len(part)), "Accept-Ranges": "bytes"}).items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in self.hub.cut:
            part = part[: self.hub.cut.pop(name)]
            self.close_connection = True
        self.hub.sent += len(part)
        self.wfile.write(part)

    def create(self) -> None:
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._say(401, {"error": "Invalid username or password."})
        if repo in self.hub.repositories:
            return self._say(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"})
        self.hub.repositories[repo] = Repository(
            {}, private=bool(wanted.get("private")) or wanted.get("visibility") == "private"
        )
        return self._say(200, {"url": f"{self.hub.url}/{repo}", "name": repo, "id": "0"})

    def preupload(self, repo: str, revision: str) -> None:
        if self._repository(repo, revision) is None:
            return
        files = json.loads(self.body)["files"]
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if is_large(f["path"]) else "regular", "shouldIgnore": False}
            for f in files
        ]
        self._say(200, {"files": modes})

    def lfs_batch(self, repo: str) -> None:
        objects = [
            {
                "oid": thing["oid"],
                "size": thing["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/lfs-upload/{thing['oid']}", "header": {}}},
            }
            for thing in json.loads(self.body)["objects"]
        ]
        self._say(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_upload(self, oid: str) -> None:
        assert sha256(self.body) == oid
        self.hub.lfs[oid] = self.body
        self._say(200, {})

    def commit(self, repo: str, revision: str) -> None:
        known = self._repository(repo, revision)
        if known is None:
            return
        for line in self.body.decode().splitlines():
            change = json.loads(line)
            value = change["value"]
            if change["key"] == "file":
                known.files[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                known.files[value["path"]] = self.hub.lfs[value["oid"]]
        url = f"{self.hub.url}/{repo}/commit/{COMMIT}"
        self._say(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def whoami(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._say(401, {"error": "Invalid username or password."})
        return self._say(200, {"name": "me", "type": "user", "orgs": []})

    def yaml_is_fine(self) -> None:
        self._say(200, {"errors": [], "warnings": []})


def _form(body: bytes) -> list[str]:
    from urllib.parse import parse_qs

    return parse_qs(body.decode()).get("paths", [])


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = {
    rf"/api/models/{_REPO}": "info",
    rf"/api/models/{_REPO}/revision/(?P<revision>.+)": "info",
    rf"/api/models/{_REPO}/paths-info/(?P<revision>.+)": "paths_info",
    rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?": "tree",
    r"/api/repos/create": "create",
    r"/api/whoami-v2": "whoami",
    r"/api/validate-yaml": "yaml_is_fine",
    rf"/api/models/{_REPO}/preupload/(?P<revision>.+)": "preupload",
    rf"/api/models/{_REPO}/commit/(?P<revision>.+)": "commit",
    rf"/{_REPO}\.git/info/lfs/objects/batch": "lfs_batch",
    r"/lfs-upload/(?P<oid>\w+)": "lfs_upload",
    rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)": "resolve",
    rf"/cdn/{_REPO}/(?P<name>.+)": "cdn",
}
