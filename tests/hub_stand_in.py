"""A small stand-in for the hub's endpoint on the loopback interface: enough to create a repository, commit and download.

It answers as the hub does where ``huggingface_hub`` looks: status, ``X-Error-Code``, ``ETag`` and ``X-Repo-Commit``. It keeps
every request in ``requests``, so a test can say what went over the network and what did not.
"""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Repository:
    """Branches and the commits they point to; a commit is the files it holds."""

    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        everything = self.files(branch) | files if branch in self.branches else dict(files)
        digest = hashlib.sha1(f"{len(self.commits)}".encode())
        self.branches[branch] = digest.hexdigest()
        self.commits[digest.hexdigest()] = everything
        return digest.hexdigest()

    def sha(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str) -> Files:
        return self.commits[self.sha(revision) or ""]


class HubStandIn:
    """The server; repositories can be filled directly with ``publish``."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.cut_off: int | None = None
        """Send only so many bytes of each file, then close the connection."""
        self._port = 0
        self._start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def publish(self, repository: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Commit files and return the commit's hash."""
        return self.repositories.setdefault(repository, Repository()).commit(branch, dict(files))

    def downloads(self) -> list[str]:
        """Return what was downloaded since the last call, and forget all requests."""
        found = [line.removeprefix("GET ") for line in self.requests if line.startswith("GET ")]
        self.requests.clear()
        return found

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuse connections inside the block."""
        self.close()
        try:
            yield
        finally:
            self._start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _start(self) -> None:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()


@contextmanager
def process_that_uses(hub: HubStandIn, home: Path) -> Iterator[Callable[..., Any]]:
    """Give a function that runs ``f(*args, **kwargs)`` in another process, for which the stand-in is the hub.

    The client reads its environment when it is imported, and the tests' own process is offline, so another one is needed.
    Functions must be importable there; results and exceptions come back.
    """
    pool = ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), _set_environment, (hub.url, str(home))
    )
    with pool:
        yield lambda function, *args, **kwargs: pool.submit(partial(function, *args, **kwargs)).result(
            timeout=300
        )


def _set_environment(endpoint: str, home: str) -> None:
    os.environ.update(
        HF_ENDPOINT=endpoint, HF_HOME=home, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_PROGRESS_BARS="1"
    )
    os.environ.update(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._download()

    def do_GET(self) -> None:
        self._download()

    def do_POST(self) -> None:
        path = self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path):
            name, action, revision = match.groups()
            if name not in self.hub.repositories:
                self._refuse(404, "RepoNotFound")
            else:
                getattr(self, f"_{action}")(name, revision, body)
        else:
            self._refuse(404, "")

    # ------------------------------------------------------------------ answers

    def _download(self) -> None:
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._note())
        repository = self.hub.repositories.get(match.group(1)) if match else None
        if match is None or repository is None:
            return self._refuse(401, "RepoNotFound")  # the hub does not tell a missing from a private one
        sha = repository.sha(match.group(2))
        if sha is None:
            return self._refuse(404, "RevisionNotFound")
        content = repository.files(sha).get(match.group(3))
        if content is None:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": sha})
        etag = hashlib.sha256(content).hexdigest()
        self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": sha}, self.hub.cut_off)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        taken = name in self.hub.repositories
        if not taken:
            self.hub.publish(name, {})
        self._json(409 if taken else 200, {"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def _validate(self, card: str) -> None:
        found = re.search(r"^base_model: (.*)$", card, re.MULTILINE)
        wrong = found is not None and HUB_ID.fullmatch(found.group(1)) is None
        errors = (
            [{"message": f'"base_model" with value "{found.group(1)}" is not valid'}]
            if found and wrong
            else []
        )
        self._json(400 if errors else 200, {"errors": errors, "warnings": []})

    def _branch(self, name: str, revision: str, body: bytes) -> None:
        repository = self.hub.repositories[name]
        taken = revision in repository.branches
        if not taken:
            repository.branches[revision] = repository.branches["main"]
        self._json(409 if taken else 200, {})

    def _preupload(self, name: str, revision: str, body: bytes) -> None:
        modes = {"uploadMode": "regular", "shouldIgnore": False}
        self._json(200, {"files": [{"path": f["path"], **modes} for f in json.loads(body)["files"]]})

    def _commit(self, name: str, revision: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in lines if e["key"] == "file"
        }
        sha = self.hub.repositories[name].commit(revision, files)
        pull = (
            {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/1"} if "create_pr=1" in self.path else {}
        )
        self._json(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, **pull})

    # ------------------------------------------------------------------ plumbing

    def _note(self) -> str:
        path = unquote(urlsplit(self.path).path)
        if path != "/api/agent-harnesses":  # the client asks it once, whatever it is used for
            self.hub.requests.append(f"{self.command} {path}")
        return path

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._answer(status, b"", {"X-Error-Code": code, **(headers or {})})

    def _json(self, status: int, values: dict[str, Any]) -> None:
        self._answer(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str], cut_off: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut_off])
