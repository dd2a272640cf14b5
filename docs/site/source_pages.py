"""The sources of the site: copies of this repository's pages, and a page for each file that they link to.

A link to a file of the repository becomes a link to a page with its source, one section for each function or class; if
its words are the name of one of these, in backticks, it goes to that section. A link to a folder goes to a list of
what is in it.
"""

import ast
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["anchor", "reading_order", "stage"]

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "*.md",
    "docs/*.md",
    "docs/api/*.md",
    "docs/play/*.md",
    "docs/vectors/*.md",
    "theory/*.md",
    "theory/*/*.md",
    "reference/*.md",
    "benchmarks/*/*.md",
)
NOTEBOOKS = "notebooks/*.ipynb"
FIGURES = ("docs/figures/*.png", "docs/figures/theory/*.png")
WHOLE_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s#]+)\)")
LINK = re.compile(r"(?:`(\w+)`)?\]\(([^)\s#]+)(?=[)#])")  # the code that ends its words, and where it leads
PAPERS = ROOT / "docs" / "papers.md"
ROW = re.compile(r"(?m)^\| (?!point )(\w[^|]*) \|")  # with its first cell
CAPTION = re.compile(r"\*Figure\.\s+([^*]+)\*")
CONTROL = "application/vnd.jupyter.widget-view+json"
PLAY = ROOT / "docs" / "play"  # build_site.py puts the page there
LANGUAGES = {".cpp": "cpp", ".js": "javascript", ".h": "cpp", ".cff": "yaml", ".toml": "toml", "": "make"}
LISTED = {".py", ".cpp", ".h", ".js", ".md", ".ipynb"}


def stage(folder: Path) -> None:
    """Write the sources of the site into `folder`: pages, notebooks, figures, and pages of files that they link to."""
    pages = sorted({path for pattern in (*PAGES, NOTEBOOKS) for path in ROOT.glob(pattern)})
    wanted = {ROOT / "reference" / f"{name}.py" for name in reading_order()}
    for path in pages:
        text = path.read_text()
        if path.suffix == ".md":
            text = WHOLE_LINK.sub(lambda link, page=path: to_play(page, link), text)
        wanted |= {target for target in targets(path, text) if target not in pages and target.suffix != ".png"}
        text = LINK.sub(lambda link, page=path: rewritten(page, link), text)
        if path.suffix == ".ipynb":
            text = as_page(text)
        elif path == PAPERS:
            text = with_anchors(text)
        write(folder / path.relative_to(ROOT), text)
    tour = reading_order()
    for path in with_listed(wanted):
        page = folder_page(path) if path.is_dir() else file_page(path)
        is_in_tour = path.parent.name == "reference" and path.stem in tour
        name = "index.md" if path.is_dir() else f"{path.name}.md"
        place = folder / (path if path.is_dir() else path.parent).relative_to(ROOT) / name
        write(place, page if is_in_tour else f"---\norphan: true\n---\n{page}")
    for pattern in FIGURES:
        for path in ROOT.glob(pattern):
            place = folder / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())


def to_play(page: Path, link: re.Match) -> str:
    """The same link; where it is one to docs/play, which GitHub can show, to the page to play with itself."""
    words, name = link.groups()
    target = Path(os.path.normpath(page.parent / name))
    if target not in (PLAY / "README.md", PLAY / "index.html"):
        return link[0]
    return f'<a href="{Path(os.path.relpath(PLAY / "index.html", page.parent)).as_posix()}">{words}</a>'


def as_page(text: str) -> str:
    """A notebook to be read: its figures say in words what the caption below them says, and it has no sliders.

    These need a kernel; the picture that each slider moves stands beside it.
    """
    notebook = json.loads(text)
    notebook["metadata"].pop("widgets", None)
    cells = notebook["cells"]
    for cell, following in zip(cells, [*cells[1:], {"source": ""}], strict=True):
        if "outputs" in cell:
            cell["outputs"] = [output for output in cell["outputs"] if CONTROL not in output.get("data", {})]
            caption = CAPTION.match("".join(following["source"]))
            if caption:
                words = " ".join(caption[1].replace("`", "").split())
                cell.setdefault("metadata", {})["mystnb"] = {"image": {"alt": words}}
    return json.dumps(notebook, indent=1)


def with_anchors(text: str) -> str:
    """docs/papers.md with an anchor in each row of its row by row tables, to which docstrings lead."""
    parts = re.split(r"(?m)^(?=## )", text)
    for i, part in enumerate(parts):
        if named := re.match(r"## (\w+).*, row by row\n", part):
            name = named[1]
            parts[i] = ROW.sub(lambda row, name=name: f'| <span id="{anchor(name, row[1])}"></span>{row[1]} |', part)
    return "".join(parts)


