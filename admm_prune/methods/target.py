"""Pruning targets: a sparsity or an N:M pattern, and their parsing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from admm_prune.errors import UserError
from admm_prune.prunable import kept_count

DENSE = "dense"  # the target of a weight that is not pruned


@dataclass(frozen=True)
class Target:
    """A pruning target: a sparsity, or a pattern N:M that keeps N of every M consecutive weights.

    Attributes:
        layers: (name, "0.5" or "2:4" or "dense") for every weight with a target of its own; "dense" is not pruned.
    """

    sparsity: float | None = None
    pattern: tuple[int, int] | None = None
    layers: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """ "0.7" or "2:4", without rounding: `target_named` restores the target exactly."""
        return f"{self.pattern[0]}:{self.pattern[1]}" if self.pattern else repr(self.sparsity)

    @property
    def label(self) -> str:
        """For messages and tables: "50%" or "2:4"."""
        return str(self) if self.pattern else f"{100 * (self.sparsity or 0.0):g}%"

    @property
    def fraction(self) -> float:
        """The fraction of the weights to remove, 0 to 1; 1 - N/M for a pattern."""
        return 1 - self.pattern[0] / self.pattern[1] if self.pattern else self.sparsity or 0.0

    def at(self, name: str) -> Target | None:
        """The target of one weight; None if it is not pruned."""
        text = self._by_name.get(name)
        if text is None:
            return replace(self, layers=())
        return None if text == DENSE else target_named(text)

    @cached_property
    def _by_name(self) -> dict[str, str]:
        return dict(self.layers)

    def of_pruned(self, name: str) -> Target:
        """The target of a weight that must be among those to prune."""
        target = self.at(name)
        assert target is not None, f"{name} is not among the weights to prune"
        return target

    def removed_from(self, size: int) -> int:
        """The number of weights to remove from a matrix of `size` entries."""
        return size - kept_count(self.fraction, size)

    @property
    def varied(self) -> bool:
        """Whether some of the pruned weights have targets of their own."""
        return any(text != DENSE for _, text in self.layers)


def target_named(text: str) -> Target:
    """The target that "0.7" or "2:4" stands for.

    Raises:
        UserError: the text is neither a number from 0 to 1 nor N:M with 1 <= N <= M.
    """
    return _pattern(text) if ":" in text else _sparsity(text)


def parse_target(sparsity: str | float | None, pattern: str | None) -> Target:
    """One target from user input.

    Raises:
        UserError: neither or both are given, the sparsity is not a number from 0 to 1, or the pattern is not N:M with
            1 <= N <= M.
    """
    _check_one(sparsity, pattern)
    return _sparsity(sparsity) if sparsity is not None else _pattern(str(pattern))


def parse_targets(sparsity: str | None, pattern: str | None) -> list[Target]:
    """Targets from comma-separated lists: sparsities first, then patterns.

    Raises:
        UserError: both lists are empty, or an item is not a target.
    """
    targets = [_sparsity(item) for item in (sparsity or "").split(",") if item.strip()]
    targets += [_pattern(item) for item in (pattern or "").split(",") if item.strip()]
    if not targets:
        raise UserError("give sparsities such as 0.5,0.7 or patterns such as 2:4")
    return targets


def parse_path(sparsity: str | None, pattern: str | None) -> list[Target]:
    """The targets of one comma-separated list, of sparsities or of patterns, without duplicates.

    Raises:
        UserError: neither or both lists are given, or an item is not a target.
    """
    _check_one(sparsity, pattern)
    return list(dict.fromkeys(parse_targets(sparsity, pattern)))


def _check_one(sparsity: object, pattern: object) -> None:
    if (sparsity is None) == (pattern is None):
        raise UserError("give either a sparsity such as 0.7 or a pattern such as 2:4")


def _sparsity(text: str | float) -> Target:
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise UserError(f"sparsity must be a number from 0 to 1, not '{text}'") from None
    if not 0.0 <= value <= 1.0:
        percent = f" (did you mean {value / 100:g}?)" if 5.0 <= value <= 100.0 else ""
        raise UserError(f"sparsity must lie between 0 and 1, not {text}{percent}")
    return Target(sparsity=value)


def _pattern(text: str) -> Target:
    first, _, second = str(text).strip().partition(":")
    if not (first.isdecimal() and second.isdecimal()):
        raise UserError(f"pattern must be N:M, N kept of every M such as 2:4, not '{text}'")
    n, m = int(first), int(second)
    if not 1 <= n <= m:
        raise UserError(f"pattern {text} must keep from 1 to {m} of every {m}: N kept of every M, such as 2:4")
    return Target(pattern=(n, m))
