"""The page to play with runs the test vectors: its port agrees, one with a mistake is told apart, nothing is loaded."""

import functools
import http.server
import json
import re
import threading
from pathlib import Path

import pytest
from browsers import needs_browser
from scripts import script
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from kvcluster.conformance.vectors import write_vectors

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "docs" / "play" / "index.html"
MOST_BYTES = 1_500_000
PATIENCE = 120  # seconds, for a machine that others use too

source_pages = script("site/source_pages")
in_a_browser = [pytest.mark.slow, needs_browser, pytest.mark.xdist_group("play")]


def verdict(browser):
    """What the page says of its vectors, as soon as it has run them."""
    patient = WebDriverWait(browser, PATIENCE)
    patient.until(lambda _: browser.execute_script("return document.getElementById('verdict').dataset.cases"))
    return browser.find_element(By.ID, "verdict").text


def give(browser, folder):
    browser.find_element(By.ID, "files").send_keys("\n".join(str(path) for path in sorted(folder.iterdir())))
    return verdict(browser)


class TestInABrowser:
    pytestmark = in_a_browser

    def test_all_cases_of_its_operations_agree_bit_for_bit(self, page, play, tmp_path):
        write_vectors(tmp_path / "vectors")
        cases = json.loads((tmp_path / "vectors" / "manifest.json").read_text())["cases"]
        n_ported = sum(case["operation"] in play.PORTED for case in cases)
        assert sorted(page.execute_script("return Object.keys(PORTED)")) == sorted(play.PORTED)
        said = give(page, tmp_path / "vectors")
        assert f"✓ {n_ported} cases of the vectors agree in your browser" in said
        assert f"{len(cases) - n_ported} cases are of operations that this port does not have" in said
        rows = [row.text.rpartition(" ")[0] for row in page.find_elements(By.CSS_SELECTOR, "#results tbody tr")]
        counts = [sum(case["operation"] == operation for case in cases) for operation in play.PORTED]
        assert sorted(rows) == sorted(f"{name} {n} of" for name, n in zip(play.PORTED, counts, strict=True))

    def test_other_files_are_refused_in_words(self, page, tmp_path):
        (tmp_path / "manifest.json").write_text(json.dumps({"format": "another"}))
        page.find_element(By.ID, "files").send_keys(str(tmp_path / "manifest.json"))
        patient = WebDriverWait(page, PATIENCE)
        said = patient.until(lambda _: "cannot be read" in (text := page.find_element(By.ID, "verdict").text) and text)
        assert "manifest.json is not one of kvcluster's vectors" in said

    def test_the_one_file_shows_by_itself_how_many_cases_agree(self, browser, play, one_file):
        browser.get(one_file.as_uri())
        files, said = play.vectors()
        n_cases = len(json.loads(files["manifest.json"])["cases"])
        assert n_cases > 130
        assert verdict(browser) == f"✓ {n_cases} cases of the vectors agree in your browser."
        assert browser.find_element(By.ID, "badge").text == f"✓ {n_cases} cases of the vectors agree in your browser"
        assert said.startswith(f"{n_cases} of the ")
        assert said in browser.find_element(By.ID, "vectors").text

    @pytest.mark.parametrize(
        ("right", "wrong", "operation"),
        [
            ("numbers[i] > numbers[best]", "numbers[i] >= numbers[best]", "chunked_soft_matching"),
            ("one.source - other.source", "other.source - one.source", "chunked_soft_matching"),
            ("sum[i] = sum[i] + row[i]", "sum[i] = Math.fround(sum[i] + row[i])", "merge"),
            (".fill(-0)", ".fill(0)", "merge"),
            (" + Math.log(ofProblem[entry])", "", "clustered_attention"),
            ("Math.abs(dot)", "dot", "similarity"),
        ],
        ids=["ties-to-the-last", "sources-to-the-last", "float32-sums", "no-minus-zero", "no-log-counts", "no-sign"],
    )
    def test_a_port_with_one_mistake_is_told_apart(self, browser, whole_page, tmp_path, right, wrong, operation):
        assert whole_page.count(right) == 1
        (tmp_path / "wrong.html").write_text(whole_page.replace(right, wrong))
        browser.get((tmp_path / "wrong.html").as_uri())
        said = verdict(browser)
        assert re.search(r"✗ \d+ of \d+ cases of the vectors differ\. The first: \w+, case [\w.-]+: \w+", said)
        assert "differ" in browser.find_element(By.ID, "badge").text
        (row,) = [
            row.text
            for row in browser.find_elements(By.CSS_SELECTOR, "#results tr")
            if row.text.startswith(f"{operation} ")
        ]
        agree, cases = (int(number) for number in re.findall(r" (\d+)", row))
        assert agree < cases

    def test_nothing_is_loaded_from_anywhere(self, browser, one_file):
        asked = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_request(self, *_):
                asked.append(self.path)

        handler = functools.partial(Handler, directory=one_file.parent)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            browser.get(f"http://127.0.0.1:{server.server_port}/play.html")
            verdict(browser)
            browser.find_element(By.ID, "end").click()
            loaded = "return performance.getEntriesByType('resource').map(entry => entry.name)"
            assert browser.execute_script(loaded) == []
            browser.execute_script("new Image().src = 'noticed.png'")
            WebDriverWait(browser, PATIENCE).until(lambda _: len(asked) > 1)
            server.shutdown()
        assert asked == ["/play.html", "/noticed.png"]


@pytest.mark.slow
def test_the_one_file_is_small_and_names_no_other(whole_page):
    assert len(whole_page.encode()) < MOST_BYTES
    assert re.findall(r"<(?:script|link|img)[^>]*\s(?:src|href)=\"(?!data:)", whole_page) == []
    assert 'id="home"' not in whole_page


def test_links_to_the_page_open_it_on_the_site():
    text = "[a](docs/play/README.md) [b](docs/play/index.html) [c](docs/play/contract.js) [d](docs/modes.md)"
    rewritten = source_pages.WHOLE_LINK.sub(lambda link: source_pages.to_play(ROOT / "README.md", link), text)
    link = '<a href="docs/play/index.html">{}</a>'
    assert rewritten == f"{link.format('a')} {link.format('b')} [c](docs/play/contract.js) [d](docs/modes.md)"
    own = source_pages.WHOLE_LINK.sub(
        lambda link: source_pages.to_play(SOURCE.with_name("README.md"), link), "[a](index.html)"
    )
    assert own == '<a href="index.html">a</a>'


def test_readme_leads_to_the_page():
    assert "(docs/play/README.md)" in (ROOT / "README.md").read_text()
