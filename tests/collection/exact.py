"""Values, bounds and optima of small problems in rational arithmetic, written apart from the checker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np

from collection.checker import Array

Rational = list[Fraction]


def rational(x: Array) -> Any:
    """Nested lists of the exact numbers of an array."""
    return [rational(row) for row in x] if x.ndim > 1 else [Fraction(float(v)) for v in x]


def form(h: Sequence[Rational], x: Rational, y: Rational) -> Fraction:
    return sum((x[i] * h[i][j] * y[j] for i in range(len(x)) for j in range(len(y))), Fraction(0))


def value(weight: Array, hessian: Array, v: Array) -> Fraction:
    """tr((V - W) H (V - W)^T), or the sum over a stack."""
    total = Fraction(0)
    for i, (row, target) in enumerate(zip(rational(v), rational(weight), strict=True)):
        away = [a - b for a, b in zip(row, target, strict=True)]
        total += form(rational(hessian[i] if hessian.ndim == 3 else hessian), away, away)
    return total


def is_semidefinite(h: Sequence[Rational]) -> bool:
    """By elimination: a zero pivot needs a zero row."""
    rows = [list(row) for row in h]
    for k in range(len(rows)):
        if rows[k][k] < 0 or (rows[k][k] == 0 and any(rows[k][k + 1 :])):
            return False
        if rows[k][k] == 0:
            continue
        for i in range(k + 1, len(rows)):
            factor = rows[i][k] / rows[k][k]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[k], strict=True)]
    return True


def loss(h: Sequence[Rational], w: Rational, kept: Sequence[bool]) -> Fraction:
    """min e^T H e over the e with e_j = -w_j where j is not kept; H semidefinite."""
    inside = [j for j, keep in enumerate(kept) if keep]
    e = [Fraction(0) if keep else -x for x, keep in zip(w, kept, strict=True)]
    rows = [[h[i][j] for j in inside] + [-sum(h[i][j] * e[j] for j in range(len(w)))] for i in inside]
    done = 0
    pivots = []
    for column in range(len(inside)):
        pivot = next((r for r in range(done, len(rows)) if rows[r][column] != 0), None)
        if pivot is None:
            continue
        rows[done], rows[pivot] = rows[pivot], rows[done]
        rows[done] = [x / rows[done][column] for x in rows[done]]
        for r in range(len(rows)):
            if r != done and rows[r][column] != 0:
                rows[r] = [a - rows[r][column] * b for a, b in zip(rows[r], rows[done], strict=True)]
        pivots.append(column)
        done += 1
    for r, column in enumerate(pivots):
        e[inside[column]] = rows[r][-1]
    return form(h, e, e)


def admissible(masks: np.ndarray, given: Mapping[str, Any]) -> bool:
    """Whether a boolean matrix fits the counts of a set; loops, apart from the checker's tables."""
    out, width = masks.shape
    match given["kind"]:
        case "row":
            keeps = given["keep"] if isinstance(given["keep"], list) else [given["keep"]] * out
            return all(int(row.sum()) <= keep for row, keep in zip(masks, keeps, strict=True))
        case "unstructured":
            return int(masks.sum()) <= given["keep"]
        case "N:M":
            m = given["of"]
            return all(int(row[j : j + m].sum()) <= given["keep"] for row in masks for j in range(0, width, m))
        case "block":
            r, c = given["height"], given["width"]
            tiles = [masks[i : i + r, j : j + c].any() for i in range(0, out, r) for j in range(0, width, c)]
            return sum(map(bool, tiles)) <= given["keep"]
        case _:
            c = given["width"]
            return sum(bool(masks[:, j : j + c].any()) for j in range(0, width, c)) <= given["keep"]


