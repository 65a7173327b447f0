"""The one way to the Hugging Face Hub: fetch what a merge needs, pinned to a commit; push a finished folder at once.

A push is checked before any work is done (:func:`check_push`) and is one commit or none: new files and the removal of
stale ones arrive together, on top of the commit that was seen when the work was planned. Tokens are read by
``huggingface_hub`` and never stored, logged or shown.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from hf_fuse.errors import CheckpointError, HubError
from hf_fuse.hub_access import PushTarget, check_push
from hf_fuse.hub_client import connect, explained, http_error, is_offline, list_files, quiet_unless_terminal, reason

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import RepoFile

__all__ = ["PushTarget", "check_push", "fetch_snapshot", "push", "pushable_files", "verify_files"]

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "tekken.json", "chat_template.*", "additional_chat_templates/*.jinja", "*processor_config.json",
)  # fmt: skip
FETCHED = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
    "README.md", *TOKENIZER_FILES,
)  # fmt: skip
FETCHED_PICKLES = ("*.bin", "*.bin.index.json")
# Code, copies of the weights in another layout, and whatever else lies in folders (other formats, old checkpoints).
NOT_FETCHED = (
    "*.py", "consolidated*", *(f"*/*.{end}" for end in ("safetensors", "json", "bin", "txt", "model", "tiktoken"))
)  # fmt: skip

STALE_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
NOT_PUSHED = {
    "training state": ("optimizer*", "scheduler*", "rng_state*", "trainer_state.json", "checkpoint-*/*", "runs/*"),
    "a pickle, which can run code when loaded": ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib"),
    "code": ("*.py", "*.pyc", "*.so"),
    "unfinished": ("*.partial", "*.incomplete", "*.tmp", "*.lock"),
}
COMMIT_RETRY_SECONDS = (2, 5, 15)
TRANSIENT_STATUS = (429, 500, 502, 503, 504)


def fetch_snapshot(
    repo_id: str, revision: str | None = None, *, allow_pickle: bool = False, token: str | None = None
) -> tuple[Path, str]:
    """Downloads what a merge needs of a model repository into the Hub cache: ``(folder, commit)``.

    A branch or tag is resolved to a commit once, and everything comes from that commit. With ``HF_HUB_OFFLINE=1`` or
    without a network the cached copy is used. ``*.bin`` is fetched only if the repository has no safetensors and
    ``allow_pickle`` is set; code never.

    Raises:
        HubError: no such repository or revision, no access, or not cached and the Hub cannot be reached.
        CheckpointError: the repository holds no weights that may be loaded.
    """
    from huggingface_hub import snapshot_download

    def download(patterns: tuple[str, ...], at: str | None) -> Path:
        allowed, ignored = list(patterns), list(NOT_FETCHED)
        return Path(
            snapshot_download(repo_id, revision=at, token=token, allow_patterns=allowed, ignore_patterns=ignored)
        )

    with explained(repo_id, revision, "downloading"), quiet_unless_terminal():
        folder = download(FETCHED, revision)
        commit = folder.name
        if any(folder.glob("*.safetensors")):
            return folder, commit
        where = f"{repo_id} at {commit[:12]}"
        if is_offline():
            if allow_pickle and any(folder.glob("*.bin")):
                return folder, commit
            raise HubError(f"{where}: no weights are cached and HF_HUB_OFFLINE is set. Unset it and run once online.")
        names = [name for name in list_files(connect(token), repo_id, commit) if "/" not in name]
        pickles = fnmatch.filter(names, "*.bin")
        if pickles and allow_pickle:
            return download(FETCHED + FETCHED_PICKLES, commit), commit
    if pickles:
        raise CheckpointError(
            f"{where}: holds only pickled weights ({pickles[0]}), which can run code when loaded. Use a repository "
            "with safetensors, or pass --allow-pickle to load it with torch's restricted unpickler."
        )
    raise CheckpointError(f"{where}: no safetensors weights found. It has: {', '.join(names[:8]) or 'no files'}.")


def verify_files(repo_id: str, commit: str, folder: Path | str, *, token: str | None = None) -> None:
    """Compares the content of downloaded files with the hashes the Hub holds for ``commit``.

    The Hub client checks sizes only, so a changed byte in a file of the right length goes unnoticed without this. Large
    files are compared by sha256, small ones by their git hash; files that were not downloaded are left out.

    Raises:
        CheckpointError: a file differs. Names it and both hashes.
        HubError: the Hub cannot be asked.
    """
    folder = Path(folder)
    with explained(repo_id, commit, "asking for checksums"):
        tree = list_files(connect(token), repo_id, commit)
    present = {path: folder / path for path in tree if (folder / path).is_file()}
    if not present:
        raise CheckpointError(f"{folder}: holds none of the files of {repo_id} at {commit[:12]}.")
    if wrong := _differing(tree, present):
        path, expected, actual = wrong[0]
        others = ", ".join(name for name, _, _ in wrong[1:4])
        raise CheckpointError(
            f"{present[path]}: damaged: for {path} of {repo_id} the Hub has {expected}, the file on disk is {actual}"
            f"{f' (also damaged: {others})' if others else ''}. Delete it and download it again; "
            f"`hf cache verify {repo_id}` checks the whole copy."
        )


def push(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    target: PushTarget | None = None,
) -> str:
    """Uploads a finished model or adapter folder as one commit and returns its web address.

    Creates the repository and the branch where they are missing. Weights of an earlier push (shards, indexes, pickles)
    and tokenizer files that the folder replaces go in the same commit. Pickles, code, hidden and unfinished files stay
    here. A server error during the commit is retried after checking that the commit did not land; files stored
    already are not sent again. Nothing changes for readers of the repository until the commit.

    Args:
        private: visibility of a new repository (None: as asked in ``check_push``, else the account's default).
        target: result of an earlier :func:`check_push`; the commit it saw must still be the newest. Default: looks now.

    Raises:
        CheckpointError: the folder is incomplete.
        HubError: everything :func:`check_push` finds, somebody else's push in between, or the network.
    """
    files = pushable_files(Path(folder))
    target = target or check_push(repo_id, private=private, revision=revision, token=token)
    if repo_id not in (target.repo_id, target.repo_id.split("/")[1]) or (revision or target.branch) != target.branch:
        raise HubError(f"{repo_id}: was checked as {target.repo_id}@{target.branch}. Run check_push for this target.")
    api = connect(token)
    with explained(target.repo_id, target.branch, "pushing"), quiet_unless_terminal():
        parent = _prepare_branch(api, target, target.private if private is None else private)
        operations = _operations(api, target, parent, files)
        _commit_once(api, target, parent, operations, commit_message or "Push a model made with hf_fuse")
    address = f"{api.endpoint}/{target.repo_id}"
    return address if target.branch == "main" else f"{address}/tree/{quote(target.branch, safe='')}"


def pushable_files(folder: Path) -> dict[str, Path]:
    """The files of a finished folder that a push uploads: ``{path in the repository: path here}``.

    Raises:
        CheckpointError: no such folder, damaged or missing weights, or a link that leads out of the folder.
    """
    from hf_fuse.checkpoint.reader import open_checkpoint, read_header, read_json

    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Expected the output of a merge, or an adapter folder.")
    if folder.name.endswith(".partial"):
        raise CheckpointError(f"{folder}: is the unfinished output of a merge that runs or was killed. Merge again.")
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        read_json(folder / "adapter_config.json")
        read_header(folder / "adapter_model.safetensors")
    else:
        open_checkpoint(str(folder.resolve()))
        read_json(folder / "config.json")

    files, left_out, root = {}, [], folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or any(part.startswith(".") or part == "__pycache__" for part in name.split("/")):
            continue
        kind = next((kind for kind, patterns in NOT_PUSHED.items() if _matches(name, patterns)), None)
        if kind:
            left_out.append(f"{name} ({kind})")
        elif not path.resolve().is_relative_to(root):
            raise CheckpointError(f"{path}: links to a file outside the folder. Replace the link by the file itself.")
        else:
            files[name] = path
    if left_out:
        logger.warning("not pushed: %s", ", ".join(left_out))
    return files


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _prepare_branch(api: HfApi, target: PushTarget, private: bool | None) -> str:
    """Creates what is missing and returns the commit to build on. What appeared since the check is not touched."""
    from huggingface_hub.errors import HfHubHTTPError

    what = "repository"
    try:
        if not target.repo_exists:
            api.create_repo(target.repo_id, private=private)
        if not target.branch_exists and (target.repo_exists or target.branch != "main"):
            what = f"branch {target.branch!r}"
            api.create_branch(target.repo_id, branch=target.branch)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        raise HubError(
            f"{target.repo_id}: someone created the {what} since you planned. Look at it, then push again."
        ) from error
    return target.parent_commit or _head(api, target)


def _operations(
    api: HfApi, target: PushTarget, parent: str, files: dict[str, Path]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """The commit: every file of the folder, and the removal of those files of ``parent`` that they replace."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    from hf_fuse.card import card_for_repo, public_recipe

    stale = STALE_WEIGHTS
    if "adapter_config.json" not in files:
        stale += ("adapter_config.json",)  # it would make from_pretrained load an adapter instead of this model
    if "tokenizer_config.json" in files or "tokenizer.json" in files:
        stale += TOKENIZER_FILES
    deletions = [
        CommitOperationDelete(path_in_repo=path, is_folder=False)
        for path in list_files(api, target.repo_id, parent)
        # Other formats in folders of their own are not ours to remove.
        if path not in files
        and _matches(path, stale)
        and ("/" not in path or path.startswith("additional_chat_templates/"))
    ]
    contents: dict[str, Path | bytes] = dict(files)
    if card := files.get("README.md"):
        branch = None if target.branch == "main" else target.branch
        contents["README.md"] = card_for_repo(card.read_text(encoding="utf-8"), target.repo_id, branch).encode()
    for name, path in files.items():
        if path.name == "fuse_recipe.yaml":
            contents[name] = public_recipe(path.read_text(encoding="utf-8")).encode()
    return deletions + [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()
    ]


def _commit_once(
    api: HfApi,
    target: PushTarget,
    parent: str,
    operations: list[CommitOperationAdd | CommitOperationDelete],
    message: str,
) -> None:
    """Makes exactly one commit on top of ``parent``, whatever the network does.

    Uses ``create_commit`` and not ``upload_folder``: with Xet the latter may split a folder into several commits, and a
    push that dies between two of them leaves new and old shards mixed.
    """
    from huggingface_hub.errors import HfHubHTTPError

    failure: Exception | None = None
    for wait in (0, *COMMIT_RETRY_SECONDS):
        if failure:
            logger.warning("%s: %s; trying again in %s s", target.repo_id, reason(failure), wait)
            time.sleep(wait)
        try:
            # The answer may have been lost after the commit was made: a second try would then fail or double it.
            if failure and _has_landed(api, target, parent, operations):
                return
            api.create_commit(
                target.repo_id, operations, commit_message=message, revision=target.branch, parent_commit=parent
            )
            return
        except http_error() as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status == 412:
                raise HubError(_overtaken(target, parent, _head(api, target))) from error
            if status not in (*TRANSIENT_STATUS, None):
                raise
            failure = error
    if failure and not _has_landed(api, target, parent, operations):
        raise failure


def _has_landed(
    api: HfApi, target: PushTarget, parent: str, operations: list[CommitOperationAdd | CommitOperationDelete]
) -> bool:
    """Whether the branch holds what ``operations`` wanted to put there; False if it is still at ``parent``."""
    from huggingface_hub import CommitOperationAdd

    head = _head(api, target)
    if head == parent:
        return False
    tree = list_files(api, target.repo_id, head)
    additions = {op.path_in_repo: op.path_or_fileobj for op in operations if isinstance(op, CommitOperationAdd)}
    wanted = {name: value if isinstance(value, bytes) else Path(value) for name, value in additions.items()}
    removed = {op.path_in_repo for op in operations} - set(additions)
    if not set(wanted) <= set(tree) or removed & set(tree) or _differing(tree, wanted):
        raise HubError(_overtaken(target, parent, head))
    return True


def _overtaken(target: PushTarget, parent: str, head: str) -> str:
    return (
        f"{target.repo_id}: someone pushed to {target.branch!r} since you planned (it was at {parent[:12]}, now at "
        f"{head[:12]}). Nothing was changed. Look at that commit, then plan again or repeat `hf-fuse push`."
    )


def _head(api: HfApi, target: PushTarget) -> str:
    heads = {ref.name: ref.target_commit for ref in api.list_repo_refs(target.repo_id).branches}
    if target.branch not in heads:
        raise HubError(f"{target.repo_id}: branch {target.branch!r} disappeared during the push. Push again.")
    return heads[target.branch]


def _differing(tree: dict[str, RepoFile], here: dict[str, Path | bytes]) -> list[tuple[str, str, str]]:
    """Files whose content is not the Hub's: ``(path, expected hash, actual hash)``."""

    def compare(path: str) -> tuple[str, str, str]:
        large, source = tree[path].lfs, here[path]
        digest = hashlib.sha256() if large else hashlib.sha1()  # git's own hash, not used for security
        if not large:
            digest.update(b"blob %d\0" % (len(source) if isinstance(source, bytes) else source.stat().st_size))
        if isinstance(source, bytes):
            digest.update(source)
        else:
            with source.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        expected = large.sha256 if large else tree[path].blob_id
        return path, f"{digest.name}:{expected}", f"{digest.name}:{digest.hexdigest()}"

    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        return [row for row in pool.map(compare, sorted(here)) if row[1] != row[2]]
