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


def package_modules():
    """Every module of kvcluster, of the folders that pyproject.toml maps."""
    modules = []
    for package, folder in FOLDERS.items():
        inner = [other for other in FOLDERS.values() if other != folder and other.is_relative_to(folder)]
        for path in sorted(folder.rglob("*.py")):
            if not any(path.is_relative_to(other) for other in inner):
                parts = path.relative_to(folder).with_suffix("").parts
                is_package = parts[-1] == "__init__"
                name = ".".join((package, *(parts[:-1] if is_package else parts)))
                modules.append(Module(name, path.read_text(), is_package))
    return modules


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
