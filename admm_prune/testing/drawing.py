"""Random inputs, without deadline and example database. The only module of the package that uses hypothesis.

Other settings (such as the phases) follow hypothesis's active profile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

try:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st
    from hypothesis.errors import Flaky
except ImportError as missing:
    raise ImportError("admm_prune.testing needs hypothesis: pip install 'admm-prune[testing]'") from missing

DrawnT = TypeVar("DrawnT")

__all__ = ["for_all", "st"]


def for_all(draws: st.SearchStrategy[DrawnT], check: Callable[[DrawnT], None], examples: int) -> None:
    """Runs `check` on random inputs, the same in every run; a failing one is shrunk to a simple one.

    Raises:
        AssertionError: of the check; also where a draw that failed passes when it is repeated.
    """

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(draws)
    def run(drawn: DrawnT) -> None:
        check(drawn)

    try:
        run()
    except Flaky as flaky:
        first = next(iter(getattr(flaky, "exceptions", ())), flaky)
        raise AssertionError(f"the same input gave two outcomes; one of them: {first}") from flaky
