"""Build the site: `make site`. It is written to .cache/site and can be read without a network."""

import shutil
import sys
from pathlib import Path

import matplotlib
from sphinx.cmd.build import main as run_sphinx

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from play import page  # noqa: E402
from source_pages import PLAY, ROOT, stage  # noqa: E402

CACHE = HERE.parents[1] / ".cache"
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "STIXGeneral.ttf"  # for formulas, without a better font


def build(site: Path, work: Path) -> int:
    """Put the pages together in `work`, write the site to `site`; 0 if Sphinx found no fault, such as a dead link."""
    for folder in (site, work):
        shutil.rmtree(folder, ignore_errors=True)
    stage(work / "pages")
    arguments = ["-b", "html", "-q", "-W", "--keep-going", "-n", "-j", "2", "-c", HERE, "-d", work / "read"]
    status = run_sphinx([str(argument) for argument in (*arguments, work / "pages", site)])
    shutil.copyfile(site / "README.html", site / "index.html")
    shutil.copyfile(FONT, site / "_static" / FONT.name)
    (site / PLAY.relative_to(ROOT) / "index.html").write_text(page(home="README.html"))
    return status


if __name__ == "__main__":
    status = build(CACHE / "site", CACHE / "site-pages")
    print(f"{CACHE / 'site' / 'index.html'}")
    sys.exit(status)
