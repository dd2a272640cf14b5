"""Folders for what is written whole or not at all: beside its target, into whose place it is then moved.

A killed process leaves its folder, and the next one that writes there removes it. Who still writes is told by a lock on
a file in the folder, which the system gives back when its process ends, however it ends. The number of a process would
not tell: on a network folder, or where containers share one, it may be another's. Network file systems that have locks
hold them for all machines (NFS by its server, Lustre mounted with `flock`); where there are none, nothing is removed.
Mounted with locks of each machine alone (NFS with `nolock`, Lustre with `localflock`), a folder should be written to by
one machine at a time: another would take what it writes for what was left, and its write would fail.
"""

import contextlib
import errno
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

__all__ = ["in_turn", "scratch_folder"]

FOLDER = ".{}.kvcluster"  # with 32 digits, which nobody calls a folder by accident
LOCK, WORK = "lock", "work"  # in it; WORK is there only while LOCK is
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of a file system


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new empty folder on the disk of `parent`, for this user alone, gone at the end with what is in it.

    Raises
    ------
    OSError : there can be none in `parent`.
    """
    for left in parent.glob(FOLDER.format("[0-9a-f]" * 32)):
        remove_left(left)
    folder, lock = new_folder(parent)
    try:
        yield folder / WORK
    finally:
        remove(folder, lock)


@contextlib.contextmanager
def in_turn(path: Path, seconds: float) -> Iterator[None]:
    """A block that one process or thread at a time is in, by a lock on the file `path`, which stays.

    Others wait; after `seconds`, and where there are no locks, they go on beside it: a process may have been stopped.
    """
    lock = FileLock(path, timeout=seconds)
    with contextlib.suppress(Timeout):
        acquire(lock)
    try:
        yield
    finally:
        lock.release()


def new_folder(parent: Path) -> tuple[Path, BaseFileLock]:
    """With its lock, which is held if the file system has locks."""
    while True:
        folder = parent / FOLDER.format(uuid.uuid4().hex)
        folder.mkdir(0o700)
        lock = FileLock(folder / LOCK, blocking=False)
        try:
            acquire(lock)
            (folder / WORK).mkdir(0o700)
            return folder, lock
        except (Timeout, FileNotFoundError, FileExistsError):  # another took it for one that was left
            remove(folder, lock)
        except OSError:
            remove(folder, lock)
            raise


def acquire(lock: BaseFileLock) -> None:
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def remove_left(folder: Path) -> None:
    """Remove a folder whose process has ended, if that can be told."""
    if folder.is_symlink() or not folder.is_dir():
        return
    with contextlib.suppress(OSError):
        if (folder / LOCK).exists():
            lock = FileLock(folder / LOCK, blocking=False)
            lock.acquire()  # fails while its process lives, and where there are no locks
            remove(folder, lock)
        else:
            folder.rmdir()  # fails if it has been locked by now


def remove(folder: Path, lock: BaseFileLock) -> None:
    """Remove a folder as far as possible; what stays can be found again by its lock."""
    shutil.rmtree(folder / WORK, ignore_errors=True)
    with contextlib.suppress(OSError):
        if not (folder / WORK).exists():
            (folder / LOCK).unlink(missing_ok=True)
    lock.release()
    with contextlib.suppress(OSError):
        folder.rmdir()
