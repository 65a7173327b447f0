"""Points the Hub client at a loopback server before anything imports it: the client reads these settings once."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tiny_models import Family

# One process of tests per core: torch's own threads would only get into each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
assert "huggingface_hub" not in sys.modules, "the Hub client was imported before its endpoint was set"
sys.path.insert(0, str(Path(__file__).parent))

from hub_server import HubServer  # noqa: E402

USER, ORGANISATION = "ada", "lab"
SERVER = HubServer()
_home = tempfile.TemporaryDirectory(prefix="hf_fuse_tests_")
for _name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy"):
    os.environ.pop(_name, None)
os.environ |= {
    "HF_ENDPOINT": SERVER.url,
    "HF_HOME": _home.name,
    "HF_TOKEN": SERVER.token(USER, orgs={ORGANISATION: "write", "guild": "read"}),
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """The loopback Hub, no faults set, its log empty. ``HF_TOKEN`` belongs to ``ada``, who may write to ``lab``."""
    SERVER.clear_faults()
    SERVER.log.clear()
    yield SERVER
    SERVER.clear_faults()


@pytest.fixture
def repo_id() -> str:
    """A repository id nobody else uses; the repository does not exist yet."""
    return f"{USER}/{uuid.uuid4().hex[:12]}"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for downloads of this process."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    return tmp_path / "hub_cache"


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """``tiny_family("gpt2")`` -> folders of a tiny base and its fine-tunes, built once. Copy before changing anything.

    ``"plain"`` is a sharded Llama made without transformers, with a tokenizer; the rest are tiny_models.ARCHITECTURES.
    """
    from tiny_models import llama_family, transformers_family

    @cache
    def build(kind: str) -> Family:
        folder = tmp_path_factory.mktemp(kind)
        return llama_family(folder) if kind == "plain" else transformers_family(kind, folder)

    return build


@pytest.fixture
def third_party(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """``third_party(function)`` installs it as another package's loss."""
    from types import SimpleNamespace

    from hf_fuse import registry

    def install(loss):
        loads = SimpleNamespace(
            load=lambda: SimpleNamespace(**{loss.__name__: loss, "__doc__": "", "__name__": "other"})
        )
        monkeypatch.setattr(registry, "_third_party", lambda kind: {loss.__name__: loads} if kind == "losses" else {})

    registry.get.cache_clear()
    yield install
    registry.get.cache_clear()


def pytest_collection_finish() -> None:
    # What was imported stays: the garbage collector, which training calls often, need not look through it each time.
    gc.collect()
    gc.freeze()
