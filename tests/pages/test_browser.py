"""`make notebooks` in a real browser: a notebook is opened by clicks, run from the menu, and shows its figure."""

import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from browsers import needs_browser, open_browser
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

ROOT = Path(__file__).resolve().parents[2]
SECOND = "02-match-and-merge-a-chunk-by-hand.ipynb"
THIRD = "03-attend-to-centroids.ipynb"
PATIENCE = 120  # seconds, for a machine that others use too
NUMBER = r"return [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent)"
ERRORS = ".jp-OutputArea-output[data-mime-type*='error'], .jp-OutputArea-output[data-mime-type*='stderr']"
WIDTHS = "return [...document.querySelectorAll('.jp-OutputArea-output img')].map(image => image.naturalWidth)"

pytestmark = [pytest.mark.slow, needs_browser, pytest.mark.xdist_group("browser")]


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    """A folder like this repository, with notebooks that have no outputs: two of ours, and one with a mistake."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "notebooks").mkdir()
    for name in (THIRD, SECOND):
        notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
        notebook.metadata.pop("widgets", None)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / "notebooks" / name)
    (cell,) = [cell for cell in notebook.cells if "== 0.9216" in cell.source]
    cell.source = cell.source.replace("== 0.9216", "== 0.9217")
    nbformat.write(notebook, folder / "notebooks" / "wrong.ipynb")
    return folder


@pytest.fixture(scope="module")
def lab(notebooks):
    """The address of JupyterLab as `make notebooks` starts it, in that folder and on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex()
    options = f"--no-browser --ip=127.0.0.1 --port={port} --ServerApp.port_retries=0 --IdentityProvider.token={token}"
    bin_folder = Path(sys.executable).parent
    command = ["make", "--old-file=.venv/.installed", "notebooks", f"CURDIR={notebooks}", f"BIN={bin_folder}"]
    log = notebooks / "lab.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, f"LAB_OPTIONS={options}"], cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
    yield f"http://127.0.0.1:{port}/lab/tree/notebooks?reset&token={token}"
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(timeout=30)


@pytest.fixture
def browser(tmp_path):
    browser = open_browser(tmp_path / "profile")
    yield browser
    browser.quit()


def run_all_cells(browser, lab, name):
    """Open the notebook by a double click, choose "Run All Cells" and wait until it has run or failed."""

    def when(condition, what):
        return WebDriverWait(browser, PATIENCE, ignored_exceptions=[Exception]).until(condition, what)

    def visible(selector, text):
        found = [element for element in browser.find_elements(By.CSS_SELECTOR, selector) if text in element.text]
        return found[0] if found and found[0].is_displayed() else False

    when(lambda _: browser.get(lab) or "JupyterLab" in browser.title, "JupyterLab does not answer")
    item = when(lambda _: visible(".jp-DirListing-item", name), f"{name} is not in the file browser")
    ActionChains(browser).double_click(item).perform()
    when(lambda _: browser.find_elements(By.CSS_SELECTOR, ".jp-CodeCell .jp-InputPrompt"), "no cells")
    when(lambda _: visible("#jp-main-statusbar", "| Idle"), "the kernel is not ready")
    when(lambda _: visible(".lm-MenuBar-item", "Run"), "no menu").click()
    when(lambda _: visible(".lm-Menu-item[data-command='runmenu:run-all']", "Run All Cells"), "no such item").click()
    when(lambda _: errors(browser) or has_run(browser), "the notebook has not run to its end")


def picture(browser):
    """The address of what a slider's picture shows."""
    return browser.execute_script("return document.querySelector('img.widget-image')?.src")


def has_run(browser):
    prompts = browser.execute_script(NUMBER)
    return prompts and all(prompt.strip("[]: ").isdigit() for prompt in prompts)


def errors(browser):
    return [element.text for element in browser.find_elements(By.CSS_SELECTOR, ERRORS)]


def test_the_second_notebook_runs_from_the_menu_and_shows_its_figure(browser, lab):
    run_all_cells(browser, lab, SECOND)
    assert errors(browser) == []
    assert has_run(browser)
    assert max(browser.execute_script(WIDTHS)) > 300


def test_a_notebook_that_fails_is_seen_to_fail(browser, lab):
    run_all_cells(browser, lab, "wrong.ipynb")
    assert any("AssertionError" in error for error in errors(browser))
    assert not has_run(browser)


def test_the_slider_of_the_third_notebook_moves_its_picture(browser, lab):
    run_all_cells(browser, lab, THIRD)
    patient = WebDriverWait(browser, PATIENCE)
    before = patient.until(picture, "no picture")
    handle = browser.find_element(By.CSS_SELECTOR, ".widget-slider .noUi-handle")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", handle)
    handle.send_keys(Keys.ARROW_RIGHT)
    patient.until(lambda _: picture(browser) not in (None, before), "the picture did not change")
    assert errors(browser) == []
