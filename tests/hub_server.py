"""A Hugging Face Hub on the loopback interface, for tests that push and pull with the unmodified client.

State lives in memory. Two ports: the Hub itself, and a "CDN" that stores and serves large files, as the real one does,
so that a token which leaks there shows up in the log. Faults are injected by rule and counted; every request is logged.
Limits: no Xet (set ``HF_HUB_DISABLE_XET=1``), no pull requests, models only.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"
ROLES_THAT_WRITE = ("admin", "write", "contributor")


@dataclass
class Account:
    """Who a token belongs to. ``role`` is read | write | fineGrained; ``scoped`` as in the real whoami reply."""

    user: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)  # organisation -> admin | write | contributor | read
    scoped: list[dict] = field(default_factory=list)


@dataclass
class Blob:
    """One file of one commit: ``content`` for regular files, ``sha256`` for those in large-file storage."""

    size: int
    oid: str  # git sha1 of the content, or of the pointer text for a large file
    content: bytes | None = None
    sha256: str | None = None


@dataclass
class Commit:
    sha: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)


@dataclass
class Fault:
    """Answers ``status`` to the next ``times`` requests that match; ``after``: does the work, then loses the answer."""

    method: str
    pattern: str
    status: int = 503
    times: int = 1
    after: bool = False


@dataclass
class LoggedRequest:
    server: str  # "hub" or "cdn"
    method: str
    path: str
    headers: dict[str, str]
    status: int = 0


class Answer(Exception):
    """Ends a request with a status other than 200."""

    def __init__(self, status: int, message: str = "", code: str | None = None, body: dict | None = None, **headers):
        self.status, self.body = status, body if body is not None else {"error": message}
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if message:
            self.headers["X-Error-Message"] = message
        if code:
            self.headers["X-Error-Code"] = code


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def regular_blob(content: bytes) -> Blob:
    return Blob(len(content), git_sha1(content), content=content)


def large_blob(sha256: str, size: int) -> Blob:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Blob(size, git_sha1(pointer.encode()), sha256=sha256)


class HubServer:
    """Starts both ports on construction. Tests use the methods and attributes below; the rest is protocol."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.accounts: dict[str, Account] = {}
        self.objects: dict[str, bytes] = {}  # large files by sha256
        self.parts: dict[str, bytes] = {}
        self.log: list[LoggedRequest] = []
        self.faults: list[Fault] = []
        self.corrupt: dict[str, str] = {}  # sha256 -> "flip" | "cut" (served damaged; "cut" once)
        self.multipart_bytes: int | None = None  # uploads larger than this are asked for in parts of this size
        self.page_size = 1000
        self.stall_uploads = False  # uploads stop half-way until this is cleared
        self.stalled = threading.Event()
        self.lock = threading.RLock()
        self._servers = []
        self.url, self.cdn_url = self._listen("hub"), self._listen("cdn")

    def _listen(self, name: str) -> str:
        handler = type(f"{name.title()}Handler", (_Handler,), {"hub": self, "server_name": name})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        self._servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        # Another host name as well as another port: some versions of the client compare hosts only.
        return f"http://{'127.0.0.1' if name == 'hub' else 'localhost'}:{server.server_address[1]}"

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    # What tests call

    def token(self, user: str, role: str = "write", **account) -> str:
        """A fresh token. Keywords as in :class:`Account`."""
        token = "hf_" + secrets.token_hex(16)
        self.accounts[token] = Account(user, role, **account)
        return token

    def clear_faults(self) -> None:
        self.faults.clear()
        self.corrupt.clear()
        self.stall_uploads, self.multipart_bytes, self.page_size = False, None, 1000
        self.stalled.clear()

    def fail(self, method: str, pattern: str, status: int = 503, times: int = 1, after: bool = False) -> None:
        self.faults.append(Fault(method, pattern, status, times, after))

    def damage(self, repo_id: str, path: str, how: str = "flip") -> None:
        """Serves this large file damaged from now on: one byte changed (``flip``), or cut short once (``cut``)."""
        self.corrupt[self.files(repo_id)[path].sha256] = how

    def add_repo(self, repo_id: str, files: dict[str, bytes] | None = None, **options) -> str:
        """Creates a repository outside the protocol and returns its head commit."""
        repo = self.repos[repo_id] = Repo(**options)
        blobs = {path: self._store(path, content) for path, content in (files or {}).items()}
        blobs.setdefault(".gitattributes", regular_blob(GITATTRIBUTES))
        return self._add_commit(repo, "main", None, "initial commit", blobs)

    def add_commit(self, repo_id: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Someone else pushes."""
        repo = self.repos[repo_id]
        parent = repo.branches[branch]
        blobs = {path: self._store(path, content) for path, content in files.items()}
        return self._add_commit(repo, branch, parent, "someone else", repo.commits[parent].files | blobs)

    def head(self, repo_id: str, branch: str = "main") -> str:
        return self.repos[repo_id].branches[branch]

    def files(self, repo_id: str, branch: str = "main") -> dict[str, Blob]:
        repo = self.repos[repo_id]
        return repo.commits[repo.branches[branch]].files

    def history(self, repo_id: str, branch: str = "main") -> list[Commit]:
        """Commits, newest first."""
        repo, out = self.repos[repo_id], []
        sha = repo.branches[branch]
        while sha:
            out.append(repo.commits[sha])
            sha = out[-1].parent
        return out

    def read(self, repo_id: str, path: str, branch: str = "main") -> bytes:
        blob = self.files(repo_id, branch)[path]
        return blob.content if blob.content is not None else self.objects[blob.sha256]

    def requests(self, method: str = "*", pattern: str = "", server: str = "*") -> list[LoggedRequest]:
        return [
            entry
            for entry in self.log
            if fnmatch.fnmatch(entry.method, method)
            and re.search(pattern, entry.path)
            and fnmatch.fnmatch(entry.server, server)
        ]

    # State

    def _store(self, path: str, content: bytes) -> Blob:
        if not _is_large(path, len(content), content[:512]):
            return regular_blob(content)
        sha256 = hashlib.sha256(content).hexdigest()
        self.objects[sha256] = content
        return large_blob(sha256, len(content))

    def _add_commit(self, repo: Repo, branch: str, parent: str | None, title: str, files: dict[str, Blob]) -> str:
        sha = hashlib.sha1(f"{parent}{title}{time.time_ns()}{secrets.token_hex(4)}".encode()).hexdigest()
        repo.commits[sha] = Commit(sha, parent, title, files)
        repo.branches[branch] = sha
        return sha


def _is_large(path: str, size: int, sample: bytes) -> bool:
    return size > 0 and (path.endswith((".safetensors", ".bin")) or size > 10_000_000 or b"\0" in sample)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    server_name = "hub"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    routes: list[tuple[str, str, re.Pattern, Callable]] = []

    def log_message(self, *args) -> None:
        pass

    def _serve(self) -> None:
        hub, split = self.hub, urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        entry = LoggedRequest(self.server_name, self.command, self.path, headers)
        hub.log.append(entry)
        self.query = {name: values[0] for name, values in parse_qs(split.query).items()}
        try:
            self.body = self._read_body()  # even for errors: an unread body would corrupt the next request
        except ConnectionError:
            self.close_connection = True
            return
        status, headers, content = 200, {}, b""
        try:
            fault = next((f for f in hub.faults if f.times > 0 and f.method == entry.method
                          and re.search(f.pattern, entry.path)), None)  # fmt: skip
            if fault:
                fault.times -= 1
            if fault and not fault.after:
                raise Answer(fault.status, "injected fault")
            content, headers = self._route(split.path)
            if fault:
                raise Answer(fault.status, "injected fault, after the work was done")
        except Answer as answer:
            status, headers, content = answer.status, answer.headers, json.dumps(answer.body).encode()
        except ConnectionError:
            self.close_connection = True
            return
        except Exception as error:  # a bug here must not look like a transient fault, which clients retry for long
            status, content = 501, json.dumps({"error": repr(error)}).encode()
            headers = {"X-Error-Message": f"bug in the test server: {error!r}"}
        status = headers.pop("status", status)
        entry.status = status
        headers.setdefault("Content-Type", "application/json")
        headers.setdefault("Content-Length", str(len(content)))
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
                if int(headers["Content-Length"]) != len(content):
                    self.close_connection = True
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        size = int(self.headers.get("Content-Length") or 0)
        first = b""
        if self.command == "PUT" and self.hub.stall_uploads:
            first = self.rfile.read(size // 2)
            self.hub.stalled.set()
            while self.hub.stall_uploads:
                time.sleep(0.02)
        body = first + self.rfile.read(size - len(first))
        if len(body) < size:
            raise ConnectionError("the client is gone")
        return body

    def _route(self, path: str) -> tuple[bytes, dict]:
        for server, method, pattern, function in self.routes:
            if server == self.server_name and re.fullmatch(method, self.command) and (found := pattern.fullmatch(path)):
                reply = function(self, **{name: unquote(value or "") for name, value in found.groupdict().items()})
                return reply if isinstance(reply, tuple) else (json.dumps(reply).encode(), {})
        raise Answer(404, "Sorry, we can't find the page you are looking for.")

    # Access

    def account(self) -> Account | None:
        header = self.headers.get("Authorization", "")
        if not header:
            return None
        account = self.hub.accounts.get(header.removeprefix("Bearer "))
        if account is None:
            raise Answer(401, "Invalid credentials in Authorization header")
        return account

    def may_write(self, repo_id: str) -> bool:
        account, namespace = self.account(), repo_id.split("/")[0]
        if account is None:
            return False
        if account.role == "fineGrained":
            return any(
                "repo.write" in scope["permissions"] and scope["entity"]["name"] in (namespace, repo_id)
                for scope in account.scoped
            )
        member = namespace == account.user or account.orgs.get(namespace) in ROLES_THAT_WRITE
        return account.role in ROLES_THAT_WRITE and member

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        repo, account = self.hub.repos.get(repo_id), self.account()
        namespace = repo_id.split("/")[0]
        mine = account is not None and (namespace == account.user or namespace in account.orgs)
        if repo is None or (repo.private and not mine):
            raise Answer(401 if account is None else 404, "Repository not found", "RepoNotFound")
        if write and not self.may_write(repo_id):
            raise Answer(403, f"You don't have the required permissions to write to {repo_id}")
        return repo

    def commit(self, repo: Repo, revision: str) -> Commit:
        sha = repo.branches.get(revision) or repo.tags.get(revision) or revision
        if sha not in repo.commits:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.commits[sha]

    def json(self) -> dict:
        return json.loads(self.body or b"{}")


def route(method: str, pattern: str, server: str = "hub") -> Callable:
    named = pattern.replace("{id}", "(?P<repo_id>[^/]+/[^/]+?)").replace("{rev}", "(?P<rev>[^/]+)")

    def register(function: Callable) -> Callable:
        _Handler.routes.append((server, method, re.compile(named), function))
        return function

    return register


@route("POST", "/api/repos/create")
def create_repo(request: _Handler) -> dict:
    body, account = request.json(), request.account()
    if account is None:
        raise Answer(401, "Invalid username or password.")
    repo_id = f"{body.get('organization') or account.user}/{body['name']}"
    url = f"{request.hub.url}/{repo_id}"
    if not request.may_write(repo_id):
        raise Answer(403, f"You don't have the rights to create a model under the namespace {repo_id.split('/')[0]!r}")
    with request.hub.lock:
        if repo_id in request.hub.repos:
            raise Answer(409, "You already created this model repo", body={"error": "exists", "url": url})
        request.hub.add_repo(repo_id, private=body.get("visibility") == "private" or bool(body.get("private")))
    return {"url": url, "name": repo_id}


@route("DELETE", "/api/repos/delete")
def delete_repo(request: _Handler) -> dict:
    body, account = request.json(), request.account()
    repo_id = f"{body.get('organization') or (account.user if account else '')}/{body['name']}"
    request.repo(repo_id, write=True)
    del request.hub.repos[repo_id]
    return {}


@route("GET", "/api/whoami-v2")
def whoami(request: _Handler) -> dict:
    account = request.account()
    if account is None:
        raise Answer(401, "Invalid username or password.")
    access = {"displayName": "test", "role": account.role}
    if account.role == "fineGrained":
        access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": account.scoped}
    orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in account.orgs.items()]
    auth = {"type": "access_token", "accessToken": access}
    return {"type": "user", "id": "1", "name": account.user, "fullname": account.user, "orgs": orgs, "auth": auth}


@route("POST", "/api/validate-yaml")
def validate_yaml(request: _Handler) -> dict:
    import yaml

    text = request.json()["content"]
    errors, found = [], re.match(r"---\r?\n(.*?)\r?\n---", text, re.S)
    try:
        data = yaml.safe_load(found.group(1)) if found else {}
    except yaml.YAMLError as error:
        data, errors = {}, [str(error)]
    parents = data.get("base_model", [])
    for parent in [parents] if isinstance(parents, str) else parents:
        if not re.fullmatch(r"[\w][\w.-]*(/[\w.-]+)?", str(parent)):
            errors.append(f'"base_model" with value "{parent}" is not valid. Use a model id from https://hf.co/models.')
    if data.get("base_model_relation", "merge") not in ("finetune", "adapter", "merge", "quantized"):
        errors.append('"base_model_relation" must be one of finetune, adapter, merge, quantized')
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be strings')
    if not isinstance(data.get("license", ""), (str, list)):
        errors.append('"license" must be a string')
    for entry in data.get("model-index", []):
        for result in entry.get("results", []):
            if not all(key in result for key in ("task", "dataset", "metrics")):
                errors.append('"model-index" results need task, dataset and metrics')
    if errors:
        raise Answer(400, body={"errors": [{"message": message} for message in errors], "warnings": []})
    return {"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata in repo card"}]}


@route("POST", "/api/models/{id}/preupload/{rev}")
def preupload(request: _Handler, repo_id: str, rev: str) -> dict:
    existing = request.commit(request.repo(repo_id, write=True), rev).files
    out = []
    for file in request.json()["files"]:
        large = _is_large(file["path"], file["size"], base64.b64decode(file["sample"]))
        entry = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if blob := existing.get(file["path"]):
            entry["oid"] = blob.sha256 or blob.oid
        out.append(entry)
    return {"files": out}


@route("POST", "/{id}\\.git/info/lfs/objects/batch")
def lfs_batch(request: _Handler, repo_id: str) -> dict:
    request.repo(repo_id, write=True)
    hub, out = request.hub, []
    for wanted in request.json()["objects"]:
        oid, size, entry = wanted["oid"], wanted["size"], dict(wanted)
        if oid not in hub.objects:
            upload = {"href": f"{hub.cdn_url}/lfs/{oid}", "header": {}}
            if hub.multipart_bytes and size > hub.multipart_bytes:
                count = -(-size // hub.multipart_bytes)
                upload["header"] = {str(n): f"{hub.cdn_url}/lfs/{oid}/{n}" for n in range(1, count + 1)}
                upload["header"]["chunk_size"] = str(hub.multipart_bytes)
            entry["actions"] = {"upload": upload, "verify": {"href": f"{hub.url}/lfs/verify/{oid}"}}
        out.append(entry)
    return {"transfer": "basic", "objects": out}


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", "cdn")
def upload_object(request: _Handler, oid: str) -> dict:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Answer(400, "content does not match its sha256")
    request.hub.objects[oid] = request.body
    return {}


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})/(?P<number>\\d+)", "cdn")
def upload_part(request: _Handler, oid: str, number: str) -> tuple[bytes, dict]:
    request.hub.parts[f"{oid}/{number}"] = request.body
    return b"", {"ETag": f'"{oid[:8]}-{number}"'}


@route("POST", "/lfs/(?P<oid>[0-9a-f]{64})", "cdn")
def complete_parts(request: _Handler, oid: str) -> dict:
    parts = [f"{oid}/{part['partNumber']}" for part in request.json()["parts"]]
    request.body = b"".join(request.hub.parts.pop(part) for part in parts)
    return upload_object(request, oid)


@route("POST", "/lfs/verify/(?P<oid>[0-9a-f]{64})")
def verify_object(request: _Handler, oid: str) -> dict:
    stored = request.hub.objects.get(oid)
    if stored is None or len(stored) != request.json()["size"]:
        raise Answer(404, "object not stored")
    return {}


@route("POST", "/api/models/{id}/commit/{rev}")
def post_commit(request: _Handler, repo_id: str, rev: str) -> dict:
    repo, hub = request.repo(repo_id, write=True), request.hub
    with hub.lock:  # of several pushes that name the same parent exactly one may succeed
        parent = request.commit(repo, rev)
        if rev not in repo.branches:
            raise Answer(400, f"{rev} is not a branch")
        files, title = dict(parent.files), ""
        for line in request.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", parent.sha) != parent.sha:
                    raise Answer(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = regular_blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in hub.objects:
                    raise Answer(400, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = large_blob(value["oid"], value["size"])
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Answer(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key == "deletedFolder":
                files = {path: blob for path, blob in files.items() if not path.startswith(value["path"])}
        sha = hub._add_commit(repo, rev, parent.sha, title, files)
    return {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repo_id}/commit/{sha}"}


@route("POST", "/api/models/{id}/branch/{rev}")
def create_branch(request: _Handler, repo_id: str, rev: str) -> dict:
    repo = request.repo(repo_id, write=True)
    if rev in repo.branches:
        raise Answer(409, "Reference already exists")
    repo.branches[rev] = request.commit(repo, request.json().get("startingPoint", "main")).sha
    return {}


@route("GET", "/api/models/{id}/refs")
def refs(request: _Handler, repo_id: str) -> dict:
    repo = request.repo(repo_id)
    branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in repo.branches.items()]
    tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": sha} for n, sha in repo.tags.items()]
    return {"branches": branches, "tags": tags, "converts": []}


@route("GET", "/api/models/{id}/auth-check(?P<write>/write)?")
def auth_check(request: _Handler, repo_id: str, write: str) -> dict:
    request.repo(repo_id, write=bool(write))
    return {}


@route("GET", "/api/models/{id}(/revision/{rev})?")
def model_info(request: _Handler, repo_id: str, rev: str) -> dict:
    repo = request.repo(repo_id)
    commit = request.commit(repo, rev or "main")
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    return {
        "_id": "1", "id": repo_id, "modelId": repo_id, "sha": commit.sha, "private": repo.private, "tags": [],
        "gated": "manual" if repo.gated else False, "siblings": siblings, "downloads": 0, "likes": 0,
    }  # fmt: skip


def _file_entry(path: str, blob: Blob) -> dict:
    entry = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
    if blob.sha256:
        entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 135}
    return entry


@route("GET", "/api/models/{id}/tree/{rev}(/(?P<folder>.*))?")
def tree(request: _Handler, repo_id: str, rev: str, folder: str) -> tuple[bytes, dict]:
    files = request.commit(request.repo(repo_id), rev).files
    prefix = folder.strip("/") + "/" if folder.strip("/") else ""
    inside = {path: blob for path, blob in sorted(files.items()) if path.startswith(prefix)}
    if prefix and not inside:
        raise Answer(404, f"{folder} does not exist on {rev}", "EntryNotFound")
    entries, folders = [], set()
    recursive = request.query.get("recursive", "").lower() in ("true", "1")
    for path, blob in inside.items():
        parents = path[len(prefix) :].split("/")[:-1]
        for depth in range(1, len(parents) + 1) if recursive else range(1, min(len(parents), 1) + 1):
            name = prefix + "/".join(parents[:depth])
            if name not in folders:
                folders.add(name)
                entries.append({"type": "directory", "path": name, "oid": git_sha1(name.encode()), "size": 0})
        if recursive or not parents:
            entries.append(_file_entry(path, blob))
    start, size = int(request.query.get("cursor", 0)), request.hub.page_size
    headers = {}
    if start + size < len(entries):
        query = f"cursor={start + size}" + ("&recursive=true" if recursive else "")
        headers["Link"] = f'<{request.hub.url}{urlsplit(request.path).path}?{query}>; rel="next"'
    return json.dumps(entries[start : start + size]).encode(), headers


@route("POST", "/api/models/{id}/paths-info/{rev}")
def paths_info(request: _Handler, repo_id: str, rev: str) -> list:
    files = request.commit(request.repo(repo_id), rev).files
    wanted = request.json()["paths"] if request.body.startswith(b"{") else parse_qs(request.body.decode())["paths"]
    return [_file_entry(path, files[path]) for path in wanted if path in files]


@route("GET|HEAD", "/{id}/resolve/{rev}/(?P<path>.+)")
def resolve(request: _Handler, repo_id: str, rev: str, path: str) -> tuple[bytes, dict]:
    repo = request.repo(repo_id)
    commit = request.commit(repo, rev)
    if repo.gated and not request.may_write(repo_id):
        raise Answer(403, f"Access to model {repo_id} is restricted", "GatedRepo", X_Repo_Commit=commit.sha)
    blob = commit.files.get(path)
    if blob is None:
        raise Answer(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.sha)
    headers = {"X-Repo-Commit": commit.sha, "Content-Type": "application/octet-stream"}
    if blob.sha256 is None:
        return blob.content, headers | {"ETag": f'"{blob.oid}"'}
    location = f"{request.hub.cdn_url}/file/{blob.sha256}/{quote(path)}"
    linked = {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.sha256}"', "Location": location}
    return b"", headers | linked | {"ETag": f'"{blob.oid}"', "status": 302}


@route("GET|HEAD", "/file/(?P<oid>[0-9a-f]{64})/.*", "cdn")
def serve_object(request: _Handler, oid: str) -> tuple[bytes, dict]:
    content, damage = request.hub.objects[oid], request.hub.corrupt.get(oid)
    if damage == "flip":
        content = content[:-1] + bytes([content[-1] ^ 1])
    headers = {"ETag": f'"{oid}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if found := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "")):
        first, last = int(found[1]), int(found[2] or len(content) - 1)
        headers |= {"Content-Range": f"bytes {first}-{last}/{len(content)}", "status": 206}
        content = content[first : last + 1]
    if damage == "cut":
        del request.hub.corrupt[oid]
        return content[: len(content) // 2], headers | {"Content-Length": str(len(content))}
    return content, headers
