"""Times each part and sets it beside its floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.micro.floors import Layer, Measure, Rates

SHAPES = "512x512,2048x2048"
_RATES = pytest.StashKey[Rates]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shapes", default=SHAPES, help=f"OUTxIN of the layers, comma-separated; default: {SHAPES}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layer" in metafunc.fixturenames:
        metafunc.parametrize("layer", metafunc.config.getoption("--shapes").split(","), indirect=True, scope="session")


@pytest.fixture(scope="session")
def layer(request: pytest.FixtureRequest) -> Layer:
    return Layer.drawn(request.param)


@pytest.fixture(scope="session")
def rates(request: pytest.FixtureRequest) -> Rates:
    stash = request.config.stash
    if _RATES not in stash:
        stash[_RATES] = Rates.measured()
    return stash[_RATES]


@pytest.fixture
def measure(benchmark: Any, rates: Rates, request: pytest.FixtureRequest) -> Measure:
    """measure(call, operations=, moved=, dtype=): times `call`, sets it beside its floor, returns what it returned.

    `moved` are the bytes that must be read or written.
    """
    benchmark.group = f"{request.node.originalname} {request.node.callspec.params['layer']}"

    def run(
        call: Callable[[], Any], *, operations: float = 0.0, moved: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> Any:
        result = benchmark(call)
        if benchmark.stats is not None:  # None with --benchmark-disable
            spent, floor = benchmark.stats.stats.median, rates.floor(operations, moved, dtype)
            benchmark.extra_info.update(operations=operations, bytes=moved, floor=floor, times_floor=spent / floor)
            rates.lines.append((request.node.name, spent, floor))
        return result

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rates = config.stash.get(_RATES, None)
    if rates is None:
        return
    single, double = (rates.operations[dtype] / 1e9 for dtype in (torch.float32, torch.float64))
    terminalreporter.section("against the floor")
    terminalreporter.line(
        f"rates of this machine now: {single:.0f} GFLOP/s in float32, {double:.0f} in float64, "
        f"{rates.bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} thread(s)"
    )
    terminalreporter.line(f"{'part':60}{'median ms':>12}{'floor ms':>12}{'times floor':>13}")
    for name, spent, floor in rates.lines:
        terminalreporter.line(f"{name:60}{1e3 * spent:>12.3f}{1e3 * floor:>12.3f}{spent / floor:>13.1f}")
