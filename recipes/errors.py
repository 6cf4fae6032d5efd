"""What ends a run with a message instead of a traceback."""


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says what happened and what to type."""
