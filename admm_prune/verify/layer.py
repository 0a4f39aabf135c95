"""Verifies a solved layer from its files alone: recomputes every claim in float64, and adds certificates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # public, but not declared so

from admm_prune.data.layer_file import LayerFile, load_layer_file, opened
from admm_prune.errors import UserError
from admm_prune.methods.local import GIVEN, LOCAL_METHODS, REFERENCES, given, method_named, with_parts
from admm_prune.methods.parts import LAYER, SETS, LayerProblem, declared
from admm_prune.point import Point
from admm_prune.problems.constraints import SparseSet
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.result import Status
from admm_prune.runs.claims import CLAIMS_DIGEST, Claims, claims_sha256, layer_sha256, tensor_sha256
from admm_prune.runs.layer import proved_gap
from admm_prune.solvers.reference import (
    BlockCertificate,
    Bound,
    DualCertificate,
    block_bound,
    block_dual,
    dual,
    dual_bound,
    lower_bound,
)
from admm_prune.verify.certificates import certify
from admm_prune.verify.recomputation import Array, Budget, Definition, cheap_bounds, define, least_loss, relative_error
from admm_prune.verify.report import TOLERANCE, Verification, same_fraction, shown

_DOUBTFUL = 1e-3  # relative: a recomputed bound with a larger rounding error is inconclusive
_DUALS: dict[str, Callable[[object], DualCertificate | BlockCertificate | None]] = {
    dual.KIND: dual_bound,
    block_dual.KIND: block_bound,
}  # bounds by iterations, by their kind
_KIND_OF = {"dual": dual.KIND, "block": block_dual.KIND}  # by the option
_ITERATED = 1e-4  # relative: what the iterations of these may end in elsewhere
_DIRECT = ("magnitude", "wanda", "sparsegpt", "brute-force", GIVEN)  # nothing is iterated: always CLOSED_FORM


def verify_layer(
    path: Path, layer_path: Path | None = None, *, seed: int = 0, bound: Literal["quick", "dual", "block"] = "quick"
) -> Verification:
    """Verifies the output of 'admm-prune solve --out' against the layer problem.

    Args:
        path: the solved layer.
        layer_path: the layer problem; by default its recorded path, or beside `path`.
        seed: draws the rows that are examined for swaps.
        bound: "dual" computes `dual_bound` too, "block" `block_bound`, as is always done for a claimed bound of theirs.

    Raises:
        UserError: a file is missing, cannot be read, or is of another kind.
    """
    weight, metadata, names = _read_solved(path)
    claims = Claims.read(metadata, path)
    layer = load_layer_file(layer_path or _recorded_layer(path, claims))
    report = Verification(path=path, kind="layer")
    report.expect("tensors", names == ["weight"], f"tensors beside the weight: {', '.join(names)}")
    for name in Claims.unknown(metadata):
        report.expect("claims", False, f"'{shown(name)}' is no claim that this release writes, or not as it writes it")
    # The weight is checked to lie in the set of its target, and so it does in that of a target that prunes as many
    # weights, or fewer.
    report.by_fingerprint("method", "status", "target", "layer", "bound", "bound_kind", "ridge", "damping")
    repeated = {kind for kind in _DUALS if kind in (_KIND_OF.get(bound), claims.bound_kind)}
    _verify_claims(report, claims, layer, weight, seed, repeated)
    whole = metadata.get(CLAIMS_DIGEST) == claims_sha256(metadata)
    report.expect(
        "claims fingerprint",
        whole or bool(report.failures),  # an altered claim is reported individually where possible
        "the claims were altered after they were written: their fingerprint does not match",
    )
    return report


def _verify_claims(
    report: Verification, claims: Claims, layer: LayerFile, weight: Tensor, seed: int, repeated: Set[str]
) -> None:
    """Everything but the claims' own fingerprint."""
    aim = claims.aim
    ours, theirs = layer_sha256(layer), claims.layer_sha256
    if not report.expect(
        "layer fingerprint",
        ours == theirs,
        f"the layer file is not the one that was solved: claimed fingerprint {theirs[:12]}, found {ours[:12]}",
    ):
        return
    shape, whole = tuple(weight.shape), tuple(layer.weight.shape)
    if not report.expect("shape", shape == whole, f"the weight has shape {shape}, its layer {whole}"):
        return
    ours, theirs = tensor_sha256(weight), claims.weight_sha256
    report.expect(
        "weight fingerprint",
        ours == theirs,
        f"the weight was altered after it was solved: claimed fingerprint {theirs[:12]}, found {ours[:12]}",
    )
    v: Array = weight.double().numpy()
    bad = int((~np.isfinite(v)).sum())
    if not report.expect("finite values", bad == 0, f"the weight contains NaN or Inf: {bad} of {v.size} entries"):
        return
    _check_sparsity(report, claims, v)
    constraint = _check_method(report, claims)
    if claims.budget == "set":
        feasible, budget = _in_named_set(report, constraint, weight), None
    else:
        if claims.budget not in ("matrix", "row", "group") or (aim.pattern is not None and v.shape[1] % aim.pattern[1]):
            raise UserError(
                f"{report.path}: no budget '{claims.budget}' of {claims.target} fits a weight of shape {shape}"
            )
        budget = Budget(aim, claims.budget)
        excess = budget.describe_excess(v)
        feasible = report.expect("sparse set", excess is None, f"the weight is not in the sparse set: {excess}")
    if claims.problem == LAYER:
        proved = _dual_bounds(report, claims, layer, constraint, repeated)
        _recompute(report, claims, layer, v, budget, feasible, seed, proved)
    else:
        _recompute_named(report, claims, layer, weight, constraint, repeated)