def anchor(section: str, row: str) -> str:
    """Where a row of docs/papers.md is found: `Chelsea: partition` at `chelsea-partition`."""
    return re.sub(r"\W+", "-", f"{section} {row}".lower())


def write(place: Path, text: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)


def reading_order() -> list[str]:
    """Names of the reference's files, as the docstring of its package lists them, then those that it does not list."""
    text = ast.get_docstring(ast.parse((ROOT / "reference" / "__init__.py").read_text()))
    lines = re.findall(r"(?m)^\d+\. .*$", text)
    names = [name for line in lines for name in re.findall(r"`(\w+)`", line)]
    return names + sorted(
        path.stem
        for path in (ROOT / "reference").glob("*.py")
        if path.stem not in names and not path.stem.startswith("_")
    )


def targets(page: Path, text: str) -> Iterator[Path]:
    """Files and folders of the repository that a page links to; Sphinx reports what does not exist."""
    for _, name in LINK.findall(text):
        target = Path(os.path.normpath(page.parent / name))
        if not re.match(r"[a-z]+:", name) and target.exists():
            yield target


def with_listed(wanted: set[Path]) -> list[Path]:
    """The files and folders that get a page: those linked to, and what the lists of linked folders name."""
    listed = {path for folder in wanted if folder.is_dir() for path in listing(folder)}
    return sorted(path for path in wanted | listed if path.is_dir() or path.suffix not in {".md", ".ipynb"})


def listing(folder: Path) -> list[Path]:
    """The files in a folder and in the folders below it."""
    return sorted(path for path in folder.rglob("[!.]*.*") if path.suffix in LISTED and path.name != "README.md")


def rewritten(page: Path, link: re.Match) -> str:
    """The same link on the site."""
    words, name = link.groups()
    target = Path(os.path.normpath(page.parent / name))
    if re.match(r"[a-z]+:", name) or not target.exists() or target.suffix in {".md", ".ipynb", ".png"}:
        return link[0]
    if target.is_dir():
        place = f"{name.rstrip('/')}/{'README' if (target / 'README.md').exists() else 'index'}.md"
    else:
        place = f"{name}.md{section(target, words)}"
    return link[0].removesuffix(name) + place


def section(path: Path, name: str | None) -> str:
    """The anchor of the function or class of that name on a file's page; nothing if the file has none."""
    is_there = path.suffix == ".py" and name in [node.name for node in definitions(path.read_text())]
    return f"#{name.lower()}" if is_there else ""


def definitions(source: str) -> list[ast.FunctionDef | ast.ClassDef]:
    return [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def first_line(node: ast.FunctionDef | ast.ClassDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def file_page(path: Path) -> str:
    """A page with a file's docstring and all of its source."""
    name = path.relative_to(ROOT)
    parts = [f"# {as_words(name)}\n"]
    source = path.read_text()
    if path.suffix != ".py":
        return "\n".join([*parts, fenced(source, LANGUAGES.get(path.suffix, "text"), 1)])
    parts.append(f"{ast.get_docstring(ast.parse(source)) or ''}\n")
    lines = source.splitlines(keepends=True)
    done = 0
    for node in definitions(source):
        start = first_line(node) - 1
        parts.append(fenced("".join(lines[done:start]), "python", done + 1))
        parts.append(f"## {as_words(node.name)}\n")
        parts.append(fenced("".join(lines[start : node.end_lineno]), "python", start + 1))
        done = node.end_lineno
    parts.append(fenced("".join(lines[done:]), "python", done + 1))
    return "\n".join(parts)


def as_words(name: Path | str) -> str:
    """A name whose underscores Markdown leaves alone."""
    return str(name).replace("_", r"\_")


def fenced(source: str, language: str, first: int) -> str:
    """A highlighted block with the numbers that its lines have in the file."""
    if not source.strip():
        return ""
    first += len(source) - len(source.lstrip("\n"))
    return f"``````{{code-block}} {language}\n:lineno-start: {first}\n{source.strip(chr(10))}\n``````\n"


def folder_page(folder: Path) -> str:
    """A list of what is in a folder, with the first line that each file says of itself."""
    lines = [f"# {folder.relative_to(ROOT)}/\n"]
    for path in listing(folder):
        name = path.relative_to(folder)
        link = f"{name}.md" if path.suffix not in {".md", ".ipynb"} else name
        lines.append(f"- [{as_words(name)}]({link}) {summary(path)}")
    return "\n".join([*lines, ""])


def summary(path: Path) -> str:
    if path.suffix != ".py":
        return ""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return text.partition("\n")[0]
