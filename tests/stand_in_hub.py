"""A stand-in for the Hugging Face Hub on this machine: the parts of its API that an upload calls, over HTTP."""

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
from pathlib import Path
from typing import Any

import pytest
import yaml

TOKEN, OWNER = "hf_of_the_tests", "tester"


@dataclass
class Repository:
    """A model repository: files by path, its visibility, and the messages of its commits by branch."""

    visibility: str | None
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, str]] = field(default_factory=list)

    def download(self, folder: Path) -> Path:
        """Writes its files to a folder, with those that the Hub and its client add."""
        for name, content in {**self.files, ".gitattributes": b"*.safetensors filter=lfs\n"}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        (folder / ".cache/huggingface/download").mkdir(parents=True)
        (folder / ".cache/huggingface/download/config.json.metadata").write_text("etag\n")
        return folder


@dataclass
class StandInHub:
    """What the server holds, and what it refuses.

    Attributes:
        refuses: status and message in place of an answer, by the kind of request: "create", "preupload", "lfs", "put",
            "commit".
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    refuses: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        kind, arguments = _kind(method, path.partition("?")[0])
        self.requests.append(kind)
        if kind in self.refuses:
            status, message = self.refuses[kind]
            return status, {"error": message}
        if kind not in ("put", "validate") and token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        return getattr(self, f"_{kind}")(body, *arguments)  # type: ignore[no-any-return]

    def _validate(self, body: bytes) -> tuple[int, Any]:
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
        errors = [] if match and isinstance(yaml.safe_load(match[1]), dict) else [{"message": "no metadata"}]
        return 400 if errors else 200, {"errors": errors, "warnings": []}

    def _create(self, body: bytes) -> tuple[int, Any]:
        content = json.loads(body)
        name = f"{content.get('organization') or OWNER}/{content['name']}"
        status = 409 if name in self.repositories else 200
        self.repositories.setdefault(name, Repository(content.get("visibility")))
        return status, {"url": f"{self.url}/{name}"}

    def _preupload(self, body: bytes, name: str, _: str) -> tuple[int, Any]:
        files = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
        return (200, {"files": files}) if name in self.repositories else (404, {"error": "Repository not found"})

    def _lfs(self, body: bytes, _: str) -> tuple[int, Any]:
        objects = []
        for one in json.loads(body)["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.url}/upload/{one['oid']}", "header": {}}}}
            objects.append(one if one["oid"] in self.objects else one | upload)
        return 200, {"transfer": "basic", "objects": objects}

    def _put(self, body: bytes, oid: str) -> tuple[int, Any]:
        assert hashlib.sha256(body).hexdigest() == oid
        self.objects[oid] = body
        return 200, {}

    def _commit(self, body: bytes, name: str, branch: str) -> tuple[int, Any]:
        repository, message = self.repositories[name], ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                assert value["encoding"] == "base64"
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.objects[value["oid"]]
        repository.commits.append((branch, message))
        number = len(repository.commits)
        return 200, {
            "commitUrl": f"{self.url}/{name}/commit/{number:040d}",
            "commitOid": f"{number:040d}",
            "pullRequestUrl": f"{self.url}/{name}/discussions/{number}",
        }


_ROUTES = {
    "validate": r"POST /api/validate-yaml",
    "create": r"POST /api/repos/create",
    "preupload": r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)",
    "lfs": r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch",
    "put": r"PUT /upload/([0-9a-f]{64})",
    "commit": r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)",
}


def _kind(method: str, path: str) -> tuple[str, tuple[str, ...]]:
    for kind, pattern in _ROUTES.items():
        if match := re.fullmatch(pattern, f"{method} {path}"):
            return kind, match.groups()
    raise AssertionError(f"the stand-in knows no {method} {path}")


@contextmanager
def serving(hub: StandInHub) -> Iterator[StandInHub]:
    """Serves it on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content = hub.answer(self.command, self.path, body, self.headers.get("Authorization"))
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_PUT = _answer  # noqa: N815  # the names that the base class calls

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """The stand-in, in the place of the Hub for the client in this process, with a valid token."""
    from huggingface_hub import constants

    with serving(StandInHub()) as stand_in:
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in stores as the older protocol does
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield stand_in
