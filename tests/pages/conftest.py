"""The page to play with, for the files that test it."""

from pathlib import Path

import pytest
from browsers import open_browser
from scripts import script

SOURCE = Path(__file__).resolve().parents[2] / "docs" / "play" / "index.html"


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


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = open_browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


@pytest.fixture
def page(browser):
    """The page as it lies in docs/play, without vectors in it."""
    browser.get(SOURCE.as_uri())
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
