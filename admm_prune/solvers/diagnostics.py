"""Diagnoses the history of a solve, with advice."""

from __future__ import annotations

from collections.abc import Sequence

from admm_prune.result import Diagnosis, Progress, Result, Status

# From histories of ADMM at constant penalties from 1e-4 to 100 and under its own schedules, on layers of 16 to 256
# inputs, half and four fifths pruned and 2:4. A healthy run ends with no change of the support and |x - z| / |z| below
# 0.01, having exchanged between 0.1 and 5 times the support (of the kept or of the pruned, whichever are fewer). With
# rho <= 0.01 a third or more of it still changes in every iteration and the residual stays at 0.2 to 0.7; with
# rho >= 3 less than 0.05 ever changes, and the value ends 10 to 100 % above that of a healthy run.
_MOVING = 1e-3
_FAR = 5e-2
_SETTLED = 1e-2
_STEADY = 0.7
_LONG_ENOUGH = 12  # iterations, below which slow progress and a cycle cannot be distinguished
_LARGE_RHO = 3.0
_FROZEN = 5e-2
_TOKENS_PER_CHANNEL = 4

# Advice, for the command line and for Python.
_RIDGE = "give 'run' or 'solve' a larger --ridge"
_PENALTY = "use the method admm, or in Python a penalty that rises from 0.1 to 1, such as LogSpaced(0.1, 1.0, over=30)"
_LONGER = "use the method admm-best, or in Python a larger max_iterations"


def diagnose(
    result: Result,
    *,
    width: int | None = None,
    tokens: int | None = None,
    dead: int = 0,
    ridge_asked: float | None = None,
    ridge_used: float | None = None,
    ridge_matters: bool = True,
) -> tuple[Diagnosis, ...]:
    """Reads the history of a result, and a few facts about its problem.

    Args:
        width: d, the inputs of the layer.
        tokens: that its Gram was summed over.
        dead: inputs that are zero in every token.
        ridge_matters: the solver takes account of the ridge; one that scores weights by |w| ||x|| alone does not.
        ridge_asked, ridge_used: where a ridge too small to factor was raised.

    Returns:
        The findings, those on the iteration first.
    """
    findings = _iteration_findings(result, ridge_matters=ridge_matters)
    larger = f", or {_RIDGE}" if ridge_matters else ""
    if width is not None and tokens is not None and tokens < _TOKENS_PER_CHANNEL * width:
        findings.append(
            Diagnosis(
                "few-tokens",
                "warning",
                f"{tokens} tokens for {width} inputs, {tokens / width:.1f} each: the error on other text will exceed "
                "the error reported on these",
                f"calibrate on {_TOKENS_PER_CHANNEL * width} tokens or more{larger}",
            )
        )
    if dead:
        share = "" if width is None else f" of {width}"
        findings.append(
            Diagnosis(
                "dead-channels",
                "info",
                f"{dead}{share} inputs are zero in every token: their weights are pruned first",
                "if the model does use them, calibrate on more varied text",
            )
        )
    if ridge_asked is not None and ridge_used is not None and ridge_used > ridge_asked:
        findings.append(
            Diagnosis(
                "damping-raised",
                "info",
                f"the Gram is singular with the ridge {ridge_asked:g} in the settings: raised to {ridge_used:g}",
                f"calibrate on more tokens{larger}",
            )
        )
    return tuple(findings)


def _iteration_findings(result: Result, *, ridge_matters: bool) -> list[Diagnosis]:
    if result.status is Status.NONFINITE:
        return [
            Diagnosis(
                "non-finite",
                "error",
                f"a number overflowed in iteration {result.iterations}: the best finite point before it is returned",
                _RIDGE if ridge_matters else "look for damaged weights, or calibrate on other text",
            )
        ]
    if not result.history:
        return []
    size = sum(int(x.count_nonzero()) for x in result.solution.values())
    pruned = sum(x.numel() for x in result.solution.values()) - size
    if not size or not pruned:
        return [Diagnosis("converged", "good", f"there was nothing to choose: {size} weights kept, {pruned} pruned")]
    findings = [_motion(result, min(size, pruned))]
    if result.best_iteration == 0 and result.objective > 0:
        findings.append(
            Diagnosis(
                "start-was-best",
                "warning",
                f"none of the {result.iterations} iterations found a better point than the start",
                f"{_PENALTY}, or use a cheaper method" if _rho(result.history) else "use a cheaper method",
            )
        )
    return findings


def _motion(result: Result, unit: int) -> Diagnosis:
    """The first applicable finding on the convergence of the iterates; changes are counted in `unit`."""
    history, last = result.history, result.history[-1]
    changes = [(p.support_changes or 0) / unit for p in history]
    residuals = [p.primal_residual for p in history if p.primal_residual is not None]
    ending = max(changes[-3:])
    evidence = f"in the last iterations {100 * ending:.2g} % of the support changed"
    if last.primal_residual is not None:
        evidence += f", |x - z| / |z| = {last.primal_residual:.1e}"
    if _rho(history) >= _LARGE_RHO and sum(changes) < _FROZEN:
        return Diagnosis(
            "rho-too-large",
            "warning",
            f"rho starts at {_rho(history):g} times the curvature and froze the support: {100 * sum(changes):.2g} % of "
            f"it changed in {len(history)} iterations",
            _PENALTY,
        )
    if result.status is Status.STALLED:
        return Diagnosis(
            "stalled",
            "warning",
            f"progress stopped after {result.iterations} iterations short of the stopping test; {evidence}",
            _PENALTY if last.rho is not None else "use another method",
        )
    if (
        last.rho is not None
        and ending > _MOVING
        and len(history) >= _LONG_ENOUGH
        and _steady(residuals)
        and _late(changes) > _STEADY
    ):
        return Diagnosis(
            "rho-too-small",
            "warning",
            f"x and z do not come together at rho = {last.rho:g}: {evidence}, no less than at the beginning",
            _PENALTY,
        )
    if ending > _MOVING:
        return Diagnosis(
            "still-moving",
            "warning" if ending > _FAR else "info",
            f"the run ended before it converged: {evidence} (after {result.iterations} iterations)",
            _LONGER,
        )
    if result.status is Status.SOLVED or last.primal_residual is None or last.primal_residual <= _SETTLED:
        return Diagnosis("converged", "good", f"the support is settled: {evidence}")
    return Diagnosis(
        "not-settled",
        "info",
        f"the support is settled, the weights on it are not: {evidence}",
        _LONGER,
    )


def _rho(history: Sequence[Progress]) -> float:
    return history[0].rho or 0.0


def _steady(residuals: Sequence[float]) -> bool:
    """True where the last quarter is, in the mean, not much below the first."""
    quarter = max(1, len(residuals) // 4)
    return bool(residuals) and sum(residuals[-quarter:]) > _STEADY * sum(residuals[:quarter])


def _late(changes: Sequence[float]) -> float:
    """The mean of the last quarter relative to the largest of all."""
    quarter = max(1, len(changes) // 4)
    return sum(changes[-quarter:]) / quarter / (max(changes) or 1.0)
