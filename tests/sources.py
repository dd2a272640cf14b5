"""The Python files of this repository as text: what tests/layout reads, and what it can make up to be told apart."""

import ast
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {package: ROOT / folder for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}


@dataclass(frozen=True)
class Module:
    """A module of kvcluster under its import name."""

    name: str
    source: str
    is_package: bool = False


def installed_files():
    """Every file of the packages, of folders that pyproject.toml maps: its place here, and once it is installed."""
    places = {}
    for package, folder in sorted(FOLDERS.items(), key=lambda item: len(item[1].parts)):  # inner folders come last
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                places[path] = f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}"
    return places


def import_name(place):
    """The name under which the file kvcluster/fast/cache.py is imported."""
    return place.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def package_modules():
    """Every module of kvcluster."""
    sources = {place: path.read_text() for path, place in installed_files().items() if place.endswith(".py")}
    return [Module(import_name(place), text, place.endswith("/__init__.py")) for place, text in sources.items()]


def files(ending):
    """Name, as fast/cache.py, and text of every file with this ending, without hidden folders and what was built."""
    tops = [top for top in ROOT.iterdir() if not top.name.startswith(".") and top.name not in ("build", "dist")]
    paths = [path for top in tops for path in (top.rglob(f"*{ending}") if top.is_dir() else [top])]
    names = sorted(path.relative_to(ROOT).as_posix() for path in paths if path.name.endswith(ending))
    return {name: (ROOT / name).read_text() for name in names}


def imports(module, names):
    """What a module imports anywhere, in functions too: of `names`, all modules, where it is one, else as written.

    What stands under `if TYPE_CHECKING` is imported by nobody who runs.
    """
    tree = ast.parse(module.source)
    unseen = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for branch in node.body
        for inner in ast.walk(branch)
    }
    found = set()
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.name.split(".")
            above = parts[: len(parts) - node.level + module.is_package] if node.level else []
            start = ".".join([*above, *filter(None, [node.module])])
            found |= {f"{start}.{alias.name}" if f"{start}.{alias.name}" in names else start for alias in node.names}
    return found
