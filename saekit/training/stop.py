"""Being told to stop: SIGTERM and Ctrl-C, heard at once, but never in the middle of a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(KeyboardInterrupt):
    """One of `SIGNALS` has come.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.signal = number


class RunStopped(StopRequested):
    """A run was told to stop and has saved itself; the message says where, and how to go on."""


class StopSignals:
    """While entered, the first of `SIGNALS` raises `StopRequested` and later ones are ignored.

    Enter it in the main thread; in any other one signals are not heard anyway, and nothing changes.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._is_held_back = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """The block runs to its end whatever comes; what came meanwhile is raised behind it."""
        before = self._received
        self._is_held_back = True
        try:
            yield
        finally:
            self._is_held_back = False
        if self._received is not None and self._received != before:
            raise StopRequested(self._received)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = number
            if not self._is_held_back:
                raise StopRequested(number)
