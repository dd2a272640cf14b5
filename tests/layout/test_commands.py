"""`make` offers what the pages say: every command that they quote is there, and every one has its line of help."""

import re
import subprocess

import pytest
from sources import ROOT, files

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"(?m)^([a-z][a-z-]*):", MAKEFILE))
QUOTED = re.compile(r"(?m)(?:`|^ *)make ([a-z][a-z-]*)(?=`| *#|$)")


def unknown(text):
    """Targets that a text quotes and nobody can make."""
    asked = set(QUOTED.findall(text))
    benchmarks = {f"bench-{path.parent.name}" for path in (ROOT / "benchmarks").glob("*/run.py")}
    return sorted(asked - TARGETS - benchmarks)


def test_every_command_that_is_quoted_can_be_made():
    texts = {name: text for name, text in (files(".md") | files(".py")).items() if not name.startswith("tests/")}
    assert {name: unknown(text) for name, text in texts.items() if unknown(text)} == {}


@pytest.mark.parametrize(
    "text", ["see `make nothing`", "```\nmake nothing    # at all\n```", "    make bench-nothing\n", "`make bench-`"]
)
def test_a_command_that_nobody_can_make_is_found(text):
    assert unknown(text) != []


def test_words_and_commands_that_are_there_are_no_faults():
    assert unknown("We make nothing of it. `make test`, `make bench-recall`\n\n    make demo  # a Llama\n") == []


def test_help_has_a_line_for_every_target():
    printed = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    phony = re.search(r"(?m)^\.PHONY: (.*)$", MAKEFILE)[1].split()
    lines = [line.split(maxsplit=2) for line in printed.splitlines()]
    assert all(len(line) == 3 for line in lines)
    assert sorted([*phony, "bench-NAME"]) == sorted(target for _, target, _ in lines)
