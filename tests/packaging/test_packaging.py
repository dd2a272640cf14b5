"""What `python -m build` makes: a wheel and an sdist; the wheel alone in an empty environment, and beside torch."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
from ports import RIGHT_PORT, WRONG_PORT
from sources import PROJECT, ROOT, installed_files

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]

VERSION = PROJECT["project"]["version"]


def run(*command):
    environment = os.environ | {"PIP_CONSTRAINT": str(ROOT / "requirements" / "constraints.txt")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600, cwd="/", env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install(python, *options):
    """By the pip of these tests: the environment of `python` has none."""
    return run(sys.executable, "-m", "pip", "--python", python, "install", *options)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the sdist, made from a copy of the sources, and of the wheel, made from the sdist."""
    folder = tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, folder / "source", ignore=ignored)
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", source)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


def test_both_pass_twines_check(built):
    names = [path.name for path in sorted(built.iterdir())]
    assert names == [f"kvcluster-{VERSION}-py3-none-any.whl", f"kvcluster-{VERSION}.tar.gz"]
    run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())


def test_the_wheel_has_every_file_of_the_packages_and_no_other(wheel):
    """Through the sdist, so that this has them too: the specification, C++, the pages of theory."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"kvcluster-{VERSION}.dist-info/METADATA").decode()
        assert any(name.endswith("/LICENSE") for name in archive.namelist())
    assert names == set(installed_files().values())
    for name, address in PROJECT["project"]["urls"].items():
        assert f"\nProject-URL: {name}, {address}\n" in metadata


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of an environment in which only this package was installed, from its wheel."""
    folder = tmp_path_factory.mktemp("alone")
    venv.create(folder)
    install(folder / "bin" / "python", wheel)
    return folder / "bin" / "python"


def test_the_reference_imports_and_works_alone(python):
    code = (
        "import kvcluster.reference as reference, numpy as np, sys; assert 'torch' not in sys.modules;"
        "keys = np.random.default_rng(0).standard_normal((4, 128, 64)).astype(np.float32);"
        "print(reference.chunked_soft_matching(keys, keep_ratio=0.25, chunk_size=64).counts.shape)"
    )
    assert run(python, "-c", code) == "(4, 32)\n"


def test_neither_torch_nor_stray_packages_are_installed(python):
    names = "('torch', 'transformers', 'reference', 'fast', 'cli', 'tests')"
    code = f"import importlib.util as u; print([name for name in {names} if u.find_spec(name)])"
    assert run(python, "-c", code) == "[]\n"


DOCTESTS = """
import doctest, importlib, pkgutil
import numpy as np
from kvcluster import reference
names = [module.name for module in pkgutil.iter_modules(reference.__path__, "kvcluster.reference.")]
results = [doctest.testmod(importlib.import_module(name), extraglobs={"np": np}) for name in names]
print(sum(each.failed for each in results), sum(each.attempted for each in results) > 50)
"""


def test_the_examples_of_the_reference_are_true_alone(python):
    assert run(python, "-c", DOCTESTS) == "0 True\n"


def test_the_command_is_there(python):
    assert "demo" in run(python.parent / "kvcluster", "--help")
    assert run(python.parent / "kvcluster", "--version") == f"kvcluster {VERSION}\n"
    assert run(python, "-m", "kvcluster", "--version") == f"kvcluster {VERSION}\n"


@pytest.fixture(scope="module")
def oracle(python, wheel, tmp_path_factory):
    """The same environment with the extra for the oracle: its programs, and a folder with a right and a wrong port."""
    install(python, f"{wheel}[oracle]")
    folder = tmp_path_factory.mktemp("ports")
    (folder / "right_port.py").write_text(RIGHT_PORT)
    (folder / "wrong_port.py").write_text(WRONG_PORT)
    return python.parent, folder


def test_the_reference_agrees_with_itself_without_torch(oracle):
    programs, _ = oracle
    assert "agrees" in run(programs / "kvcluster", "check", "kvcluster.reference")


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


@pytest.fixture(scope="module")
def beside_torch(wheel, tmp_path_factory):
    """The interpreter of an environment with this wheel, and all other packages of the environment of these tests."""
    folder = tmp_path_factory.mktemp("beside-torch")
    venv.create(folder)
    python = folder / "bin" / "python"
    install(python, "--no-deps", "--no-index", wheel)
    own = sysconfig.get_path("purelib", vars={"base": str(folder)})
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    with open(f"{own}/others.pth", "w") as file:
        file.write("\n".join(others))  # what lies there is found after the wheel; its own .pth files are not read
    return python


def test_what_the_extra_for_transformers_asks_for_is_in_the_environment_of_the_tests(beside_torch):
    assert "Would install" not in install(beside_torch, "--no-index", "--dry-run", "kvcluster[hf]")


GENERATION = """
import sys, torch, kvcluster
from transformers import LlamaConfig, LlamaForCausalLM
from kvcluster.fast.huggingface import ClusteredCache
assert kvcluster.__file__.startswith(sys.prefix), kvcluster.__file__
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
)
model = LlamaForCausalLM(config).eval()
prompt = torch.randint(1, 97, (1, 600))
cache = ClusteredCache.for_model(model, keep_ratio=0.25)
tokens = model.generate(prompt, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0)
print(tuple(tokens.shape), cache.n_seen, cache.n_stored < 600)
"""


def test_a_tiny_model_generates_with_the_wheel(beside_torch):
    assert run(beside_torch, "-c", GENERATION) == "(1, 608) 607 True\n"
