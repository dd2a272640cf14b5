"""C++ of the package with a change of its text, or compiled with other flags, for one test."""

import ctypes
import shutil
from pathlib import Path

import pytest

from kvcluster.fast.cpu import compiling

__all__ = ["INSTRUCTIONS", "recompile"]

INSTRUCTIONS = ["-march=native", "-march=x86-64-v3", "-march=x86-64"]


def recompile(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *changes: tuple[str, str],
    flags: tuple[str, ...] = compiling.FLAGS,
) -> ctypes.CDLL:
    """`name`.cpp with other words in the place of some, which it then has once."""
    sources = folder / "sources"
    shutil.copytree(compiling.FOLDER, sources, ignore=shutil.ignore_patterns("*.py*"))
    text = (sources / f"{name}.cpp").read_text()
    for right, wrong in changes:
        assert text.count(right) == 1, right
        text = text.replace(right, wrong)
    (sources / f"{name}.cpp").write_text(text)
    monkeypatch.setattr(compiling, "FOLDER", sources)
    monkeypatch.setattr(compiling, "FLAGS", flags)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda _: folder)
    return compiling.library.__wrapped__(name)
