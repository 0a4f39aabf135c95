"""Checks a solution and a lower bound of a layer problem. Needs only numpy, safetensors and the standard library.

    python collection/checker.py PROBLEM SOLUTION [CERTIFICATE]

The problem is to minimize f(V) = tr((V - W) H (V - W)^T) over the V (out, in) in a sparse set; in a stack of rows,
every row has its own Hessian. From the files alone, the checker determines whether V is in the set, an interval that
contains f(V), and the lower bound of f over the set that the certificate proves. It does not rely on any figure stated
in a solution or a certificate, and refuses a file whose stated value or bound does not hold. With "-" in place of
SOLUTION only the certificate is checked. If a file is refused, the reason is printed in one line and the exit status
is 1.

Proofs: the numbers in the files are taken as exact reals. Everything is computed in float64 with bounds on all rounding
errors: u = 2^-53, gamma_k = k u / (1 - k u); the error of a sum of k products, in any order, is at most gamma_k times
the sum of their magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). The constants
below are at least twice as large as this requires, which covers the rounding of the bounds themselves. `README.md` in
this folder describes the formats.
"""

from __future__ import annotations

import decimal
import hashlib
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

Array = NDArray[np.float64]

FORMATS = {kind: f"layer-{kind}-1" for kind in ("problem", "solution", "certificate")}
TENSORS: Mapping[str, Sequence[tuple[str, ...]]] = {  # of a file; no others, so that its SHA-256 identifies its content
    "problem": (("weight", "hessian"), ("weight", "hessian_upper")),
    "solution": (("weight",), ("mask", "values")),
    "dual": (("diagonal", "diagonal_of_row", "shift"),),
    "tree": (("leaves", "row_of_leaf", "diagonal", "diagonal_of_leaf", "shift"),),
    "block": (("columns", "blocks", "shift"),),
}
KINDS = {  # of sets, with the counts that define them
    "row": ("keep",),
    "unstructured": ("keep",),
    "N:M": ("keep", "of"),
    "block": ("height", "width", "keep"),
    "group": ("width", "keep"),
}
_UNIT = 2.0**-53
_TINY = 1e-300  # more than underflow takes from the products of one formula
_LARGEST = 1e60  # magnitude of an entry; products of three do not overflow
_FLOOR = 1e-8  # relative to the diagonal of H; replaces multipliers that are not positive
_SHRINKS = (0.0, 1e-12, 1e-10, 1e-8, 1e-6)  # relative to diag(H); subtracted from multipliers that are too large
_MOST_SUPPORTS = 4096  # of a block, all of which are tried
_CLAIM = 1e-9  # relative margin to the safe side in a stated value or bound


class CheckError(ValueError):
    """A file is malformed or states what does not hold. The message is one line."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A layer problem: W (out, in), H (in, in), or (out, in, in) if every row has its own, and the sparse set.

    `fingerprint` is the SHA-256 of the tensors, the id and the set; it is listed in `problems.json` and stored in
    solutions and certificates.
    """

    id: str
    set: Mapping[str, Any]
    weight: Array
    hessian: Array
    fingerprint: str

    @property
    def is_stack(self) -> bool:
        return self.hessian.ndim == 3

    def hessian_of(self, row: int) -> Array:
        return self.hessian[row] if self.is_stack else self.hessian


@dataclass(frozen=True, eq=False)
class Value:
    """f(V) lies in [lower, upper]; `rows` (out, 2) has the interval of each row's part of f."""

    lower: float
    upper: float
    rows: Array


@dataclass(frozen=True, eq=False)
class Bound:
    """f(V) >= value for every V in the set; `rows` (out,) are the bounds of the rows if each has its own budget."""

    value: float
    kind: str
    rows: Array | None = None


def gamma(k: int) -> float:
    """gamma_k = k u / (1 - k u)."""
    return k * _UNIT / (1 - k * _UNIT)


# Files