def _check_sparsity(report: Verification, claims: Claims, v: Array) -> None:
    sparsity = float((v == 0).sum() / v.size)
    report.numbers["sparsity"] = sparsity
    report.expect(
        "sparsity",
        same_fraction(claims.sparsity, sparsity),
        f"claimed sparsity {shown(claims.sparsity)}, recomputed {shown(sparsity)}",
    )
    if not all(math.isfinite(x) and x >= 0 for x in (claims.ridge, claims.damping)):
        raise UserError(f"{report.path}: ridge and damping must be finite and not negative")


def _check_method(report: Verification, claims: Claims) -> SparseSet | None:
    """Checks method, budget, set and status against each other; returns the claimed set, None if unavailable."""
    statuses = set(Status.__members__)
    if claims.method in {*LOCAL_METHODS, *REFERENCES, GIVEN}:
        direct = claims.method in _DIRECT
        statuses = {name for name in statuses if (name == Status.CLOSED_FORM.name) == direct}
    elif claims.method not in declared("solvers"):
        report.open(f"method: '{shown(claims.method)}' is not among the methods installed here")
    report.expect(
        "status", claims.status in statuses, f"claimed status {claims.status}, which {claims.method} never ends with"
    )
    try:
        made_by = given(torch.empty(0, 0)) if claims.method == GIVEN else method_named(claims.method)
        method = with_parts(made_by, None, claims.constraint)
        made, cell = method.constraint(claims.aim), method.cell(claims.aim)
    except UserError as error:
        if claims.budget != "set" and (claims.constraint is None or claims.constraint in SETS):
            return None  # the budget defines the set; the method was reported already
        report.open(f"sparse set: it is not available ({error})")
        return None
    report.expect(
        "budget",
        cell == claims.budget,
        f"claimed budget '{claims.budget}', where {claims.method} with the set {claims.constraint or 'of its own'} "
        f"has '{cell}'",
    )
    return made


def _in_named_set(report: Verification, constraint: SparseSet | None, weight: Tensor) -> bool:
    """Checks membership in a set by its own code; if that is not installed, the claim is reported as unchecked."""
    if constraint is None:
        report.open("sparse set: only its own code can tell what lies in it")
        return False
    try:
        holds = constraint.contains(Point(weight=weight))
    except Exception as error:  # a plug-in may raise anything
        report.open(f"sparse set: {type(constraint).__name__} cannot be evaluated ({type(error).__name__}: {error})")
        return False
    return report.expect(
        "sparse set", bool(holds), f"the weight is not in the sparse set, says {type(constraint).__name__}"
    )


def _posed(claims: Claims, layer: LayerFile, constraint: SparseSet) -> LayerReconstruction:
    """The claimed problem in float64, of the numbers in the file.

    Raises:
        UserError: the objective is not available.
    """
    cross = layer.cross_gram
    return LayerProblem.of(claims.problem).build(
        layer.weight.to(layer.gram.dtype).double(),
        layer.gram.double(),
        constraint,
        ridge=claims.ridge,
        damping=claims.damping,
        cross_gram=None if cross is None else cross.to(layer.gram.dtype).double(),
        target_energy=layer.target_energy,
    )


def _dual_bounds(
    report: Verification, claims: Claims, layer: LayerFile, constraint: SparseSet | None, kinds: Set[str]
) -> dict[str, float]:
    """The bounds of some kinds on the claimed problem; a note in place of one that is not proved."""
    bounds = {}
    for kind in sorted(kinds):
        if constraint is None:
            report.certificates.append(f"no {kind} bound: it is not computed without the sparse set")
            continue
        try:
            certificate = _DUALS[kind](_posed(claims, layer, constraint))
        except (TypeError, ValueError, LinAlgError) as error:
            report.certificates.append(f"no {kind} bound: {error}")
            continue
        if certificate is None:
            report.certificates.append(f"no {kind} bound: the Hessian is not proved positive definite in float64")
            continue
        bounds[kind] = certificate.bound.value
    return bounds


