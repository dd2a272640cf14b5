"""What runs in the process of an `Isolated` implementation: it loads it, then answers one case after the other."""

import io
import signal
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from .guard import DisturbedError
from .implementation import Implementation, load_implementation
from .raised import Raised

__all__ = ["in_words", "main"]


class Said(io.TextIOBase):
    """Standard output that is sent to whoever asks, line by line: there it is known what becomes of it."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, sender: "Sender") -> None:
        self.sender = sender
        self.text = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        self.text += text
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        text, self.text = self.text, ""
        if text:
            self.sender.send("said", text)


class Sender:
    """The connection, for several threads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.lock = threading.Lock()

    def send(self, kind: str, content: Any) -> None:
        with self.lock:
            self.connection.send((kind, content))


def main(number: int, target: str) -> None:
    """Answer on the connection of this number until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks ends this process
    connection = Connection(number)
    sender = Sender(connection)
    sys.stdout = said = Said(sender)
    try:
        connection.recv()
        implementation = loaded(sender, target)
        while implementation is not None:
            case = connection.recv()
            try:
                outcome = implementation.answer(case)
            except DisturbedError as error:
                sender.send("disturbed", str(error))
                continue
            said.flush()
            sender.send("outcome", outcome)
    except (EOFError, ConnectionError):
        pass  # nobody asks any longer


def loaded(sender: Sender, target: str) -> Implementation | None:
    """The implementation, of which is told what it has; None if there is none."""
    try:
        implementation = load_implementation(target)
    except DisturbedError as error:
        sender.send("disturbed", str(error))
    except (Exception, SystemExit) as error:  # whatever a module raises when it is imported
        sender.send("unloadable", in_words(error))
    else:
        sender.send("loaded", (implementation.operations, implementation.dtypes))
        return implementation
    return None


def in_words(error: BaseException) -> str:
    """An exception of a module that is imported, with the line of that which raised it."""
    lines = Raised.of(error).lines
    return f"{type(error).__name__}: {error}" + (f" ({lines[-1].partition(', in ')[0]})" if lines else "")
