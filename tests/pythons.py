"""What needs NumPy alone, on every supported Python and several NumPys, each in an environment of its own.

    python tests/pythons.py                  all that are found on the path, about two minutes each
    python tests/pythons.py --python 3.12    one

In each the conformance suite puts the reference to itself, test vectors are written, and the tutorials that need no
torch are executed. The vectors must be the same bytes everywhere. A Python that is not on the path is named and left
out; with pyenv, `PYENV_VERSION=3.11.7:3.12.1:3.13.0` puts three there.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
NUMPYS = {"3.11": "2.0.2", "3.12": "2.2.6", "3.13": "2.4.6"}  # by Python: the oldest supported, one between, the newest
TUTORIALS = ("02", "03", "04", "05")  # that need no torch
NEEDED = ("ipykernel", "matplotlib", "nbclient")  # for these


def python_of(version: str) -> str | None:
    """The program on the path that is this version of Python."""
    if (program := shutil.which(f"python{version}")) is None:
        return None
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    return program if done.stdout.startswith(f"Python {version}.") else None


def environment_of(version: str, program: str) -> Path:
    """The folder of programs of an environment with the package and what it needs, pinned but for NumPy."""
    folder = ROOT / ".cache" / "pythons" / f"{version}-numpy-{NUMPYS[version]}"
    subprocess.run([program, "-m", "venv", folder], check=True)
    pinned = (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(line for line in pinned if not line.startswith("numpy==")) + "\n")
    packages = ["--editable", f"{ROOT}[oracle]", f"numpy=={NUMPYS[version]}", *NEEDED]
    install = [folder / "bin" / "python", "-m", "pip", "install", "-qq", *packages]
    subprocess.run(install, check=True, env=os.environ | {"PIP_CONSTRAINT": str(constraints)})
    return folder / "bin"


def run_all(programs: Path, folder: Path) -> dict[str, str]:
    """What came of each step: "passed", or its last line; for vectors the digest of their bytes."""
    vectors = folder / "vectors"
    steps = {
        "reference": [programs / "kvcluster", "check", "kvcluster.reference"],
        "vectors": [programs / "kvcluster", "vectors", vectors],
    }
    for number in TUTORIALS:
        (path,) = (ROOT / "notebooks").glob(f"{number}-*.ipynb")
        steps[number] = [programs / "jupyter", "execute", "--timeout=500", "--output", folder / path.name, path]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    of_jupyter = {"IPYTHONDIR": folder, "JUPYTER_RUNTIME_DIR": folder, "MPLCONFIGDIR": folder}
    environment = kept | {name: str(value) for name, value in of_jupyter.items()}
    outcomes = {}
    for name, command in steps.items():
        done = subprocess.run(command, cwd=folder, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT)
        lines = done.stdout.strip().splitlines() or [""]
        outcomes[name] = "passed" if done.returncode == 0 else f"{done.returncode}: {lines[-1]}"
    if outcomes["vectors"] == "passed":
        outcomes["vectors"] = digest_of(vectors)
    return outcomes


def digest_of(folder: Path) -> str:
    """Of all files with their names."""
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        total.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:12]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", choices=NUMPYS, help="may be repeated; all by default")
    console, rows = Console(), {}
    for version in parser.parse_args().python or NUMPYS:
        console.rule(f"Python {version}, NumPy {NUMPYS[version]}")
        if (program := python_of(version)) is None:
            console.print(f"python{version} is not on the path", style="yellow", highlight=False)
            continue
        with console.status("installing"):
            programs = environment_of(version, program)
        with console.status("running"), tempfile.TemporaryDirectory() as folder:
            rows[version] = run_all(programs, Path(folder))

    table = Table("Python", "NumPy", "reference", "vectors", *(f"no. {number}" for number in TUTORIALS))
    for version, outcomes in rows.items():
        table.add_row(version, NUMPYS[version], *outcomes.values())
    console.print(table)
    vectors = {outcomes["vectors"] for outcomes in rows.values()}
    others = {outcome for row in rows.values() for name, outcome in row.items() if name != "vectors"}
    return 0 if others == {"passed"} and len(vectors) == 1 and ":" not in vectors.pop() else 1


if __name__ == "__main__":
    sys.exit(main())
