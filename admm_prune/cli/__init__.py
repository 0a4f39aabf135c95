"""The command line. Each command is a file; heavy packages load when a command runs, not before."""

from __future__ import annotations

import sys

_WRONG_INPUT, _INTERRUPTED = 2, 130


def main() -> None:
    """Runs `admm-prune` and exits: 0 done, 2 wrong input (one line on stderr), 130 interrupted.

    Without arguments it shows the help.
    """
    import typer

    from admm_prune.cli import interrupts
    from admm_prune.cli.app import app
    from admm_prune.errors import UserError

    try:
        with interrupts.remembered():
            status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (UserError, _usage_error()) as error:
        # A usage error's str() leaves out the name of the option that is wrong.
        text = getattr(error, "format_message", error.__str__)()
        print(f"admm-prune: {' '.join(text.split())}", file=sys.stderr)
        sys.exit(_WRONG_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    if status == _INTERRUPTED:  # some releases of typer return it, others raise
        print(f"admm-prune: {interrupts.message()}", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def _usage_error() -> type[Exception]:
    """The base of all usage errors, wherever a release of typer keeps it."""
    import typer

    return next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
