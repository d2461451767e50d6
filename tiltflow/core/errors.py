"""The one exception that means "the caller can mend this": the command line turns it into exit code 2."""


class TiltflowError(ValueError):
    """Bad input. The message names what was wrong, where, and what to do about it."""
