"""From README to any claim's proof, checks and tests in two clicks: the links are followed, the names looked up."""

import os
import re
from pathlib import Path

import pytest
from scripts import script

from kvcluster.theory.catalogue import CLAIMS

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s#]+)(?:#([^)\s]+))?\)")
PAGE = (ROOT / "theory" / "README.md").read_text()


claims = script("site/claims")


def clicks(page):
    """What one can click on: where it leads, the anchor there, the words of the link."""
    for words, target, anchor in LINK.findall(page.read_text()):
        if not re.match(r"[a-z]+:", target):
            yield Path(os.path.normpath(page.parent / target)), anchor, words.strip("`")


def faults(number, checks, links):
    """What of a claim cannot be reached over these links: its proof, a check, a test."""
    proofs = [section(target, anchor) for target, anchor, words in links if words == number]
    found = [] if proofs and all("**Claim" in proof for proof in proofs) else ["no proof"]
    for kind, names in (("check", checks), ("test", [words for *_, words in links if words.startswith("test_")])):
        if not names:
            found.append(f"no {kind}")
        for name in names:
            function = name.rpartition(".")[2]
            files = [target for target, _, words in links if words == function]
            if not any(function in claims.functions(path) for path in files):
                found.append(f"no {function}")
    return found


def section(path, anchor):
    """What stands under the title of that anchor."""
    parts = [part for part in path.read_text().split("\n## ") if claims.slug(part.partition("\n")[0]) == anchor]
    return parts[0] if parts else ""


def row_of(number, page=PAGE):
    """The links of a claim's row."""
    rows = [row for row in page.splitlines() if f"[{number}](" in row]
    assert len(rows) == 1
    return [
        (Path(os.path.normpath(ROOT / "theory" / target)), anchor, words.strip("`"))
        for words, target, anchor in LINK.findall(rows[0])
    ]


def test_the_first_click_leads_from_readme_to_the_claims():
    assert ROOT / "theory" / "README.md" in [target for target, _, _ in clicks(ROOT / "README.md")]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.number)
def test_the_second_click_leads_to_proof_checks_and_tests(claim):
    assert faults(claim.number, claim.checks, row_of(claim.number)) == []


def test_missing_links_are_noticed():
    links = row_of("M1")
    checks = ("merging.checks.check_equal_keys",)
    assert faults("M1", checks, links) == []
    assert faults("M1", checks, [link for link in links if link[2] != "M1"]) == ["no proof"]
    wrong = [(target, anchor.replace("m1-", "m0-"), words) for target, anchor, words in links]
    assert faults("M1", checks, wrong) == ["no proof"]
    assert faults("M1", checks, [link for link in links if not link[2].startswith("test_")]) == ["no test"]
    elsewhere = [
        (ROOT / "theory" / "claims.py" if t.suffix == ".py" else t, anchor, words) for t, anchor, words in links
    ]
    assert faults("M1", checks, elsewhere) == ["no check_equal_keys", "no test_m1_is_false_without_log_counts"]


def test_the_page_is_as_its_script_writes_it():
    assert claims.page() == PAGE, "theory/README.md is old: python docs/site/claims.py"
