"""The exception that means "the caller can mend this", exit code 2 of the command line; that of a lost companion, 1; and a
warning."""


class TiltflowError(ValueError):
    """Bad input. The message names what was wrong, where, and what to do about it."""


class TiltflowWarning(UserWarning):
    """What the user should know, though the work goes on."""


class LostProcess(BaseException):
    """Of several processes that train together one died or hangs; the message names it.

    As KeyboardInterrupt it may come from anywhere, since launchers end processes by a signal; nobody may take it for an
    error of his own.
    """
