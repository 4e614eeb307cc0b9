"""Ctrl-C while a compiled program runs: the first one is a wish, the second one is an end. SIGTERM is a wish too."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

STOPPING = "stopping after this call; Ctrl-C once more stops now, without saving."


class Preempted(KeyboardInterrupt):
    """SIGTERM came and the state is saved: the same, started again, goes on from there."""


@contextlib.contextmanager
def preemptible(on: bool) -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM into a flag that is read between calls.

    Parameters
    ----------
    on
        Whether to; if not, or outside the main thread, nothing changes.

    Yields
    ------
    asked
        Whether SIGTERM has come.

    Examples
    --------
    >>> with preemptible(True) as asked:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     asked()
    True
    """
    came = threading.Event()
    if not on or threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that is read between calls, and say so at once; the second one stops.

    Outside the main thread, which gets no signals, nothing changes.

    Yields
    ------
    asked
        Whether Ctrl-C has been pressed.

    Raises
    ------
    KeyboardInterrupt
        At the second Ctrl-C.

    Examples
    --------
    >>> with interruptible() as asked:
    ...     asked()
    False
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def handler(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt("stopped at once; the last checkpoint, if any, is what is saved.")
        asked.set()

    before = signal.signal(signal.SIGINT, handler)
    try:
        with _announced():
            yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _announced() -> Iterator[None]:
    # Python runs a handler only when the compiled call is over. The number of the signal is written to this socket when it
    # comes, and a thread can print meanwhile.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        said = False
        while number := reader.recv(1):
            if before != -1:
                # Whoever listened before, an event loop for instance, still hears of every signal; if its buffer is full, it has.
                with contextlib.suppress(BlockingIOError):
                    os.write(before, number)
            if number[0] == signal.SIGINT and not said:
                print(STOPPING, file=sys.stderr, flush=True)
                said = True

    thread = threading.Thread(target=listen, name="paperjax-ctrl-c", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()
        thread.join()
        reader.close()
