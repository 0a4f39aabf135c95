"""verify against solved layers: genuine ones of every method and pattern pass, and every falsified claim is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from admm_prune.data.layer_file import LayerFile, load_layer_file
from admm_prune.errors import UserError
from admm_prune.methods.local import LOCAL_METHODS, method_named, with_parts
from admm_prune.methods.target import Target, target_named
from admm_prune.runs.claims import CLAIMS_DIGEST, Claims, claims_sha256, tensor_sha256
from admm_prune.runs.layer import solve_path
from admm_prune.testing.instances import correlated_inputs, random_weight
from admm_prune.verify.layer import verify_layer
from admm_prune.verify.recomputation import Budget, cheap_bounds, define, least_loss, relative_error
from admm_prune.verify.report import Verdict

TARGETS = {"0": Target(0.0), "0.5": Target(0.5), "0.83": Target(0.83), "1": Target(1.0), "2:4": Target(None, (2, 4))}
Edit = Callable[[torch.Tensor, dict[str, str]], None]


def layer_file(
    path: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, tokens: int = 96, cross: bool = False
) -> Path:
    """A layer of 10 outputs and 24 inputs, of which one is dead; 96 correlated tokens and as many held out."""
    x, other = correlated_inputs(tokens, 24, seed), correlated_inputs(96, 24, seed + 100)
    x[:, 5] = 0
    weight = random_weight(10, 24, seed).to(dtype)
    dense = x + 0.1 * other[:tokens]
    target = dense @ weight.double().T
    LayerFile(
        weight=weight,
        gram=(x.T @ x).to(dtype),
        gram_holdout=(other.T @ other).to(dtype),
        cross_gram=(dense.T @ x).to(dtype) if cross else None,
        metadata={"tokens": str(tokens), "target_energy": repr(float(target.square().sum()))} if cross else {},
    ).save(path)
    return path


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    return layer_file(tmp_path / "layer.safetensors")


HALF = TARGETS["0.5"]


def solved(layer: Path, method: str = "admm", target: Target = HALF, **options: float) -> Path:
    out = layer.with_name("v.safetensors")
    solve_path(layer, method_named(method), [target], out=out, overwrite=True, device="cpu", **options)
    return out


def falsify(path: Path, edit: Edit) -> None:
    """Edits the weight or its claims in place, and says so nowhere."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    weight = load_file(path)["weight"].clone()
    edit(weight, metadata)
    save_file({"weight": weight}, path, metadata)


