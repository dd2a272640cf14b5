"""What the pages say beside their text: figures in words, the row of the papers' page that a docstring names."""

import inspect
import json
import re
import sys
from pathlib import Path

import pytest
from scripts import script

from kvcluster import fast, reference

ROOT = Path(__file__).resolve().parents[2]
IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
PAGES = sorted(
    path for folder in ("docs", "theory", "benchmarks", "notebooks") for path in ROOT.glob(f"{folder}/**/*.md")
)
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
LINK = re.compile(r"\]\(([^)\s]+)\)")

sys.modules.setdefault("source_pages", source_pages := script("site/source_pages"))
conf = script("site/conf")


def says_little(words):
    """Whether the words of a figure are missing, the name of a file, or too few for what it shows."""
    return len(words.split()) < 8 or re.search(r"\.(png|svg|jpe?g)\b", words) is not None


def row_of(docstring):
    """The row of docs/papers.md that a docstring names, as its anchor; None without one."""
    found = conf.SOURCE.search(docstring)
    return source_pages.anchor(found[1], found[2]) if found else None


def rows():
    page = source_pages.with_anchors((ROOT / "docs" / "papers.md").read_text())
    return re.findall(r'<span id="([^"]+)"></span>', page)


def test_every_figure_of_a_page_says_in_words_what_it_shows():
    texts = {path: path.read_text() for path in (ROOT / "README.md", *PAGES)}
    figures = {(path, name): words for path, text in texts.items() for words, name in IMAGE.findall(text)}
    assert len(figures) >= 20
    assert [(str(path), name) for (path, name), words in figures.items() if says_little(words)] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_of_a_notebook_says_on_the_site_what_its_caption_says(path):
    cells = json.loads(source_pages.as_page(path.read_text()))["cells"]
    figures = [cell for cell in cells if any("image/png" in out.get("data", {}) for out in cell.get("outputs", []))]
    assert figures
    words = [cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "") for cell in figures]
    assert [cell["source"][-1] for cell, said in zip(figures, words, strict=True) if says_little(said)] == []


def test_figures_without_words_are_noticed():
    assert all(map(says_little, ("", "frontier", "_images/3f2a.png", "a b c d e f g x.png")))
    assert not says_little("Two plots: the clustered cache is smaller, and as fast")
    picture = {"cell_type": "code", "source": ["show()"], "outputs": [{"data": {"image/png": ""}}], "metadata": {}}
    without = json.dumps({"metadata": {}, "cells": [picture, {"cell_type": "markdown", "source": ["No caption."]}]})
    assert json.loads(source_pages.as_page(without))["cells"][0]["metadata"] == {}


@pytest.mark.parametrize("name", reference.__all__)
def test_the_docstring_of_every_public_name_names_its_row_of_the_papers(name):
    assert row_of(inspect.getdoc(getattr(reference, name))) in rows()


@pytest.mark.parametrize("name", reference.__all__)
def test_on_the_site_both_docstrings_lead_to_that_row(name):
    row = row_of(inspect.getdoc(getattr(reference, name)))
    for package in (reference, fast):
        lines = inspect.getdoc(getattr(package, name)).splitlines()
        conf.link_sources(None, "", f"{package.__name__}.{name}", None, None, lines)
        assert f"<../papers.html#{row}>`__" in "\n".join(lines)


def test_rows_that_are_not_there_are_noticed():
    assert len(rows()) == len(set(rows()))
    assert row_of("Source: docs/papers.md, Chelsea: partition.") == "chelsea-partition" in rows()
    assert row_of("Source: docs/papers.md, Chelsea: partitions.") not in rows()
    assert row_of("From the paper.") is None


def test_every_question_has_an_answer_that_leads_further():
    parts = (ROOT / "docs" / "questions.md").read_text().split("\n## ")[1:]
    assert len(parts) >= 10
    assert [
        part.partition("\n")[0] for part in parts if not LINK.search(part) or "?" not in part.partition("\n")[0]
    ] == []
    assert "docs/questions.md" in LINK.findall((ROOT / "README.md").read_text())
