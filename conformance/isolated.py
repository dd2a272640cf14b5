"""An implementation in a process of its own: it cannot change what it is compared with, and may crash or hang.

One process takes many cases, one after the other. When it dies or a case takes too long, that case is named, and a new
process goes on with the next.
"""

import contextlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.connection import Pipe as pipe
from types import TracebackType
from typing import Any

from .case import Case
from .guard import DisturbedError
from .port import Outcome

__all__ = ["Isolated", "UnloadableError"]

START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
START += "from kvcluster.conformance.child import main; main(int(sys.argv[2]), json.loads(sys.argv[3]))"
TO_LOAD = 300.0  # seconds that an import may take beside those of a case: a compiler may run
TO_LOOK = 0.5  # seconds between two looks whether the process still lives


class UnloadableError(Exception):
    """An implementation cannot be imported; the message says why."""


class EndedError(Exception):
    """The process gives no answer; the message says how it ended."""


class Isolated:
    """The implementation that `target` names, see `load_implementation`, in a process of its own.

    Parameters
    ----------
    target : a module, or a path to a .py file.
    case_seconds : a case that takes longer is stopped.

    Raises
    ------
    UnloadableError : it cannot be loaded, or ends its process when it is.
    DisturbedError : it changed the arithmetic of its process.
    """

    def __init__(self, target: str, case_seconds: float = math.inf) -> None:
        self.name = target
        self.case_seconds = case_seconds
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None
        self.operations, self.dtypes = self.start()

    def __enter__(self) -> "Isolated":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def answer(self, case: Case) -> Outcome:
        """What it gives for a case; `ended` says so if its process did not outlive it.

        Raises
        ------
        DisturbedError : it changed the arithmetic of its process.
        UnloadableError : it could be loaded once, and cannot be loaded again.
        """
        if self.process is None:
            self.start()
        try:
            kind, content = self.ask(case, self.case_seconds)
        except EndedError as error:
            return Outcome({}, ended=str(error))
        if kind == "disturbed":
            self.close()
            raise DisturbedError(content)
        outcome: Outcome = content
        return outcome

    def start(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """A new process that has loaded the implementation; the operations and dtypes of that."""
        self.connection, theirs = pipe()
        number = theirs.fileno()
        words = [sys.executable, "-c", START, json.dumps(sys.path), str(number), json.dumps(self.name)]
        self.process = subprocess.Popen(words, pass_fds=[number], stdin=subprocess.DEVNULL, start_new_session=True)
        theirs.close()
        try:
            kind, content = self.ask(None, self.case_seconds + TO_LOAD)
        except EndedError as error:
            raise UnloadableError(f"its import {error}") from error
        except BaseException:
            self.close()
            raise
        if kind == "loaded":
            operations, dtypes = content
            return operations, dtypes
        self.close()
        raise (DisturbedError if kind == "disturbed" else UnloadableError)(content)

    def ask(self, question: Case | None, seconds: float) -> tuple[str, Any]:
        """The answer, in its kind and its content; what is printed meanwhile is printed here."""
        assert self.connection is not None  # `start` has made it
        until = time.monotonic() + seconds
        try:
            self.connection.send(question)
            while True:
                self.wait(until, seconds)
                kind, content = self.connection.recv()
                if kind != "said":
                    return kind, content
                sys.stdout.write(content)
                sys.stdout.flush()
        except (EOFError, ConnectionError, pickle.UnpicklingError):
            raise EndedError(self.close()) from None
        except EndedError:
            self.close()
            raise

    def wait(self, until: float, seconds: float) -> None:
        """Until there is something to read, or the process has ended; children of it may keep its end open."""
        assert self.connection is not None
        assert self.process is not None
        while not self.connection.poll(max(0.0, min(TO_LOOK, until - time.monotonic()))):
            if self.process.poll() is not None and not self.connection.poll(0):
                raise EOFError
            if time.monotonic() >= until:
                raise EndedError(f"was stopped after {seconds:g} s")

    def close(self) -> str:
        """End the process, and those that it started; how it ended by itself, in words."""
        process, self.process = self.process, None
        if process is None:
            return "had ended"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0 if process.returncode is not None else 0.2)  # it may be about to end
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        if self.connection is not None:
            self.connection.close()
        return ended_by(code)


def ended_by(code: int) -> str:
    """The exit status of a process in words."""
    if code >= 0:
        return f"ended its process with exit status {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    more = " (no memory may be left)" if -code == signal.SIGKILL else ""
    return f"ended its process by {name}{more}"
