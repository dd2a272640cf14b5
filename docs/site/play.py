"""The page to play with as one file, with test vectors in it: `python docs/site/play.py FILE`."""

import base64
import gzip
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

from kvcluster.conformance import all_cases
from kvcluster.conformance.vectors import FORMAT, MANIFEST, arrays_of, description, serialize

__all__ = ["page", "vectors"]

SOURCE = Path(__file__).resolve().parents[1] / "play"
PORTED = (  # what contract.js has
    "alternating_partition",
    "similarity",
    "chunked_soft_matching",
    "merge",
    "attention",
    "clustered_attention",
)
LARGEST = 113_000  # bytes of a case's arrays; with the few larger ones the page would be three times as long
HOME = re.compile(r' <a id="home".*?</a>')


def page(home: str | None = None) -> str:
    """The page of docs/play with its scripts, its style and test vectors in it; it loads nothing.

    Parameters
    ----------
    home : where its link "What is this?" leads; without, it has no such link.
    """
    text = (SOURCE / "index.html").read_text()
    text = HOME.sub("", text) if home is None else text.replace('href="README.md"', f'href="{home}"')
    style = (SOURCE / "play.css").read_text()
    text = text.replace('<link rel="stylesheet" href="play.css">', f"<style>\n{style}</style>")
    text = re.sub(
        r'<script src="(\w+\.js)"></script>', lambda tag: f"<script>\n{(SOURCE / tag[1]).read_text()}</script>", text
    )
    files, said = vectors()
    text = text.replace('<span id="subset"></span>', f'<span id="subset">{said}</span>')
    return text.replace("<!-- vectors -->", "\n".join(embedded(name, content) for name, content in files.items()))


def embedded(name: str, content: bytes) -> str:
    text = base64.b64encode(gzip.compress(content, mtime=0)).decode()
    return f'<script type="application/gzip" data-name="{name}">{text}</script>'


def vectors() -> tuple[dict[str, bytes], str]:
    """Files of vectors, all but the largest cases of the port's operations, and what to say of those left out."""
    files: dict[str, bytes] = {}
    said, n_all = [], 0
    for operation in PORTED:
        arrays: dict[str, np.ndarray] = {}
        for case in all_cases((operation,)):
            if case.is_refused:
                continue
            n_all += 1
            inputs, outputs = arrays_of(case)
            if sum(array.nbytes for array in (*inputs.values(), *outputs.values())) <= LARGEST:
                said.append(description(case, inputs, outputs))
                arrays |= {f"{case.name}/in/{name}": array for name, array in inputs.items()}
                arrays |= {f"{case.name}/out/{name}": array for name, array in outputs.items()}
        files[f"{operation}.safetensors"] = serialize(arrays)
    manifest = {**FORMAT, "version": version("kvcluster"), "seed": 0, "files": {}, "cases": said}
    files[MANIFEST] = json.dumps(manifest, allow_nan=False).encode()
    return files, f"{len(said)} of the {n_all} cases of its operations are in this page, all but the largest."


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/site/play.py FILE")
    Path(sys.argv[1]).write_text(page())
