"""Re-checks a solved layer from its files alone: every claim recomputed in float64, and certificates beside it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from admm_prune.data.layer_file import LayerFile, load_layer_file
from admm_prune.errors import UserError
from admm_prune.recipes.parts import LAYER
from admm_prune.runs.certificates import certify
from admm_prune.runs.claims import Claims, layer_sha256, tensor_sha256
from admm_prune.runs.recomputation import Array, Budget, Definition, cheap_bounds, define, relative_error

TOLERANCE = 1e-6  # relative, between a claimed number and the recomputed one


@dataclass(kw_only=True)
class Verification:
    """What came out of a re-check.

    Attributes:
        kind: "layer", "run" or "comparison".
        checked: what was compared with its claim.
        failures: a sentence for every claim that does not hold.
        unchecked: what could not be compared, and why.
        certificates: what is known of the weight beyond its claims, in words.
        numbers: recomputed, by name.
    """

    path: Path
    kind: str
    checked: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    certificates: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def verified(self) -> bool:
        return not self.failures

    def expect(self, what: str, holds: bool, otherwise: str) -> bool:
        """Notes a check, and the failure where it does not hold."""
        if what not in self.checked:
            self.checked.append(what)
        if not holds:
            self.failures.append(otherwise)
        return holds

    def compare(self, what: str, claimed: Any, found: Any, slack: float = 0.0, where: str = "") -> bool:
        """Notes that a claim was compared: numbers to 1e-6 relative, and `slack` absolute, all else as it is."""
        same = claimed == found
        if isinstance(claimed, float | int) and isinstance(found, float | int):
            same = same or abs(claimed - found) <= TOLERANCE * abs(found) + slack
        return self.expect(what, bool(same), f"{where}claimed {what} {_said(claimed)}, recomputed {_said(found)}")

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "kind": self.kind,
            "verified": self.verified,
            "failures": self.failures,
            "checked": self.checked,
            "unchecked": self.unchecked,
            "certificates": self.certificates,
            **self.numbers,
        }


def verify_layer(path: Path, layer_path: Path | None = None, *, seed: int = 0) -> Verification:
    """Re-checks what 'admm-prune solve --out' wrote against the layer problem.

    Args:
        path: the solved layer.
        layer_path: the layer problem; by default where it lay when it was solved, or beside `path`.
        seed: draws the rows that are examined for swaps.

    Raises:
        UserError: a file is missing, cannot be read, or is of another kind.
    """
    weight, metadata = _read_solved(path)
    claims = Claims.read(metadata, path)
    aim = claims.aim
    layer = load_layer_file(layer_path or _recorded_layer(path, claims))
    report = Verification(path=path, kind="layer")
    ours, theirs = layer_sha256(layer), claims.layer_sha256
    if not report.expect(
        "layer fingerprint",
        ours == theirs,
        f"the layer file is not the one that was solved: claimed fingerprint {theirs[:12]}, found {ours[:12]}",
    ):
        return report
    shape, whole = tuple(weight.shape), tuple(layer.weight.shape)
    if not report.expect("shape", shape == whole, f"the weight is of shape {shape}, its layer of shape {whole}"):
        return report
    ours, theirs = tensor_sha256(weight), claims.weight_sha256
    report.expect(
        "weight fingerprint",
        ours == theirs,
        f"the weight was altered after it was solved: claimed fingerprint {theirs[:12]}, found {ours[:12]}",
    )
    v: Array = weight.double().numpy()
    bad = int((~np.isfinite(v)).sum())
    if not report.expect("finite values", bad == 0, f"the weight holds NaN or Inf: {bad} of {v.size} entries"):
        return report
    if claims.budget == "set":
        return _verify_named_set(report, claims, layer, v)
    if claims.budget not in ("matrix", "row", "group") or (aim.pattern is not None and v.shape[1] % aim.pattern[1]):
        raise UserError(f"{path}: no budget '{claims.budget}' of {claims.target} fits a weight of shape {shape}")
    budget = Budget(aim, claims.budget)
    excess = budget.describe_excess(v)
    report.expect("sparse set", excess is None, f"the weight is not in the sparse set: {excess}")
    _check_sparsity(report, claims, v)
    _recompute(report, claims, layer, v, budget, excess is None, seed)
    return report


def _check_sparsity(report: Verification, claims: Claims, v: Array) -> None:
    sparsity = float((v == 0).sum() / v.size)
    report.numbers["sparsity"] = sparsity
    report.expect(
        "sparsity",
        abs(claims.sparsity - sparsity) * v.size < 0.5,
        f"claimed sparsity {_said(claims.sparsity)}, recomputed {_said(sparsity)}",
    )
    if not all(math.isfinite(x) and x >= 0 for x in (claims.ridge, claims.damping)):
        raise UserError(f"{report.path}: ridge and damping must be finite and not negative")


def _verify_named_set(report: Verification, claims: Claims, layer: LayerFile, v: Array) -> Verification:
    """What can be said of a weight whose sparse set only its own code knows: everything but what needs the set."""
    _check_sparsity(report, claims, v)
    _compare_losses(report, claims, define(layer, claims.ridge, claims.damping), layer, v)
    report.unchecked.append("the sparse set, the bound and the certificates: they need the code of the named set")
    return report


def _recompute(
    report: Verification, claims: Claims, layer: LayerFile, v: Array, budget: Budget, feasible: bool, seed: int
) -> None:
    """Errors, objective, bound and certificates."""
    problem = define(layer, claims.ridge, claims.damping)
    value, slack = _compare_losses(report, claims, problem, layer, v)
    if claims.problem not in (None, LAYER):
        report.unchecked.append(f"the bound and the certificates: they are those of the problem '{LAYER}'")
        return
    try:
        certificates = certify(problem, budget, v, value, seed)
    except np.linalg.LinAlgError as failed:
        report.unchecked.append(f"certificates: the damped Gram is singular ({failed})")
        reachable = value
    else:
        report.numbers |= asdict(certificates)
        report.certificates += certificates.in_words()
        reachable = certificates.reachable if feasible else value
    _check_bound(report, claims, problem, budget, value, reachable, slack)


def _compare_losses(
    report: Verification, claims: Claims, problem: Definition, layer: LayerFile, v: Array
) -> tuple[float, float]:
    """Errors and objective against their claims; returns the objective and its rounding."""
    error, slack = problem.relative_error(v)
    report.compare("relative_error", claims.relative_error, error, slack)
    report.numbers["relative_error"] = error
    holdout, slack = None, 0.0
    if layer.gram_holdout is not None and problem.cross is None:
        holdout, slack = relative_error(v, problem.weight, layer.gram_holdout.double().numpy(), problem.rounding)
    report.compare("relative_error_holdout", claims.relative_error_holdout, holdout, slack)
    report.numbers["relative_error_holdout"] = holdout
    value, slack = problem.objective(v)
    if claims.problem in (None, LAYER):
        report.compare("objective", claims.objective, value, slack)
    else:
        report.unchecked.append(f"the objective: it is that of the problem '{claims.problem}'")
    report.numbers["objective"] = value
    return value, slack


def _check_bound(
    report: Verification,
    claims: Claims,
    problem: Definition,
    budget: Budget,
    value: float,
    reachable: float,
    slack: float,
) -> None:
    """A claimed bound lies below what is known to be reached, and is reproduced where its argument is a cheap one."""
    claimed, kind = claims.bound, claims.bound_kind
    report.numbers |= {"bound": claimed, "bound_kind": kind}
    try:
        bounds, doubt = cheap_bounds(problem, budget)
    except np.linalg.LinAlgError as failed:
        report.unchecked.append(f"the bound was not recomputed: {failed}")
        bounds, doubt = {}, 0.0
    best = max(bounds, key=lambda name: bounds[name], default=None)
    report.numbers |= {"bound_recomputed": bounds.get(best or ""), "bound_recomputed_kind": best}
    if claimed is None:
        return
    margin = TOLERANCE * abs(value) + slack
    if not report.expect(
        "bound below the objective",
        claimed <= value + margin,
        f"claimed bound {_said(claimed)} lies above the value {_said(value)} of the weight itself: it is no bound",
    ):
        return
    if not report.expect(
        "bound below a better point",
        claimed <= reachable + margin,
        f"claimed bound {_said(claimed)} lies above {_said(reachable)}, which a refit and single swaps reach",
    ):
        return
    if kind not in bounds:
        report.unchecked.append(f"the argument of the bound, {kind}: only that no point found lies below it")
        return
    least = problem.least
    report.expect(
        "bound reproduced",
        claimed - least <= (bounds[kind] - least) * (1 + TOLERANCE + doubt) + margin,
        f"claimed bound {_said(claimed)} by '{kind}', recomputed {_said(bounds[kind])}",
    )


def _read_solved(path: Path) -> tuple[Tensor, dict[str, str]]:
    if not path.is_file():
        raise UserError(f"no such file or folder: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            if "weight" not in set(file.keys()):
                raise UserError(f"{path} holds no 'weight': it is no solved layer")
            weight: Tensor = file.get_tensor("weight")
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return weight, metadata


def _recorded_layer(path: Path, claims: Claims) -> Path:
    recorded = Path(claims.layer)
    for place in (recorded, path.parent / recorded.name):
        if place.is_file():
            return place
    raise UserError(f"the layer problem {recorded} is not there: name it with --layer")


def _said(value: Any) -> str:
    """A number with as many digits as comparing it takes."""
    return f"{value:.9g}" if isinstance(value, float) else "none" if value is None else str(value)
