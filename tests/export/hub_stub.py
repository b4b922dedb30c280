"""As much of the hub's API as uploading and downloading a model takes, on localhost."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """Repositories by name, and what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repos: dict[str, Files] = {}
        self.commits: dict[str, list[str]] = {}
        self.private: set[str] = set()
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sha(self, repo: str) -> str:
        return f"{len(self.commits[repo]):040x}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        self.server.tokens.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            is_new = repo not in self.server.repos
            self.server.repos.setdefault(repo, {})
            self.server.commits.setdefault(repo, [])
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(repo)
            self._json({"url": f"{self.server.url}/{repo}"}, 200 if is_new else 409)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif found := re.fullmatch("/api/models/(.+)/preupload/main", path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif found := re.fullmatch("/api/models/(.+)/commit/main", path):
            self._commit(found[1], [json.loads(x) for x in body.splitlines() if x])
        else:
            self._json({"error": f"POST {path}"}, 404)

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repos[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.commits[repo].append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.server.sha(repo)
        url = f"{self.server.url}/{repo}/commit/{sha}"
        self._json({"commitUrl": url, "commitOid": sha, "success": True})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch("/api/models/(.+)/tree/[^/]+", path):
            files = self.server.repos[found[1]]
            self._json([_entry(name, content) for name, content in files.items()])
        elif found := re.fullmatch("/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            repo = found[1]
            if repo not in self.server.repos:
                self._json({"error": "Repository not found"}, 404, "RepoNotFound")
                return
            names = [{"rfilename": name} for name in self.server.repos[repo]]
            self._json({"id": repo, "sha": self.server.sha(repo), "siblings": names})
        elif found := re.fullmatch("/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = self.server.repos[found[1]].get(found[2])
            if content is None:
                self._json({"error": "Entry not found"}, 404, "EntryNotFound")
            else:
                self._send(content, 200, repo=found[1])
        else:
            self._json({"error": f"GET {path}"}, 404)

    def _json(self, answer: Any, status: int = 200, code: str = "") -> None:
        self._send(json.dumps(answer).encode(), status, code)

    def _send(self, body: bytes, status: int, code: str = "", repo: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        if code:
            self.send_header("X-Error-Code", code)
        if repo:
            self.send_header("X-Repo-Commit", self.server.sha(repo))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def _entry(name: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": oid}


@contextmanager
def serving() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
