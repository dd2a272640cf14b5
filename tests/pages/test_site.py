"""The site: built without a word from Sphinx, read without a network, at home on a telephone and in the dark."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browsers import needs_browser, open_browser
from bs4 import BeautifulSoup
from scripts import script
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; sys.path.insert(0, 'docs/site'); from build_site import build; from pathlib import Path; "
ELSEWHERE = re.compile(r"\s*(https?:)?//")
LOADING = re.compile(r"<(?:script|link|img|iframe|source|object|embed|video|audio)\b[^>]*>")
STYLE = re.compile(r"(?s)<style[^>]*>.*?</style>|\sstyle=\"[^\"]*\"")
PICTURE = re.compile(r"<img\b(?![^>]*src=\"[^\"]*_static/)[^>]*>")  # but those of the theme
ADDRESS = re.compile(r"\s(?:src|href|data|srcset)=[\"']([^\"']*)")
IN_STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?\s*((?:https?:)?//[^)\"']+)")
CODE = re.compile(r"[A-Za-z_][\w./*]*(\(True\))?|python .+|--?[a-z][\w -]+ \w+|-[a-z-]+|[+-]?0")
PHONE, DESKTOP = 390, 1280  # pixels
PAGES = ("*.html", "theory/*.html", "theory/*/README.html", "notebooks/*.html", "docs/*.html", "docs/[!f]*/*.html")
LOOKED_AT = {
    PHONE: (*PAGES, "reference/*.html", "benchmarks/*/*.html"),
    DESKTOP: (*PAGES, "benchmarks/quality/QUALITY.html"),
}
WIDER = """
const scrolls = element => element.tagName !== 'ARTICLE'
    && (/auto|scroll|hidden/.test(getComputedStyle(element).overflowX) || scrolls(element.parentElement));
const isOut = element => element.getClientRects().length && element.getBoundingClientRect().right > innerWidth + 1;
return [...document.querySelectorAll('article *')].filter(element => isOut(element) && !scrolls(element))
    .map(element => element.tagName + ' ' + element.textContent.slice(0, 60)).slice(0, 3)
"""

sys.modules.setdefault("source_pages", source_pages := script("site/source_pages"))
site_tests = [pytest.mark.slow, pytest.mark.xdist_group("site")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site's folder, and what Sphinx said."""
    folder = tmp_path_factory.mktemp("site")
    code = BUILD + f"sys.exit(build(Path({str(folder / 'site')!r}), Path({str(folder / 'work')!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def foreign(page, is_style=False):
    """Addresses of other hosts from which a page, or a sheet of styles, would load something."""
    found = [address for tag in LOADING.findall(page) for address in ADDRESS.findall(tag)]
    styles = [page] if is_style else STYLE.findall(page)
    return [address for address in found if ELSEWHERE.match(address)] + IN_STYLE.findall("\n".join(styles))


def words_of(tag):
    """What a picture says where it is not seen."""
    return BeautifulSoup(tag, "html.parser").img.get("alt", "")


def test_addresses_of_other_hosts_are_noticed():
    page = '<script src="https://x.org/a.js"></script><link href="//x.org/b.css"><img src="c.png"><a href="https://d">'
    assert foreign(page) == ["https://x.org/a.js", "//x.org/b.css"]
    style = "a { background: url('http://x.org/e.png') }"
    assert foreign(style, is_style=True) == foreign(f"<style>{style}</style>") == ["http://x.org/e.png"]
    assert foreign(f"<code>{style}</code>") == []


