"""Scripts of docs/, which is no package, as modules."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def script(name):
    """The module `name` of docs, such as "site/claims"."""
    specification = importlib.util.spec_from_file_location(Path(name).stem, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
