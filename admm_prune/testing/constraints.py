"""The requirements on every constraint set."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from admm_prune.ops import selection
from admm_prune.point import Point
from admm_prune.problem import BatchedConstraint, Constraint, RunConstraint, StripConstraint, SupportConstraint
from admm_prune.testing.drawing import for_all, st
from admm_prune.testing.results import Case, named, same_bits, same_form, shares_memory
from admm_prune.testing.supports import ALL, Family, Frame, column_cuts, families, grown

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FRACTIONS = (0.0, 0.3, 0.7, 1.0)
_GRID = 20  # steps from scaled_to(0) to scaled_to(1)
_HEAVY = 1e8  # a forced entry, in the metric 1e6: dropping one costs more than all free entries together
_ROUNDING = 1 + 1e-12

# Ties, zeros, signs, and magnitudes far apart.
_entries = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6, allow_subnormal=False))
_metrics = st.one_of(st.just(1.0), st.floats(1e-6, 1e6))


def assert_constraint_conforms(
    constraint: Constraint,
    shape: tuple[int, ...] | Mapping[str, tuple[int, ...]] = (2, 6),
    *,
    examples: int = 60,
    device: str = "cpu",
) -> None:
    """Checks C and its projection z = argmin_{z in C} sum_i m_i (z_i - v_i)^2.

    For every set: z lies in C, no sampled point of C is closer, projecting twice changes nothing, `metric=None` is a
    metric of ones; v and m are not modified; shapes, dtypes (float16 to float64) and devices are kept; NaN is refused
    with a ValueError.

    In addition, for a family of supports (SupportConstraint): z is as close as the best of all supports that `contains`
    tried one by one (of all of them up to 12 entries, along four cuts beyond), and keeps the entries of v
    bitwise; membership is invariant under scaling by positive numbers and under zeroing entries, and counts entries
    that are tiny, infinite or NaN; `select` returns a support of the largest sum of squared scores and of the full
    size, also where scores are zero, the same in every dtype; of supports of equal sums it returns the one of the
    lowest indices, that is the first in lexicographic order (row-major, names in the order of the point);
    `select_each`, where there is one, returns what `select` returns for each matrix, `runs` states the
    rule of `select` (both are inherited by a class that derives from another set), and members may exchange the tiles
    of the `strips`; the shares of a partition of the columns together select a member of full size, in proportion to
    their columns up to one group of a row, and optimal in each share;
    `scaled_to` returns sets of the same class and group width that go from everything at 0 to the set itself at 1, each
    inside the one before, and prune in proportion up to the steps in which they can (or says with a ValueError that it
    cannot).

    Args:
        shape: of a point's one tensor, named "weight", or the shapes of its tensors by name. At most 12 entries make
            the check of the projection complete.
        examples: random points for each requirement on the projection.
        device: where the points live.

    Raises:
        AssertionError: a requirement is violated.
    """
    frame = Frame(shape if isinstance(shape, Mapping) else {"weight": shape}, device)
    form = next(iter(frame.shapes.values())) if len(frame.shapes) == 1 else dict(frame.shapes)
    case = Case(named(constraint), f"shape {form}")
    case.require(isinstance(constraint, Constraint), "have the members project and contains")
    _check_form(case, constraint, frame)
    _check_nan(case, constraint, frame)
    if isinstance(constraint, SupportConstraint):
        cuts = families(case, constraint, frame)
        lists = (st.lists(x, min_size=12, max_size=12) for x in (_entries, _metrics))
        drawn = st.tuples(st.sampled_from(cuts), *(values.map(torch.DoubleTensor) for values in lists))
        for_all(drawn, lambda drawn: _check_projection(case, constraint, frame, *drawn), examples)
        _check_contains(case, constraint, frame)
        _check_ties(case, constraint, frame, cuts)
        _check_dtypes(case, constraint, frame)
        _check_scaled_to(case, constraint, frame)
        if list(frame.shapes) == ["weight"] and len(frame.shapes["weight"]) == 2:
            _check_select_each(case, constraint, frame)
            _check_runs(case, constraint, frame)
            _check_strips(case, constraint, frame)
            _check_column_slices(case, constraint, frame)
    else:
        lacks = [name for name in ("group_width", "column_slice", "scaled_to") if not hasattr(constraint, name)]
        case.require(not hasattr(constraint, "select"), "show all of a SupportConstraint", f"it lacks {lacks}")
        for_all(st.integers(0, 9999), lambda seed: _check_distance(case, constraint, frame, seed), examples)
        _check_distance_in_dtypes(case, constraint, frame)


def _random(frame: Frame, seed: int) -> Tensor:
    return torch.randn(frame.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _projected(case: Case, constraint: Constraint, v: Point, metric: Point | None = None) -> Point:
    """The projection, with the checks for every one: arguments unchanged, form preserved, feasible, idempotent."""
    before = v.clone()
    metric_before = None if metric is None else metric.clone()
    with case.guard("project every finite point"):
        z = constraint.project(v, metric)
    untouched = same_bits(v, before) and (metric is None or metric_before is None or same_bits(metric, metric_before))
    case.require(untouched, "not modify the arguments of project")
    case.require(
        not shares_memory(z, v) and (metric is None or not shares_memory(z, metric)),
        "return a new point from project, not memory of its arguments",
    )
    case.require(same_form(z, v), "keep names, shapes, dtypes and devices in a projection")
    case.require(z.is_finite(), "project finite points to finite ones", f"v = {_short(v)}")
    exact = isinstance(constraint, SupportConstraint)
    if not exact and any(x.dtype is not torch.float64 for x in v.values()):
        return z  # rounding may put it slightly outside a set that is not a family of supports
    case.require(constraint.contains(z), "contain its own projections", f"not that of {_short(v)}")
    again = constraint.project(z, metric)
    same = same_bits(again, z) if exact else (again - z).norm() <= 1e-9 * z.norm()
    case.require(same, "change nothing by projecting twice", f"v = {_short(v)}")
    return z


def _short(point: Point) -> str:
    return ", ".join(f"{name} = {x.flatten()[:12].tolist()}" for name, x in point.items())


def _cost(metric: Tensor, z: Tensor, v: Tensor) -> float:
    return float((metric * (z - v).square()).sum())


def _check_projection(
    case: Case, constraint: SupportConstraint, frame: Frame, family: Family, values: Tensor, metrics: Tensor
) -> None:
    free = family.free
    v, metric = (torch.zeros(frame.size, dtype=torch.float64), torch.ones(frame.size, dtype=torch.float64))
    v[family.forced], metric[family.forced] = _HEAVY, 1e6
    v[free], metric[free] = values[: len(free)], metrics[: len(free)]
    for m, words in ((metric, f"the metric {metric[free].tolist()}"), (torch.ones_like(metric), "a metric of ones")):
        subcase = case.narrow(f"v = {v[free].tolist()} at the entries {free.tolist()}, {words}")
        point = frame.point(m)
        z = _projected(subcase, constraint, frame.point(v), point)
        flat = frame.flat(z)
        costs = (m * v.square())[free]
        best = float(((1 - family.admissible) * costs).sum(1).min())
        mine = _cost(m, flat, v)
        subcase.require(
            mine <= best * _ROUNDING,
            "project to the closest point of all supports that it admits",
            f"its projection costs {mine}, the best support {best}",
        )
        nonzero = flat != 0
        subcase.require(torch.equal(flat[nonzero], v[nonzero]), "keep the entries of v that it does not drop, bitwise")
        scale = torch.exp2((_random(frame, 1) * 4).round())
        subcase.require(
            constraint.contains(frame.point(flat * scale)), "contain its members scaled by positive numbers"
        )
        _check_selection(subcase, constraint, frame, (v.abs() * m.sqrt()), family, best)
    subcase = case.narrow(f"v = {v[free].tolist()} at the entries {free.tolist()}")
    plain = constraint.project(frame.point(v))
    subcase.require(same_bits(plain, z), "project without a metric as in a metric of ones")


def _check_selection(
    case: Case, constraint: SupportConstraint, frame: Frame, score: Tensor, family: Family, best: float
) -> None:
    with case.guard("select a support for every score that is not negative"):
        mask = constraint.select(frame.point(score))
    case.require(
        mask.keys() == frame.shapes.keys()
        and all(x.dtype is torch.bool and tuple(x.shape) == tuple(frame.shapes[name]) for name, x in mask.items()),
        "return a support as booleans of the shapes of the scores",
    )
    flat = frame.flat(mask)
    case.require(constraint.contains(frame.point(flat.double())), "select supports that it admits")
    case.require(
        int(flat.sum()) >= family.largest,
        "select a support of the full size, also where scores are zero",
        f"it selects {int(flat.sum())} entries, and admits {family.largest}",
    )
    lost = float(score[~flat].square().sum())
    case.require(
        lost <= best * (1 + 1e-9),
        "select the support of the largest sum of squared scores",
        f"it loses {lost}, not {best}",
    )


def _check_distance(case: Case, constraint: Constraint, frame: Frame, seed: int) -> None:
    subcase = case.narrow(f"seed {seed}")
    v, metric = 3 * _random(frame, seed), _random(frame, seed + 10_000).exp()
    z = frame.flat(_projected(subcase, constraint, frame.point(v), frame.point(metric)))
    others = [(_random(frame, seed + k) * k, metric) for k in (1, 2, 3)]
    others += [(v, torch.ones_like(metric)), (v + 0.1 * _random(frame, seed + 4), metric)]
    for other, m in others:
        member = frame.flat(_projected(subcase, constraint, frame.point(other), frame.point(m)))
        mine, its = _cost(metric, z, v), _cost(metric, member, v)
        subcase.require(
            mine <= its * (1 + 1e-9), "project to the closest of its points", f"one costs {its}, not {mine}"
        )


def _check_form(case: Case, constraint: Constraint, frame: Frame) -> None:
    for dtype in _DTYPES:
        subcase = case.narrow(str(dtype))
        v = frame.point((torch.arange(frame.size) % 7 + 1).to(dtype))  # many ties, no zeros
        z = _projected(subcase, constraint, v)
        if isinstance(constraint, SupportConstraint):
            size = constraint.select(v).count_nonzero()
            subcase.require(
                z.count_nonzero() == size, "keep a full support of a point without zeros", f"{z.count_nonzero()}"
            )


def _check_nan(case: Case, constraint: Constraint, frame: Frame) -> None:
    for i in {0, frame.size // 2, frame.size - 1}:
        v = torch.ones(frame.size)
        v[i] = math.nan
        try:
            constraint.project(frame.point(v))
        except ValueError:
            continue
        except Exception as error:
            kind = type(error).__name__
            raise AssertionError(
                f"{case.owner} must refuse NaN with a ValueError; it raised {kind}: {error}"
            ) from error
        case.require(False, "refuse a point that contains NaN with a ValueError", f"entry {i} was taken")


def _check_contains(case: Case, constraint: SupportConstraint, frame: Frame) -> None:
    full = grown(case, constraint, frame, torch.arange(frame.size))
    for i in (~full).nonzero()[:, 0].tolist()[:: max(1, frame.size // 12)]:
        for value in (1e-300, -1e-30, math.inf, math.nan):
            z = full.double()
            z[i] = value
            with case.guard("say of any point whether it contains it"):
                inside = constraint.contains(frame.point(z))
            case.require(not inside, "count every entry that is not zero in contains", f"{value} at {i} was overlooked")


def _small_integers(frame: Frame, seed: int, most: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, most + 1, (frame.size,), generator=g).double()


def _check_ties(case: Case, constraint: SupportConstraint, frame: Frame, cuts: list[Family]) -> None:
    duty = "select the lowest indices among supports of equal sums"
    lowest = grown(case, constraint, frame, torch.arange(frame.size))
    for dtype in _DTYPES:
        for value in (1.0, 0.0):
            mask = frame.flat(constraint.select(frame.point(torch.full((frame.size,), value, dtype=dtype))))
            subcase = case.narrow(f"{dtype}, all scores {value}")
            if int(mask.sum()) == int(lowest.sum()):
                subcase.require(torch.equal(mask, lowest), duty, f"it selects {mask.nonzero()[:, 0].tolist()[:12]}")
    if frame.size > ALL:
        return
    supports = cuts[0].admissible
    supports = supports[supports.sum(1) == supports.sum(1).max()]
    order = torch.exp2(torch.arange(frame.size - 1, -1, -1, dtype=torch.float64))
    for seed in range(30):
        score = _small_integers(frame, seed, 2)
        sums = supports @ score.square()
        best = supports[sums == sums.max()]
        first = best[(best @ order).argmax()] > 0
        mask = frame.flat(constraint.select(frame.point(score)))
        detail = f"it selects {mask.nonzero()[:, 0].tolist()}, not {first.nonzero()[:, 0].tolist()}"
        case.narrow(f"the scores {score.int().tolist()}").require(torch.equal(mask, first), duty, detail)


def _check_dtypes(case: Case, constraint: SupportConstraint, frame: Frame) -> None:
    """Small integers and powers of two are exact in every dtype, and so are the sums of their squares in float32."""
    for seed in range(6):
        score, sign = _small_integers(frame, seed, 7), _random(frame, seed).sign()
        metric = torch.exp2(_small_integers(frame, seed + 50, 2) * 2)
        plain = constraint.select(frame.point(score))
        weighted = constraint.project(frame.point(score), frame.point(metric)).map(lambda z: z != 0)
        for dtype in _DTYPES[:3]:
            subcase = case.narrow(f"{dtype}, the scores {score[:12].int().tolist()}")
            mask = constraint.select(frame.point(score.to(dtype)))
            subcase.require(same_bits(mask, plain), "select in each dtype as in float64")
            for large in (1.0, 2.0**7):  # beyond float16 with the metric, whose roots are exact: 7 2^7 times 2^7
                v = frame.point((score * sign * large).to(dtype))
                m = frame.point((metric * (1.0 if large == 1 else 2.0**10)).to(dtype))
                z = _projected(subcase, constraint, v, m)
                same = same_bits(z.map(lambda x: x != 0), weighted)
                subcase.require(same, "project in each dtype as in float64", f"v scaled by {large}")


def _check_distance_in_dtypes(case: Case, constraint: Constraint, frame: Frame) -> None:
    for dtype in _DTYPES[:3]:
        for seed in range(6):
            v, metric = (3 * _random(frame, seed)).to(dtype), _random(frame, seed + 10_000).exp().to(dtype)
            subcase = case.narrow(f"{dtype}, seed {seed}")
            z = frame.flat(_projected(subcase, constraint, frame.point(v), frame.point(metric))).double()
            exact = frame.flat(constraint.project(frame.point(v.double()), frame.point(metric.double())))
            mine, best = (_cost(metric.double(), x, v.double()) for x in (z, exact))
            slack = 8 * torch.finfo(dtype).eps * float((metric.double() * v.double().square()).sum())
            subcase.require(mine <= best + slack, "project in each dtype as closely as in float64", f"{mine}, {best}")


def _check_select_each(case: Case, constraint: SupportConstraint, frame: Frame) -> None:
    if not isinstance(constraint, BatchedConstraint):
        return
    shape = tuple(frame.shapes["weight"])
    several = [
        _random(frame, 1).abs(),
        100 * _random(frame, 2).abs(),
        _small_integers(frame, 3, 2),
        0 * _random(frame, 4),
    ]
    for dtype in _DTYPES:
        score = torch.stack(several).to(dtype).view(-1, *shape).to(frame.device)
        before = score.clone()
        with case.guard("select for each of several matrices"):
            masks = constraint.select_each(score)
        alone = torch.stack([constraint.select(Point(weight=one))["weight"] for one in before])
        subcase = case.narrow(f"{dtype}, {len(several)} matrices")
        same = masks.dtype is torch.bool and masks.shape == alone.shape and torch.equal(masks, alone)
        subcase.require(same, "select in select_each what select selects for each matrix")
        subcase.require(torch.equal(score, before), "not modify the scores of select_each")


def _check_runs(case: Case, constraint: SupportConstraint, frame: Frame) -> None:
    if not isinstance(constraint, RunConstraint):
        return
    rows, width = frame.shapes["weight"]
    with case.guard("say of which runs of a matrix it keeps how many"):
        runs = constraint.runs((rows, width))
    if runs is None:
        return
    keep, length = runs
    case.require(length > 0 and frame.size % length == 0, "have runs that divide the matrix", f"of {length} entries")
    for score in (*(_small_integers(frame, seed, 3) for seed in range(3)), _random(frame, 5).abs()):
        mask = frame.flat(constraint.select(frame.point(score)))
        case.narrow(f"the scores {score[:12].tolist()}").require(
            torch.equal(mask, selection.largest_per_group(score, keep, length)),
            "select the largest scores of each of its runs, or have `runs` return None",
            f"{keep} of every {length} entries",
        )


def _check_strips(case: Case, constraint: SupportConstraint, frame: Frame) -> None:
    if not isinstance(constraint, StripConstraint):
        return
    rows, width = frame.shapes["weight"]
    with case.guard("say of which tiles its supports are made"):
        strips = constraint.strips((rows, width))
    if strips is None:
        return
    divided = all(
        one.rows % one.height == 0 and width % one.width == 0 and width % (one.span or width) == 0 for one in strips
    )
    case.require(
        divided and sum(one.rows for one in strips) == rows, "have strips that make up the matrix", f"{strips}"
    )
    generator = torch.Generator().manual_seed(0)
    for seed in range(3):
        mask = constraint.select(frame.point(_random(frame, seed).abs()))["weight"].cpu()
        moved = []
        for part, one in zip(mask.split([one.rows for one in strips]), strips, strict=True):
            tiles = part.view(-1, one.height, width // one.width, one.width).transpose(1, 2).flatten(2).flatten(0, 1)
            case.require(torch.equal(tiles.all(1), tiles.any(1)), "select whole tiles of its strips", f"{one}")
            cells = len(tiles) if one.span is None else one.span // one.width
            order = torch.cat(
                [part[torch.randperm(len(part), generator=generator)] for part in torch.arange(len(tiles)).split(cells)]
            )
            grid = tiles[order].view(-1, width // one.width, one.height, one.width).transpose(1, 2)
            moved.append(grid.reshape(one.rows, width))
        point = frame.point(torch.cat(moved).flatten().double())
        case.require(constraint.contains(point), "contain its members with the tiles of a strip exchanged", f"{strips}")


def _check_scaled_to(case: Case, constraint: SupportConstraint, frame: Frame) -> None:
    score = frame.point(_random(frame, 0).abs())
    try:
        sets = [constraint.scaled_to(fraction) for fraction in _FRACTIONS]
    except ValueError:
        return  # an explicit count has no fraction
    masks = [looser.select(score) for looser in sets]
    sizes = [mask.count_nonzero() for mask in masks]
    case.require(sizes[0] == frame.size, "prune nothing when scaled_to(0)", f"it keeps {sizes[0]} of {frame.size}")
    case.require(same_bits(masks[-1], constraint.select(score)), "be itself when scaled_to(1)")
    case.require(
        sizes == sorted(sizes, reverse=True), "shrink as the fraction of scaled_to rises", f"{sizes} at {_FRACTIONS}"
    )
    for k in range(1, len(sets)):
        inside = sets[k - 1].contains(masks[k].map(Tensor.double))
        case.require(inside, f"lie inside scaled_to({_FRACTIONS[k - 1]}) when scaled_to({_FRACTIONS[k]})")
        case.require(
            type(sets[k]) is type(constraint) and sets[k].group_width == constraint.group_width,
            f"be of its own class and group width when scaled_to({_FRACTIONS[k]})",
            f"it is {named(sets[k])}",
        )
    grid = [k / _GRID for k in range(_GRID + 1)]
    pruned = [frame.size - constraint.scaled_to(fraction).select(score).count_nonzero() for fraction in grid]
    step = max(b - a for a, b in pairwise(pruned))
    for fraction, count in zip(grid, pruned, strict=True):
        case.require(
            abs(count - fraction * pruned[-1]) <= 1.5 * step,  # stacked sets round apart
            "prune in proportion to the fraction of scaled_to",
            f"scaled_to({fraction}) prunes {count}, the set itself {pruned[-1]}",
        )


def _check_column_slices(case: Case, constraint: SupportConstraint, frame: Frame) -> None:
    rows, width = frame.shapes["weight"]
    step = constraint.group_width
    if width % step:
        return
    score = frame.point(_random(frame, 0).abs())
    whole = constraint.select(score).count_nonzero()
    for edges in column_cuts(width, step):
        subcase = case.narrow(f"columns cut at {edges}")
        masks = []
        for start, stop in pairwise(edges):
            with subcase.guard("share its budget among columns cut at multiples of group_width"):
                share = constraint.column_slice(start, stop, (rows, width))
                mask = share.select(score.map(lambda x, a=start, b=stop: x[:, a:b]))["weight"]
            masks.append(mask)
            due = whole * (stop - start) / width
            off = abs(int(mask.count_nonzero()) - due)
            subcase.require(
                off <= rows * step, "share its budget in proportion to the columns", f"off by {off} of {due}"
            )
            if mask.numel() < ALL:
                _check_slice(
                    subcase.narrow(f"the share of {start}..{stop}"), share, Frame({"weight": (rows, stop - start)})
                )
        joined = Point(weight=torch.cat(masks, dim=1))
        size = joined.count_nonzero()
        subcase.require(size == whole, "have shares that add up to its budget", f"{size} entries, not {whole}")
        subcase.require(constraint.contains(joined.map(Tensor.double)), "contain what its shares select together")


def _check_slice(case: Case, share: SupportConstraint, frame: Frame) -> None:
    (family,) = families(case, share, frame)
    for seed in range(3):
        score = _random(frame, seed).abs()
        best = float(((1 - family.admissible) * score.square()).sum(1).min())
        _check_selection(case, share, frame, score, family, best)