def optimum(weight: Array, hessian: Array, given: Mapping[str, Any]) -> Fraction:
    """The least value over all supports, by trying each."""
    out, width = weight.shape
    supports = list(product((False, True), repeat=width))
    losses = []
    for i, w in enumerate(rational(weight)):
        h = rational(hessian[i] if hessian.ndim == 3 else hessian)
        losses.append([loss(h, w, kept) for kept in supports])
    best: Fraction | None = None
    for chosen in product(range(len(supports)), repeat=out):
        total = sum((losses[i][c] for i, c in enumerate(chosen)), Fraction(0))
        if (best is None or total < best) and admissible(np.array([supports[c] for c in chosen]), given):
            best = total
    assert best is not None
    return best


def dual_row(
    h: Sequence[Rational], w: Rational, d: Rational, s: Rational
) -> tuple[Fraction, list[Fraction | None], Rational] | None:
    """(-s^T q, costs of keeping (None: no bound), costs of removing) of a certificate; None if H - D is indefinite."""
    less = [[x - (d[i] if i == j else 0) for j, x in enumerate(row)] for i, row in enumerate(h)]
    if not is_semidefinite(less):
        return None
    q = [sum((a * b for a, b in zip(row, s, strict=True)), Fraction(0)) for row in less]
    kept = [-x * x / y if y > 0 else (Fraction(0) if x == 0 else None) for x, y in zip(q, d, strict=True)]
    removed = [y * v * v - 2 * x * v for x, y, v in zip(q, d, w, strict=True)]
    return -sum((a * b for a, b in zip(q, s, strict=True)), Fraction(0)), kept, removed


def block_bound(
    weight: Array, hessian: Array, given: Mapping[str, Any], columns: np.ndarray, blocks: Array, shift: Array
) -> Fraction | None:
    """The bound of a block certificate, over every support of the set; None if D or H - D is indefinite."""
    out, width = weight.shape
    h = rational(hessian)
    d = [[Fraction(0)] * width for _ in range(width)]
    for group, block in zip(columns.tolist(), rational(blocks), strict=True):
        for i, row in zip(group, block, strict=True):
            for j, x in zip(group, row, strict=True):
                d[i][j] = x
    less = [[x - y for x, y in zip(a, b, strict=True)] for a, b in zip(h, d, strict=True)]
    if not is_semidefinite(less) or not is_semidefinite(d):
        return None
    best: Fraction | None = None
    supports = list(product((False, True), repeat=width))
    costs = []
    for w, s in zip(rational(weight), rational(shift), strict=True):
        q = [sum((a * b for a, b in zip(row, s, strict=True)), Fraction(0)) for row in less]
        # e^T D e + 2 q^T e is the loss of D to the target w - D^-1 q, but for a constant: by least squares on v - w
        row_costs = []
        for kept in supports:
            e = _least(d, q, w, kept)
            if e is None:
                return None
            linear = sum((a * b for a, b in zip(q, e, strict=True)), Fraction(0))
            row_costs.append(form(d, e, e) + 2 * linear - form(less, s, s))
        costs.append(row_costs)
    for chosen in product(range(len(supports)), repeat=out):
        total = sum((costs[i][c] for i, c in enumerate(chosen)), Fraction(0))
        if (best is None or total < best) and admissible(np.array([supports[c] for c in chosen]), given):
            best = total
    return best


def _least(d: Sequence[Rational], q: Rational, w: Rational, kept: Sequence[bool]) -> Rational | None:
    """argmin e^T D e + 2 q^T e over the e with e_j = -w_j where j is not kept; None where D is singular there."""
    inside = [j for j, keep in enumerate(kept) if keep]
    e = [Fraction(0) if keep else -x for x, keep in zip(w, kept, strict=True)]
    rows = [[d[i][j] for j in inside] + [-q[i] - sum(d[i][j] * e[j] for j in range(len(w)))] for i in inside]
    for k in range(len(inside)):
        if rows[k][k] == 0:
            return None
        rows[k] = [x / rows[k][k] for x in rows[k]]
        for r in range(len(inside)):
            if r != k:
                rows[r] = [a - rows[r][k] * b for a, b in zip(rows[r], rows[k], strict=True)]
    for k, j in enumerate(inside):
        e[j] = rows[k][-1]
    return e


