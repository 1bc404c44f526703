"""A hub on this machine: as much of the Hugging Face hub's protocol as huggingface_hub and datasets ask for.

As on the hub, files of large kinds are redirected to a storage host, and a repository that is not there is answered
like one that may not be seen. There is no Xet, which the libraries do without where a hub does not offer it.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)/?(.*))?")
RESOLVE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
STORAGE = re.compile(r"/storage/(\w+)")
RANGE = re.compile(r"bytes=(\d+)-(\d*)")
IN_STORAGE = (".safetensors", ".bin", ".parquet")


@dataclass(frozen=True)
class Branch:
    """A branch of a repository: its files by their paths."""

    kind: str  # models or datasets
    repository: str
    name: str
    files: Mapping[str, bytes]

    @cached_property
    def commit(self) -> str:
        """Forty digits, others for other contents."""
        digest = hashlib.sha1(f"{self.kind}/{self.repository}@{self.name}".encode())
        for path, content in sorted(self.files.items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()

    def tree(self, folder: str, recursive: bool) -> list[dict]:
        """What the hub says of the contents of a folder; nothing if there is no such folder."""
        prefix = f"{folder}/" if folder else ""
        below = [path for path in sorted(self.files) if path.startswith(prefix)]
        folders = {path[: end.start()] for path in below for end in re.finditer("/", path) if end.start() > len(prefix)}
        paths = [*sorted(folders), *below]
        return [self.describe(path) for path in paths if recursive or "/" not in path.removeprefix(prefix)]

    def describe(self, path: str) -> dict:
        """What the hub says of a file or folder."""
        if path not in self.files:
            return {"type": "directory", "oid": self.commit, "size": 0, "path": path}
        content = self.files[path]
        entry = {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": path}
        if path.endswith(IN_STORAGE):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry


class Hub:
    """A server in a thread of this process, until the with statement ends.

    Args:
        models: files of each model, by the model's name.
        datasets: files of each dataset, by its name, or by NAME@BRANCH for another branch than main.

    Attributes:
        fetched: the files whose content was sent, as OWNER/NAME/PATH.
    """

    def __init__(self, models: Mapping[str, Mapping[str, bytes]], datasets: Mapping[str, Mapping[str, bytes]]) -> None:
        self._branches: list[Branch] = []
        for kind, repositories in (("models", models), ("datasets", datasets)):
            for key, files in repositories.items():
                repository, _, name = key.partition("@")
                self._branches.append(Branch(kind, repository, name or "main", files))
        self.fetched: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]

    def __enter__(self) -> "Hub":
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, variables: Mapping[str, str], cache: Path) -> dict[str, str]:
        """These variables for a process that asks this hub.

        It is its own proxy as well: what is asked of any other host comes here too, and goes no further.
        """
        kept = {name: value for name, value in variables.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
        address = f"http://127.0.0.1:{self.port}"
        proxies = {f"{scheme}_proxy": address for scheme in ("http", "https", "all")}
        proxies["no_proxy"] = "127.0.0.1,localhost"
        own = {"HF_ENDPOINT": address, "HF_HOME": str(cache)}
        return kept | proxies | {name.upper(): value for name, value in proxies.items()} | own

    def branches(self, kind: str, repository: str) -> list[Branch]:
        """Those of a repository; none if there is no such repository."""
        return [branch for branch in self._branches if (branch.kind, branch.repository) == (kind, repository)]

    def stored(self, digest: str) -> tuple[Branch, str]:
        """Where a file is, by the digest of its content."""
        found = ((branch, path) for branch in self._branches for path in branch.files)
        return next(place for place in found if digest in str(place[0].describe(place[1]).get("lfs")))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if match := API.fullmatch(url.path):
            kind, repository, verb, revision, path = (unquote(group or "") for group in match.groups())
            if branch := self._branch(kind, repository, revision or "main"):
                self._answer_api(branch, verb, path, parse_qs(url.query).get("recursive") == ["true"])
        elif match := RESOLVE.fullmatch(url.path):
            kind, repository, revision, path = (unquote(group or "models") for group in match.groups())
            if branch := self._branch(kind, repository, revision):
                self._answer_file(branch, path)
        elif match := STORAGE.fullmatch(url.path):
            self._send_file(*self.hub.stored(match[1]), {})
        else:
            self._send(404, b"", {})

    do_HEAD = do_CONNECT = do_GET  # noqa: N815

    def _branch(self, kind: str, repository: str, revision: str) -> Branch | None:
        branches = self.hub.branches(kind, repository)
        for branch in branches:
            if revision in (branch.name, branch.commit):
                return branch
        if branches:
            self._send_error(404, "RevisionNotFound", f"Invalid rev id: {revision}", {})
        else:
            self._send_error(401, "RepoNotFound", "Invalid username or password.", {})
        return None

    def _answer_api(self, branch: Branch, verb: str, path: str, recursive: bool) -> None:
        if verb != "tree":
            files = [{"rfilename": path} for path in branch.files]
            self._send_json({"_id": "0" * 24, "id": branch.repository, "sha": branch.commit, "siblings": files,
                             "private": False, "downloads": 0, "likes": 0, "tags": []})  # fmt: skip
        elif entries := branch.tree(path, recursive):
            self._send_json(entries)
        else:
            self._send_error(404, "EntryNotFound", f"{path} does not exist", {"X-Repo-Commit": branch.commit})

    def _answer_file(self, branch: Branch, path: str) -> None:
        headers = {"X-Repo-Commit": branch.commit}
        if path not in branch.files:
            self._send_error(404, "EntryNotFound", "Entry not found", headers)
            return
        entry = branch.describe(path)
        if "lfs" not in entry:
            self._send_file(branch, path, headers | {"ETag": f'"{entry["oid"]}"'})
            return
        digest = entry["lfs"]["oid"]
        # By its other name this is another host, and none of the hub's.
        headers |= {"Location": f"http://localhost:{self.hub.port}/storage/{digest}"}
        self._send(302, b"", headers | {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(entry["size"])})

    def _send_file(self, branch: Branch, path: str, headers: dict[str, str]) -> None:
        if self.command == "GET":
            self.hub.fetched.add(f"{branch.repository}/{path}")
        content = branch.files[path]
        wanted = RANGE.fullmatch(self.headers.get("Range", ""))
        if wanted is None:
            self._send(200, content, headers)
        else:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(206, content[first : last + 1], headers)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_error(self, status: int, code: str, message: str, headers: dict[str, str]) -> None:
        # The same words for what is not there and for what a person without a name may not see, as on the hub.
        self._send(status, b"", headers | {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Tests look at what was asked for themselves."""
