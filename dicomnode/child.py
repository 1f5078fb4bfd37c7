"""A helper process with a pipe: started by the node, gone when the node is gone.

What decodes foreign pixels or talks to foreign hosts runs apart, so that a crash there is not the
node's. Messages are pickled objects of our own; nothing from outside is ever unpickled.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from dicomnode import log
from dicomnode.errors import WorkerLost

_CONTEXT = multiprocessing.get_context("spawn")  # fork would copy threads and locks


class Child:
    """One helper process running ``target(connection, *args)``."""

    def __init__(self, name: str, target: Callable[..., None], *args: Any) -> None:
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(
            target=_run, args=(target, theirs, os.getpid(), *args), name=name, daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def send(self, message: object) -> None:
        """Hand over a message.

        Raises:
            WorkerLost: the process is gone.
        """
        try:
            self._connection.send(message)
        except (OSError, ValueError) as error:
            raise self._obituary() from error

    def receive(self, timeout: float | None = None) -> Any:
        """The next message, or None after `timeout` seconds without one.

        Raises:
            WorkerLost: the process is gone.
        """
        try:
            return self._connection.recv() if self._connection.poll(timeout) else None
        except (EOFError, OSError) as error:
            raise self._obituary() from error

    def stop(self, grace: float) -> None:
        """Let it finish for `grace` seconds, then kill it; its work is repeatable."""
        self._connection.close()  # it sees the end of its pipe
        self._process.join(grace)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _obituary(self) -> WorkerLost:
        self._process.join(5)
        code = self._process.exitcode
        words = f"{self._process.name} ended with code {code}"
        return WorkerLost(words, crashed=code != -signal.SIGKILL)


def _run(target: Callable[..., None], connection: Connection, parent: int, *args: Any) -> None:
    """The start of every helper process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the node decides when we stop
    log.configure()
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    target(connection, *args)


def _die_with(parent: int) -> None:
    """A killed node cannot tell its children: they look whether it is still theirs."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
