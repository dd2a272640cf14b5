"""`pip install kvcluster`, alone, in an empty environment: NumPy code that imports without torch."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment in which only this package was installed, from its wheel."""
    folder = tmp_path_factory.mktemp("alone")
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, source)
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--constraint", ROOT / "constraints.txt", *folder.glob("*.whl"))
    return python


def run(*command):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_reference_imports_and_works_alone(python):
    code = (
        "import kvcluster.reference as reference, numpy as np, sys; assert 'torch' not in sys.modules;"
        "keys = np.random.default_rng(0).standard_normal((4, 128, 64)).astype(np.float32);"
        "print(reference.chunked_soft_matching(keys, keep_ratio=0.25).counts.shape)"
    )
    assert run(python, "-c", code) == "(4, 32)\n"


def test_neither_torch_nor_stray_packages_are_installed(python):
    names = "('torch', 'transformers', 'reference', 'fast', 'cli', 'tests')"
    code = f"import importlib.util as u; print([name for name in {names} if u.find_spec(name)])"
    assert run(python, "-c", code) == "[]\n"


def test_the_command_is_there(python):
    assert "demo" in run(python.parent / "kvcluster", "--help")
    assert run(python.parent / "kvcluster", "--version").startswith("kvcluster 0.1.0")