def tree_row(
    h: Sequence[Rational], w: Rational, leaves: Sequence[tuple[Sequence[int], Rational, Rational]], keep: int
) -> Fraction | None:
    """The bound of leaves (signs, d, s) of one row, by selection; None where they prove nothing or leave out a support.

    Whether they cover all supports is decided by listing these.
    """
    for kept in product((False, True), repeat=len(w)):
        fits = [
            all((k and s >= 0) or (not k and s <= 0) for k, s in zip(kept, leaf[0], strict=True)) for leaf in leaves
        ]
        if sum(kept) == keep and not any(fits):
            return None
    bounds = []
    for signs, d, s in leaves:
        costs = dual_row(h, w, d, s)
        if costs is None:
            return None
        constant, kept, removed = costs
        total, gains = constant, []
        for sign, a, b in zip(signs, kept, removed, strict=True):
            if a is None and sign >= 0:
                return None
            total += a if sign > 0 else b
            if sign == 0:
                gains.append(b - a)
        left = max(0, keep - sum(sign > 0 for sign in signs))
        bounds.append(total - sum(sorted(gains, reverse=True)[:left]))
    return min(bounds)


def priced_block_bound(
    weight: Array, hessian: Array, given: Mapping[str, Any], columns: np.ndarray, blocks: Array, shift: Array
) -> Fraction | None:
    """The bound of a block certificate at the best price of every budget; None where a block is singular.

    The price is relaxed only where several blocks share a budget. The best one is where two counts of a block gain
    alike, or 0: the bound is concave and piecewise linear in it.
    """
    out = len(weight)
    height = {"block": given.get("height", 1), "group": out}.get(given["kind"], 1)
    unit = given["width"] if given["kind"] in ("block", "group") else 1
    h, w, s = rational(hessian), rational(weight), rational(shift)
    less, total = [list(row) for row in h], Fraction(0)
    for group, block in zip(columns.tolist(), rational(blocks), strict=True):
        for i, row in zip(group, block, strict=True):
            for j, x in zip(group, row, strict=True):
                less[i][j] -= x
    pulls = [[sum((a * b for a, b in zip(row, x, strict=True)), Fraction(0)) for row in less] for x in s]
    gains: dict[int, list[dict[int, Fraction]]] = {}  # of each budget: of each band of rows and block, by counts
    for first in range(0, out, height):
        for group, block in zip(columns.tolist(), rational(blocks), strict=True):
            costs: dict[tuple[bool, ...], Fraction] = {}
            for chosen in product((False, True), repeat=len(group) // unit):
                kept = [keep for keep in chosen for _ in range(unit)]
                costs[chosen] = Fraction(0)
                for row in range(first, first + height):
                    q = [pulls[row][j] for j in group]
                    e = _least(block, q, [w[row][j] for j in group], kept)
                    if e is None:
                        return None
                    costs[chosen] += form(block, e, e) + 2 * sum(
                        (a * b for a, b in zip(q, e, strict=True)), Fraction(0)
                    )
            none = costs[(False,) * (len(group) // unit)]
            total += none
            table: dict[int, Fraction] = {}
            for chosen, cost in costs.items():
                table[sum(chosen)] = max(table.get(sum(chosen), Fraction(0)), none - cost)
            gains.setdefault(first if given["kind"] == "row" else 0, []).append(table)
    total -= sum((form(less, x, x) for x in s), Fraction(0))
    keeps = given["keep"] if isinstance(given["keep"], list) else [given["keep"]] * out
    for row, tables in gains.items():
        prices = {Fraction(0)} | {
            (table[b] - table[a]) / (b - a) for table in tables for a in table for b in table if a < b
        }
        total -= min(
            price * keeps[row] + sum(max(gain - price * count for count, gain in table.items()) for table in tables)
            for price in prices
            if price >= 0
        )
    return total
