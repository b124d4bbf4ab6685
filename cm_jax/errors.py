"""The one exception that bad input raises."""


class InputError(ValueError):
    """Something given to us cannot be used. The message says what came, what was wanted and what to do.

    The command line prints it without a traceback and exits with status 2. Any other exception is our bug.
    """
