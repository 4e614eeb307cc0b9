import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from paperjax.interrupts import interruptible


def interrupt():
    signal.raise_signal(signal.SIGINT)


def test_the_first_is_a_flag_and_said_once_and_the_second_stops(capsys):
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as asked:
        assert not asked()
        interrupt()
        assert asked()
        with pytest.raises(KeyboardInterrupt, match="stopped at once"):
            interrupt()
    assert capsys.readouterr().err.count("stopping after this call") == 1
    assert signal.getsignal(signal.SIGINT) is before
    with interruptible() as asked:
        assert not asked()
    assert capsys.readouterr().err == ""


def test_it_is_said_while_the_main_thread_cannot_run_the_handler(capsys, monkeypatch):
    said = threading.Event()
    monkeypatch.setattr("builtins.print", lambda *args, **options: said.set())
    with interruptible() as asked:
        # With the signal blocked, as it is to Python in a compiled call, only the byte arrives.
        number = bytes([signal.SIGINT])
        os.write(_wakeup_fd(), number)
        assert said.wait(30)
        assert not asked()


def _wakeup_fd():
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    return fd


def test_another_listener_hears_of_it_too():
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno())
    try:
        with interruptible():
            interrupt()
        reader.settimeout(30)
        assert reader.recv(1) == bytes([signal.SIGINT])
        assert _wakeup_fd() == writer.fileno()
    finally:
        signal.set_wakeup_fd(before)
        reader.close()
        writer.close()


def test_other_threads_have_no_signals():
    def enter():
        with interruptible() as asked:
            return asked()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() is False
