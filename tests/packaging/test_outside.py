"""What a process may meet outside: a full disk, a reader that goes away, closed streams, Ctrl-C, odd names."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import typer
from typer.testing import CliRunner

from kvcluster.cli import app
from kvcluster.evaluation.commands import Command
from kvcluster.evaluation.errors import UnusableInputError

FULL = "/dev/full"
needs_full = pytest.mark.skipif(not os.path.exists(FULL), reason=f"needs {FULL}")
RIGHT = "from kvcluster.reference import alternating_partition\n"
SLOW = "import time\n\ndef alternating_partition(size):\n    print('asked', flush=True)\n    time.sleep(60)\n"


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter.py").write_text(RIGHT)
    return tmp_path / "adapter.py"


def words_of(arguments):
    if arguments[0] == "theory":
        return [sys.executable, "-m", "kvcluster.theory", *arguments[1:]]
    return [sys.executable, "-m", "kvcluster", *arguments]


def ended(*arguments, before="", **streams):
    """Exit code and lines of standard error; `before` is put before the command in a shell's line."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | streams
    shell = ["bash", "-c", f'{before} exec "$@"', "bash"] if before else []
    done = subprocess.run([*shell, *words_of(arguments)], timeout=120, **streams)
    return done.returncode, (done.stderr or "").splitlines()


WRITES = pytest.param(["vectors"], marks=pytest.mark.slow)
PRINTING = [["--version"], ["--help"], ["check"], ["theory", "--claim", "C1"], WRITES]


def printing(arguments, adapter):
    """A whole command that prints something."""
    added = {"check": [adapter], "vectors": [adapter.parent / "vectors"]}
    return [*arguments, *map(str, added.get(arguments[0], []))]


@needs_full
@pytest.mark.parametrize("arguments", PRINTING, ids=lambda words: words[0])
def test_a_full_disk_under_standard_output_is_said(adapter, arguments):
    with open(FULL, "w") as full:
        code, lines = ended(*printing(arguments, adapter), stdout=full)
    assert code == 2, lines
    name = "" if arguments[0].startswith("--") else f" {arguments[0]}"
    assert lines == [f"kvcluster{name}: standard output cannot be written: No space left on device"]


@pytest.mark.parametrize("arguments", PRINTING, ids=lambda words: words[0])
def test_a_reader_that_goes_away_is_said(adapter, arguments):
    read, write = os.pipe()
    os.close(read)
    code, lines = ended(*printing(arguments, adapter), stdout=write)
    os.close(write)
    name = "" if arguments[0].startswith("--") else f" {arguments[0]}"
    assert (code, lines) == (141, [f"kvcluster{name}: whoever read the output has gone"])


def test_an_adapter_that_prints_to_nobody_does_not_differ(tmp_path):
    (tmp_path / "adapter.py").write_text(SLOW.replace("time.sleep(60)", "return 1"))
    read, write = os.pipe()
    os.close(read)
    code, lines = ended("check", str(tmp_path / "adapter.py"), stdout=write)
    os.close(write)
    assert (code, lines) == (141, ["kvcluster check: whoever read the output has gone"])


@needs_full
def test_the_code_is_the_same_where_nothing_can_be_said(tmp_path):
    with open(FULL, "w") as full:
        assert ended("check", str(tmp_path / "none.py"), stderr=full) == (2, [])
        assert ended("--version", stderr=full, stdout=full) == (2, [])


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_a_closed_stream_changes_nothing(adapter, tmp_path, closed):
    report = tmp_path / "report.json"
    assert ended("check", str(adapter), "--json", str(report), before=f"exec {closed};") == (0, [])
    assert report.read_text().startswith("{")
    assert ended("check", str(tmp_path / "none.py"), before=f"exec {closed};")[0] == 2


def interrupted(process):
    """Exit code and lines of standard error of a process after Ctrl-C."""
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    return process.returncode, said.splitlines()


def started(*arguments):
    def listen():
        """To Ctrl-C, which whoever runs the tests in the background ignores, and what they start with them."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    words = words_of(arguments)
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)


def test_a_check_is_interrupted(tmp_path):
    (tmp_path / "adapter.py").write_text(SLOW)
    with started("check", str(tmp_path / "adapter.py")) as process:
        assert "asked" in process.stdout.readline()
        assert interrupted(process) == (130, ["kvcluster check: interrupted"])


def test_vectors_that_are_interrupted_leave_nothing(tmp_path):
    with started("vectors", str(tmp_path / "vectors")) as process:
        until = time.monotonic() + 60
        while not list(tmp_path.glob(".vectors.*/new/*.safetensors")):
            assert time.monotonic() < until
            time.sleep(0.01)
        assert interrupted(process) == (130, ["kvcluster vectors: interrupted"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    ["eval", pytest.param("tune", marks=pytest.mark.slow), pytest.param("demo", marks=pytest.mark.slow)],
)
def test_a_command_that_reads_is_interrupted(tmp_path, command):
    pipe = tmp_path / "text"
    os.mkfifo(pipe)
    model = ["smollm2"] if command == "tune" else []
    with started(command, *model, "--text", str(pipe)) as process, pipe.open("w"):  # waits until the command reads
        assert interrupted(process) == (130, [f"kvcluster {command}: interrupted"])


def test_a_name_need_not_be_characters(adapter):
    odd = os.fsencode(adapter.parent) + b"/\xff.py"
    os.rename(adapter, odd)
    report = os.fsencode(adapter.parent) + b"/\xfe"
    assert ended("check", odd, "--junit", report) == (0, [])
    code, lines = ended("check", odd + b".py")
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith(f"kvcluster check: {adapter.parent}/\\udcff.py.py cannot be loaded: ")
    assert os.path.getsize(report) > 0


def test_a_terminal_without_letters_is_no_fault(adapter):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    assert ended("check", str(adapter), env=environment) == (0, [])


def end_by(error):
    """How a command ends whose code raises."""
    one = typer.Typer()

    @one.command("one", cls=Command)
    def raise_it():
        raise error

    return CliRunner().invoke(one, [])


@pytest.mark.parametrize("error", [KeyError("name"), ValueError("of our own"), RecursionError(), AssertionError()])
def test_a_fault_of_the_program_is_not_hidden(error):
    result = end_by(error)
    assert result.exception is error
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UnusableInputError("text must be\n  long"), 2, "text must be long"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.txt"), 2, "[Errno 2] No such file: 'a.txt'"),
        (ConnectionResetError("reset"), 2, "reset"),
        (BrokenPipeError("of a socket"), 2, "of a socket"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_comes_from_outside_is_one_line(error, code, said):
    result = end_by(error)
    assert (result.exit_code, result.stderr) == (code, f"kvcluster one: {said}\n")


def test_help_has_the_codes():
    said = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    assert "130: interrupted" in said
