"""Where compiled code cannot be made, kept or trusted: a warning and torch, or it is compiled again."""

import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

PROGRAM = """
import sys, warnings
import torch
from kvcluster import fast
from kvcluster.fast.cpu import compiling
compiling.TIME_LIMIT = int(sys.argv[1])
query, keys = torch.ones(1, 1, 16), torch.ones(1, 3, 16)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        output = fast.attention(query, keys, keys)
assert torch.equal(output, query)
print(len(caught), *(repr(str(warning.message)) for warning in caught))
try:
    fast.attention(query, keys, keys, backend="cpp")
    print("served")
except (ModuleNotFoundError, RuntimeError) as error:
    print(repr(str(error)))
"""


def run(cache, time_limit=120, **environment):
    """What a new process says whose compiled code lies below `cache`: its warnings, then what C++ says."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(time_limit)],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def wrong_environments(folder):
    """By what is wrong: the folder of caches, a limit of time, the environment, and what is said of it."""
    a_file, owned, empty = folder / "a file", folder / "owned", folder / "empty"
    a_file.write_text("")
    (owned / "kvcluster").mkdir(parents=True)
    os.chown(owned / "kvcluster", 12345, -1)
    return {
        "a file in its place": (a_file, 120, {}, "cannot be kept in"),
        "another user's folder": (owned, 120, {}, "it is another user's, of number 12345"),
        "a compiler that fails": (empty, 120, {"CXX": script(folder / "fails", "exit 1")}, "the C++ compiler failed"),
        "one that writes nothing": (empty, 120, {"CXX": script(folder / "idle", "exit 0")}, "cannot be kept in"),
        "one that hangs": (empty, 1, {"CXX": script(folder / "hangs", "sleep 60")}, "took more than 1 seconds"),
        "one that writes no library": (
            empty,
            120,
            {"CXX": script(folder / "text", 'for last; do :; done; echo text > "$last"')},
            "cannot be kept in",
        ),
    }


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_where_there_can_be_no_library_torch_does_the_work(tmp_path):
    for name, (cache, time_limit, environment, said) in wrong_environments(tmp_path).items():
        warned, refused = run(cache, time_limit, **environment)
        assert warned[3:].startswith("attention on the CPU is slower than it could be: "), name
        assert said in warned, name
        assert said in refused, name


@pytest.mark.slow
def test_what_is_damaged_or_may_be_anybodys_is_compiled_again(tmp_path):
    folder = tmp_path / "kvcluster"
    assert run(tmp_path) == ["0", "served"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    [library] = folder.glob("attention-*.so")
    whole = library.read_bytes()

    def damage():
        library.write_bytes(whole[: len(whole) // 2])

    def replace():
        library.write_bytes(b"not what was compiled")

    def open_to_all():
        library.write_bytes(whole[:-1] + b"x")
        library.with_suffix(".sha256").write_text("")
        folder.chmod(0o777)

    for change in (damage, replace, open_to_all):
        change()
        assert run(tmp_path) == ["0", "served"], change
        assert library.read_bytes() == whole
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".sha256", ".so"]


def when_it_compiles(path, text):
    """A compiler that does this before it compiles, but not before it says what it is."""
    return script(path, f'case "$*" in *" -o "*) {text};; esac\nexec c++ "$@"')


@pytest.mark.slow
def test_of_processes_that_need_the_same_code_one_compiles(tmp_path):
    compiler = script(
        tmp_path / "c++", f'case "$*" in *" -o "*) echo "$@" >> "{tmp_path}/compiled";; esac; exec c++ "$@"'
    )
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(run, tmp_path, CXX=compiler) for _ in range(3)]
    assert [each.result() for each in runs] == [["0", "served"]] * 3
    assert len((tmp_path / "compiled").read_text().splitlines()) == 1


@pytest.mark.slow
def test_what_a_killed_compilation_left_goes_with_the_next_one(tmp_path):
    """And what a killed process had begun to write is not used."""
    folder, begun = tmp_path / "kvcluster", tmp_path / "begun"
    compiler = when_it_compiles(
        tmp_path / "stalls", f'for last; do :; done; echo half > "$last"; touch {begun}; sleep 60'
    )
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "120"],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CXX": compiler},
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while not begun.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    [half] = folder.rglob("*.so")
    assert half.read_text() == "half\n"
    assert run(tmp_path) == ["0", "served"]
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".sha256", ".so"]
