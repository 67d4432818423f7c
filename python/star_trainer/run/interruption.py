"""SIGTERM and Ctrl-C as a request, which training answers where its weights are whole and all processes can agree."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The run was asked to end; `number` is the signal's."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number

    @classmethod
    def by(cls, number: int) -> Interrupted:
        """Of the signal with this number."""
        return cls(f"stopped by {signal.Signals(number).name}", number)


_asked: int | None = None


def asked() -> int | None:
    """The signal that asked this process to end the run, if any did since `listening` began."""
    return _asked


def stop_if_asked() -> None:
    """End the run here if this process was asked to.

    Raises:
        Interrupted: it was.
    """
    if _asked is not None:
        raise Interrupted.by(_asked)


@contextmanager
def listening() -> Iterator[None]:
    """Within this context signals only ask; a second Ctrl-C ends the process at once.

    Outside of the main thread, where Python takes no signals, it does nothing.
    """
    global _asked

    def note(number: int, frame: FrameType | None) -> None:
        global _asked
        if _asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        _asked = number

    _asked = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        _asked = None
        for number, handler in before.items():
            signal.signal(number, handler)
