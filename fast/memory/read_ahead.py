"""Reading ahead: what the next step may want of a mapped file is read before it comes, by a thread of its own.

The thread only tells the system which pages will be wanted, so whatever it does or fails to do, no result depends on
it. It holds references to the tensors that it looks at, none of which is written to while it may look.
"""

import contextlib
import functools
import os
import queue
import threading
from collections.abc import Callable

__all__ = ["soon"]

MOST_WAITING = 64  # more than the layers of a model that reads ahead: then the oldest steps are long over


def soon(task: Callable[[], object]) -> None:
    """Run `task` in the thread, or not at all if it has too much to do."""
    try:
        waiting().put_nowait(task)
    except queue.Full:
        return


@functools.cache
def waiting() -> "queue.Queue[Callable[[], object]]":
    """The tasks of a thread that does one after the other; started when first needed, it ends with the process."""
    tasks: queue.Queue[Callable[[], object]] = queue.Queue(MOST_WAITING)

    def work() -> None:
        while True:
            with contextlib.suppress(Exception):  # a lack of memory, say: then nothing is read ahead
                tasks.get()()

    threading.Thread(target=work, name="kvcluster reads ahead", daemon=True).start()
    return tasks


os.register_at_fork(after_in_child=waiting.cache_clear)  # threads do not follow into a child
