"""The page to play with: what it shows is what the reference says, by mouse, finger and keyboard, on any screen."""

import re

import numpy as np
import pytest
from browsers import needs_browser, open_browser
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from kvcluster.reference import chunked_soft_matching, merge
from kvcluster.reference.agreement import attention_agreement

PHONE = 390
EXAMPLES = ["Three directions", "Ties", "Not alike at all", "Two chunks and a rest", "32 keys"]
WIDER = """
const width = document.documentElement.scrollWidth;
const scrolls = element => getComputedStyle(element).overflowX === 'auto'
    || (element.parentElement && scrolls(element.parentElement));
const out = [...document.querySelectorAll('body *')].filter(element => !scrolls(element.parentElement)
    && element.getClientRects().length && element.getBoundingClientRect().right > innerWidth + 1);
return [width > innerWidth, ...out.map(element => element.tagName + ' ' + element.className)].filter(Boolean);
"""
SHOWN = """
const numbers = (selector, ...names) => [...document.querySelectorAll(selector)]
    .map(element => names.map(name => Number(element.dataset[name])));
return {
    points: numbers('.handle', 'x', 'y'), labels: numbers('#tokens li', 'label').flat(),
    counts: numbers('#entries tbody tr', 'count').flat(), centroids: numbers('#entries tbody tr', 'x', 'y'),
    shares: [...document.querySelectorAll('.bar')]
        .map(bar => [...bar.querySelectorAll('b')].map(part => Number(part.dataset.share))),
    chunkSize: Number(document.querySelector('#chunk-size').value),
    keepRatio: Number(document.querySelector('#keep-ratio').value),
};
"""


pytestmark = [pytest.mark.slow, needs_browser, pytest.mark.xdist_group("play")]


def press(browser, button):
    browser.find_element(By.ID, button).click()


def choose(browser, example):
    Select(browser.find_element(By.ID, "example")).select_by_visible_text(example)


def put(browser, setting, value):
    """Move a slider."""
    code = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    browser.execute_script(code, browser.find_element(By.ID, setting), value)


def shown(browser):
    found = browser.execute_script(SHOWN)
    points = np.array(found["points"], dtype=np.float32)
    assert (points == found["points"]).all()  # they are float32 numbers
    return {**found, "keys": points[:-1], "query": points[-1:]}


def faults(browser, keep_ratio=None):
    """What the page shows otherwise than the reference, for its keys and settings."""
    found = shown(browser)
    keys, keep_ratio = found["keys"], keep_ratio or found["keepRatio"]
    right = chunked_soft_matching(keys, keep_ratio=keep_ratio, chunk_size=found["chunkSize"])
    if found["labels"] != right.labels.tolist():
        return ["labels"]
    centroids = merge(keys, right)
    wrong = [] if found["counts"] == right.counts.tolist() else ["counts"]
    if np.array(found["centroids"], dtype=np.float32).tobytes() != centroids.tobytes():
        wrong.append("centroids")
    by_entry = np.argsort(right.labels, kind="stable")
    ones = np.ones(len(centroids), dtype=np.int64)
    bars = ((keys[by_entry], None), (centroids, right.counts), (centroids, ones))
    for shares, (entries, counts) in zip(found["shares"], bars, strict=True):
        values = np.eye(len(entries), dtype=np.float32)
        output = np.array([shares], dtype=np.float32)
        if not attention_agreement(output, found["query"], entries, values, counts).holds:
            wrong.append("shares")
    return wrong


def test_a_dragged_key_and_two_rounds_have_the_labels_of_the_reference(page):
    before = shown(page)
    handle = page.find_elements(By.CLASS_NAME, "handle")[7]
    ActionChains(page).click_and_hold(handle).move_by_offset(120, 90).move_by_offset(13, -7).release().perform()
    after = shown(page)
    assert after["keys"][:7].tolist() == before["keys"][:7].tolist()
    assert after["keys"][7, 0] > before["keys"][7, 0] + 0.5
    assert after["keys"][7, 1] < before["keys"][7, 1] - 0.3
    said = set()
    for step, keep_ratio in ((0, 1.0), (1, 1.0), (2, 0.5), (3, 0.5), (4, None)):
        assert page.find_element(By.ID, "where").text == f"{step} / 4"
        assert faults(page, keep_ratio) == []
        said.add(page.find_element(By.ID, "story").text)
        if step < 4:
            press(page, "next")
    assert len(said) == 5
    assert not page.find_element(By.ID, "next").is_enabled()


def test_a_key_that_is_dragged_changes_the_clusters_at_once(page):
    press(page, "end")
    labels = shown(page)["labels"]
    handle = page.find_elements(By.CLASS_NAME, "handle")[0]
    ActionChains(page).click_and_hold(handle).move_by_offset(-300, 130).release().perform()
    assert shown(page)["labels"] != labels
    assert faults(page) == []


