"""A stand-in for the Hub on this machine: what huggingface_hub's client calls to push, and transformers to load.

It speaks HTTP to the real client. Repositories are lists of commits, large files are kept by their SHA-256 as in the
Hub's LFS storage. After `stall_at` large files have arrived, more of them hang until the test is over.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})  # in their order
    messages: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return list(self.commits)[-1]


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub:` serves at `hub.endpoint`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}  # "models/me/name", "spaces/me/name"
        self.blobs: dict[str, bytes] = {}
        self.received: list[str] = []  # the SHA-256 of every large file sent, in turn
        self.stall_at: int | None = None
        self.refuses_files = False
        self.stalled = threading.Event()
        self.over = threading.Event()

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('type') or 'model'}s/{wanted['organization']}/{wanted['name']}"
            page = {"url": f"{self.server.endpoint}/{name.removeprefix('models/')}"}
            if name in self.server.repos:
                return self.answer({"error": "You already created this repo", **page}, 409)
            self.server.repos[name] = Repo(private=wanted.get("visibility") == "private")
            return self.answer(page)
        if path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.answer({"objects": [self.lfs(item) for item in json.loads(body)["objects"]]})
        kind, name, action, rest = re.fullmatch(r"/api/(\w+)/([^/]+/[^/]+)/(\w+)/(.+)", path).groups()
        repo = self.server.repos[f"{kind}/{name}"]
        if action == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return self.answer({"files": [self.preupload(repo, path) for path in paths]})
        if action == "commit":
            return self.commit(repo, [json.loads(line) for line in body.splitlines()], name)
        assert action == "tag", path
        tag = json.loads(body)["tag"]
        if tag in repo.tags:
            return self.answer({"error": "Tag reference exists already"}, 409)
        repo.tags[tag] = rest
        return self.answer({})

    def do_PUT(self) -> None:
        if self.server.stall_at is not None and len(self.server.received) >= self.server.stall_at:
            self.server.stalled.set()
            self.server.over.wait()
            return
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = hashlib.sha256(content).hexdigest()
        self.server.received.append(oid)
        assert self.path == f"/lfs/{oid}"
        if self.server.refuses_files:
            return self.answer({"error": "expired"}, 400)
        self.server.blobs[oid] = content
        self.answer({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": "me"})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(*found.groups())
        found = re.fullmatch(r"/api/(\w+/([^/]+/[^/]+))(/.*)?", path)
        repo = self.server.repos.get(found[1]) if found else None
        if repo is None:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        _, name, rest = found.groups()
        if rest and rest.startswith("/tree/"):
            _, _, revision, *folder = rest.split("/", 3)
            files = repo.commits[self.resolve(repo, revision)]
            if folder and not any(name.startswith(f"{folder[0]}/") for name in files):
                return self.answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return self.answer(
                [{"type": "file", "path": name, "size": len(content), "oid": "0"} for name, content in files.items()]
            )
        revision = self.resolve(repo, rest.split("/")[2] if rest else "main")
        if revision is None:
            return self.answer({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name} for name in repo.commits[revision]]
        return self.answer(
            {"id": name, "private": repo.private, "sha": revision, "siblings": siblings, "tags": [], "downloads": 0}
        )

    def commit(self, repo: Repo, lines: list[dict], name: str) -> None:
        files = dict(repo.commits[repo.head])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(b"".join([repo.head.encode(), *files.values()])).hexdigest()
        repo.commits[oid] = files
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.server.endpoint}/{name}/commit/{oid}"})

    def lfs(self, item: dict) -> dict:
        known = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] in self.server.blobs:
            return known
        return {**known, "actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{item['oid']}"}}}

    def file(self, name: str, revision: str, path: str) -> None:
        repo = self.server.repos[f"models/{name}"]
        commit = self.resolve(repo, revision)
        content = repo.commits[commit].get(path) if commit else None
        if content is None:
            code = "EntryNotFound" if commit else "RevisionNotFound"
            return self.answer({"error": code}, 404, {"X-Error-Code": code, "X-Repo-Commit": commit or ""})
        etag = hashlib.sha256(content).hexdigest()
        self.answer(content, 200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    @staticmethod
    def resolve(repo: Repo, revision: str) -> str | None:
        """Commit of a branch, tag or commit."""
        named = {"main": repo.head, **repo.tags}.get(revision, revision)
        return named if named in repo.commits else None

    @staticmethod
    def preupload(repo: Repo, path: str) -> dict:
        """How to send a file, and what the branch holds under its name: by that the client sees what has changed."""
        large = path.endswith((".safetensors", ".mp4"))
        here = repo.commits[repo.head].get(path)
        known = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if here is None:
            return known
        blob = b"blob %d\0%b" % (len(here), here)  # as Git names it
        return {**known, "oid": hashlib.sha256(here).hexdigest() if large else hashlib.sha1(blob).hexdigest()}

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)
