"""Folders of dead processes go, those of living ones stay, and nothing is touched that is merely named alike."""

import errno
import fcntl
import multiprocessing
import os
import stat
import threading
import time

import pytest

from kvcluster import scratch
from kvcluster.scratch import in_turn, scratch_folder

FORK = multiprocessing.get_context("fork")
NAME = f".{'0123456789abcdef' * 2}.kvcluster"


def in_a_child(function):
    """The exit code of a process that runs `function`, which may kill it."""
    child = FORK.Process(target=function)
    child.start()
    child.join(30)
    return child.exitcode


def die():
    os.kill(os.getpid(), 9)


def use(folder, then=lambda: None):
    with scratch_folder(folder) as work:
        (work / "deep").mkdir()
        (work / "deep" / "file").write_text("half")
        then()


def interrupt():
    raise KeyboardInterrupt


def no_locks(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_folder_is_private_and_gone_in_the_end_whatever_happens(tmp_path):
    with scratch_folder(tmp_path) as work:
        assert stat.S_IMODE(work.stat().st_mode) == stat.S_IMODE(work.parent.stat().st_mode) == 0o700
        assert (os.listdir(work), work.parent.parent) == ([], tmp_path)
    with pytest.raises(KeyboardInterrupt):
        use(tmp_path, interrupt)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("where", ["in it", "locked", "made"])
def test_what_dead_processes_left_goes(where, tmp_path, monkeypatch):
    if where != "in it":
        monkeypatch.setattr(scratch, "acquire", (lambda lock: die()) if where == "made" else die_when_locked)
    assert in_a_child(lambda: use(tmp_path, die)) == -9
    monkeypatch.undo()
    assert len(os.listdir(tmp_path)) == 1
    use(tmp_path)
    assert os.listdir(tmp_path) == []


def die_when_locked(lock):
    lock.acquire()
    die()


def test_those_of_living_processes_and_threads_stay(tmp_path):
    def others():
        for _ in range(3):
            assert in_a_child(lambda: use(tmp_path)) == 0
            use(tmp_path)
        assert len(os.listdir(tmp_path)) == 1

    use(tmp_path, others)


def test_many_at_once_never_take_from_one_another(tmp_path):
    def again_and_again():
        for number in range(100):
            with scratch_folder(tmp_path) as work:
                (work / "file").write_text("whole")
                (work / "file").rename(tmp_path / f"{os.getpid()}-{number}")

    children = [FORK.Process(target=again_and_again) for _ in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 6
    assert len(os.listdir(tmp_path)) == 600


def test_what_is_merely_named_alike_stays(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for each in (folder, elsewhere, folder / ".mine.kvcluster"):
        each.mkdir()
    for path in (elsewhere / "lock", folder / ".mine.kvcluster" / "lock", folder / NAME):
        path.write_text("mine")
    (folder / NAME.replace("0", "a")).symlink_to(elsewhere)
    before = sorted(tmp_path.rglob("*"))
    use(folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_locks_nothing_of_others_is_removed_and_work_goes_on(tmp_path, monkeypatch):
    assert in_a_child(lambda: use(tmp_path, die)) == -9
    monkeypatch.setattr(fcntl, "flock", no_locks)
    use(tmp_path)
    with in_turn(tmp_path / "turn", 1):
        assert len(os.listdir(tmp_path)) == 2
    monkeypatch.undo()
    use(tmp_path)
    assert os.listdir(tmp_path) == ["turn"]


def test_where_nothing_can_be_written_nothing_is_left(tmp_path, monkeypatch):
    def full(lock):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(scratch, "acquire", full)
    with pytest.raises(OSError, match="No space left"), scratch_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_one_is_in_at_a_time_until_others_have_waited_long_enough(tmp_path):
    inside, entered = threading.Event(), []

    def second(seconds):
        with in_turn(tmp_path / "turn", seconds):
            entered.append(inside.is_set())

    with in_turn(tmp_path / "turn", 30):
        inside.set()
        impatient, patient = (threading.Thread(target=second, args=(seconds,)) for seconds in (0.1, 30))
        patient.start()
        impatient.start()
        impatient.join()
        assert entered == [True]
        time.sleep(0.3)
        inside.clear()
    patient.join()
    assert entered == [True, False]