def test_the_keyboard_does_the_same(page):
    page.execute_script("document.getElementById('random').focus()")

    def keyboard(*keys):
        ActionChains(page).send_keys(*keys).perform()

    for _ in range(3):
        keyboard(Keys.TAB)
    active = page.switch_to.active_element
    assert active.get_attribute("aria-label") == "Key of token 2"
    assert active.get_attribute("aria-valuetext").startswith("25 degrees, length 1.70")
    keyboard(*[Keys.ARROW_LEFT] * 17, Keys.ARROW_UP)
    ActionChains(page).key_down(Keys.SHIFT).send_keys(Keys.ARROW_RIGHT).key_up(Keys.SHIFT).perform()
    assert active.get_attribute("aria-valuetext").startswith("109 degrees, length 1.87")
    assert shown(page)["keys"][2, 1] > 1.7
    for _ in range(7):
        keyboard(Keys.TAB)
    assert page.switch_to.active_element.get_attribute("id") == "next"  # the only button that does something
    for _ in range(4):
        page.find_element(By.ID, "next").send_keys(Keys.ENTER)
    assert shown(page)["labels"][2] == shown(page)["labels"][4]
    assert faults(page) == []
    story = page.find_element(By.ID, "story")
    assert story.get_attribute("aria-live") == "polite"
    assert "3 entries stand for 8 tokens" in story.text


def test_a_finger_drags_a_key(one_file, tmp_path):
    phone = open_browser(tmp_path / "profile", width=PHONE)
    try:
        phone.get(one_file.as_uri())
        handle = phone.find_elements(By.CLASS_NAME, "handle")[7]
        phone.execute_script("arguments[0].scrollIntoView({block: 'center'})", handle)
        place = "const r = arguments[0].getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]"
        x, y = phone.execute_script(place, handle)
        for kind, points in (
            ("Start", [(x, y)]),
            ("Move", [(x + 40, y + 60)]),
            ("Move", [(x + 41, y + 61)]),
            ("End", []),
        ):
            touch = {"type": f"touch{kind}", "touchPoints": [{"x": at, "y": above} for at, above in points]}
            phone.execute_cdp_cmd("Input.dispatchTouchEvent", touch)
        assert shown(phone)["keys"][7, 1] < -0.8
        press(phone, "end")
        assert faults(phone) == []
    finally:
        phone.quit()


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_clustered_as_by_the_reference(page, example):
    choose(page, example)
    press(page, "end")
    assert faults(page) == []


@pytest.mark.parametrize(("n_keys", "chunk_size", "keep_ratio"), [(9, 3, 0.5), (31, 16, 0.2), (32, 32, 0.075)])
def test_random_keys_are_clustered_as_by_the_reference(page, n_keys, chunk_size, keep_ratio):
    for setting, value in (("n-keys", n_keys), ("chunk-size", chunk_size), ("keep-ratio", keep_ratio)):
        put(page, setting, value)
    for _ in range(5):
        press(page, "random")
        press(page, "end")
        assert len(shown(page)["keys"]) == n_keys
        assert faults(page) == []


def test_ties_are_named(page):
    choose(page, "Ties")
    press(page, "next")
    story = page.find_element(By.ID, "story").text
    assert "A is exactly as near to B and D; the first wins" in story
    assert "Tie at the cut: C and E" in story
    assert len(page.find_elements(By.CLASS_NAME, "tie")) == 4
    assert len(page.find_elements(By.CSS_SELECTOR, "line.tied")) == 3


def test_a_page_that_is_wrong_is_seen_to_be_wrong(browser, whole_page, tmp_path):
    wrong = whole_page.replace("numbers[i] > numbers[best]", "numbers[i] >= numbers[best]")
    (tmp_path / "wrong.html").write_text(wrong.replace(" + Math.log(ofProblem[entry])", ""))
    browser.get((tmp_path / "wrong.html").as_uri())
    press(browser, "end")
    assert faults(browser) == ["shares"]
    choose(browser, "Ties")
    press(browser, "end")
    assert faults(browser) == ["labels"]


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_on_a_telephone_nothing_is_cut_off(one_file, tmp_path, is_dark):
    phone = open_browser(tmp_path / "profile", width=PHONE, is_dark=is_dark)
    try:
        phone.get(one_file.as_uri())
        for example in EXAMPLES:
            choose(phone, example)
            while phone.find_element(By.ID, "next").is_enabled():
                assert phone.execute_script(WIDER) == [], example
                press(phone, "next")
            assert phone.execute_script(WIDER) == [], example
        red, *_ = re.findall(r"\d+", phone.execute_script("return getComputedStyle(document.body).backgroundColor"))
        assert (int(red) < 128) == is_dark
        phone.execute_script("document.querySelector('main').innerHTML += '<p style=width:3000px>a</p>'")
        assert phone.execute_script(WIDER)
    finally:
        phone.quit()
