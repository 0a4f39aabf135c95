"""Random corruptions of problems, solutions and certificates: each makes a claim of the files false, and is refused.

A corruption whose effect depends on numbers, such as a flipped bit, counts only where rational arithmetic confirms that
the claim is false: the value is above the one stated, or the data prove less than the bound stated.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from collection import checker
from collection.checker import CheckError, Problem
from collection.files import write_certificate, write_solution
from tests.collection import exact, producers
from tests.collection.test_checker import exact_bound

KINDS = ("problem", "solution", "certificate")
Tensors = dict[str, NDArray[Any]]


@dataclass
class Case:
    """Three files that are accepted, in memory, and changes made to them."""

    problem: Problem
    draw: np.random.Generator
    tensors: dict[str, Tensors]
    metadata: dict[str, dict[str, str]]
    cut: dict[str, int] = field(default_factory=dict)  # bytes dropped from the end of a file

    @classmethod
    def make(cls, folder: Path, seed: int, kind: str) -> Case | None:
        """None where the certificate proves little, or what rational arithmetic does not confirm to the last digit."""
        draw = np.random.default_rng(seed)
        name = "row" if kind != "block" else sorted(producers.SETS)[seed % len(producers.SETS)]
        problem = producers.problem(folder, seed, name, stack=seed % 2 == 0 and kind != "block")
        try:
            write_solution(folder / "solution.safetensors", problem, producers.solution(problem), {"solver": "test"})
            data = getattr(producers, kind)(problem, draw)
            proved = write_certificate(folder / "certificate.safetensors", problem, kind, data, {})
        except CheckError:
            return None
        files = {name: checker.read(folder / f"{name}.safetensors", name) for name in KINDS}
        case = cls(problem, draw, {k: dict(t) for k, (t, _) in files.items()}, {k: m for k, (_, m) in files.items()})
        assert case.value_is_as_stated()
        return case if proved.value > 1e-3 * checker.energy(problem) and case.bound_is_as_stated() else None

    @property
    def splitting(self) -> str:
        """The tensor that is taken off H."""
        return "blocks" if "blocks" in self.tensors["certificate"] else "diagonal"

    def refused(self, folder: Path) -> bool:
        for kind in KINDS:
            path = folder / f"{kind}.safetensors"
            save_file(self.tensors[kind], path, self.metadata[kind])
            if kind in self.cut:
                path.write_bytes(path.read_bytes()[: -self.cut[kind]])
        paths = [folder / f"{kind}.safetensors" for kind in KINDS]
        try:
            checker.check(*paths, self.problem.id)
        except CheckError as error:
            message = str(error)
        else:
            return False
        assert len(message.splitlines()) == 1
        return True

    # What the files claim, decided in rational arithmetic.

    def value_is_as_stated(self) -> bool:
        weight = np.zeros(self.problem.weight.size)
        bits = np.unpackbits(self.tensors["solution"]["mask"])[: weight.size].astype(bool)
        weight[bits] = self.tensors["solution"]["values"]
        if not np.isfinite(weight).all():
            return False
        truth = exact.value(self.problem.weight, self.problem.hessian, weight.reshape(self.problem.weight.shape))
        return truth <= Fraction(float(self.metadata["solution"]["value"]))

    def bound_is_as_stated(self) -> bool:
        data = self.tensors["certificate"]
        if not all(np.isfinite(x).all() for x in data.values()):
            return False
        if "blocks" in data:
            return self.blocks_prove_what_is_stated()
        if (data["diagonal"] < 0).any():
            return False
        # The checker may lower the multipliers of each row by another step: what is within 1e-5 counts as stated.
        stated = Fraction(float(self.metadata["certificate"]["bound"])) - Fraction(1e-5 * checker.energy(self.problem))
        scale = np.stack([np.diagonal(self.problem.hessian_of(i)) for i in range(len(data["diagonal"]))])
        for shrink in (
            0.0,
            1e-12,
            1e-10,
            1e-8,
            1e-6,
        ):  # multipliers may be lowered by so much of the Hessian's diagonal
            for floor in (0.0, 1e-8):  # and raised to so much of it where they are 0
                lower = {**data, "diagonal": np.maximum(data["diagonal"], floor * scale) - shrink * scale}
                lower["diagonal"] = np.maximum(lower["diagonal"], 0)
                proved = exact_bound(self.problem, self.metadata["certificate"]["kind"], lower)
                if proved is not None and proved >= stated:
                    return True
        return False

    def blocks_prove_what_is_stated(self) -> bool:
        """Without the price of a budget, at which the checker may prove less; see above for the rest."""
        data = self.tensors["certificate"]
        if not np.array_equal(data["blocks"], np.swapaxes(data["blocks"], 1, 2)):
            return False
        size = checker.energy(self.problem)
        stated = Fraction(float(self.metadata["certificate"]["bound"])) - Fraction(1e-5 * size)
        arguments = self.problem.weight, self.problem.hessian, self.problem.set
        scale = np.diagonal(self.problem.hessian)[data["columns"]]
        for shrink in (0.0, 1e-12, 1e-10, 1e-8, 1e-6):
            lowered = data["blocks"].astype(np.float64)
            np.einsum("gii->gi", lowered)[:] -= shrink * scale
            proved = exact.block_bound(*arguments, data["columns"], lowered, data["shift"])
            if proved is not None and proved >= stated:
                return True
        return False


def flip(x: NDArray[Any], draw: np.random.Generator) -> NDArray[Any]:
    """One bit of one entry."""
    flipped = np.ascontiguousarray(x).copy()
    raw = flipped.view(np.uint8).reshape(-1)
    raw[draw.integers(raw.size)] ^= np.uint8(1 << draw.integers(8))
    return flipped


def set_entry(x: NDArray[Any], draw: np.random.Generator, number: float) -> NDArray[Any]:
    changed = x.copy()
    changed.reshape(-1)[draw.integers(changed.size)] = number
    return changed


def flip_until_false(case: Case, kind: str, name: str, holds: Callable[[], bool]) -> bool:
    """Flips one bit, by several draws: most bits of a number are too small to matter."""
    original = case.tensors[kind][name]
    for _ in range(8):
        case.tensors[kind][name] = flip(original, case.draw)
        if not holds():
            return True
    return False


def bit_of_solution(case: Case) -> bool:
    return flip_until_false(case, "solution", "values", case.value_is_as_stated)


def bit_of_certificate(case: Case) -> bool:
    name = str(case.draw.choice((case.splitting, "shift")))
    return flip_until_false(case, "certificate", name, case.bound_is_as_stated)


def bit_of_problem(case: Case) -> bool:
    """Any bit: the other files are for other numbers then."""
    data = case.tensors["problem"]
    name = str(case.draw.choice(sorted(data)))
    data[name] = flip(data[name], case.draw)
    return True


def swapped_rows(case: Case) -> bool:
    data = case.tensors["certificate"]
    data["shift"] = data["shift"][::-1].copy()
    return not case.bound_is_as_stated()


def larger_diagonal(case: Case) -> bool:
    data = case.tensors["certificate"]
    data[case.splitting] = data[case.splitting] * case.draw.choice((1.5, 2, 10))
    return not case.bound_is_as_stated()


def negative_diagonal(case: Case) -> bool:
    data = case.tensors["certificate"]
    if "diagonal" not in data:
        return False
    data["diagonal"] = set_entry(data["diagonal"], case.draw, -case.draw.random() * data["diagonal"].max() - 1e-30)
    return True


def one_kept_too_many(case: Case) -> bool:
    weight = checker.weight_of(case.tensors["solution"], case.problem) + 0.0
    places = np.argwhere(weight == 0)
    weight[tuple(places[case.draw.integers(len(places))])] = case.draw.choice((1.0, 1e-30))
    case.tensors["solution"] = {"weight": weight}
    return not exact.admissible(weight != 0, case.problem.set)


def not_finite(case: Case) -> bool:
    kind, name = (("solution", "values"), ("certificate", "shift"), ("certificate", case.splitting))[
        case.draw.integers(3)
    ]
    number = case.draw.choice((np.nan, np.inf, -np.inf))
    case.tensors[kind][name] = set_entry(case.tensors[kind][name], case.draw, number)
    return True


def smaller_value(case: Case) -> bool:
    stated = float(case.metadata["solution"]["value"])
    case.metadata["solution"]["value"] = repr(float(stated * (1 - 10.0 ** -case.draw.integers(1, 7))))
    return not case.value_is_as_stated()


def larger_bound(case: Case) -> bool:
    stated = float(case.metadata["certificate"]["bound"])
    case.metadata["certificate"]["bound"] = repr(float(stated * (1 + 10.0 ** -case.draw.integers(0, 7))))
    return not case.bound_is_as_stated()


def claim_that_is_no_number(case: Case) -> bool:
    kind, name = (("solution", "value"), ("certificate", "bound"))[case.draw.integers(2)]
    case.metadata[kind][name] = str(case.draw.choice(("nan", "inf", "-inf", "", "much")))
    return True


def other_problem(case: Case) -> bool:
    kind = str(case.draw.choice(("solution", "certificate")))
    name = str(case.draw.choice(("id", "problem", "format")))
    case.metadata[kind][name] = case.metadata[kind][name][:-1] + "x"
    return True


def other_set(case: Case) -> bool:
    """The problem with another count: the files were made for the first."""
    given = case.problem.set
    fewer = [k - 1 for k in given["keep"]] if isinstance(given["keep"], list) else given["keep"] - 1
    case.metadata["problem"]["sets"] = json.dumps({case.problem.id.partition("/")[2]: {**given, "keep": fewer}})
    return True


def wrong_shape(case: Case) -> bool:
    kind = str(case.draw.choice(("solution", "certificate")))
    data = case.tensors[kind]
    name = str(case.draw.choice(sorted(data)))
    data[name] = data[name][..., :-1].copy() if case.draw.random() < 0.5 else data[name][None].copy()
    return True


def wrong_dtype(case: Case) -> bool:
    kind, name, dtype = (
        ("solution", "values", np.int32),
        ("solution", "mask", np.int16),
        ("certificate", "shift", np.int64),
        ("certificate", case.splitting, np.bool_),
    )[case.draw.integers(4)]
    case.tensors[kind][name] = case.tensors[kind][name].astype(dtype)
    return True


def missing_tensor(case: Case) -> bool:
    kind = str(case.draw.choice(KINDS))
    needed = {"problem": ("weight",), "solution": ("values", "mask"), "certificate": (case.splitting, "shift")}[kind]
    del case.tensors[kind][str(case.draw.choice(needed))]
    return True


def truncated(case: Case) -> bool:
    case.cut[str(case.draw.choice(KINDS))] = int(case.draw.integers(1, 40))
    return True


def missing_leaf(case: Case) -> bool:
    data = case.tensors["certificate"]
    if "leaves" not in data:
        return False
    left = np.delete(np.arange(len(data["leaves"])), case.draw.integers(len(data["leaves"])))
    case.tensors["certificate"] = {name: x if name == "diagonal" else x[left] for name, x in data.items()}
    return not case.bound_is_as_stated()


def other_sign(case: Case) -> bool:
    data = case.tensors["certificate"]
    if "leaves" not in data:
        return False
    data["leaves"] = set_entry(data["leaves"], case.draw, case.draw.choice((-1, 0, 1)))
    return not case.bound_is_as_stated()


def leaf_that_is_no_sign(case: Case) -> bool:
    data = case.tensors["certificate"]
    if "leaves" not in data:
        return False
    data["leaves"] = set_entry(data["leaves"], case.draw, case.draw.choice((-2, 2, 127)))
    return True


def index_out_of_range(case: Case) -> bool:
    data = case.tensors["certificate"]
    name = str(case.draw.choice([name for name in data if name.endswith(("_of_leaf", "_of_row", "columns"))]))
    data[name] = set_entry(data[name], case.draw, case.draw.choice((-1, 99)))
    return True


def unknown_tensor(case: Case) -> bool:
    case.tensors[str(case.draw.choice(KINDS))]["note"] = np.zeros(1)
    return True


def asymmetric_block(case: Case) -> bool:
    data = case.tensors["certificate"]
    if "blocks" not in data or data["blocks"].shape[1] == 1:
        return False
    blocks = data["blocks"].copy()
    blocks[0, 0, -1] += (np.abs(blocks).max() or 1) * 1e-3
    data["blocks"] = blocks
    return True


CORRUPTIONS: tuple[Callable[[Case], bool], ...] = (
    *(bit_of_solution, bit_of_certificate, bit_of_problem, swapped_rows, larger_diagonal, negative_diagonal),
    *(one_kept_too_many, not_finite, smaller_value, larger_bound, claim_that_is_no_number, other_problem, other_set),
    *(wrong_shape, wrong_dtype, missing_tensor, truncated, missing_leaf, other_sign, leaf_that_is_no_sign),
    *(index_out_of_range, unknown_tensor, asymmetric_block),
)


def corrupt(folder: Path, count: int, first: int) -> dict[str, int]:
    """How many corruptions of each kind were refused, of `count`; raises where one is accepted."""
    refused: dict[str, int] = {}
    seed = first
    while sum(refused.values()) < count:
        seed += 1
        kind = ("dual", "tree", "block")[seed % 3]
        case = Case.make(folder, seed, kind)
        if case is None:
            continue
        assert not case.refused(folder), "the files are accepted before they are corrupted"
        corruption = CORRUPTIONS[sum(refused.values()) % len(CORRUPTIONS)]  # the next files, where it does not apply
        if corruption(case):
            assert case.refused(folder), (corruption.__name__, seed)
            refused[corruption.__name__] = refused.get(corruption.__name__, 0) + 1
    return refused


def test_100_corruptions_are_refused(tmp_path: Path) -> None:
    assert min(corrupt(tmp_path, 100, 0).values()) >= 100 // len(CORRUPTIONS)


@pytest.mark.slow
def test_1000_corruptions_are_refused(tmp_path: Path) -> None:
    assert min(corrupt(tmp_path, 1000, 10_000).values()) >= 1000 // len(CORRUPTIONS)
