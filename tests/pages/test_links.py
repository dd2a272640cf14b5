"""Every link of the pages leads somewhere."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)\s]+)\)")
TITLE = re.compile(r"(?m)^#+ (.*)$")


def pages():
    """The repository's pages and notebooks; what git ignores does not count."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md", "*.ipynb"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    found = listed or [str(path.relative_to(ROOT)) for path in ROOT.glob("*.md")]
    return sorted(found)


def text_of(path):
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def anchors(text):
    """The names that GitHub gives to titles."""
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in TITLE.findall(text)}


def broken_links(page, text):
    """Links of a page that lead nowhere; those to other hosts are not followed."""
    broken = []
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target.read_text())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", pages())
def test_every_link_leads_somewhere(page):
    path = ROOT / page
    assert broken_links(path, text_of(path)) == []


def test_broken_links_are_noticed():
    text = "# A title, two\n[a](#a-title-two) [b](README.md) [c](nowhere.md) [d](README.md#nowhere) [e](https://x.org)"
    assert broken_links(ROOT / "README.md", text) == ["#a-title-two", "nowhere.md", "README.md#nowhere"]


def test_readme_leads_to_reference_theory_tests_specification_and_notebooks():
    links = LINK.findall((ROOT / "README.md").read_text())
    for place in (
        "reference/soft_matching.py",
        "theory/exactness",
        "reference/SPECIFICATION.md",
        "notebooks",
        "docs/modes.md",
    ):
        assert any(link == place or link.startswith(f"{place}/") for link in links), place


def test_how_to_cite_is_the_same_in_readme_and_citation():
    cited = re.findall(r"(?s)@\w+\{(.*?)\n\}", (ROOT / "README.md").read_text())
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    software, *papers = [dict(re.findall(r"(\w+) += \{+(.+?)\}+,?\n", f"{entry}\n")) for entry in cited]
    assert software == {"author": citation["authors"][0]["name"]} | {
        name: citation[name] for name in ("title", "version")
    }
    known = {reference["identifiers"][0]["value"]: reference for reference in citation["references"]}
    assert len(papers) == 2
    for paper in papers:
        reference = known[paper["journal"]]
        authors = [f"{author['family-names']}, {author['given-names']}" for author in reference["authors"]]
        assert paper["author"] == " and ".join(authors)
        assert paper["title"] == reference["title"]
        assert paper["year"] == str(reference["year"])
