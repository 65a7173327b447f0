import pytest


@pytest.fixture
def no_charts(monkeypatch):
    """A chart takes longer than the alignment of a tiny model."""
    monkeypatch.setattr("hf_fuse.merge.align.engine.draw", lambda *_: None)
