"""Products of a solve in the precision of their numbers, whatever the process is set to.

`torch.set_float32_matmul_precision("high")`, TF32 asked for on CUDA, bfloat16 asked for of oneDNN, and autocast all
make products of float32 matrices keep 8 to 11 bits. They are settings of a training script, and a solve in the same
process has to end where it ends without them: what it multiplies in fewer bits, it rounds itself (`products`).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_MKLDNN: Any = torch.backends.mkldnn  # its types lack `matmul`
_PLACES = (torch.backends.cuda.matmul, _MKLDNN.matmul)
_FULL = ("ieee", "none")


@contextmanager
def full() -> Generator[None]:
    """Within it float32 products are of float32 numbers on every device; afterwards all settings are as they were.

    As a decorator it holds for a whole call. The settings are the process's: threads that multiply meanwhile have them
    too.
    """
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if not all(place.fp32_precision in _FULL for place in _PLACES):
            stack.enter_context(_set())
        yield


@contextmanager
def _set() -> Generator[None]:
    before = [place.fp32_precision for place in _PLACES]
    old_name = _by_old_name()
    torch.set_float32_matmul_precision("highest")  # the old name sets both, and torch refuses what they disagree on
    try:
        yield
    finally:
        if old_name is not None:
            torch.set_float32_matmul_precision(old_name)
        for place, value in zip(_PLACES, before, strict=True):
            place.fp32_precision = "none"  # as torch.backends.fp32_precision says
            if place.fp32_precision != value:
                place.fp32_precision = value


def _by_old_name() -> str | None:
    """What `torch.set_float32_matmul_precision` was given; None where only the new names were used."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
