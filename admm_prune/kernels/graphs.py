"""Work on a device that is the same every time: recorded once, then played back without the host (CUDA graphs).

What is recorded are kernels and the addresses they read and write. A function can be played back if all that changes
between two calls lies in tensors that stay where they are, and if it asks nothing of the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch

Returned = TypeVar("Returned")


class Recorder(Protocol):
    """What can write down the work of a device."""

    def record(self, function: Callable[[], Returned]) -> tuple[Callable[[], Any], Returned]:
        """Has the function's work written down, but not done.

        Returns:
            What does the work, and what the function returned: tensors that each playing fills anew.

        Raises:
            RuntimeError: the function does what cannot be recorded.
        """
        ...


class CudaGraphs:
    """`torch.cuda.graph`, whose memory is the graph's own as long as it lives."""

    def record(self, function: Callable[[], Returned]) -> tuple[Callable[[], Any], Returned]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, which may read weights meanwhile, are none of this recording's.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            returned = function()
        return graph.replay, returned


RECORDERS: dict[str, Recorder] = {"cuda": CudaGraphs()}  # by the type of the device


class Replayed(Generic[Returned]):
    """A function that is called the first time, recorded the second time, and played back from then on.

    The first call loads what the function needs, so that the recording finds it there. Where nothing can be recorded
    the function is called every time, and `note` says why.

    Args:
        function: works on tensors that stay where they are, and may be called any number of times.
        device: of the tensors.
    """

    def __init__(self, function: Callable[[], Returned], device: torch.device) -> None:
        self._function = function
        self._recorder = RECORDERS.get(device.type)
        self._play: Callable[[], Any] | None = None
        self._returned: Returned | None = None
        self._called = False
        self.note = "" if self._recorder else f"steps were not played back: there are no graphs on the {device.type}"

    def __call__(self) -> Returned:
        """What the function returns; once it is played back, tensors that the next call overwrites."""
        if self._play is None and self._called and self._recorder is not None:
            try:
                self._play, self._returned = self._recorder.record(self._function)
            except RuntimeError as error:  # nothing was done: recorded work is not executed
                self._recorder = None
                self.note = f"steps were not played back: {str(error).strip().splitlines()[0]}"
        self._called = True
        if self._play is None or self._returned is None:
            return self._function()
        self._play()
        return self._returned