def _recompute(
    report: Verification,
    claims: Claims,
    layer: LayerFile,
    v: Array,
    budget: Budget | None,
    feasible: bool,
    seed: int,
    proved: Mapping[str, float],
) -> None:
    """Errors, objective, bound and certificates of the problem of this package."""
    problem = define(layer, claims.ridge, claims.damping)
    _compare_errors(report, claims, problem, layer, v)
    value, slack = problem.objective(v)
    report.compare("objective", claims.objective, value, slack)
    report.numbers["objective"] = value
    if budget is None:
        report.certificates.append("no certificates: the sparse set is known to its own code only")
        _check_bound(report, claims, problem, None, value, value, slack, proved)
        return
    try:
        certificates = certify(problem, budget, v, seed)
    except np.linalg.LinAlgError as failed:
        report.certificates.append(f"no certificates: the damped Gram is singular ({failed})")
        reachable = value
    else:
        report.numbers |= asdict(certificates)
        report.certificates += certificates.in_words()
        reachable = certificates.reachable if feasible else value
    _check_bound(report, claims, problem, budget, value, reachable, slack, proved)


def _compare_errors(report: Verification, claims: Claims, problem: Definition, layer: LayerFile, v: Array) -> None:
    """The relative errors, which are those of the undamped reconstruction whatever the objective."""
    error, slack = problem.relative_error(v)
    report.compare("relative_error", claims.relative_error, error, slack)
    report.numbers["relative_error"] = error
    holdout, slack = None, 0.0
    if layer.gram_holdout is not None and problem.cross is None:
        holdout, slack = relative_error(v, problem.weight, layer.gram_holdout.double().numpy(), problem.rounding)
    report.compare("relative_error_holdout", claims.relative_error_holdout, holdout, slack)
    report.numbers["relative_error_holdout"] = holdout


def _recompute_named(
    report: Verification,
    claims: Claims,
    layer: LayerFile,
    weight: Tensor,
    constraint: SparseSet | None,
    repeated: Set[str],
) -> None:
    """Errors, and the objective of a plug-in by the plug-in's own code in float64; a cheap bound by this package's."""
    _compare_errors(report, claims, define(layer, claims.ridge, claims.damping), layer, weight.double().numpy())
    name = claims.problem
    report.expect("bound kind", (claims.bound is None) == (claims.bound_kind is None), "a bound has a kind")
    try:
        LayerProblem.of(name)
    except UserError as error:
        report.open(f"objective: the problem is not available ({error})")
        if claims.bound is not None:
            report.open(f"bound: it is one of the problem '{name}'")
        return
    if constraint is None:
        report.open(f"objective: '{name}' is not built without its sparse set")
        return
    try:
        problem = _posed(claims, layer, constraint)
        value = float(problem.value(Point(weight=weight.double())))
    except Exception as error:  # a plug-in may raise anything
        report.open(f"objective: the problem '{name}' cannot be evaluated ({type(error).__name__}: {error})")
        return
    definition = define(layer, claims.ridge, claims.damping)
    rounding = definition.solver_rounding(weight.double().numpy())
    report.compare("objective", claims.objective, value, rounding)
    report.numbers["objective"] = value
    proved = _dual_bounds(report, claims, layer, constraint, repeated)
    if proved:
        best = max(proved, key=lambda one: proved[one])
        report.numbers |= {"bound_recomputed": proved[best], "bound_recomputed_kind": best}
        report.numbers["gap"] = proved_gap(value, proved[best])
    if claims.bound is None:
        return
    if not _is_below_value(report, claims.bound, value, rounding):
        return
    try:
        argued = claims.bound_kind or ""
        same = Bound(proved[argued], argued) if argued in proved else None
        bound = same if argued in _DUALS else lower_bound(problem)
    except (TypeError, ValueError, LinAlgError) as error:
        report.open(f"bound: it cannot be recomputed ({error})")
        return
    if bound is None:
        report.open("bound: the Hessian is not proved positive definite in float64")
        return
    if bound.kind != claims.bound_kind:
        report.open(f"bound: the argument '{claims.bound_kind}' was not repeated")
        return
    doubt = definition.doubt()
    if _is_doubtful(report, doubt):
        return
    report.expect(
        "bound reproduced",
        claims.bound <= bound.value + (TOLERANCE + doubt) * abs(bound.value) + definition.floor_doubt(),
        f"claimed bound {shown(claims.bound)} by '{bound.kind}', recomputed {shown(bound.value)}",
    )


