"""Runs that are interrupted, as by ^C, right after they have written to their journal."""

from __future__ import annotations

from typing import Any

import pytest

from admm_prune.runs.journal.journal import FolderJournal


class Interruption:
    """Every call of a method of the journal is followed by a KeyboardInterrupt, or the call of one number alone.

    Attributes:
        calls: so far.
    """

    def __init__(self, patch: pytest.MonkeyPatch, method: str = "commit", *, after: int | None = None) -> None:
        self.calls = 0
        completed = getattr(FolderJournal, method)

        def interrupted(*arguments: Any, **named: Any) -> None:
            completed(*arguments, **named)
            self.calls += 1
            if after in (None, self.calls):
                raise KeyboardInterrupt

        patch.setattr(FolderJournal, method, interrupted)
