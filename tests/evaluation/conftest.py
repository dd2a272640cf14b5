"""Contexts of these tests are short, and so are the chunks of soft matching in them."""

import pytest

from kvcluster.evaluation.quality import methods


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    for name, size in (("chunk_size", 64), ("n_sink", 4), ("n_recent", 64)):
        monkeypatch.setitem(methods.CHUNKED, name, size)
