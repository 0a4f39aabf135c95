"""The error that the user can correct."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches


class UserError(ValueError):
    """Invalid input; the message is one line that states the problem and the remedy.

    The command line prints it without a traceback and exits with status 2. Any other exception is a bug.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'sparsegpt'?)" for a misspelt name, to be put into a message; empty where no name is near."""
    by_lower = {one.lower(): one for one in known}
    matches = get_close_matches(name.lower(), by_lower, n=3)
    ratios = [SequenceMatcher(None, name.lower(), match).ratio() for match in matches]
    nearest = [f"'{by_lower[match]}'" for match, ratio in zip(matches, ratios, strict=True) if ratio == max(ratios)]
    return f" (did you mean {' or '.join(nearest)}?)" if nearest else ""


def unknown(what: str, name: str, known: Iterable[str], otherwise: str = "") -> UserError:
    """The error for a name that is none of those there are; it lists them, and the one that is near.

    Args:
        what: such as "method".
        otherwise: what else can be done, at the end of the message.
    """
    names = list(known)
    listed = ", ".join([*names, *([otherwise] if otherwise else [])])
    return UserError(f"unknown {what} '{name}'{did_you_mean(name, names)}: choose one of {listed}")
