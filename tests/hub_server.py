"""A local stand-in for the Hugging Face hub: the part of its HTTP interface that Remora uses.

Paths, headers and bodies are those that huggingface_hub sends and reads. Files are kept in memory;
weights are LFS objects, identified by their SHA-256, other files by git's SHA-1. With `uses_xet`
weights are transferred by the Xet protocol, see `xet`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, utils

import xet

TOKEN = "hf_of_the_tests"
LFS_ENDINGS = (".safetensors", ".parquet", ".bin")


@dataclass
class Repository:
    """The files of one repository, and who may read and write them."""

    files: dict[str, bytes]
    private: bool = False
    gated: bool = False
    writable: bool = True
    commits: list[list[str]] = field(default_factory=list)  # the files that each one changed

    @property
    def sha(self) -> str:
        """The hash of the last commit."""
        names = "".join(f"{name} {etag(name, self.files[name])}\n" for name in sorted(self.files))
        return hashlib.sha1(names.encode()).hexdigest()


def etag(name: str, content: bytes) -> str:
    """Return the hub's identifier of a file's content."""
    if name.endswith(LFS_ENDINGS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


@dataclass
class Hub:
    """The repositories of a stand-in, by `models/owner/name`, and the requests that it got."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded, by their SHA-256
    requests: list[str] = field(default_factory=list)
    served: dict[str, bytes] = field(default_factory=dict)  # sent instead of a file's content
    cut_after: dict[str, int] = field(default_factory=dict)  # bytes of a file, once
    cut_requests: set[str] = field(default_factory=set)  # "POST /path": closes the connection
    url: str = ""
    uses_xet: bool = False
    storage: xet.Storage = field(default_factory=xet.Storage)

    def publish(self, name: str, files: Path | dict[str, bytes], **settings: Any) -> Repository:
        """Make a repository such as `models/owner/name` from a folder's files."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir() if path.is_file()}
        self.repositories[name] = Repository(dict(files), **settings)
        return self.repositories[name]

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment variables that point huggingface_hub in a process here."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "0" if self.uses_xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
        }

    def connect(self, patch: pytest.MonkeyPatch, home: Path, token: str | None = None) -> None:
        """Point huggingface_hub in this process here; it has read its variables already."""
        patch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("NO_PROXY", "*")
        if token is None:
            patch.delenv("HF_TOKEN", raising=False)
        else:
            patch.setenv("HF_TOKEN", token)
        utils.close_session()


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """Yield a stand-in that answers on a free port."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield hub
        finally:
            utils.close_session()
            server.shutdown()


