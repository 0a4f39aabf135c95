"""What a run writes down on its way, so that one that was killed goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


class Journal:
    """Records of finished work, by part of the run and number; this one keeps nothing. `runs.journal` keeps files.

    A record is whole or not there. What is in it comes back to the bit: JSON values with their floats, tensors, and the
    state of the random generators. A run that is resumed does the same steps in the same order as one that was never
    interrupted; where a step has a record it takes the record instead.
    """

    keeps = False  # whether what is committed can be had again

    def finished(self, part: str) -> list[Any]:
        """The contents of the records 0, 1, ... of a part, as JSON gives them back."""
        return []

    def tensor_file(self, part: str, index: int) -> Path:
        """The safetensors file with the tensors of a record."""
        raise LookupError(f"there is no record {index} of {part}")

    def resume_point(self, part: str) -> dict[str, Tensor] | None:
        """The activations of the last record of a part, None if it went without; puts the random generators into the
        state that they had then.

        Only the latest activations of a run are kept: ask for those of a part before another part begins.
        """
        raise LookupError(f"there is no record of {part}")

    def commit(
        self,
        part: str,
        index: int,
        content: Any,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        activations: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes the next record of a part, whole or not at all.

        Args:
            content: JSON values; floats may be inf or nan.
            activations: with them the activations of all records before are dropped.

        Raises:
            UserError: it cannot be written. What was committed before is safe.
        """

    def once(self, part: str, compute: Callable[[], Any]) -> Any:
        """What `compute` gave when the part was first asked for: JSON values."""
        found = self.finished(part)
        if found:
            return found[0]
        content = compute()
        self.commit(part, 0, content)
        return content

    def checkpoints(self, name: str) -> Path | None:
        """A folder for what a recipe keeps in files of its own, whole or not at all; None where nothing is kept.

        It is there, with all that is in it, when the run is resumed, and goes when the run is finished. The recipe
        makes its files atomic (write under another name, then rename), says in them how far it was, and keeps the
        state of the random generators in them.
        """
        return None

    def scratch(self) -> Path | None:
        """A folder for temporary files beside the output, emptied when the run is resumed; None for anywhere."""
        return None


NOTHING = Journal()
