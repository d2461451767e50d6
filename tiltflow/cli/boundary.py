"""The one boundary between a command and what comes from elsewhere: the user's code, files, signals, the disk.

Whatever happens becomes one sentence and an exit code. What code of the user's raises is named with its file and line.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from tiltflow.core.errors import LostProcess, TiltflowError, TiltflowWarning

DEBUG = "--debug"
LOST, MISUSE, SIGNALLED = 1, 2, 128
"""Exit codes; a signal adds its number to the last."""
OURS = Path(__file__).resolve().parents[1]
LONGEST = 400
"""Characters of a message of somebody else's."""


def guarded(command: Callable[[], Any], debug: bool = False) -> int:
    """Run a command; returns its exit code. ``debug``: errors show their traceback."""
    try:
        with _outside():
            command()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        signalled = error.__cause__ if isinstance(error, click.Abort) else error  # click hides the one in the other
        number, said, *_ = *(signalled.args if signalled else ()), *(None, None)
        _say(said or "interrupted.", "")
        return SIGNALLED + (number or signal.SIGINT)
    except BaseException as error:
        code, sentence = judged(error)
        if debug and not isinstance(error, SystemExit):
            traceback.print_exception(error)
        if sentence is not None:
            _say(sentence)
        return code
    return 0


def judged(error: BaseException) -> tuple[int, str | None]:
    """The exit code of an error, and the sentence that says what happened; None: nothing is said."""
    place = _user_place(error)
    if isinstance(error, (TiltflowError, LostProcess)):
        return (MISUSE if isinstance(error, TiltflowError) else LOST), _sentence(error)
    if isinstance(error, SystemExit):
        if place is None:
            return (error.code if isinstance(error.code, int) else int(error.code is not None)), None
        return MISUSE, f"{place} ended the process with exit code {error.code}{_notes(error)}: let it return or raise."
    what = f"{type(error).__name__}: {_sentence(error)}"
    if place is not None:
        return MISUSE, f"{place} raised {what}"
    if isinstance(error, OSError):
        file = "" if error.filename is None else f"{os.fsdecode(error.filename)!r:.{LONGEST}}: "
        return MISUSE, f"{file}{error.strerror or error}{_notes(error)}."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return MISUSE, f"out of memory{_notes(error)}: give smaller batches, fewer samples, or another device."
    return LOST, f"{what}. This is a defect of tiltflow: please report it, with what {DEBUG} shows."


def _say(sentence: str, kind: str = "error") -> None:
    """On standard error, with the number of the process, if a launcher started several."""
    rank = os.environ.get("RANK", "0")
    head = f"{kind}{'' if rank == '0' else f' of rank {rank}'}: " if kind else ""
    click.echo((head + sentence).encode("utf-8", "backslashreplace").decode(), err=True)


def _sentence(error: BaseException) -> str:
    """What an error says, with the notes on where it happened."""
    own = isinstance(error, (TiltflowError, LostProcess))
    return (str(error) if own else (str(error).strip().splitlines() or [""])[0][:LONGEST]) + _notes(error)


def _notes(error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    return f" ({', '.join(notes)})" if notes else ""


def _user_place(error: BaseException) -> str | None:
    """Where in the user's own code an error was raised; None if it was not."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_user_code(f.filename)]
    return f"{frames[-1].name}() in {frames[-1].filename}, line {frames[-1].lineno}," if frames else None


def _is_user_code(file: str) -> bool:
    """Whether a file belongs neither to tiltflow nor to Python, an installed package or the script that starts us."""
    path = Path(file)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    standard = path.is_relative_to(Path(os.__file__).parent) or file.startswith("<")
    return not (installed or standard or path.resolve().is_relative_to(OURS) or file == sys.argv[0])


@contextmanager
def _outside() -> Iterator[None]:
    """Signals, warnings, and calls of os._exit, which would end the process without a word."""
    before: Any = None
    main, pid, leave = threading.current_thread() is threading.main_thread(), os.getpid(), os._exit

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    def ended(code: int) -> None:
        if os.getpid() != pid:  # a child that was forked
            leave(code)
        raise SystemExit(code)

    if main:
        before = signal.signal(signal.SIGTERM, end)
    os._exit = ended  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", TiltflowWarning)
            shown: Any = warnings.showwarning

            def show(message: Any, category: type[Warning], *place: Any) -> None:
                if issubclass(category, TiltflowWarning):
                    _say(str(message), "warning")
                else:
                    shown(message, category, *place)

            warnings.showwarning = show  # type: ignore[assignment]
            yield
    finally:
        os._exit = leave
        if main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