class _RefusalError(Exception):
    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _CutError(Exception):
    pass


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        begin = self.headers.get("Range", "").removeprefix("bytes=").removesuffix("-")
        self.hub.requests.append(f"{self.command} {path}" + (f" from {begin}" if begin else ""))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if f"{self.command} {path}" in self.hub.cut_requests:
                raise _CutError
            self.route(path, body)
        except _RefusalError as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
            self.reply({"error": str(refusal)}, refusal.status, headers)
        except _CutError:
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def route(self, path: str, body: bytes) -> None:
        kinds, name = "(models|datasets)", r"[\w.-]+/[\w.-]+"
        if match := re.fullmatch(rf"/api/{kinds}/({name})(?:/revision/[^/]+)?", path):
            self.reply(self.info(f"{match[1]}/{match[2]}"))
        elif match := re.fullmatch(rf"/api/{kinds}/({name})/tree/\w+", path):
            self.reply(self.tree(f"{match[1]}/{match[2]}"))
        elif re.fullmatch(rf"/api/{kinds}/{name}/tree/.+", path):  # there are no folders
            raise _RefusalError(404, "EntryNotFound")
        elif match := re.fullmatch(rf"/(datasets/)?({name})/resolve/\w+/([^/]+)", path):
            self.send_file(f"{match[1] or 'models/'}{match[2]}", match[3])
        elif path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif match := re.fullmatch(rf"/api/(models/{name})/preupload/main", path):
            self.choose_modes(self.to_write(match[1]), json.loads(body))
        elif match := re.fullmatch(rf"/({name})\.git/info/lfs/objects/batch", path):
            self.to_write(f"models/{match[1]}")
            self.offer_uploads(json.loads(body))
        elif match := re.fullmatch(r"/upload/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.hub.objects[match[1]] = body
            self.reply({})
        elif match := re.fullmatch(rf"/api/(models/{name})/commit/main", path):
            self.commit(match[1], body)
        elif self.hub.uses_xet:
            self.route_xet(path, body)
        else:
            raise _RefusalError(404, "RepoNotFound", "Repository not found")

    def route_xet(self, path: str, body: bytes) -> None:
        storage = self.hub.storage
        if match := re.fullmatch(r"/api/(models/[\w./-]+)/xet-(read|write)-token/\w+", path):
            (self.to_write if match[2] == "write" else self.to_read)(match[1])
            until = int(time.time()) + 900
            headers = {
                "X-Xet-Cas-Url": self.hub.url,
                "X-Xet-Access-Token": match[2],
                "X-Xet-Token-Expiration": str(until),
            }
            answer = {"casUrl": self.hub.url, "accessToken": match[2], "exp": until}
            self.reply(answer, headers=headers)
        elif match := re.fullmatch(r"/v1/xorbs/default/(\w+)", path):
            storage.xorbs[match[1]] = body
            self.reply({"was_inserted": True})
        elif path == "/v1/shards":
            self.hub.objects |= storage.add_shard(body)
            self.reply({"result": 1})
        elif match := re.fullmatch(r"/v1/reconstructions/(\w+)", path):
            self.reply(storage.reconstruction(match[1], self.hub.url))
        elif match := re.fullmatch(r"/xorb/(\w+)", path):
            asked = xet.bytes_asked_for(self.headers.get("Range", ""))
            self.reply(storage.xorbs[match[1]][asked], 206)
        else:  # such as the question whether a chunk is stored already
            raise _RefusalError(404, "", "not found")

    # Permissions

    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def to_read(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.has_token()):
            status = 404 if self.has_token() else 401
            raise _RefusalError(status, "RepoNotFound", "Repository not found")
        return repository

    def to_write(self, name: str) -> Repository:
        repository = self.to_read(name)
        if not (self.has_token() and repository.writable):
            raise _RefusalError(403, "", "you are not allowed to write here")
        return repository

    # Reading

    def info(self, name: str) -> dict[str, Any]:
        repository = self.to_read(name)
        return {
            "id": name.partition("/")[2],
            "sha": repository.sha,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "tags": [],
            "siblings": [{"rfilename": each} for each in repository.files],
        }

    def tree(self, name: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = []
        for path, content in self.to_read(name).files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
            if path.endswith(LFS_ENDINGS):
                entry["lfs"] = {"oid": etag(path, content), "size": len(content), "pointerSize": 1}
                if hashed := self.hub.storage.hashes.get(etag(path, content)):
                    entry["xetHash"] = hashed
            else:
                entry["oid"] = etag(path, content)
            entries.append(entry)
        return entries

    def send_file(self, name: str, path: str) -> None:
        repository = self.to_read(name)
        if repository.gated:
            raise _RefusalError(403, "GatedRepo", f"Access to {name} is restricted")
        if path not in repository.files:
            raise _RefusalError(404, "EntryNotFound")
        whole = self.hub.served.get(path, repository.files[path])
        headers = {
            "ETag": f'"{etag(path, repository.files[path])}"',
            "X-Repo-Commit": repository.sha,
            "Accept-Ranges": "bytes",
        }
        if hashed := self.hub.storage.hashes.get(etag(path, repository.files[path])):
            asked = f"{self.hub.url}/api/{name}/xet-read-token/{repository.sha}"
            headers |= {"X-Xet-Hash": hashed, "Link": f'<{asked}>; rel="xet-auth"'}
        status, content = 200, whole
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, content = 206, whole[int(match[1]) :]
            headers["Content-Range"] = f"bytes {match[1]}-{len(whole) - 1}/{len(whole)}"
        cut = self.hub.cut_after.pop(path, None) if self.command == "GET" else None
        self.reply(content, status, headers, cut)

    # Writing

    def create(self, wanted: dict[str, Any]) -> None:
        if not self.has_token():
            raise _RefusalError(401, "", "Invalid credentials in Authorization header")
        if wanted["organization"] != "me":
            message = "you may not create a model under this namespace"
            raise _RefusalError(403, "", message)
        name = f"{wanted['organization']}/{wanted['name']}"
        # An older client says `private`, a newer one `visibility`.
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.publish(f"models/{name}", {".gitattributes": b""}, private=private)
        self.reply({"url": f"{self.hub.url}/{name}"})

    def choose_modes(self, repository: Repository, asked: dict[str, Any]) -> None:
        chosen = []
        for file in asked["files"]:
            held = repository.files.get(file["path"])
            mode = "lfs" if file["path"].endswith(LFS_ENDINGS) else "regular"
            oid = None if held is None else etag(file["path"], held)
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}
            chosen.append(answer)
        self.reply({"files": chosen})

    def offer_uploads(self, asked: dict[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            upload = {"href": f"{self.hub.url}/upload/{each['oid']}", "header": {}}
            wanted = {} if each["oid"] in self.hub.objects else {"actions": {"upload": upload}}
            objects.append(each | wanted)
        self.reply({"transfer": "basic", "objects": objects})

    def commit(self, name: str, body: bytes) -> None:
        repository = self.to_write(name)
        changed: dict[str, bytes] = {}
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                changed[value["path"]] = self.hub.objects[value["oid"]]
        repository.files.update(changed)
        repository.commits.append(sorted(changed))
        url = f"{self.hub.url}/{name.partition('/')[2]}/commit/{repository.sha}"
        self.reply({"commitUrl": url, "commitOid": repository.sha})

    # Answering

    def reply(
        self,
        content: Any,
        status: int = 200,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            raise _CutError

    def log_message(self, *_: object) -> None:
        pass
