"""`pip install kvcluster`, alone, in an empty environment: NumPy code that imports without torch."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from ports import RIGHT_PORT, WRONG_PORT

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment in which only this package was installed, from its wheel."""
    folder = tmp_path_factory.mktemp("alone")
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, source)
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    run(
        python, "-m", "pip", "install", "--constraint", ROOT / "requirements" / "constraints.txt", *folder.glob("*.whl")
    )
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


@pytest.fixture(scope="module")
def oracle(python, tmp_path_factory):
    """The same environment with the extra for the oracle: a folder with a right and a wrong port, and the command."""
    wheel = next(python.parent.parent.parent.glob("*.whl"))
    run(python, "-m", "pip", "install", "--constraint", ROOT / "requirements" / "constraints.txt", f"{wheel}[oracle]")
    folder = tmp_path_factory.mktemp("ports")
    (folder / "right_port.py").write_text(RIGHT_PORT)
    (folder / "wrong_port.py").write_text(WRONG_PORT)
    return python.parent, folder


def test_the_oracle_judges_ports_without_torch(python, oracle):
    programs, folder = oracle
    for port, status, text in (("right", 0, "agrees"), ("wrong", 1, "sources and destinations are swapped")):
        command = [programs / "kvcluster", "check", folder / f"{port}_port.py"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
        assert (done.returncode, text in done.stdout) == (status, True), done.stdout + done.stderr
    command = [programs / "pytest", "-q", "-p", "no:cacheprovider", "--pyargs", "kvcluster.conformance"]
    done = run(*command, "--implementation", folder / "right_port.py")
    assert " passed" in done
    assert " failed" not in done
    code = "import importlib.util as u; print([name for name in ('torch', 'triton') if u.find_spec(name)])"
    assert run(python, "-c", code) == "[]\n"


def test_vectors_are_written_and_verified_without_torch(oracle):
    programs, folder = oracle
    run(programs / "kvcluster", "vectors", folder / "vectors")
    run(programs / "kvcluster", "vectors", folder / "vectors", "--verify")


def test_the_command_is_there(python):
    assert "demo" in run(python.parent / "kvcluster", "--help")
    assert run(python.parent / "kvcluster", "--version").startswith("kvcluster 0.1.0")
