"""Whether a push would be accepted, found out before hours of work and without changing anything on the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_fuse.errors import HubError
from hf_fuse.hub_client import connect, endpoint, explained, first_line, is_offline

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class PushTarget:
    """Where a push will go, as :func:`check_push` saw it. ``parent_commit`` is None where there is no branch yet."""

    repo_id: str
    branch: str
    user: str
    repo_exists: bool
    branch_exists: bool
    parent_commit: str | None
    private: bool | None


def check_push(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> PushTarget:
    """Checks token, role, namespace and repository, and records the commit that a push would build on.

    Args:
        repo_id: ``org/name``, or ``name`` for the user's own namespace.
        private: visibility of a new repository (None: the account's default). If True, a public one is refused.
        revision: branch to push to. One that does not exist will be created by the push.

    Raises:
        HubError: no token, a wrong or read-only one, no write access to the namespace or repository, or no network.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a Hub id: expected org/name. {first_line(error)}") from None
    branch = revision or "main"
    if re.fullmatch("[0-9a-f]{40}", branch):
        raise HubError(f"{repo_id}: {branch[:12]} is a commit, and only a branch can be pushed to. Name a branch.")
    if is_offline():
        raise HubError(f"{repo_id}: pushing needs the Hub, but HF_HUB_OFFLINE is set. Unset it.")
    token = token or get_token()
    if not token:
        raise HubError(f"{repo_id}: no Hub token found. Run `hf auth login`, or set HF_TOKEN to one that may write.")

    api = connect(token)
    with explained(repo_id, None, "checking the token"):
        who = api.whoami()
    repo_id = repo_id if "/" in repo_id else f"{who['name']}/{repo_id}"
    if refusal := _refusal(who, repo_id):
        raise HubError(refusal)

    with explained(repo_id, None, "looking at the repository"):
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            if _is_bound_to_repositories(who, repo_id):
                raise HubError(
                    f"{repo_id}: does not exist, and this fine-grained token may write to existing repositories only. "
                    "Create the repository first, or use a token with write access to the namespace."
                ) from None
            return PushTarget(repo_id, branch, who["name"], False, False, None, private)
        _ask_write_access(api, repo_id)
        refs = api.list_repo_refs(repo_id)
    if private and info.private is False:
        raise HubError(
            f"{repo_id}: is public, but a private repository was asked for. Make it private in its settings, choose "
            "another name, or push without --private."
        )
    if branch in {tag.name for tag in refs.tags}:
        raise HubError(f"{repo_id}: {branch!r} is a tag, and only a branch can be pushed to. Choose another revision.")
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    return PushTarget(repo_id, branch, who["name"], True, branch in heads, heads.get(branch), info.private)


def _refusal(who: dict, repo_id: str) -> str | None:
    """Why the token cannot write to ``repo_id``, as far as the account's own description tells; None if it can."""
    namespace, user = repo_id.split("/")[0], who["name"]
    role = _access(who).get("role")
    tokens = f"{endpoint()}/settings/tokens"
    if role == "read":
        return (
            f"{repo_id}: the Hub token is read-only. Create one with write access at {tokens}, then run "
            "`hf auth login` or set HF_TOKEN."
        )
    if role == "fineGrained":
        writable = _writable(who)
        if writable & {namespace, repo_id, "*"}:
            return None
        return (
            f"{repo_id}: the fine-grained Hub token has no write access (repo.write) to {namespace!r}, only to: "
            f"{', '.join(sorted(writable)) or 'nothing'}. Change it at {tokens}."
        )
    roles = {org["name"]: org.get("roleInOrg") for org in who.get("orgs") or []}
    if namespace == user or roles.get(namespace, "read") != "read":
        return None
    if namespace in roles:
        return f"{repo_id}: {user!r} may only read in {namespace!r}. Ask one of its admins for the write role."
    allowed = ", ".join([user, *(name for name, org_role in roles.items() if org_role != "read")])
    return f"{repo_id}: {user!r} is not a member of {namespace!r}. This account may write to: {allowed}."


def _access(who: dict) -> dict:
    return (who.get("auth") or {}).get("accessToken") or {}


def _writable(who: dict) -> set[str]:
    """Users, organisations and repositories that a fine-grained token may write to; ``*`` for all."""
    rights = _access(who).get("fineGrained") or {}
    names = {
        scope["entity"].get("name", "")
        for scope in rights.get("scoped") or []
        if "repo.write" in scope.get("permissions", ())
    }
    return names | ({"*"} if "repo.write" in (rights.get("global") or []) else set())


def _is_bound_to_repositories(who: dict, repo_id: str) -> bool:
    """Whether the token may write to named repositories only, so that it cannot create one."""
    return _access(who).get("role") == "fineGrained" and not _writable(who) & {repo_id.split("/")[0], "*"}


def _ask_write_access(api: HfApi, repo_id: str) -> None:
    """Asks the Hub itself: in an organisation a contributor may write to some repositories and not to others."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.auth_check(repo_id, write=True)
    except TypeError:  # older clients cannot ask; the account's description has to do
        return
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise HubError(f"{repo_id}: exists, but this Hub token may not write to it. Ask its owner.") from None
        if status != 404:  # a Hub that does not know the question
            raise
