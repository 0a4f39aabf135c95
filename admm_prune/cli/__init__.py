"""The command line. Each command is a file; heavy packages load when a command runs, not before."""

from __future__ import annotations

import errno
import os
import sys

_WRONG_INPUT, _INTERRUPTED = 2, 130


def main() -> None:
    """Runs `admm-prune` and exits: 0 done, 2 wrong input (one line on stderr), 130 interrupted.

    Without arguments it shows the help. If several processes (torchrun) fail, one reports why. A package of an extra
    that is not installed is wrong input.
    """
    from admm_prune.errors import named_extra

    try:
        _run()
    except ModuleNotFoundError as error:
        missing = named_extra(error)
        if missing is None:
            raise
        print(f"admm-prune: {missing}", file=sys.stderr)
        _leave(_WRONG_INPUT)
    except KeyboardInterrupt:  # while the command line itself is imported
        print("admm-prune: interrupted", file=sys.stderr)
        _leave(_INTERRUPTED)


def _run() -> None:
    import typer

    from admm_prune.cli import interrupts
    from admm_prune.cli.app import app
    from admm_prune.errors import UserError

    status: object = None
    try:
        with interrupts.remembered():
            if _several() and sys.argv[1:2] != ["run"]:
                raise UserError("only 'run' supports several processes: call this command without torchrun")
            status = app(sys.argv[1:] or ["--help"], prog_name="admm-prune", standalone_mode=False)
    except (UserError, _usage_error()) as error:
        # A usage error's str() leaves out the name of the option that is wrong.
        text = getattr(error, "format_message", error.__str__)()
        if _speaks(error):
            print(f"admm-prune: {' '.join(text.split())}", file=sys.stderr)
        _leave(_WRONG_INPUT)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"admm-prune: {error.filename}: no file or folder can have a name this long", file=sys.stderr)
        _leave(_WRONG_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    if status == _INTERRUPTED:  # some releases of typer return it, others raise
        if _speaks():
            print(f"admm-prune: {interrupts.message()}", file=sys.stderr)
        _leave(_INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def _speaks(error: Exception | None = None) -> bool:
    """Whether this is the process that reports why the run has failed."""
    if not _several():
        return True
    from admm_prune.runs import machine

    return machine.speaks(error)


def _leave(status: int) -> None:
    if _several():  # others may wait for this process while the interpreter shuts down: exit at once
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _usage_error() -> type[Exception]:
    """The base class of all usage errors, whose location depends on the release of typer."""
    import typer

    return next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
