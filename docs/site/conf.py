"""Sphinx configuration of the site; `make site` builds it from pages that build_site.py has put together."""

import inspect
import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from source_pages import anchor, reading_order  # noqa: E402

from kvcluster import reference  # noqa: E402

project = "kvcluster"
author = "The kvcluster authors"
version = release = version_of("kvcluster")
root_doc = "README"
extensions = ["myst_nb", "sphinx.ext.autodoc", "numpydoc"]
myst_enable_extensions = ["dollarmath"]
default_role = "literal"
myst_heading_anchors = 4
nb_execution_mode = "off"
autodoc_typehints = "none"
numpydoc_show_class_members = False
autodoc_member_order = "bysource"
nitpick_ignore_regex = [("py:class", r"kvcluster\.fast\..*BodyClusters")]  # the type of a property, no page
html_math_renderer = "mathml"  # below
html_theme = "furo"
html_title = "kvcluster"
html_copy_source = html_show_sourcelink = html_show_copyright = False
html_static_path = [str(HERE / "static")]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}

FUNCTION = r"\\(?:log|exp|cosh|sinh|tanh|dim|operatorname\{\w+\})"
SOURCE = re.compile(r"docs/papers\.md, (\w+): (\w[\w -]*\w)")  # a row: section, first cell
LONG_FORMULA = 40  # characters of TeX; a longer formula may be wider than a telephone
ROOT = HERE.parents[1]
MEASURED = ["demo", "kept", "speed", "recall"]
LEARN = ["questions", "reading"]
USE = sorted({path.stem for path in HERE.parent.glob("*.md")} - {*MEASURED, *LEARN, "papers"})
BENCHMARKS = sorted(str(path.relative_to(ROOT).with_suffix("")) for path in ROOT.glob("benchmarks/*/*.md"))
OF_THE_METHOD = 9  # files of the reference, an evening; the others lead beyond


def idea(name):
    """The entry of a file of the reference, by what it is about."""
    words = {"kmeans": "k-means", "llama": "a whole Llama", "rotary": "rotary positions"}.get(
        name, name.replace("_", " ")
    )
    return f"{words[0].upper()}{words[1:]} <reference/{name}.py>"


IDEAS = [idea(name) for name in reading_order()]
CONTENTS = {
    "Learn": ["docs/play/README", *(f"docs/{name}" for name in LEARN), "notebooks/[0-9]*"],
    "The method": [
        *IDEAS[:OF_THE_METHOD],
        "reference/SPECIFICATION",
        "The papers, and ours <docs/papers>",
    ],
    "Beyond it": IDEAS[OF_THE_METHOD:],
    "Theory": [
        "All claims <theory/README>",
        "theory/notation",
        *(f"theory/{page}/README" for page in ("complexity", "partition", "merging", "recall", "exactness")),
    ],
    "Use": [*(f"docs/{name}" for name in USE), "docs/vectors/README"],
    "Measured": [*(f"docs/{name}" for name in MEASURED), *BENCHMARKS],
    "Names": ["docs/api/*"],
    "Take part": ["CONTRIBUTING", "SECURITY", "CHANGELOG"],
}


def add_contents(app, docname, source):
    """The start page is README, which knows nothing of Sphinx: the links to all other pages are added here."""
    if docname == root_doc:
        for caption, entries in CONTENTS.items():
            lines = [f":caption: {caption}", ":hidden:", ":glob:", ":maxdepth: 1", "", *entries]
            source[0] += "\n".join(["", "```{toctree}", *lines, "```", ""])


def link_sources(app, what, name, obj, options, lines):
    """Docstrings name a row of docs/papers.md; here they lead to it, those of the fast path to their namesake's."""
    module, _, own = name.rpartition(".")
    if module == "kvcluster.fast" and (row := SOURCE.search(inspect.getdoc(getattr(reference, own, None)) or "")):
        lines += ["", f"Source: {row[0]}.", ""]
    lines[:] = [
        SOURCE.sub(lambda row: f"`{row[0]} <../papers.html#{anchor(row[1], row[2])}>`__", line) for line in lines
    ]


def as_mathml(tex, as_block):
    """A formula that browsers show without any script; docutils, unlike TeX, sets `n log n` and `|x|` badly."""
    tex = re.sub(rf"(?<=[\w)}}]) (?={FUNCTION})", r"\\thinspace ", tex)
    tex = re.sub(rf"({FUNCTION}(?:_\w)?) (?=[\w\\])", r"\1\\thinspace ", tex)
    return tex2mathml(tex.replace(r"\lvert", r"\left|").replace(r"\rvert", r"\right|"), as_block=as_block)


def visit_formula(translator, node):
    formula = as_mathml(node.astext(), as_block=False)
    is_long = len(node.astext()) > LONG_FORMULA
    translator.body.append(f'<span class="long formula">{formula}</span>' if is_long else formula)
    raise nodes.SkipNode


def visit_displayed_formula(translator, node):
    translator.body.append(f'<div class="formula">{as_mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", link_sources, priority=600)  # after numpydoc
    app.add_html_math_renderer("mathml", (visit_formula, None), (visit_displayed_formula, None))
