"""The one error that is the user's to mend."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong input; the message is one line which says what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2. Any other exception is a defect of ours.
    """
