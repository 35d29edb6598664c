"""Ctrl-C and SIGTERM, noted for the loop to act on between two steps."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Signals:
    """Notes Ctrl-C and SIGTERM, for the loop to act on after the step. A second Ctrl-C leaves at once.

    Outside of the main thread, where Python delivers no signals, it notes nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._doing = "this step"
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """While in it, a signal is answered with what comes to its end first."""
        before, self._doing = self._doing, what
        try:
            yield
        finally:
            self._doing = before

    def _note(self, number: int, _: Any) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
        # os.write: a handler may come in the middle of a write to sys.stderr
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: finishing {self._doing}, then saving (Ctrl-C again: at once)\n".encode())
