"""The Hub client as the rest of the package uses it, and its many exceptions as one: :class:`HubError`, one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hf_fuse.errors import FuseError, HubError

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile


def connect(token: str | None = None) -> HfApi:
    from huggingface_hub import HfApi

    from hf_fuse import __version__

    return HfApi(token=token, library_name="hf_fuse", library_version=__version__)


def endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def list_files(api: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    """All files of a commit with sizes and hashes, by path."""
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


@contextmanager
def quiet_unless_terminal() -> Iterator[None]:
    """No progress bars in log files. On a terminal the user's ``HF_HUB_DISABLE_PROGRESS_BARS`` decides."""
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    decided = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled()
    if decided or sys.stderr.isatty():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def http_error() -> type[Exception]:
    """The root of HTTP failures, answered or not: of the library below ``huggingface_hub``, which has changed once."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


@contextmanager
def explained(repo_id: str, revision: str | None, doing: str) -> Iterator[None]:
    """Turns whatever the client raises into one :class:`HubError` that says what happened and what to do.

    ``doing`` continues "org/name: ... failed" and "org/name: ... was refused", for example ``"downloading"``.
    """
    try:
        yield
    except FuseError:
        raise
    except (OSError, RuntimeError, ValueError, http_error()) as error:
        raise HubError(_explanation(error, repo_id, revision, doing)) from error


def _explanation(error: BaseException, repo_id: str, revision: str | None, doing: str) -> str:
    from huggingface_hub import constants, errors

    web = f"{endpoint()}/{repo_id}"
    at = f"{repo_id}@{revision}" if revision else repo_id
    chain = [error]  # the client wraps upload errors, and network errors behind "not in the cache"
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)

    def first(*kinds: type[BaseException]) -> BaseException | None:
        return next((e for e in chain if isinstance(e, kinds)), None)

    not_cached = isinstance(error, errors.LocalEntryNotFoundError)
    if first(errors.OfflineModeIsEnabled) or (not_cached and is_offline()):
        if not_cached:
            return f"{at}: not in the cache, or only in part, and HF_HUB_OFFLINE is set. Unset it and run once online."
        return f"{at}: {doing} needs the Hub, but HF_HUB_OFFLINE is set. Unset it."
    if first(errors.GatedRepoError):
        return f"{at}: is gated. Accept its conditions at {web} with the account of your Hub token, then try again."
    if first(errors.RevisionNotFoundError):
        return f"{repo_id}: has no branch, tag or commit {revision!r}. See {web}/tree/main for those it has."
    if first(errors.DisabledRepoError):
        return f"{at}: was disabled by the Hub. See {web}."
    if answer := first(errors.HfHubHTTPError):
        status = answer.response.status_code
        if status == 401 and "whoami" in str(answer.response.url):
            return f"{at}: the Hub does not accept the token. Run `hf auth login`, or correct HF_TOKEN."
        if first(errors.RepositoryNotFoundError):
            return (
                f"{repo_id}: no such repository on the Hub, or it is private and your token has no access. Check the "
                "name; `hf auth whoami` shows whose token is used."
            )
        if status in (401, 403):
            return f"{at}: {doing} was refused ({reason(answer)}). Use a token that has this permission."
        if status == 400 and "README.md" in str(error):
            details = first_line(str(error).partition("\n")[2]).lstrip("- ")
            return f"{at}: the Hub does not accept README.md: {details} Correct its front matter and push again."
        return f"{at}: {doing} failed: {reason(answer)}. Try again later; files stored already are not sent twice."
    if first(errors.HFValidationError):
        return f"{repo_id!r} is not a Hub id: expected org/name. {first_line(error)}"
    if silence := first(http_error(), TimeoutError):
        cached = ", and it is not in the cache" if not_cached else ""
        return (
            f"{at}: {doing} failed: no answer from {endpoint()} ({reason(silence)}){cached}. Check the network and try "
            "again."
        )
    uses_xet = doing == "pushing" and not constants.HF_HUB_DISABLE_XET
    plain = " If it fails again, HF_HUB_DISABLE_XET=1 sends the files by plain HTTP." if uses_xet else ""
    return f"{at}: {doing} failed: {reason(error)}.{plain}"


def reason(error: BaseException) -> str:
    """One phrase: what the Hub answered, or the exception and its first line."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        said = first_line(error.server_message).rstrip(".")
        return f"the Hub answered {error.response.status_code}" + (f": {said}" if said else "")
    return f"{type(error).__name__}: {first_line(error)}".rstrip(": .")


def first_line(text: object) -> str:
    """One line fit for a message: without tokens, whatever a server echoes."""
    lines = [line.strip() for line in str(text or "").splitlines() if line.strip()]
    return re.sub(r"hf_\w{8,}|Bearer \S+", "<token>", lines[0])[:300] if lines else ""
