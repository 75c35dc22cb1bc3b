"""A stub of the Hugging Face hub on loopback: what pushing needs of its HTTP interface, with real files behind it.

`with Hub() as hub:` serves until the block ends; `hub.environment` sends huggingface_hub of a child process there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token_for_tests"


class Hub:
    """The hub's state: repositories with a visibility and, by branch, files; objects by digest; requests made."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.refuse: dict[str, int] = {}
        """Status by a part of the path: how requests to it are answered."""

    def __enter__(self) -> Self:
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *ending: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a child process: the stub, a token, online, and uploads by LFS."""
        changes = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0",
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
        return {**os.environ, **changes}

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """What stands in a branch."""
        return self.repos[repo]["branches"][branch]


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_PUT(self) -> None:
        self._answer(self._put)

    def _answer(self, method: Any) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append(f"{self.command} {path}")
        status = next((code for part, code in self.state.refuse.items() if part in path), 0)
        if not status and self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/objects/"):
            status = 401
        found = None if status else method(path.strip("/").split("/"), body)
        self._send(status or (200 if found is not None else 404), found if found is not None else {"error": "refused"})

    def _send(self, status: int, document: Any) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _get(self, path: list[str], body: bytes) -> Any:
        if path == ["api", "whoami-v2"]:
            return {"type": "user", "name": "org", "auth": {}}
        repo = "/".join(path[2:4])
        if path[:2] != ["api", "models"] or repo not in self.state.repos:
            return None
        if path[4:5] == ["tree"]:
            files = self.state.files(repo, path[5])
            return [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
        private = self.state.repos[repo]["private"]
        return {"id": repo, "private": private, "sha": "0" * 40, "siblings": [], "tags": []}

    def _post(self, path: list[str], body: bytes) -> Any:
        if path == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if path == ["api", "validate-yaml"]:
            return {"errors": [], "warnings": []}
        if path[-1] == "batch":
            return self._batch(json.loads(body))
        repo, what, branch = "/".join(path[2:4]), path[4], path[5]
        branches = self.state.repos[repo]["branches"]
        if what == "branch":
            branches.setdefault(branch, dict(branches["main"]))
            return {}
        if what == "preupload":
            files = json.loads(body)["files"]
            return {"files": [{"path": file["path"], "uploadMode": _mode(file["path"]), "shouldIgnore": False}
                              for file in files]}  # fmt: skip
        return self._commit(repo, branches[branch], [json.loads(line) for line in body.splitlines()])

    def _create(self, wanted: dict[str, Any]) -> Any:
        repo = f"{wanted.get('organization') or 'org'}/{wanted['name']}"
        private = wanted.get("visibility") == "private"
        self.state.repos.setdefault(repo, {"private": private, "branches": {"main": {".gitattributes": b""}}})
        return {"url": f"{self.state.url}/{repo}", "name": repo}

    def _batch(self, wanted: dict[str, Any]) -> Any:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.state.url}/objects/{item['oid']}", "header": {}}}}
            for item in wanted["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _put(self, path: list[str], body: bytes) -> Any:
        assert hashlib.sha256(body).hexdigest() == path[1]
        self.state.objects[path[1]] = body
        return {}

    def _commit(self, repo: str, files: dict[str, bytes], lines: list[dict[str, Any]]) -> Any:
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.state.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        return {"commitUrl": f"{self.state.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}


def _mode(name: str) -> str:
    return "lfs" if name.endswith((".safetensors", ".png")) else "regular"
