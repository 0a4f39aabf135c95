"""Times each operation, and reports it with the lower bound of its time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.micro.rates import Layer, Measure, Rates

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
    """measure(call, operations=, moved=, dtype=): times `call`, records the bound, returns the result of the call.

    `moved` are the bytes that must be read or written.
    """
    benchmark.group = f"{request.node.originalname} {request.node.callspec.params['layer']}"

    def run(
        call: Callable[[], Any], *, operations: float = 0.0, moved: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> Any:
        result = benchmark(call)
        if benchmark.stats is not None:  # None with --benchmark-disable
            spent, bound = benchmark.stats.stats.median, rates.lower_bound(operations, moved, dtype)
            benchmark.extra_info.update(operations=operations, bytes=moved, lower_bound=bound, ratio=spent / bound)
            rates.lines.append((request.node.name, spent, bound))
        return result

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rates = config.stash.get(_RATES, None)
    if rates is None:
        return
    single, double = (rates.operations[dtype] / 1e9 for dtype in (torch.float32, torch.float64))
    terminalreporter.section("times and their lower bounds")
    terminalreporter.line(
        f"rates of this machine now: {single:.0f} GFLOP/s in float32, {double:.0f} in float64, "
        f"{rates.bandwidth / 1e9:.1f} GB/s, {torch.get_num_threads()} thread(s)"
    )
    terminalreporter.line(f"{'operation':60}{'median ms':>12}{'bound ms':>12}{'ratio':>13}")
    for name, spent, bound in rates.lines:
        terminalreporter.line(f"{name:60}{1e3 * spent:>12.3f}{1e3 * bound:>12.3f}{spent / bound:>13.1f}")