@pytest.mark.sampled(30)
@pytest.mark.parametrize(("method", "target"), list(product(LOCAL_METHODS, TARGETS)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_every_method_claims_for_every_target_holds(
    tmp_path: Path, method: str, target: str, dtype: torch.dtype
) -> None:
    layer = layer_file(tmp_path / "layer.safetensors", dtype=dtype)
    report = verify_layer(solved(layer, method, TARGETS[target]))
    assert report.failures == []
    assert report.unchecked == []
    assert {"sparse set", "relative_error", "relative_error_holdout", "objective", "bound reproduced"} <= set(
        report.checked
    )
    assert report.numbers["bound_recomputed"] <= report.numbers["reachable"] * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("method", LOCAL_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_target_from_other_inputs_too(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    layer = layer_file(tmp_path / "layer.safetensors", dtype=dtype, cross=True)
    report = verify_layer(solved(layer, method))
    assert report.failures == []
    assert report.numbers["relative_error_holdout"] is None


def test_a_ridge_that_had_to_be_raised_is_the_one_that_is_claimed(tmp_path: Path) -> None:
    layer = layer_file(tmp_path / "layer.safetensors", tokens=7)
    path = solved(layer, "admm-gradual", ridge=0.0)  # it has no damping beside the ridge
    with safe_open(path, framework="pt") as file:
        assert float(file.metadata()["ridge"]) > 0
    assert verify_layer(path).failures == []


@pytest.mark.parametrize(("tokens", "ridge"), [(96, 1e-2), (7, 1e-10), (7, 0.0)])
def test_a_published_bound_is_lowered_by_its_rounding_and_none_where_the_gram_is_singular(
    tmp_path: Path, tokens: int, ridge: float
) -> None:
    layer = layer_file(tmp_path / "layer.safetensors", dtype=torch.float64, tokens=tokens)

    def restate(weight: torch.Tensor, claims: dict[str, str]) -> None:
        claims.update(ridge=repr(ridge), damping="0.0")
        del claims["bound"], claims["bound_kind"]

    path = solved(layer)
    falsify(path, restate)
    report = verify_layer(path)
    bounds, doubt = cheap_bounds(define(load_layer_file(layer), ridge, 0.0), Budget(HALF, "matrix"))
    if ridge == 0.0:
        assert (bounds, doubt) == ({}, 1.0)
        assert report.numbers["bound_recomputed"] is report.numbers["gap"] is None
        assert "no inexpensive bound: the damped Gram is singular up to rounding" in report.certificates
    else:
        assert 0 < doubt < 1
        assert report.numbers["bound_recomputed"] == pytest.approx(max(bounds.values()) * (1 - doubt), rel=1e-12)


def alter(weight: torch.Tensor, claims: dict[str, str]) -> None:
    kept = weight.nonzero()[0]
    weight[tuple(kept)] *= 1.5


def add(weight: torch.Tensor, claims: dict[str, str]) -> None:
    weight[tuple((weight == 0).nonzero()[0])] = 1e-3


def claim(name: str, change: Callable[[float], float]) -> Edit:
    def edit(weight: torch.Tensor, claims: dict[str, str]) -> None:
        claims[name] = repr(change(float(claims[name])))

    return edit


def say(name: str, value: str) -> Edit:
    def edit(weight: torch.Tensor, claims: dict[str, str]) -> None:
        claims[name] = value

    return edit


FORGED = {
    "weight altered": (alter, ["the weight was altered", "relative_error", "relative_error_holdout", "objective"]),
    "a weight too many": (add, ["altered", "leaves at most 120 of 240 weights, found 121", "sparsity", "relative"]),
    "error": (claim("relative_error", lambda x: x * 0.99), ["claimed relative_error"]),
    "error, a little": (claim("relative_error", lambda x: x * (1 - 3e-6)), ["claimed relative_error"]),
    "held-out error": (claim("relative_error_holdout", lambda x: x * 0.9), ["claimed relative_error_holdout"]),
    "objective": (claim("objective", lambda x: x * 0.999), ["claimed objective"]),
    "sparsity": (claim("sparsity", lambda x: x + 1 / 240), ["claimed sparsity 0.504166667, recomputed 0.5"]),
    "bound above the value": (claim("bound", lambda x: x + 1e9), ["lies above the value"]),
    "bound raised": (claim("bound", lambda x: x * 1.01), ["claimed bound"]),
    "ridge": (claim("ridge", lambda x: x * 2), ["claimed objective"]),
    "not a number": (say("relative_error", "nan"), ["claimed relative_error nan"]),
    "target": (say("target", "0.6"), ["60% leaves at most 96 of 240 weights, found 120"]),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "told"), FORGED.values(), ids=FORGED)
def test_a_falsified_claim_is_told(layer: Path, edit: Edit, told: list[str]) -> None:
    path = solved(layer)
    falsify(path, edit)
    report = verify_layer(path)
    assert not report.verified
    for word in told:
        assert any(word in failure for failure in report.failures), report.failures
    if edit is not alter and edit is not add:
        assert len(report.failures) == 1, "a single lie, a single message"


def test_an_alteration_too_small_for_any_number_is_told_by_the_fingerprint(layer: Path) -> None:
    def nudge(weight: torch.Tensor, claims: dict[str, str]) -> None:
        kept = tuple(weight.nonzero()[0])
        weight[kept] = torch.nextafter(weight[kept], torch.tensor(0.0))

    path = solved(layer)
    falsify(path, nudge)
    (failure,) = verify_layer(path).failures
    assert failure.startswith("the weight was altered after it was solved")


def test_each_lie_has_its_own_message(layer: Path) -> None:
    heads = []
    for edit, _ in FORGED.values():
        path = solved(layer)
        falsify(path, edit)
        heads.append(" ".join(verify_layer(path).failures[0].split()[:4]))
    assert len(set(heads)) >= 7


def test_a_dual_bound_is_recomputed_and_a_raised_one_told(layer: Path) -> None:
    """Also for groups of columns, which no other bound knows."""
    by_columns = with_parts(method_named("admm"), None, "groups")
    for method, bound, kind in (
        (method_named("admm"), "dual", "perspective dual"),
        (by_columns, "dual", "perspective dual"),
        (by_columns, "block", "block-diagonal dual"),
    ):
        path = layer.with_name("v.safetensors")
        solve_path(layer, method, [HALF], bound=bound, out=path, overwrite=True, device="cpu")
        report = verify_layer(path)
        assert report.failures == []
        assert report.unchecked == []
        assert "bound reproduced" in report.checked
        assert report.numbers["bound_recomputed_kind"] == kind
        falsify(path, claim("bound", lambda x: x * 1.001))
        assert any(f"by '{kind}', recomputed" in failure for failure in verify_layer(path).failures)


def test_a_bound_that_is_not_proved_is_none(layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("admm_prune.runs.layer._WIDEST_BOUND", 23)
    (result,) = solve_path(layer, method_named("magnitude"), [HALF], bound="dual", device="cpu")
    assert result.bound is result.gap is None
    assert any("no lower bound: the layer is wider" in note for note in result.notes)


def test_a_bound_that_a_better_point_refutes_is_told_whatever_its_argument(layer: Path) -> None:
    """Magnitude is far from the optimum: a bound just below its value is refuted by a refit and swaps."""
    path = solved(layer, "magnitude")
    value = verify_layer(path).numbers["objective"]

    def edit(weight: torch.Tensor, claims: dict[str, str]) -> None:
        claims |= {"bound": repr(0.99 * value), "bound_kind": "branch and bound"}

    falsify(path, edit)
    (failure,) = verify_layer(path).failures
    assert "which a refit and single swaps reach" in failure


def test_a_group_and_a_row_that_keep_too_much_are_named(layer: Path) -> None:
    def edit(weight: torch.Tensor, claims: dict[str, str]) -> None:
        weight[3, 8:12] = 1.0

    path = solved(layer, target=Target(None, (2, 4)))
    falsify(path, edit)
    assert any("of row 3 from column 8, 4" in failure for failure in verify_layer(path).failures)
    path = solved(layer, "wanda")
    falsify(path, edit)
    assert any("1 rows keep more, the first, row 3, " in failure for failure in verify_layer(path).failures)


def test_weights_that_are_not_finite_or_of_another_shape(layer: Path) -> None:
    def poison(weight: torch.Tensor, claims: dict[str, str]) -> None:
        weight[0, :3] = torch.nan

    path = solved(layer)
    falsify(path, poison)
    assert verify_layer(path).failures[-1] == "the weight contains NaN or Inf: 3 of 240 entries"
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    save_file({"weight": torch.zeros(10, 23)}, path, metadata)
    assert verify_layer(path).failures == ["the weight has shape (10, 23), its layer (10, 24)"]


def test_another_layer_is_told_and_nothing_else(layer: Path, tmp_path: Path) -> None:
    path = solved(layer)
    other = layer_file(tmp_path / "other.safetensors", seed=1)
    (failure,) = verify_layer(path, other).failures
    assert failure.startswith("the layer file is not the one that was solved: claimed fingerprint ")
    tensors = load_file(layer)
    tensors["gram_holdout"][0, 0] *= 1.5
    save_file(tensors, layer)
    assert not verify_layer(path).verified, "the held-out Gram counts too"


def test_the_layer_is_found_beside_the_solved_one_and_asked_for_where_it_is_not(layer: Path, tmp_path: Path) -> None:
    path = solved(layer)
    (tmp_path / "moved").mkdir()
    moved = path.rename(tmp_path / "moved/v.safetensors")
    beside = layer.rename(tmp_path / "moved" / layer.name)
    assert verify_layer(moved).verified
    beside.rename(tmp_path / "away.safetensors")
    with pytest.raises(UserError, match="name it with --layer"):
        verify_layer(moved)
    assert verify_layer(moved, tmp_path / "away.safetensors").verified


def test_claims_survive_the_file_to_the_bit() -> None:
    claims = Claims(
        method="admm", status="SOLVED", target="0.7", budget="matrix", constraint=None, problem="layer", sparsity=0.7,
        relative_error=1 / 3, relative_error_holdout=None, objective=1e-300, bound=None, bound_kind=None,
        ridge=0.1 + 0.2, damping=0.0, layer="a b.safetensors", layer_sha256="0", weight_sha256="1",
    )  # fmt: skip
    assert Claims.read(claims.metadata(), Path("f")) == claims


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_fingerprint_sees_bits_shape_and_dtype(dtype: torch.dtype) -> None:
    x = torch.arange(6, dtype=dtype).reshape(2, 3)
    others = [x.T.contiguous(), x.reshape(3, 2), x.to(torch.float16), x.clone().index_fill_(0, torch.tensor([1]), 2.0)]
    assert tensor_sha256(x) == tensor_sha256(x.T.contiguous().T)
    assert len({tensor_sha256(t) for t in [x, *others]}) == 5 - int(torch.equal(others[0], others[1]))


SMALL = {"0.5": Target(0.5), "0.75": Target(0.75), "2:4": Target(None, (2, 4))}
EVERY = [*LOCAL_METHODS, "brute-force", "branch-and-bound", "group-exact"]


def small_layer(path: Path, kind: str, dtype: torch.dtype) -> Path:
    """A layer of 3 outputs and 8 inputs, small enough for every reference."""
    x, other = correlated_inputs(48, 8, 3), correlated_inputs(48, 8, 4)
    weight = random_weight(3, 8, 5).to(dtype)
    dense = x + 0.1 * other
    cross = kind == "cross_gram"
    LayerFile(
        weight=weight,
        gram=(x.T @ x).to(dtype),
        gram_validation=None if cross else (x[:16].T @ x[:16]).to(dtype),
        gram_holdout=(other.T @ other).to(dtype),
        cross_gram=(dense.T @ x).to(dtype) if cross else None,
        metadata={"target_energy": repr(float((dense @ weight.double().T).square().sum()))} if cross else {},
    ).save(path)
    return path


def admitted(method: str, target: str, constraint: str | None) -> bool:
    """Whether a reference takes the set."""
    sets = constraint or ("row-wise" if method in ("wanda", "brute-force", "branch-and-bound") else "unstructured")
    if method == "group-exact":
        return target == "2:4"
    if method == "branch-and-bound":
        return target != "2:4" and sets != "groups"
    return method != "brute-force" or target == "2:4" or sets == "row-wise"


@pytest.mark.sampled(40)
@pytest.mark.parametrize("kind", ["plain", "cross_gram", "ridge auto"])
@pytest.mark.parametrize("constraint", [None, "unstructured", "row-wise", "groups"])
@pytest.mark.parametrize("method", EVERY)
def test_honest_files_of_every_solver_set_and_kind_are_verified(
    tmp_path: Path, method: str, constraint: str | None, kind: str
) -> None:
    for dtype, target in product((torch.float32, torch.float64), SMALL):
        if (constraint is not None and target == "2:4") or not admitted(method, target, constraint):
            continue
        layer = small_layer(tmp_path / "layer.safetensors", kind, dtype)
        out = tmp_path / "v.safetensors"
        used = with_parts(method_named(method), None, constraint)
        try:
            solve_path(
                layer,
                used,
                [SMALL[target]],
                out=out,
                overwrite=True,
                device="cpu",
                ridge="auto" if kind == "ridge auto" else None,
            )
        except UserError:
            if constraint == "groups":  # not every solver takes sets beside the three usual ones
                continue
            raise
        report = verify_layer(out)
        assert (report.failures, report.unchecked) == ([], []), (dtype, target)
        assert report.verdict is Verdict.VERIFIED
        bound, optimum = report.numbers["bound"], report.numbers.get("optimum", report.numbers["objective"])
        assert (
            bound is None or bound <= optimum * (1 + 1e-12) + 1e-12
        )  # of the problem that the file states, whatever its dtype


def resealed(path: Path, **claims: str | None) -> None:
    """A forger's file: claims replaced or, where None, taken out, and the fingerprint renewed."""

    def edit(weight: torch.Tensor, metadata: dict[str, str]) -> None:
        for name, text in claims.items():
            metadata.pop(name, None)
            if text is not None:
                metadata[name] = text
        metadata[CLAIMS_DIGEST] = claims_sha256(metadata)

    falsify(path, edit)


@pytest.mark.parametrize(
    ("claims", "failure"),
    [
        ({"status": "FINE"}, "claimed status FINE"),
        ({"status": "CLOSED_FORM"}, "which admm never ends with"),
        ({"method": "wanda"}, "claimed budget 'matrix', where wanda"),
        ({"budget": "row"}, "claimed budget 'row', where admm"),
        ({"budget": "set"}, "claimed budget 'set', where admm"),
        ({"award": "first"}, "'award' is no claim"),
        ({"bound": None}, "a bound has a kind"),
        ({"bound_kind": None}, "a bound has a kind"),
        ({"bound_kind": "solver", "bound": "33.0"}, "lies above the value"),
    ],
    ids=str,
)
def test_a_forger_who_renews_the_fingerprint_is_refuted(
    layer: Path, claims: dict[str, str | None], failure: str
) -> None:
    path = solved(layer)
    resealed(path, **claims)
    report = verify_layer(path)
    assert report.verdict is Verdict.REJECTED
    assert any(failure in one for one in report.failures), report.failures


@pytest.mark.parametrize(
    ("claims", "note"),
    [
        ({"method": "of-another-package"}, "method: 'of-another-package'"),
        ({"problem": "other", "objective": "1e-9", "bound": None, "bound_kind": None}, "objective: the problem"),
        (
            {"budget": "set", "constraint": "other", "bound": None, "bound_kind": None},
            "sparse set: it is not available",
        ),
        ({"bound_kind": "solver", "bound": "13.0"}, "bound: the argument 'solver' was not repeated"),
    ],
    ids=str,
)
def test_what_cannot_be_checked_is_named_and_nothing_is_called_verified(
    layer: Path, claims: dict[str, str | None], note: str
) -> None:
    path = solved(layer)
    resealed(path, **claims)
    report = verify_layer(path)
    assert (report.failures, report.verdict) == ([], Verdict.INCOMPLETE)
    assert any(note in one for one in report.unchecked), report.unchecked
    assert (report.as_json()["verified"], report.as_json()["outcome"]) == (None, "incomplete")
    assert report.verdict.exit_status == 3
    assert report.summary().startswith("incomplete: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["relative_error", "objective"])
def test_a_target_from_other_inputs_tolerates_no_more_than_any_other(
    tmp_path: Path, dtype: torch.dtype, name: str
) -> None:
    path = solved(layer_file(tmp_path / "layer.safetensors", dtype=dtype, cross=True))
    with safe_open(path, framework="pt") as file:
        claimed = float(file.metadata()[name])
    for factor in (1 + 3e-6, 1 - 3e-6, 1.001):
        resealed(path, **{name: repr(claimed * factor)})
        assert any(f"claimed {name}" in failure for failure in verify_layer(path).failures)
    resealed(path, **{name: repr(claimed)})
    assert verify_layer(path).failures == []


@pytest.mark.parametrize(
    "budget", [Budget(Target(0.5), "matrix"), Budget(Target(0.5), "row"), Budget(SMALL["2:4"], "group")]
)
def test_the_optimum_by_exhaustion_is_that_of_every_support(tmp_path: Path, budget: Budget) -> None:
    whole = load_layer_file(small_layer(tmp_path / "layer.safetensors", "cross_gram", torch.float64))
    assert whole.cross_gram is not None
    layer = replace(whole, weight=whole.weight[:3, :4], gram=whole.gram[:4, :4], cross_gram=whole.cross_gram[:4, :4])
    problem = define(layer, 0.03, 0.003)
    values = []
    for kept in combinations(range(12), 6):
        support = np.isin(np.arange(12), kept).reshape(3, 4)
        if budget.describe_excess(support.astype(float)) is None:
            v = np.zeros((3, 4))
            for row, inside in enumerate(support):
                linear = problem.hessian[inside] @ problem.minimizer[row]
                v[row, inside] = np.linalg.solve(problem.hessian[inside][:, inside], linear)
            values.append(problem.objective(v)[0])
    found = least_loss(problem, budget)
    assert found is not None
    assert problem.least + found[0] == pytest.approx(min(values), rel=1e-9)


def test_exhaustion_is_not_tried_where_it_would_take_long(tmp_path: Path) -> None:
    problem = define(load_layer_file(layer_file(tmp_path / "layer.safetensors")), 0.03, 0.0)
    assert least_loss(problem, Budget(Target(0.5), "matrix")) is None


@pytest.mark.parametrize("cross", [False, True], ids=["own target", "another target"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_bad_weight_does_not_widen_what_its_bound_may_claim(tmp_path: Path, dtype: torch.dtype, cross: bool) -> None:
    layer = small_layer(tmp_path / "layer.safetensors", "cross_gram" if cross else "plain", dtype)
    path = solved(layer, "brute-force", SMALL["2:4"])
    optimum = verify_layer(path).numbers["optimum"]
    problem = define(load_layer_file(layer), *(float(claims_of(path)[name]) for name in ("ridge", "damping")))
    weight = -1e8 * load_file(path)["weight"]
    v = weight.double().numpy()
    error, whole = problem.relative_error(v)[0], load_layer_file(layer)
    claims = {**claims_of(path), "weight_sha256": tensor_sha256(weight)}
    claims |= {"objective": repr(problem.objective(v)[0]), "relative_error": repr(error)}
    if "relative_error_holdout" in claims:
        assert whole.gram_holdout is not None
        holdout = relative_error(v, problem.weight, whole.gram_holdout.double().numpy(), problem.rounding)
        claims["relative_error_holdout"] = repr(holdout[0])
    save_file({"weight": weight}, path, {**claims, CLAIMS_DIGEST: claims_sha256(claims)})
    assert verify_layer(path).failures == []  # far off, but in the set, and its bound is one
    for factor in (1 + 1e-4, 2.0):
        resealed(path, bound=repr(optimum * factor))
        assert any("claimed bound" in failure for failure in verify_layer(path).failures)


def test_a_bound_that_rounding_leaves_in_doubt_is_named(tmp_path: Path) -> None:
    layer = layer_file(tmp_path / "layer.safetensors", tokens=7, dtype=torch.float64)
    path = solved(layer, "admm-gradual", ridge=1e-12)
    assert "bound" in claims_of(path)
    report = verify_layer(path)
    assert report.failures == []
    assert any("bound" in note and "ill-conditioned" in note for note in report.unchecked)
    assert report.verdict is Verdict.INCOMPLETE


def test_a_false_bound_is_rejected_though_rounding_leaves_its_argument_in_doubt(tmp_path: Path) -> None:
    layer = layer_file(tmp_path / "layer.safetensors", tokens=7, dtype=torch.float64)
    path = solved(layer, "admm-gradual", ridge=1e-12)
    resealed(path, bound=repr(float(claims_of(path)["objective"]) / 2), bound_kind="removal")
    report = verify_layer(path)
    assert report.verdict is Verdict.REJECTED
    (failure,) = report.failures
    assert "which a refit and single swaps reach" in failure


@pytest.mark.parametrize(("target", "forged"), [("0.5", "0.4995"), ("0.5", "0.4"), ("0.0", "0.001"), ("2:4", "3:4")])
def test_a_target_that_the_weight_meets_too_is_held_by_the_fingerprint_alone(
    layer: Path, target: str, forged: str
) -> None:
    path = solved(layer, "wanda", target_named(target))
    resealed(path, target=forged, bound=None, bound_kind=None)
    report = verify_layer(path)
    assert report.failures == []
    assert "target" in report.fingerprinted
    falsify(path, say("target", target))  # the fingerprint is that of the other target
    assert verify_layer(path).verdict is Verdict.REJECTED


def claims_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())
