"""Signals that end a training: the round is finished and saved first."""

from __future__ import annotations

import signal
import threading
import warnings
from types import FrameType, TracebackType
from typing import Any, Self

from tiltflow.core.errors import TiltflowWarning
from tiltflow.train.distributed import world


class Interruption:
    """While it lasts, SIGINT (Ctrl-C) and SIGTERM are only noted; a second one raises KeyboardInterrupt at once.

    Of several processes SIGTERM stays what it is: a launcher ends all when one has failed. A context manager; outside of
    the main thread, where there are no signals, it does nothing.

    Args:
        active: Whether it does anything.
    """

    def __init__(self, active: bool) -> None:
        self.active = active and threading.current_thread() is threading.main_thread()
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM) if world().size == 1 else (signal.SIGINT,):
            before = signal.getsignal(number)
            if self.active and before not in (signal.SIG_IGN, None):
                self._before[number] = before
                signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt(number)
        self.signal = number
        what = "interrupted: this round is finished and saved first; a second interrupt leaves at once"
        warnings.warn(what, TiltflowWarning, stacklevel=2)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