def read(path: Path, kind: str) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """The (tensors, metadata) of a "problem", a "solution" or a "certificate"."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise CheckError(f"{path} cannot be read as safetensors: {one_line(error) or type(error).__name__}") from error
    if metadata.get("format") != FORMATS[kind]:
        raise CheckError(f"{path} is not a {kind} of this collection: its format is not '{FORMATS[kind]}'")
    return tensors, metadata


def check_tensors(path: Path, tensors: Mapping[str, NDArray[Any]], kind: str) -> None:
    """Raises CheckError if tensors other than those of a kind of file are there; `kind` is a key of `TENSORS`."""
    if not any(set(tensors) <= set(names) for names in TENSORS[kind]):
        found, wanted = one_line(", ".join(sorted(tensors))), " or ".join(map(", ".join, TENSORS[kind]))
        raise CheckError(f"{path} contains the tensors {found}: of the kind '{kind}' they must be {wanted}")


def load_problems(path: Path) -> dict[str, Problem]:
    """The problems in a file, one for each of its sets, by id: '<layer>/<set>'."""
    tensors, metadata = read(path, "problem")
    check_tensors(path, tensors, "problem")
    weight = _real(path, tensors, "weight", 2)
    out, width = weight.shape
    if "hessian_upper" in tensors:
        packed = _real(path, tensors, "hessian_upper", 1, 2)
        if packed.shape[-1] != width * (width + 1) // 2:
            raise CheckError(f"{path}: hessian_upper has {packed.shape[-1]} entries, not those of {width} x {width}")
        hessian = np.zeros((*packed.shape[:-1], width, width))
        upper = np.triu_indices(width)
        hessian[..., upper[0], upper[1]] = packed
        hessian[..., upper[1], upper[0]] = packed
    else:
        hessian = _real(path, tensors, "hessian", 2, 3)
    if hessian.shape not in ((width, width), (out, width, width)):
        raise CheckError(f"{path}: hessian has the shape {hessian.shape}, which does not fit weight {weight.shape}")
    if not np.array_equal(hessian, np.swapaxes(hessian, -1, -2)):
        raise CheckError(f"{path}: hessian is not symmetric")
    if np.diagonal(hessian, axis1=-2, axis2=-1).min(initial=0.0) < 0:
        raise CheckError(f"{path}: hessian has a negative diagonal entry")
    sets = _json(path, metadata.get("sets", ""))
    name = metadata.get("id")
    if not name or not isinstance(sets, dict) or not sets:
        raise CheckError(f"{path} states no id and sets")
    if not all(map(str.isprintable, (name, *sets))):
        raise CheckError(f"{path}: its id and the names of its sets must not have line breaks or control characters")
    content = tensor_hash(tensors)
    problems = {}
    for label, given in sets.items():
        check_set(given, out, width)
        if hessian.ndim == 3 and given["kind"] != "row":
            raise CheckError(f"{path}: a stack of rows can only have sets of the kind 'row'")
        identity = f"{name}/{label}"
        problems[identity] = Problem(identity, given, weight, hessian, fingerprint_of(identity, given, content))
    return problems


def fingerprint_of(identity: str, given: Mapping[str, Any], content: str) -> str:
    """SHA-256 of the id of a problem, its set, and the hash of its tensors."""
    named = json.dumps([FORMATS["problem"], identity, given, content], sort_keys=True)
    return hashlib.sha256(named.encode()).hexdigest()


def tensor_hash(tensors: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of tensors, sorted by name."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype.newbyteorder('<').str} {tensor.shape}\n".encode())
        total.update(np.ascontiguousarray(tensor).tobytes())
    return total.hexdigest()


def check_set(given: Any, rows: int, width: int) -> None:
    """Raises CheckError unless `given` is a valid set for matrices (rows, width)."""
    kind = given.get("kind") if isinstance(given, dict) else None
    if not isinstance(kind, str) or kind not in KINDS or set(given) != {"kind", *KINDS[kind]}:
        raise CheckError(f"a set has one of the kinds {', '.join(KINDS)} and its counts, not {one_line(given)}")
    listed = kind == "row" and isinstance(given["keep"], list)
    keeps = given["keep"] if listed else [given["keep"]]
    counts = [given[name] for name in KINDS[kind] if name != "keep"]
    if not all(type(count) is int and count >= 1 for count in counts):
        raise CheckError(f"the counts of a set must be positive integers, not {given}")
    height, across = given.get("height", 1), given.get("of", given.get("width", 1))
    if width % across or rows % height or (listed and len(keeps) != rows):
        raise CheckError(f"the set {given} does not fit a matrix of {rows} x {width}")
    cells = {"row": width, "unstructured": rows * width, "N:M": across, "group": width // across}
    most = cells.get(kind, rows // height * (width // across))
    if not all(type(keep) is int and 0 <= keep <= most for keep in keeps):
        raise CheckError(f"the set {given} must keep 0 to {most}")


def load_weight(path: Path, problem: Problem) -> Array:
    """V (out, in), read from a solution."""
    tensors, metadata = read(path, "solution")
    _check_names(path, metadata, problem)
    return weight_of(tensors, problem, path)


def weight_of(tensors: Mapping[str, NDArray[Any]], problem: Problem, path: Path = Path("solution")) -> Array:
    """V (out, in), from `weight`, or from `mask` (one bit per entry, row by row) and the `values` at its set bits."""
    check_tensors(path, tensors, "solution")
    shape = problem.weight.shape
    if "weight" in tensors:
        weight = _real(path, tensors, "weight", 2)
    else:
        mask, values = _whole(path, tensors, "mask", 1), _real(path, tensors, "values", 1)
        if tensors["mask"].dtype != np.uint8:
            raise CheckError(f"{path}: mask has the dtype {tensors['mask'].dtype}, not uint8")
        size = math.prod(shape)
        bits = np.unpackbits(mask.astype(np.uint8)).astype(bool)
        if len(mask) != -(-size // 8) or bits[size:].any() or bits.sum() != len(values):
            raise CheckError(f"{path}: mask and values do not fit a matrix of {shape[0]} x {shape[1]}")
        weight = np.zeros(size)
        weight[bits[:size]] = values
        weight = weight.reshape(shape)
    if weight.shape != shape:
        raise CheckError(f"{path}: weight has the shape {weight.shape}, not {shape}")
    return weight


def claim(path: Path, kind: str, name: str) -> float | None:
    """The value or bound stated in the metadata of a file, to be compared with what is proved; None if it has none."""
    text = read(path, kind)[1].get(name)
    try:
        stated = None if text is None else float(text)
    except ValueError:
        stated = math.nan
    if stated is not None and not math.isfinite(stated):
        raise CheckError(f"{path}: the {name} that it states is not a number")
    return stated


def _check_names(path: Path, metadata: Mapping[str, str], problem: Problem) -> None:
    if metadata.get("id") != problem.id:
        raise CheckError(f"{path} is for the problem '{one_line(metadata.get('id'))}', not '{problem.id}'")
    if "problem" not in metadata:
        raise CheckError(f"{path} does not name the data of {problem.id}: its 'problem' must be {problem.fingerprint}")
    if metadata["problem"] != problem.fingerprint:
        raise CheckError(f"{path} was made for other data of {problem.id}, whose SHA-256 is {problem.fingerprint}")


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckError(f"{path}: its metadata is not JSON: {one_line(error) or type(error).__name__}") from error


def _tensor(path: Path, tensors: Mapping[str, NDArray[Any]], name: str, *dimensions: int) -> NDArray[Any]:
    if name not in tensors:
        raise CheckError(f"{path} has no tensor '{name}'")
    tensor = tensors[name]
    if tensor.ndim not in dimensions or tensor.size == 0:
        raise CheckError(
            f"{path}: {name} has the shape {tensor.shape}: it must have {dimensions[0]} dimensions and not be empty"
        )
    return tensor


def _real(path: Path, tensors: Mapping[str, NDArray[Any]], name: str, *dimensions: int) -> Array:
    tensor = _tensor(path, tensors, name, *dimensions)
    if tensor.dtype.kind != "f":
        raise CheckError(f"{path}: {name} has the dtype {tensor.dtype}, which is not floating-point")
    numbers = np.asarray(tensor, dtype=np.float64)
    if not (np.abs(numbers) <= _LARGEST).all():
        raise CheckError(f"{path}: {name} contains NaN, infinity or a number above {_LARGEST:g}")
    return numbers


def _whole(path: Path, tensors: Mapping[str, NDArray[Any]], name: str, dimensions: int) -> NDArray[np.int64]:
    tensor = _tensor(path, tensors, name, dimensions)
    if tensor.dtype.kind not in "iu":
        raise CheckError(f"{path}: {name} has the dtype {tensor.dtype}, which is not an integer type")
    return tensor.astype(np.int64)


def one_line(text: object) -> str:
    """Text from a file or an error, without line breaks and control characters."""
    printable = "".join(character if character.isprintable() else " " for character in str(text))
    return " ".join(printable.split())


# Set and value


def cells(entries: Array, given: Mapping[str, Any]) -> tuple[Array, NDArray[np.int64]]:
    """Sums of entries that are kept or removed together (groups, choices), and the choices kept per group (groups,).

    Args:
        entries: (out, in), non-negative.
        given: the set.
    """
    out, width = entries.shape
    match given["kind"]:
        case "row":
            table = entries
        case "unstructured":
            table = entries.reshape(1, -1)
        case "N:M":
            table = entries.reshape(-1, given["of"])
        case "block":
            tiles = entries.reshape(out // given["height"], given["height"], width // given["width"], given["width"])
            table = tiles.sum(axis=(1, 3)).reshape(1, -1)
        case _:
            table = entries.sum(axis=0).reshape(1, -1, given["width"]).sum(axis=2)
    return table, np.broadcast_to(np.asarray(given["keep"], dtype=np.int64), (len(table),))


def is_member(weight: Array, given: Mapping[str, Any]) -> bool:
    """Whether V is in the set, by the positions of its nonzero entries."""
    counts, keep = cells((weight != 0).astype(np.float64), given)
    return bool(((counts > 0).sum(axis=1) <= keep).all())


def value(problem: Problem, weight: Array) -> Value:
    """An interval that contains f(V), by the error bounds in the docstring of this module. V - W is rounded once."""
    away = weight - problem.weight
    sizes = np.abs(away)
    if problem.is_stack:
        rows = np.einsum("rj,rj->r", np.einsum("ri,rij->rj", away, problem.hessian), away)
        terms = np.einsum("rj,rj->r", np.einsum("ri,rij->rj", sizes, np.abs(problem.hessian)), sizes)
    else:
        rows = np.einsum("rj,rj->r", away @ problem.hessian, away)
        terms = np.einsum("rj,rj->r", sizes @ np.abs(problem.hessian), sizes)
    width = away.shape[1]
    radius = 2 * gamma(2 * width + 10) * terms + _TINY * (1 + sizes.sum(axis=1))
    intervals = np.stack([rows - radius, rows + radius], axis=1)
    below, above = _down(math.fsum(intervals[:, 0])), _up(math.fsum(intervals[:, 1]))
    return Value(below, above, np.stack([_down(intervals[:, 0]), _up(intervals[:, 1])], axis=1))


def energy(problem: Problem) -> float:
    """tr(W H W^T), to which relative values refer. Not proved."""
    return math.fsum(value(problem, np.zeros_like(problem.weight)).rows.mean(axis=1))


def _down(x: Any) -> Any:
    """A number below x by more than two rounding errors."""
    return x - 4 * _UNIT * np.abs(x) - _TINY


def _up(x: Any) -> Any:
    """A number above x by more than two rounding errors."""
    return x + 4 * _UNIT * np.abs(x) + _TINY


# Bounds


def is_semidefinite(hessian: Array, diagonal: Array) -> bool:
    """Whether H - Diag(d) is proved to be positive semidefinite.

    If the floating-point Cholesky factorization of B with diagonal b succeeds, its factor is the exact one of a matrix
    whose entries differ from those of B by at most phi sqrt(b_i b_j), phi = gamma_(n+1) / (1 - gamma_(n+1)) (Higham,
    theorem 10.5, after Demmel; Rump, Verification of positive definiteness, 2006). Hence B + n phi Diag(b) is
    semidefinite. B is H - Diag(d) with the diagonal (1 - 2 n phi) (H_jj - d_j).
    """
    n = len(hessian)
    room = np.diagonal(hessian) - diagonal
    apart = (room == 0) & (np.count_nonzero(hessian, axis=1) <= (np.diagonal(hessian) != 0))
    if apart.any():  # rows of zeros
        return is_semidefinite(hessian[~apart][:, ~apart], diagonal[~apart])
    if not (room > 0).all():
        return False
    with np.errstate(all="ignore"):
        exponents = np.frexp(room)[1] // 2  # scaling by powers of two rounds nothing
        matrix = np.ldexp(hessian, -(exponents[:, None] + exponents))
        phi = gamma(2 * n + 20) / (1 - gamma(2 * n + 20))
        matrix[np.diag_indices(n)] = np.ldexp(room, -2 * exponents) * (1 - 2 * n * phi) - 1e-280
        try:
            factor = np.linalg.cholesky(matrix)
        except np.linalg.LinAlgError:
            return False
    return bool(np.isfinite(factor).all() and (np.diagonal(factor) > 0).all())


def proved_diagonal(hessian: Array, diagonal: Array) -> Array:
    """Multipliers d for which H - Diag(d) is proved to be semidefinite: those given, slightly lowered if necessary.

    Raises:
        CheckError: lowering them does not make a proof possible.
    """
    scale = np.diagonal(hessian)
    starts = [diagonal] if (diagonal > 0).all() else [np.maximum(diagonal, _FLOOR * scale), diagonal]
    for start in starts:
        for shrink in _SHRINKS:
            multipliers: Array = start - shrink * scale
            if is_semidefinite(hessian, multipliers):
                return multipliers
    raise CheckError("the Hessian less the diagonal of the certificate is not proved to be positive semidefinite")


def costs(hessian: Array, multipliers: Array, target: Array, shift: Array) -> tuple[Array, Array, Array]:
    """c (rows,), a (rows, in) and b (rows, in): f of a row is at least -c + sum_kept a_j + sum_removed b_j.

    With D = Diag(d), e = v - w and q = (H - D) s for any s: f = e^T (H - D) e + e^T D e >= 2 q^T e - s^T q + e^T D e.
    Each d_j e_j^2 + 2 q_j e_j is at least -q_j^2 / d_j, and equals d_j w_j^2 - 2 q_j w_j if v_j = 0.
    """
    n = len(multipliers)
    with np.errstate(all="ignore"):
        pull = shift @ hessian - shift * multipliers
        sizes = np.abs(shift) @ np.abs(hessian) + np.abs(shift * multipliers)
        error = np.where(sizes > 0, 2 * gamma(n + 6) * sizes + _TINY, 0.0)
        reach = np.abs(pull) + error
        constant = (shift * pull).sum(axis=1) + (np.abs(shift) * (error + 2 * gamma(n + 6) * reach)).sum(axis=1)
        ratio = reach / np.sqrt(multipliers)
        kept = np.where(reach == 0, 0.0, np.where(multipliers > 0, -_up(_up(ratio) ** 2), -np.inf))
        kept = np.where((multipliers < 0) | np.isnan(kept), -np.inf, kept)
        first, second, third = multipliers * target**2, 2 * pull * target, 2 * error * np.abs(target)
        removed = first - second - third - 16 * _UNIT * (np.abs(first) + np.abs(second) + third) - _TINY
        return _up(constant), np.minimum(kept, removed), removed


def least_cost(constant: Array, kept: Array, removed: Array, given: Mapping[str, Any]) -> float:
    """A lower bound of sum(-c) + sum_kept a + sum_removed b over the supports in the set.

    The largest gains b - a are kept.
    """
    tile = given.get("height", len(kept)) * given.get("width", 1)
    gains, keep = cells(_up(removed - kept), given)
    gains = gains * (1 + 2 * gamma(tile + 4))  # sums over tiles
    ordered = -np.sort(-gains, axis=1)
    chosen = ordered[np.arange(ordered.shape[1]) < keep[:, None]]
    if not np.isfinite(chosen).all():
        return -math.inf
    parts = [math.fsum(removed.ravel()), -_up(math.fsum(chosen)), -_up(math.fsum(constant))]
    return float(_down(sum(parts) - 8 * _UNIT * sum(map(abs, parts))))


def dual_bound(problem: Problem, tensors: Mapping[str, NDArray[Any]], path: Path = Path("certificate")) -> Bound:
    """The bound proved by `diagonal` (g, in), `diagonal_of_row` (out,) and `shift` (out, in); see `costs`.

    Raises:
        CheckError: shapes do not match, or H - Diag(d) is not proved to be semidefinite.
    """
    out, width = problem.weight.shape
    diagonal, shift = _real(path, tensors, "diagonal", 2), _real(path, tensors, "shift", 2)
    index = _index(path, tensors, "diagonal_of_row", out, len(diagonal))
    if diagonal.shape[1] != width or shift.shape != (out, width):
        raise CheckError(f"{path}: diagonal or shift does not fit a matrix of {out} x {width}")
    _check_multipliers(path, diagonal)
    constant, kept, removed = np.zeros(out), np.zeros((out, width)), np.zeros((out, width))
    for rows in _rows_of_each(index, problem.is_stack):
        hessian = problem.hessian_of(int(rows[0]))
        multipliers = proved_diagonal(hessian, diagonal[index[rows[0]]])
        found = costs(hessian, multipliers, problem.weight[rows], shift[rows])
        constant[rows], kept[rows], removed[rows] = found
    if problem.set["kind"] != "row":
        return Bound(least_cost(constant, kept, removed, problem.set), "dual")
    keep = np.broadcast_to(np.asarray(problem.set["keep"]), (out,))
    alone = [
        least_cost(constant[i : i + 1], kept[i : i + 1], removed[i : i + 1], {"kind": "row", "keep": int(keep[i])})
        for i in range(out)
    ]
    each: Array = np.asarray(alone, dtype=np.float64)
    return Bound(_total(each), "dual", each)


def block_bound(problem: Problem, tensors: Mapping[str, NDArray[Any]], path: Path = Path("certificate")) -> Bound:
    """The bound proved by a block-diagonal matrix D with H - D semidefinite, by trying all supports of each block.

    `columns` (g, b) has the columns of each block, every column once, `blocks` (g, b, b) the symmetric blocks of D, and
    `shift` (out, in) the s of each row. With q = (H - D) s and y = D w - q, f of a row is at least -s^T q plus

        e^T D e + 2 q^T e = w^T D w - 2 q^T w + v^T D v - 2 y^T v,

    whose minimum over the v with support S in a block is lower than the value at v = 0 by the gain y_S^T D_SS^-1 y_S.
    Gains of rows that are kept together are added. With G_c the largest gain in a block of a support with c choices, a
    budget of k choices gains at most k l + sum_blocks max_c (G_c - l c), for any l >= 0.

    Raises:
        CheckError: shapes do not match, blocks divide groups of the set, or a matrix is not proved to be semidefinite.
    """
    out, width = problem.weight.shape
    columns, blocks = _whole(path, tensors, "columns", 2), _real(path, tensors, "blocks", 3)
    shift = _real(path, tensors, "shift", 2)
    if problem.is_stack:
        raise CheckError(f"{path}: a block certificate needs one Hessian: it is not for a stack of rows")
    if blocks.shape != (*columns.shape, columns.shape[1]) or shift.shape != (out, width):
        raise CheckError(f"{path}: columns, blocks or shift do not fit a matrix of {out} x {width}")
    if not np.array_equal(np.sort(columns, axis=None), np.arange(width)):
        raise CheckError(f"{path}: columns must have every column once")
    if not np.array_equal(blocks, np.swapaxes(blocks, 1, 2)):
        raise CheckError(f"{path}: blocks are not symmetric")
    supports = supports_of_block(columns, problem.set, path)
    blocks = proved_blocks(problem.hessian, columns, blocks)
    height = {"block": problem.set.get("height", 1), "group": out}.get(problem.set["kind"], 1)
    constant, pull, error = _linear_part(problem, columns, blocks, shift)
    choices = supports.sum(axis=1) // _unit(problem.set)
    exact = problem.set["kind"] == "N:M"  # all supports of a block keep what may be kept
    counts = np.zeros_like(choices) if exact else choices
    gains = np.zeros((len(columns), out // height, int(counts.max()) + 1))
    for i, (group, matrix) in enumerate(zip(columns, blocks, strict=True)):
        found = _gains(matrix, supports, pull[:, group], error[:, group], height)
        for count in range(gains.shape[2]):
            gains[i, :, count] = found[:, counts == count].max(axis=1)
    if problem.set["kind"] == "row":
        keep = np.broadcast_to(np.asarray(problem.set["keep"]), (out,))
        gained = np.array([_most_gained(gains[:, row], int(keep[row])) for row in range(out)])
        each = _down(constant - gained - 8 * _UNIT * (np.abs(constant) + gained))
        return Bound(_total(each), "block", each)
    most = math.fsum(gains.ravel()) if exact else _most_gained(gains.reshape(-1, gains.shape[2]), problem.set["keep"])
    total = [math.fsum(constant), -_up(most)]
    return Bound(float(_down(sum(total) - 8 * _UNIT * sum(map(abs, total)))), "block")


def _unit(given: Mapping[str, Any]) -> int:
    """The number of columns that are kept or removed together."""
    return int(given["width"]) if given["kind"] in ("block", "group") else 1


def supports_of_block(columns: NDArray[np.int64], given: Mapping[str, Any], path: Path) -> NDArray[np.bool_]:
    """The supports of a block (supports, b) in the set; for N:M, those that keep N of every group."""
    together = given["of"] if given["kind"] == "N:M" else _unit(given)
    size = columns.shape[1]
    aligned = columns.reshape(len(columns), -1, together) if size % together == 0 else None
    if aligned is None or (aligned[..., :1] % together).any() or (np.diff(aligned, axis=2) != 1).any():
        raise CheckError(f"{path}: a block must consist of whole groups of {together} consecutive columns")
    parts = size // together
    choices = math.comb(together, given["keep"]) if given["kind"] == "N:M" else 2
    if choices**parts > _MOST_SUPPORTS:
        raise CheckError(f"{path}: a block has more than {_MOST_SUPPORTS} supports")
    if given["kind"] == "N:M":
        kept = list(itertools.combinations(range(together), given["keep"]))
        options = np.zeros((len(kept), together), dtype=bool)
        for option, chosen in zip(options, kept, strict=True):
            option[list(chosen)] = True
    else:
        options = np.array([[False] * together, [True] * together])
    return np.array([np.concatenate(chosen) for chosen in itertools.product(options, repeat=parts)])


def proved_blocks(hessian: Array, columns: NDArray[np.int64], blocks: Array) -> Array:
    """Blocks D, slightly lowered if necessary, that are proved to be definite with H - D proved to be semidefinite.

    The rounding error of an entry of H - D is at most u times its magnitude. A matrix of such errors is bounded by the
    diagonal matrix of the sums of their magnitudes over rows.

    Raises:
        CheckError: lowering them does not make a proof possible.
    """
    scale = np.diagonal(hessian)
    places = columns[:, :, None], columns[:, None, :]
    for shrink in _SHRINKS:
        lowered: Array = blocks.copy()
        np.einsum("gii->gi", lowered)[:] -= shrink * scale[columns]
        if not all(
            is_semidefinite(block, _FLOOR**2 * scale[group]) for block, group in zip(lowered, columns, strict=True)
        ):
            break
        rest, doubt = hessian.copy(), np.zeros(len(hessian))
        rest[places] -= lowered
        doubt[columns] = 4 * _UNIT * np.abs(rest[places]).sum(axis=2)
        if is_semidefinite(rest, doubt):
            return lowered
    raise CheckError("the Hessian less the blocks of the certificate is not proved to be positive semidefinite")


def _linear_part(
    problem: Problem, columns: NDArray[np.int64], blocks: Array, shift: Array
) -> tuple[Array, Array, Array]:
    """A lower bound of -s^T q + w^T D w - 2 q^T w (rows,), y = D w - q (rows, in), and a bound on the error of y."""
    width = problem.weight.shape[1]
    whole = np.zeros((width, width))
    whole[columns[:, :, None], columns[:, None, :]] = blocks
    weight, sizes = problem.weight, np.abs(problem.weight)
    slack = 2 * gamma(2 * width + 10)
    scaled, scaled_sizes = weight @ whole, sizes @ np.abs(whole)
    pull = shift @ problem.hessian - shift @ whole
    pull_sizes = np.abs(shift) @ np.abs(problem.hessian) + np.abs(shift) @ np.abs(whole)
    tiny = np.where((pull_sizes + scaled_sizes).any(axis=1, keepdims=True), _TINY, 0.0)
    error = slack * pull_sizes + tiny
    terms = np.stack([-(shift * pull).sum(axis=1), (weight * scaled).sum(axis=1), -2 * (pull * weight).sum(axis=1)])
    reach = np.abs(pull) + error
    sums = (np.abs(shift) * reach + sizes * scaled_sizes + 2 * sizes * reach).sum(axis=1)
    doubt = (np.abs(shift) * error + 2 * sizes * error).sum(axis=1) + slack * sums
    constant = _down(terms.sum(axis=0) - _up(doubt) - 8 * _UNIT * np.abs(terms).sum(axis=0))
    return constant, scaled - pull, _up(error + slack * (scaled_sizes + np.abs(pull)))


def _gains(block: Array, supports: NDArray[np.bool_], pull: Array, error: Array, height: int) -> Array:
    """Upper bounds of y_S^T D_SS^-1 y_S summed over groups of `height` rows (groups, supports), for a definite D.

    For X close to D_SS^-1 with |I - D_SS X| <= r < 1 in the maximum norm, the eigenvalues of D^1/2 X D^1/2 are at least
    1 - r, so that X is definite and D_SS^-1 <= X / (1 - r). The square root of y^T X y is a norm, so that the error of
    y adds at most its own norm.
    """
    size = len(block)
    inside = supports[:, :, None] & supports[:, None, :]
    single = np.eye(size) * ~supports[:, None, :]
    matrices = np.where(inside, block, 0.0)
    with np.errstate(all="ignore"):
        try:
            inverse = np.linalg.inv(matrices + single)
        except np.linalg.LinAlgError:
            return np.full((len(pull) // height, len(supports)), np.inf)
        inverse = np.where(inside, (inverse + np.swapaxes(inverse, 1, 2)) / 2, 0.0)
        rest = np.abs(np.where(inside, np.eye(size), 0.0) - matrices @ inverse)
        rest += 2 * gamma(size + 4) * (np.abs(matrices) @ np.abs(inverse) + np.eye(size))
        ratio = _up(rest.sum(axis=2).max(axis=1)) * (1 + 2 * gamma(size + 4))
        norm = np.abs(inverse).sum(axis=2).max(axis=1) * (1 + 2 * gamma(size + 4))  # of X, at least
        rows = pull.reshape(-1, height, size)
        products = np.einsum("ghi,ghj->gij", rows, rows).reshape(len(rows), -1)
        squares = np.einsum("gii->g", products.reshape(-1, size, size)) * (1 + 2 * gamma(height * size + 4))
        away = error.reshape(len(rows), -1).max(axis=1) * math.sqrt(height * size) * (1 + 8 * _UNIT)
        forms = products @ inverse.reshape(len(supports), -1).T
        forms += 2 * gamma(height + size * size + 8) * squares[:, None] * norm
        forms += _TINY * (1 + norm) * (rows != 0).any(axis=(1, 2))[:, None]  # what underflows
        roots = _up(np.sqrt(np.maximum(forms, 0.0))) + _up(np.sqrt(norm) * away[:, None])
        gains = _up(_up(_up(roots) ** 2) / np.where(ratio < 0.5, _down(1 - ratio), np.nan))
    return np.where(np.isfinite(gains), gains, np.inf)


def _most_gained(gains: Array, keep: int) -> float:
    """An upper bound of the sum of one gain per row of `gains`, whose column c takes c of the `keep` choices."""
    if not np.isfinite(gains).all():
        return math.inf
    counts = np.arange(gains.shape[1])
    low, high = 0.0, float(gains.max()) + _TINY
    for _ in range(60):  # any price gives a bound: the best is where the choices fit
        middle = (low + high) / 2
        above = int((gains - middle * counts).argmax(axis=1).sum()) > keep
        low, high = (middle, high) if above else (low, middle)
    best = math.inf
    for price in (0.0, low, high):
        terms = (gains - price * counts).max(axis=1)
        total = math.fsum(terms) + price * keep
        doubt = 8 * _UNIT * (math.fsum(np.abs(terms)) + price * keep + len(gains) * price * counts[-1])
        best = min(best, float(_up(total + doubt)))
    return best


def tree_bound(problem: Problem, tensors: Mapping[str, NDArray[Any]], path: Path = Path("certificate")) -> Bound:
    """The bound proved by the leaves of a branch-and-bound tree for each row: the minimum of the bounds of its leaves.

    `leaves` (L, in), int8, is 1 for entries that a leaf keeps, -1 for those that it removes, and 0 for free entries, of
    which those with the largest gains are kept. `row_of_leaf` (L,), `shift` (L, in), `diagonal` (g, in) and
    `diagonal_of_leaf` (L,) are as for `dual_bound`, with one bound for each leaf.

    Raises:
        CheckError: as `dual_bound`; or the leaves do not cover all supports.
    """
    out, width = problem.weight.shape
    if problem.set["kind"] != "row":
        raise CheckError(f"{path}: a tree certificate is only for row-wise sets")
    leaves = _whole(path, tensors, "leaves", 2)
    diagonal, shift = _real(path, tensors, "diagonal", 2), _real(path, tensors, "shift", 2)
    row_of = _index(path, tensors, "row_of_leaf", len(leaves), out)
    index = _index(path, tensors, "diagonal_of_leaf", len(leaves), len(diagonal))
    if leaves.shape[1] != width or diagonal.shape[1] != width or shift.shape != leaves.shape:
        raise CheckError(f"{path}: leaves, diagonal or shift do not fit rows of {width}")
    if not np.isin(leaves, (-1, 0, 1)).all():
        raise CheckError(f"{path}: leaves has entries other than -1, 0 and 1")
    _check_multipliers(path, diagonal)
    keep = np.broadcast_to(np.asarray(problem.set["keep"]), (out,))
    for row in range(out):
        mine = leaves[row_of == row]
        if not len(mine) or not covers_all_supports(mine, int(keep[row])):
            raise CheckError(f"{path}: the leaves of row {row} do not cover every support")
    rows = np.full(out, np.inf)
    pairs = index * out + row_of if problem.is_stack else index
    for group in _rows_of_each(pairs, False):
        hessian = problem.hessian_of(int(row_of[group[0]]))
        multipliers = proved_diagonal(hessian, diagonal[index[group[0]]])
        fixed = leaves[group]
        constant, kept, removed = costs(hessian, multipliers, problem.weight[row_of[group]], shift[group])
        base = np.where(fixed > 0, kept, removed)
        gains = np.where(fixed == 0, _up(removed - kept), 0.0)
        left = np.maximum(keep[row_of[group]] - (fixed > 0).sum(axis=1), 0)
        ordered = -np.sort(-gains, axis=1)
        chosen = np.where(np.arange(width) < left[:, None], ordered, 0.0)
        with np.errstate(all="ignore"):
            total = base.sum(axis=1) - chosen.sum(axis=1) - constant
            sizes = np.abs(base).sum(axis=1) + chosen.sum(axis=1) + np.abs(constant)
            bound = _down(total - 2 * gamma(2 * width + 8) * sizes)
        np.minimum.at(rows, row_of[group], np.where(np.isfinite(bound), bound, -np.inf))
    return Bound(_total(rows), "tree", rows)


def covers_all_supports(leaves: NDArray[np.int64], keep: int) -> bool:
    """Whether every support of `keep` entries is in a leaf, proved by branching on entries that all leaves fix.

    Branches without a support of that size need no leaf: they keep more than `keep` or remove more than width - keep.
    """
    width = leaves.shape[1]
    open_nodes = [(np.arange(len(leaves)), np.zeros(width, dtype=np.int64))]
    while open_nodes:
        members, path = open_nodes.pop()
        if (path > 0).sum() > keep or (path < 0).sum() > width - keep:
            continue
        fixed = np.where(path == 0, leaves[members], 0) != 0
        if len(members) and not fixed.any(axis=1).all():
            continue  # a leaf that fixes nothing beside the path
        shared = fixed.all(axis=0) if len(members) else np.zeros(width, dtype=bool)
        if not shared.any():
            return False
        entry = int(shared.argmax())
        for sign in (-1, 1):
            side = path.copy()
            side[entry] = sign
            open_nodes.append((members[leaves[members, entry] == sign], side))
    return True


def _index(path: Path, tensors: Mapping[str, NDArray[Any]], name: str, count: int, below: int) -> NDArray[np.int64]:
    """A tensor (count,) of integers from 0 to below - 1; zeros if it is absent and only 0 is possible."""
    if name not in tensors and below == 1:
        return np.zeros(count, dtype=np.int64)
    index = _whole(path, tensors, name, 1)
    if len(index) != count or index.min() < 0 or index.max() >= below:
        raise CheckError(f"{path}: {name} must be {count} integers from 0 to {below - 1}")
    return index


def _check_multipliers(path: Path, diagonal: Array) -> None:
    if (diagonal < 0).any():
        raise CheckError(f"{path}: diagonal has a negative entry")


def _rows_of_each(index: NDArray[np.int64], separate: bool) -> Iterator[NDArray[np.int64]]:
    """The positions of each number in `index`; with `separate`, each position alone."""
    if separate:
        yield from np.arange(len(index))[:, None]
        return
    order = np.argsort(index, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(index[order])) + 1)


def _total(rows: Array) -> float:
    return float(_down(math.fsum(rows))) if np.isfinite(rows).all() else -math.inf


def bound(problem: Problem, path: Path) -> Bound:
    """The bound that a certificate file proves."""
    tensors, metadata = read(path, "certificate")
    _check_names(path, metadata, problem)
    return bound_of(problem, metadata.get("kind", ""), tensors, path)


def bound_of(
    problem: Problem, kind: str, tensors: Mapping[str, NDArray[Any]], path: Path = Path("certificate")
) -> Bound:
    """The bound that the tensors of a certificate prove.

    Raises:
        CheckError: they are malformed, or prove no bound.
    """
    kinds = {"dual": dual_bound, "tree": tree_bound, "block": block_bound}
    if kind not in kinds:
        raise CheckError(f"{path}: its kind is '{one_line(kind)}', not one of {', '.join(kinds)}")
    check_tensors(path, tensors, kind)
    try:
        proved = kinds[kind](problem, tensors, path)
    except OverflowError as error:
        raise CheckError(f"{path} proves no bound: its numbers overflow") from error
    if not math.isfinite(proved.value):
        raise CheckError(f"{path} proves no bound: a multiplier of an entry that can be kept is 0")
    return proved


# The command


def safe_claim(number: float, kind: str) -> str:
    """A value rounded up, or a bound rounded down, by 1e-9 relative, so that other machines confirm it."""
    return repr(float(number + (_CLAIM if kind == "value" else -_CLAIM) * abs(number)))


def decimal_text(number: float, kind: str, digits: int = 10) -> str:
    """A value rounded up, or a bound rounded down, to a number of significant decimal digits."""
    rounding = decimal.ROUND_CEILING if kind == "value" else decimal.ROUND_FLOOR
    rounded = decimal.Context(prec=digits, rounding=rounding).create_decimal_from_float(float(number))
    return format(rounded.normalize(), f".{digits}g")


def check(
    problem_file: Path, solution: Path | None, certificate: Path | None, problem_id: str | None = None
) -> tuple[Problem, Value | None, Bound | None]:
    """The problem, the interval of the solution's value, and the bound that the certificate proves.

    Args:
        problem_id: by default that of the solution or the certificate.

    Raises:
        CheckError: a file is malformed or for another problem, the solution is not in the set, or a stated figure does
            not hold.
    """
    problems = load_problems(problem_file)
    if problem_id is None:
        first, kind = (solution, "solution") if solution is not None else (certificate, "certificate")
        problem_id = "" if first is None else read(first, kind)[1].get("id", "")
    if problem_id not in problems:
        raise CheckError(f"{problem_file} has no problem '{one_line(problem_id)}': it has {', '.join(problems)}")
    problem = problems[problem_id]
    reached = proved = None
    if solution is not None:
        weight = load_weight(solution, problem)
        if not is_member(weight, problem.set):
            raise CheckError(f"{solution}: more weights are kept than the set {json.dumps(problem.set)} allows")
        reached = value(problem, weight)
        stated = claim(solution, "solution", "value")
        if stated is not None and stated < reached.lower:
            raise CheckError(f"{solution} states the value {stated:.9g}, which is below its value {reached.lower:.9g}")
    if certificate is not None:
        proved = bound(problem, certificate)
        stated = claim(certificate, "certificate", "bound")
        if stated is not None and stated > proved.value:
            raise CheckError(f"{certificate} states the bound {stated:.9g}, but only proves {proved.value:.9g}")
    if reached is not None and proved is not None and proved.value > reached.upper:
        raise CheckError(f"{certificate} proves a bound above the value of {solution}: an error of this checker")
    return problem, reached, proved


def report(problem: Problem, reached: Value | None, proved: Bound | None) -> Iterator[str]:
    """The lines that the command prints, from the results of `check`."""
    out, width = problem.weight.shape
    unit = energy(problem) or 1.0
    each = " independent rows" if problem.is_stack else ""
    yield f"problem  {problem.id}: {out} x {width}{each}, {json.dumps(problem.set)}"
    yield f"SHA-256  {problem.fingerprint} of id, set and data: compare it with the fingerprint in problems.json"
    if reached is not None:
        lower, upper = decimal_text(reached.lower, "bound", 15), decimal_text(reached.upper, "value", 15)
        yield f"value    in [{lower}, {upper}], proved; relative {reached.upper / unit:.6g}"
    if proved is not None:
        lower = decimal_text(proved.value, "bound", 15)
        yield f"bound    {lower}, proved ({proved.kind}); relative {proved.value / unit:.6g}"
    if reached is not None and proved is not None:
        yield f"gap      {gap(reached.upper, proved.value):.6g}"


def gap(upper: float, lower: float) -> float:
    """1 - lower / upper, between 0 and 1. If the value is not positive: 0 if the bound reaches it, otherwise 1."""
    if upper <= 0:
        return 0.0 if lower >= upper else 1.0
    return min(1.0, max(0.0, 1 - lower / upper))


def main(arguments: Sequence[str]) -> int:
    if len(arguments) not in (2, 3):
        print("usage: python checker.py PROBLEM SOLUTION [CERTIFICATE]", file=sys.stderr)
        return 2
    solution = None if arguments[1] == "-" else Path(arguments[1])
    certificate = Path(arguments[2]) if len(arguments) == 3 else None
    try:
        lines = list(report(*check(Path(arguments[0]), solution, certificate)))
    except CheckError as refused:
        print(f"refused: {refused}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
