"""The exception that means "the caller can mend this", exit code 2 of the command line; and that of a lost companion, 1."""


class TiltflowError(ValueError):
    """Bad input. The message names what was wrong, where, and what to do about it."""


class LostProcess(Exception):
    """Of several processes that train together one died or hangs; the message names it."""
