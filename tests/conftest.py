"""Settings of all tests: hypothesis without a clock (machines are shared), reproducible examples."""

from __future__ import annotations

import os
from collections import defaultdict

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.saved_model import model_folder, text_file

__all__ = ["model_folder", "text_file"]  # fixtures of all tests

# Without a GPU Triton's kernels are tested in its interpreter, which must be chosen before they are read.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("shared", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


def _mark_unsampled(items: list[pytest.Item]) -> None:
    """Marks all but k cases of a function marked `sampled(k)` slow: those at even distances run by default."""
    functions: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sampled") is not None:
            functions[item.nodeid.partition("[")[0]].append(item)
    for cases in functions.values():
        (count,) = cases[0].get_closest_marker("sampled").args
        chosen = {round((i + 0.5) * len(cases) / count - 0.5) for i in range(min(count, len(cases)))}
        for index, item in enumerate(cases):
            if index not in chosen:
                item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _mark_unsampled(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