def _is_below_value(report: Verification, bound: float, value: float, slack: float) -> bool:
    return report.expect(
        "bound below the objective",
        bound <= value + TOLERANCE * abs(value) + slack,
        f"claimed bound {shown(bound)} lies above the value {shown(value)} of the weight itself: it is not a bound",
    )


def _is_doubtful(report: Verification, doubt: float) -> bool:
    """Whether rounding may change a bound too much to compare it; it is then reported as unchecked."""
    if doubt > _DOUBTFUL:
        note = f"bound: rounding leaves a relative doubt of {doubt:.1g}, because the damped Gram is ill-conditioned"
        report.open(note)
    return doubt > _DOUBTFUL


def _check_bound(
    report: Verification,
    claims: Claims,
    problem: Definition,
    budget: Budget | None,
    value: float,
    reachable: float,
    slack: float,
    proved: Mapping[str, float],
) -> None:
    """Checks that a claimed bound is below every value known to be attained, and not above a recomputed one.

    An inexpensive argument is repeated, and so are those of `proved`, which is by kind. Any other bound is compared
    with the exact optimum if every support can be tried, or with an inexpensive bound above it; otherwise its proof is
    unchecked. The comparisons allow for the rounding of a recomputed bound; a published one is lowered by it.
    """
    claimed, kind = claims.bound, claims.bound_kind
    report.numbers |= {"bound": claimed, "bound_kind": kind}
    bounds: dict[str, float] = {}
    doubt = 0.0
    if budget is not None:
        with suppress(np.linalg.LinAlgError):
            bounds, doubt = cheap_bounds(problem, budget)
    # The margin is not for the weight's own value, which may be arbitrarily bad.
    floor, margin = problem.least, problem.floor_doubt()
    lowered = {name: floor + (bound - floor) * (1 - doubt) - margin for name, bound in bounds.items() if doubt < 1}
    lowered |= proved
    best = max(lowered, key=lambda name: lowered[name], default=None)
    report.numbers |= {"bound_recomputed": lowered.get(best or ""), "bound_recomputed_kind": best}
    report.numbers["gap"] = None if best is None else proved_gap(value, lowered[best])
    if doubt >= 1:
        report.certificates.append("no inexpensive bound: the damped Gram is singular up to rounding")
    bounds |= proved
    if not report.expect(
        "bound kind",
        (claimed is None) == (kind is None),
        f"claimed bound {shown(claimed)} of kind {shown(kind)}: a bound has a kind, and a kind a bound",
    ):
        return
    if claimed is None:
        return
    if not _is_below_value(report, claimed, value, slack):
        return

    def below(loss: float, relative: float) -> bool:
        return claimed - floor <= loss * (1 + TOLERANCE + relative) + margin

    if not report.expect(
        "bound below a better point",
        below(reachable - floor, doubt),
        f"claimed bound {shown(claimed)} lies above {shown(reachable)}, which a refit and single swaps reach",
    ):
        return
    if kind in bounds and not report.expect(
        "bound reproduced",
        below(bounds[kind] - floor, max(doubt, _ITERATED) if kind in _DUALS else doubt),
        f"claimed bound {shown(claimed)} by '{kind}', recomputed {shown(bounds[kind])}",
    ):
        return
    if _is_doubtful(report, doubt):
        return
    if any(below(bound - floor, doubt) for bound in bounds.values()):
        report.expect("bound proved", True, "")  # by its own argument, or by another that gives no less
        return
    exact = None
    if budget is not None:
        with suppress(np.linalg.LinAlgError):
            exact = least_loss(problem, budget)
    if exact is None:
        report.open(f"bound: the argument '{kind}' was not repeated; no point found lies below {shown(claimed)}")
        return
    report.numbers["optimum"] = floor + exact[0]
    report.expect(
        "bound below the optimum",
        below(exact[0], exact[1]),
        f"claimed bound {shown(claimed)} by '{kind}' lies above the optimum {shown(floor + exact[0])}",
    )


def _read_solved(path: Path) -> tuple[Tensor, dict[str, str], list[str]]:
    """The weight, the metadata, and the names of all tensors."""
    if not path.is_file():
        raise UserError(f"no such file or folder: {path}")
    with opened(path) as file:
        metadata = dict(file.metadata() or {})
        names = sorted(file.keys())
        if "weight" not in names:
            raise UserError(f"{path} contains no 'weight': it is not a solved layer")
        weight: Tensor = file.get_tensor("weight")
    return weight, metadata, names


def _recorded_layer(path: Path, claims: Claims) -> Path:
    recorded = Path(claims.layer)
    for place in (recorded, path.parent / recorded.name):
        try:
            if place.is_file():
                return place
        except (OSError, ValueError):  # no name of a file
            continue
    raise UserError(f"the layer problem {shown(claims.layer)} is not there: name it with --layer")
