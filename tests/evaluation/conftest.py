"""Contexts of these tests are short, as are the chunks of soft matching in them; a model's folder, to be altered."""

import shutil

import pytest
from evaluation_inputs import save_character_llama

from kvcluster.evaluation.quality import methods


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    for name, size in (("chunk_size", 64), ("n_sink", 4), ("n_recent", 64)):
        monkeypatch.setitem(methods.CHUNKED, name, size)


@pytest.fixture(scope="session")
def honest(tmp_path_factory):
    return save_character_llama(tmp_path_factory.mktemp("honest"))


@pytest.fixture
def folder(honest, tmp_path):
    """A copy of an honest folder, to be altered."""
    return shutil.copytree(honest, tmp_path / "model")
