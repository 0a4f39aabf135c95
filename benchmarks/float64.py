"""What products and factors in fewer bits than float64 would do to a solve, measured on the CPU.

    python -m benchmarks.float64 OUT

Layers are synthetic (`admm_prune.testing.instances`), twice as many tokens as inputs, in float32. For each width and
ridge:

- the condition of A at unit diagonal; the residual |U A U^T v - v| / |v| of SparseGPT's factor computed in float32,
  and of the one computed in float64 and rounded to float32 (`quadratic.factor_residual`);
- the relative error of the objective at ADMM's solution, whose product is formed in float32, in three products of
  bfloat16, and in products of 8-bit integers (`ops.integer_energy`), in place of float64.

The results are OUT.txt and OUT.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from admm_prune import ADMM, LayerReconstruction, Unstructured
from admm_prune.ops import integer_energy, precision, quadratic
from admm_prune.testing.instances import correlated_inputs, random_weight
from benchmarks.machine import headline, machine, write_results

WIDTHS = (128, 256, 576)
RIDGES = (0.03, 1e-3, 1e-6)
ROWS = 64
Row = dict[str, float]


def measured(width: int, ridge: float, *, rows: int = ROWS) -> Row:
    x = correlated_inputs(2 * width, width, 0).double()
    gram, weight = (x.T @ x).float(), random_weight(rows, width, 0).float()
    problem = LayerReconstruction(weight, gram, Unstructured(0.7), ridge=ridge)
    scaled = quadratic.unit_diagonal(problem.hessian)[0]
    exact = quadratic.inverse_factor(scaled.double())
    solution = ADMM().solve(problem).solution
    error = solution["weight"] - problem.minimizer
    value = quadratic.energy(error, problem.hessian)
    return {
        "width": width,
        "ridge": ridge,
        "condition": float(torch.linalg.cond(scaled.double())),
        "factor float32": quadratic.factor_residual(quadratic.inverse_factor(scaled), scaled),
        "factor float64": quadratic.factor_residual(exact.float(), scaled),
        "objective float32": abs(_energy(error, problem.hessian, "exact") / value - 1),
        "objective bfloat16x3": abs(_energy(error, problem.hessian, "bfloat16x3") / value - 1),
        "objective integers": abs(float(integer_energy.energy(error, problem.hessian)) / value - 1),
    }


def _energy(error: Tensor, hessian: Tensor, form: precision.Precision) -> float:
    """tr(E A E^T) with one product E A in this form, the rest in float64."""
    product = precision.multiply(error, precision.prepared(hessian, form), out=torch.empty_like(error))
    return float((product.double() * error.double()).sum())


def table(rows: Sequence[Row]) -> str:
    lines = ["".join(f"{name:>22}" for name in rows[0])]
    lines += ["".join(f"{value:>22.3g}" for value in row.values()) for row in rows]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args(words).out
    rows = [measured(width, ridge) for width in WIDTHS for ridge in RIDGES]
    about = machine()
    text = f"{headline(about)}\npython -m benchmarks.float64\n\n{table(rows)}"
    write_results(out, {"machine": about, "rows": rows}, text)
    print(text)


if __name__ == "__main__":
    main()
