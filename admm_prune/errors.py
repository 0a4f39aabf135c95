"""The error that the user can correct."""

from __future__ import annotations


class UserError(ValueError):
    """Invalid input; the message is one line that states the problem and the remedy.

    The command line prints it without a traceback and exits with status 2. Any other exception is a bug.
    """
