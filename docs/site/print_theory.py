"""Print the pages of theory/ as one PDF with all numbered claims, to cite: `make theory-pdf`. It needs Chromium."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from sphinx.cmd.build import main as run_sphinx

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from build_site import CACHE, FONT  # noqa: E402
from source_pages import ROOT, write  # noqa: E402

__all__ = ["print_theory"]

PAGES = ("notation", *(f"{part}/README" for part in ("complexity", "partition", "merging", "exactness", "recall")))
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]*)(#[^)\s]*)?\)")
COVER = """# The theory of kvcluster {version}: claims, proofs, checks

Clustering the key-value cache of long-context language models. Claims have letters and numbers: C for cost, P for
partitions, M for merging, E for exactness, R for recall. To cite one: its number, the version above, and the software
as its file `CITATION.cff` has it. The functions that are named try to break the claims; `python -m kvcluster.theory`
runs them all.

```{{toctree}}
:maxdepth: 2
{pages}
```
"""


def print_theory(place: Path, chromium: str) -> int:
    """Write the PDF to `place` with that browser; 0 if Sphinx found no fault."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        stage(folder / "pages")
        settings = {"html_theme": "basic", "html_css_files": "print.css", "root_doc": "index"}
        options = [part for key, value in settings.items() for part in ("-D", f"{key}={value}")]
        arguments = ["-b", "singlehtml", "-q", "-W", "--keep-going", "-c", HERE, *options]
        status = run_sphinx([str(argument) for argument in (*arguments, folder / "pages", folder / "one")])
        shutil.copyfile(FONT, folder / "one" / "_static" / FONT.name)
        command = [chromium, "--headless", "--no-sandbox", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={folder / 'user'}", "--no-pdf-header-footer", "--generate-pdf-document-outline"]
        command += [f"--print-to-pdf={place.resolve()}", (folder / "one" / "index.html").as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    return status


def stage(folder: Path) -> None:
    """Write a cover, the pages of theory/ and their figures into `folder`."""
    for page in PAGES:
        path = ROOT / "theory" / f"{page}.md"
        write(folder / path.relative_to(ROOT), LINK.sub(lambda link, path=path: printed(path, link), path.read_text()))
    pages = "\n".join(f"theory/{page}" for page in PAGES)
    write(folder / "index.md", COVER.format(version=version("kvcluster"), pages=pages))
    shutil.copytree(ROOT / "docs" / "figures" / "theory", folder / "docs" / "figures" / "theory")


def printed(page: Path, link: re.Match) -> str:
    """The same link if it stays inside of what is printed, or leads to the web; else its words."""
    words, name, _ = link.groups()
    target = Path(os.path.normpath(page.parent / name)) if name else page
    is_inside = target in [ROOT / "theory" / f"{each}.md" for each in PAGES]
    return link[0] if is_inside or re.match(r"[a-z]+:", name) else words


if __name__ == "__main__":
    browser = shutil.which("chromium")
    if browser is None:
        sys.exit("no Chromium on the path: `apt-get install chromium`")
    place = CACHE / "theory.pdf"
    CACHE.mkdir(exist_ok=True)
    status = print_theory(place, browser)
    print(place)
    sys.exit(status)
