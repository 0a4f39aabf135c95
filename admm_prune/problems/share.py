"""The tokens of a problem where several processes hold a share of them each: what is summed over tokens is of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]  # a tensor -> its sum over all processes, in place


def own(values: Tensor) -> Tensor:
    """The total of one process."""
    return values


@dataclass(frozen=True)
class Share:
    """Which of all tokens are here. All processes ask for sums in the same order.

    Attributes:
        count: tokens in all.
        places: (n,) ascending, where those that are here stand among all; None where all are here.
        total: sums a tensor over the processes, in place.
    """

    count: int
    places: Tensor | None = None
    total: Total = own

    def every(self, stride: int) -> slice | Tensor:
        """Which of the tokens that are here stand at places 0, stride, 2 stride, ..."""
        if self.places is None:
            return slice(None, None, stride)
        return (self.places % stride == 0).nonzero()[:, 0]

    def at(self, places: Tensor) -> Tensor:
        """Which of the tokens that are here stand at these places, in their order; others are left out."""
        if self.places is None:
            return places
        found = self._here[places]
        return found[found >= 0]

    @cached_property
    def _here(self) -> Tensor:
        """(count,) the number of the token that stands at a place among those that are here; -1 where it is not."""
        assert self.places is not None
        here = torch.full((self.count,), -1, device=self.places.device)
        here[self.places] = torch.arange(len(self.places), device=self.places.device)
        return here
