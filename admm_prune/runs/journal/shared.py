"""One journal for all processes of a run: the first one writes it, and its answers are broadcast."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from admm_prune.methods.base import Journal
from admm_prune.models.parallel import World
from admm_prune.runs.journal.journal import FolderJournal, journal_of

T = TypeVar("T")


class SharedJournal(Journal):
    """Forwards calls to the first process and broadcasts its results and errors; all processes make the same calls.

    The folder must be visible to all processes: they read each other's files in it.

    Args:
        kept: the journal itself, in the first process.
        world: the processes.
    """

    keeps = True

    def __init__(self, out: Path, kept: FolderJournal | None, world: World) -> None:
        self.out = out
        self._kept, self._world = kept, world

    def begin(self, facts: Callable[[], dict[str, Any]]) -> None:
        """As `FolderJournal.begin`; the facts are computed where they are needed."""
        self._ask(lambda kept: kept.begin(facts()))

    @property
    def resumed(self) -> bool:
        return self._ask(lambda kept: kept.resumed)

    def begun_with(self, setting: str) -> Any:
        return self._ask(lambda kept: kept.begun_with(setting))

    def finished(self, part: str) -> list[Any]:
        return self._ask(lambda kept: kept.finished(part))

    def tensor_file(self, part: str, index: int) -> Path:
        return self._ask(lambda kept: kept.tensor_file(part, index))

    def resume_point(self, part: str) -> dict[str, Tensor] | None:
        if self._world.size == 1:
            return self._ask(lambda kept: kept.resume_point(part))
        return None  # activations are used by single-process runs only, and several processes draw nothing at random

    def commit(
        self,
        part: str,
        index: int,
        content: Any,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        activations: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._ask(lambda kept: kept.commit(part, index, content, tensors=tensors, activations=activations))

    def checkpoints(self, name: str) -> Path | None:
        return self._ask(lambda kept: kept.checkpoints(name))

    def scratch(self) -> Path | None:
        return self._ask(lambda kept: kept.scratch())

    def output(self, write: Callable[[Path], Any]) -> Any:
        """The result of `write`, which writes the output into an empty folder in the first process; the folder is then
        moved into its place."""
        return self._ask(lambda kept: _written(kept, write))

    def _ask(self, what: Callable[[FolderJournal], T]) -> T:
        def answer() -> T:
            assert self._kept is not None
            return what(self._kept)

        return self._world.broadcast_from_rank0(answer)


@contextmanager
def shared_journal(
    out: Path, world: World, *, resume: bool = False, overwrite: bool = False
) -> Generator[SharedJournal]:
    """`journal_of` in the first process, for all of them."""
    with ExitStack() as stack:
        kept: list[FolderJournal] = []
        world.broadcast_from_rank0(
            lambda: kept.append(stack.enter_context(journal_of(out, resume=resume, overwrite=overwrite)))
        )
        yield SharedJournal(out, kept[0] if kept else None, world)


def _written(journal: FolderJournal, write: Callable[[Path], Any]) -> Any:
    with journal.output() as folder:
        return write(folder)
