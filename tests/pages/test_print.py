"""The printed theory: one PDF that has every numbered claim."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from browsers import CHROMIUM, needs_browser
from pypdf import PdfReader
from scripts import script

from kvcluster.theory.catalogue import CLAIMS

ROOT = Path(__file__).resolve().parents[2]
BUILD = "import sys; sys.path.insert(0, 'docs/site'); from print_theory import print_theory; from pathlib import Path; "
NUMBERS = {claim.number for claim in CLAIMS}

print_theory = script("site/print_theory")


def numbers_of(outline):
    """The numbers with which the titles of a PDF begin."""
    for entry in outline:
        if isinstance(entry, list):
            yield from numbers_of(entry)
        elif found := re.match(r"([A-Z]\d+)\. ", entry.title):
            yield found[1]


def test_links_out_of_what_is_printed_become_words():
    page = ROOT / "theory" / "merging" / "README.md"
    text = "[P7](../partition/README.md#p7) [`f`](checks.py) [c](../README.md#a) [d](https://x.org) ![e](f.png)"
    printed = print_theory.LINK.sub(lambda link: print_theory.printed(page, link), text)
    assert printed == "[P7](../partition/README.md#p7) `f` c [d](https://x.org) ![e](f.png)"


@pytest.mark.slow
@needs_browser
@pytest.mark.xdist_group("site")
def test_the_pdf_has_all_claims_with_their_numbers(tmp_path):
    place = tmp_path / "theory.pdf"
    code = BUILD + f"sys.exit(print_theory(Path({str(place)!r}), {CHROMIUM!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    with PdfReader(place) as pdf:
        found = list(numbers_of(pdf.outline))
        assert set(found) >= NUMBERS
        assert len(found) == len(set(found))
        text = " ".join(page.extract_text() for page in pdf.pages)
    assert len(re.findall(r"Claim\b", text)) >= len(NUMBERS)
    assert {number for number in NUMBERS if not re.search(rf"\b{number}\. \w", text)} == set()
    assert "\\frac" not in text
