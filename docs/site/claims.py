"""Write theory/README.md: every claim with links to its proof, and to the files of its checks and its tests."""

import ast
import re
import sys
from pathlib import Path

from kvcluster.theory.catalogue import CLAIMS
from kvcluster.theory.claims import Claim

__all__ = ["page", "slug"]

ROOT = Path(__file__).resolve().parents[2]
THEORY, TESTS = ROOT / "theory", ROOT / "tests"
OPENING = """# Claims

Every numbered claim with its proof (P7 and P8 are measurements), the code that looks for a counterexample, and the
tests that hand this code something false and see it fail; a link with the name of a function leads to its file.
`python -m kvcluster.theory` runs all checks, with `--claim M5` those of one claim. [notation.md](notation.md) says what
the signs mean and how rounding is bounded. The proofs stand on the pages [complexity](complexity/README.md),
[partition](partition/README.md), [merging](merging/README.md), [exactness](exactness/README.md) and
[recall](recall/README.md).

This page is written by `python docs/site/claims.py`.

| claim | proof | checks | tests |
|---|---|---|---|
"""


def page() -> str:
    """The text of theory/README.md."""
    tests = [(path, name) for path in sorted(TESTS.rglob("test_*.py")) for name in functions(path)]
    return OPENING + "".join(f"{row(claim, tests)}\n" for claim in CLAIMS)


def row(claim: Claim, tests: list[tuple[Path, str]]) -> str:
    title = re.search(rf"(?m)^## ({claim.number}\. .+)$", (THEORY / claim.page / "README.md").read_text())
    proof = f"[{claim.number}]({claim.page}/README.md#{slug(title[1])})"
    checks = []
    for name in claim.checks:
        module, function = name.rsplit(".", 1)
        checks.append(f"[`{function}`]({module.replace('.', '/')}.py)")
    named = [
        f"[`{name}`](../{path.relative_to(ROOT)})"
        for path, name in tests
        if re.match(rf"test_(\w+_and_)?{claim.number.lower()}_", name)
    ]
    return f"| {claim.statement} | {proof} | {', '.join(checks)} | {', '.join(named)} |"


def functions(path: Path) -> list[str]:
    """Names of the functions that a file defines."""
    return [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]


def slug(title: str) -> str:
    """The anchor that GitHub, and the site, give to a title."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


if __name__ == "__main__":
    (THEORY / "README.md").write_text(page())
    sys.stdout.write(f"{THEORY / 'README.md'}\n")
