"""How long work says what is going on."""

from __future__ import annotations

from collections.abc import Callable

Tell = Callable[[str, int, int, str], None]
"""Told (what is going on, how much is done, of how much, a note); see ``Bars`` of the command line."""


def silent(what: str, done: int, total: int, note: str = "") -> None:
    """Tells nobody."""
