"""The page to play with, for the files that test it."""

import pytest
from scripts import script


@pytest.fixture(scope="session")
def play():
    """docs/site/play.py."""
    return script("site/play")


@pytest.fixture(scope="session")
def whole_page(play):
    """The page as one file, as text."""
    return play.page()


@pytest.fixture(scope="module")
def one_file(whole_page, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "play.html"
    path.write_text(whole_page)
    return path