class TestBuilt:
    pytestmark = site_tests

    def test_no_page_loads_anything_from_another_host(self, site):
        pages = [*site.rglob("*.html"), *site.rglob("*.css")]
        assert len(pages) > 80
        found = {page.name: foreign(page.read_text(), page.suffix == ".css") for page in pages}
        assert {name: addresses for name, addresses in found.items() if addresses} == {}

    def test_every_part_is_there(self, site):
        start = (site / "index.html").read_text()
        for page in (
            *(f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")),
            *(str(path.relative_to(ROOT).with_suffix("")) for path in (ROOT / "theory").rglob("*.md")),
            *(str(path.relative_to(ROOT).with_suffix("")) for path in (ROOT / "benchmarks").glob("*/*.md")),
            *(f"reference/{name}.py" for name in source_pages.reading_order()),
            *(f"docs/{path.stem}" for path in (ROOT / "docs").glob("*.md")),
            *(f"docs/api/{name}" for name in ("reference", "conformance", "fast", "fast-huggingface", "evaluation")),
            *("reference/SPECIFICATION", "benchmarks/quality/QUALITY", "docs/vectors/README"),
            *("CONTRIBUTING", "SECURITY", "CHANGELOG"),
        ):
            assert (site / f"{page}.html").exists(), page
            assert f'href="{page}.html' in start, page

    def test_formulas_are_set(self, site):
        page = (site / "theory" / "merging" / "README.html").read_text()
        assert page.count("<math") > 150
        assert '<div class="formula"><math' in page
        assert "<msub>" in page
        assert "<math" not in (site / "reference" / "SPECIFICATION.html").read_text()

    def test_notebooks_have_their_figures_and_no_control(self, site):
        for path in (site / "notebooks").glob("[0-9]*.html"):
            article = BeautifulSoup(path.read_text(), "html.parser").article
            assert article.find("img"), path.name
            assert "VBox" not in "".join(str(output) for output in article.find_all(class_="cell_output"))

    def test_functions_are_documented_and_lead_to_the_papers(self, site):
        page = BeautifulSoup((site / "docs/api/fast.html").read_text(), "html.parser")
        function = page.find(id="kvcluster.fast.chunked_soft_matching")
        assert page.find(id="kvcluster.fast.ClusteredCache.append")
        (address,) = {link["href"] for link in function.parent.find_all("a") if "papers" in link.get("href", "")}
        row = BeautifulSoup((site / "docs/papers.html").read_text(), "html.parser").find(id=address.partition("#")[2])
        assert "which matches merge" in row.parent.get_text()

    def test_every_picture_says_in_words_what_it_shows(self, site):
        silent = [
            (str(path.relative_to(site)), tag)
            for path in site.rglob("*.html")
            for tag in PICTURE.findall(path.read_text())
            if len(words_of(tag).split()) < 8 or re.search(r"\.(png|svg)\b", words_of(tag))
        ]
        assert silent == []

    def test_the_side_bar_names_ideas(self, site):
        bar = BeautifulSoup((site / "index.html").read_text(), "html.parser").find(class_="sidebar-tree")
        names = [link.get_text() for link in bar.find_all("a")]
        assert len(names) > 60
        assert [name for name in names if re.search(r"\.\w+$|/|_", name) and not name.startswith("kvcluster.")] == []

    @needs_browser
    def test_search_needs_no_server(self, site, tmp_path):
        browser = open_browser(tmp_path / "profile")
        try:
            browser.get(f"{(site / 'search.html').as_uri()}?q=certificate")
            found = WebDriverWait(browser, 60).until(
                lambda _: [
                    link.get_attribute("href") for link in browser.find_elements(By.CSS_SELECTOR, ".search li a")
                ]
            )
            assert any("theory/merging/README.html" in address for address in found)
        finally:
            browser.quit()

    @needs_browser
    @pytest.mark.parametrize(("width", "is_dark"), [(PHONE, False), (DESKTOP, True)], ids=["phone", "desktop-dark"])
    def test_in_a_browser_nothing_is_cut_off_or_missing(self, site, tmp_path, width, is_dark):
        browser = open_browser(tmp_path / "profile", width=width, is_dark=is_dark)
        try:
            for page in sorted(page for folder in LOOKED_AT[width] for page in site.glob(folder)):
                browser.get(page.as_uri())
                name = page.relative_to(site)
                assert browser.execute_script(WIDER) == [], name
                broken = "return [...document.images].filter(image => image.complete && !image.naturalWidth).length"
                assert browser.execute_script(broken) == 0, name
            browser.execute_script("document.querySelector('article').innerHTML += '<p style=width:3000px>a</p>'")
            assert browser.execute_script(WIDER) == ["P a"]
            light = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
            assert (light == "rgb(255, 255, 255)") != is_dark
            assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        finally:
            browser.quit()


@pytest.mark.slow
def test_dead_links_are_faults(tmp_path):
    """The same configuration, other pages."""
    dead = ["nowhere.md", "#nowhere", "docs/nowhere.py", "docs/modes.md#nothing"]
    readme = "# A title\n\n[right](docs/modes.md#modes) " + " ".join(f"[words]({link})" for link in dead)
    for name, text in (("README.md", readme), ("docs/modes.md", "# Modes\n")):
        page = tmp_path / "pages" / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text)
    options = ["-q", "-n", "-c", ROOT / "docs" / "site"]
    command = [sys.executable, "-m", "sphinx", *options, tmp_path / "pages", tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stderr.count("[myst.xref_missing]") == len(dead)


@pytest.mark.parametrize("path", ["reference/soft_matching.py", "fast/cache.py", "docs/vectors/reader.cpp", "Makefile"])
def test_a_page_of_a_file_has_all_of_its_lines(path):
    page = source_pages.file_page(ROOT / path)
    blocks = re.findall(r"(?s)\n:lineno-start: (\d+)\n(.*?)\n``````\n", page)
    numbered = {int(first) + i: line for first, block in blocks for i, line in enumerate(block.split("\n")) if line}
    assert numbered == {i: line for i, line in enumerate((ROOT / path).read_text().split("\n"), 1) if line}


def test_links_to_files_functions_and_folders_become_links_to_pages():
    links = (
        "[a](theory/merging/checks.py) [`check_gap`](theory/merging/checks.py) [`other`](theory/merging/checks.py) "
        "[b](fast) [c](docs/vectors) [d](docs/modes.md#x) [e](Makefile) [f](https://x.org)"
    )
    page = source_pages.LINK.sub(lambda link: source_pages.rewritten(ROOT / "README.md", link), links)
    assert page == (
        "[a](theory/merging/checks.py.md) [`check_gap`](theory/merging/checks.py.md#check_gap) "
        "[`other`](theory/merging/checks.py.md) "
        "[b](fast/index.md) [c](docs/vectors/README.md) [d](docs/modes.md#x) [e](Makefile.md) [f](https://x.org)"
    )


@pytest.mark.parametrize("page", sorted((ROOT / "theory").rglob("*.md")), ids=lambda page: str(page.relative_to(ROOT)))
def test_code_on_a_page_of_theory_is_code_and_formulas_are_formulas(page):
    text = re.sub(r"(?m)^ {4}.*$", "", page.read_text())
    assert [span for span in re.findall(r"`([^`]+)`", text) if not CODE.fullmatch(span)] == []
    assert text.count("$$") % 2 == 0
    assert text.replace("$$", "").count("$") % 2 == 0


def test_formulas_in_code_are_noticed():
    assert all(CODE.fullmatch(span) for span in ("check_pair", "fast/cache.py", "python -m kvcluster.theory", "-0"))
    assert not any(CODE.fullmatch(span) for span in ("n d", "2^-24", "log n_c", "|x|", "f(1)"))


def test_functions_and_bars_are_set_as_tex_does():
    conf = script("site/conf")
    assert conf.as_mathml(r"8 u \log N", as_block=False).count("<mspace") == 2
    assert conf.as_mathml(r"\log(x)", as_block=False).count("<mspace") == 0
    assert conf.as_mathml(r"\lvert x \rvert", as_block=False) == conf.as_mathml(r"\left| x \right|", as_block=False)


def test_notebooks_lose_their_sliders_only():
    view = {"data": {source_pages.CONTROL: {}, "text/plain": "VBox()"}}
    cells = [{"cell_type": "code", "outputs": [view, {"text": "1"}]}, {"cell_type": "markdown", "source": "a"}]
    still = json.loads(source_pages.as_page(json.dumps({"metadata": {"widgets": {}}, "cells": cells})))
    assert still == {"metadata": {}, "cells": [{"cell_type": "code", "outputs": [{"text": "1"}]}, cells[1]]}


def test_the_picture_of_the_idea_is_drawn(tmp_path):
    script("figures/idea").draw(tmp_path / "idea.png")
    assert (tmp_path / "idea.png").read_bytes().startswith(b"\x89PNG")
    assert (ROOT / "docs" / "figures" / "idea.png").stat().st_size < 300_000
