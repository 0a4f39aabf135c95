"""Objectives and constraints of a layer: built in, declared by other packages, or passed as objects.

Other packages declare names for their parts as entry points:

    [project.entry-points."admm_prune.solvers"]
    projected-gradient = "their_package:ProjectedGradient"

The groups are `admm_prune.solvers` (a class that is called without arguments; see `methods.local`),
`admm_prune.problems` (a subclass of `LayerReconstruction`, called with the same arguments) and
`admm_prune.constraints` (a `SparseSet`, called with the fraction of the weights to remove). A plug-in is imported only
when its name is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from admm_prune.errors import UserError, unknown
from admm_prune.methods.part_checks import explained_parts
from admm_prune.methods.target import Target
from admm_prune.problems.constraints import Groups, NofM, RowWise, SparseSet, Unstructured
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.statistics import UNWEIGHTED, TokenContext, TokenWeighting, check_token_values

Kind = Literal["solvers", "problems", "constraints"]
Objective = Callable[..., LayerReconstruction]  # with the arguments of `LayerReconstruction`
ProblemLike = str | Objective | None  # a name or an object; None for the one of the method
SetLike = str | SparseSet | type[SparseSet] | None
# Constraints with a sparsity as parameter; N:M is selected by a pattern.
SETS: Mapping[str, Callable[[float], SparseSet]] = {"unstructured": Unstructured, "row-wise": RowWise, "groups": Groups}
LAYER = "layer"
_HOOKS = ("token_weights", "token_scores")
_TRIAL_TOKENS, _TRIAL_VOCABULARY = 64, 8
LAYER_PROBLEMS: Mapping[str, type[LayerReconstruction]] = {LAYER: LayerReconstruction}


def declared(kind: Kind) -> dict[str, EntryPoint]:
    """The parts of this kind that installed packages declare, by name."""
    return {point.name: point for point in entry_points(group=f"admm_prune.{kind}")}


def all_declared() -> list[dict[str, str]]:
    """All plug-ins of all kinds: kind, name, object and package of each."""
    return [
        {
            "kind": kind,
            "name": name,
            "object": point.value,
            "package": "" if point.dist is None else f"{point.dist.name} {point.dist.version}",
        }
        for kind in get_args(Kind)
        for name, point in sorted(declared(kind).items())
    ]


def check_no_clash(kind: Kind, name: str, ours: Collection[str]) -> None:
    """Rejects an ambiguous name.

    Raises:
        UserError: a package declares the name of a built-in part, or two packages declare the same name.
    """
    declarations = {point.value: point for point in entry_points(group=f"admm_prune.{kind}") if point.name == name}
    points = declarations.values()
    who = " and ".join(f"{point.dist.name if point.dist else 'a package'} ({point.value})" for point in points)
    if declarations and name in ours:
        raise UserError(f"the name '{name}' is built in, and declared by {who}: that package has to choose another")
    if len(declarations) > 1:
        raise UserError(f"the name '{name}' is declared by {who}: one of them has to choose another")


def load_declared(kind: Kind, name: str) -> Any:
    """Imports the object that is declared under a name.

    Raises:
        UserError: its package cannot be imported, or does not have the object.
    """
    point = declared(kind)[name]
    try:
        return point.load()
    except Exception as error:  # importing another package may raise anything
        whose = "" if point.dist is None else f" of {point.dist.name}"
        raise UserError(
            f"the plug-in '{name}'{whose} ({point.value}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error


@dataclass(frozen=True)
class LayerProblem:
    """The objective of a layer: its name, and the class or function that builds the problem."""

    name: str
    build: Objective

    @property
    def weighting(self) -> TokenWeighting:
        """How the objective weights the tokens in Gram matrices, from its hooks; their results are checked."""
        weigh, score = (self._hook(name) for name in _HOOKS)
        if weigh is None:
            return UNWEIGHTED
        needs_context = _takes_context(weigh)

        def weighed(inputs: Tensor, context: TokenContext | None) -> Tensor:
            version = inputs._version
            with explained_parts(problem=self.build):
                weights: Tensor = weigh(inputs, context) if needs_context else weigh(inputs)
            self._check_values("token_weights", weights, inputs)
            if inputs._version != version:
                raise UserError(f"token_weights of the problem '{self.name}' must not change its inputs in place")
            return weights

        def scored(logits: Tensor, following: Tensor) -> Tensor:
            with explained_parts(problem=self.build):
                scores: Tensor = score(logits, following)
            self._check_values("token_scores", scores, logits)
            scores = scores.float()
            if not bool(torch.isfinite(scores).all()):
                raise UserError(f"token_scores of the problem '{self.name}' must be finite in float32")
            return scores

        needs_outputs = bool(self._hook("needs_outputs"))
        return TokenWeighting(weighed, needs_context, needs_outputs, None if score is None else scored)

    def trial_weights(self, inputs: Tensor, weight: Tensor) -> Tensor | None:
        """Calls the token weighting for the first n of 64 random tokens.

        Args:
            inputs: (n, in).
            weight: W (out, in).

        Returns:
            The weights (n,); None if all tokens have equal weight.

        Raises:
            UserError: the weighting fails, or does not return weights.
            ValueError: the weighting rejects these inputs.
        """
        weighting = self.weighting
        if weighting.weigh is None:
            return None
        context, tokens = None, len(inputs)
        if weighting.needs_context:
            g = torch.Generator().manual_seed(0)
            ids, following = torch.randint(0, _TRIAL_VOCABULARY, (2, _TRIAL_TOKENS), generator=g)[:, :tokens]
            logits = torch.randn(_TRIAL_TOKENS, _TRIAL_VOCABULARY, generator=g)[:tokens]
            context = TokenContext(
                weight="trial.weight",
                ids=ids,
                positions=torch.arange(tokens),
                sequences=torch.zeros(tokens, dtype=torch.int64),
                scored=torch.ones(tokens, dtype=torch.bool),
                outputs=inputs @ weight.to(inputs.dtype).T if weighting.needs_outputs else None,
                scores=None if weighting.score is None else weighting.score(logits, following),
            )
        return weighting.weigh(inputs, context)

    def posed(self, *arguments: Any, **settings: Any) -> LayerReconstruction:
        """Builds the problem from the arguments of `LayerReconstruction`.

        Raises:
            UserError: building fails, or the result is not a `LayerReconstruction`.
            ValueError: the arguments cannot be used.
        """
        with explained_parts(problem=self.build):
            problem: Any = self.build(*arguments, **settings)
        if not isinstance(problem, LayerReconstruction):
            raise UserError(
                f"the problem '{self.name}' builds {_kind_of(problem)}: it has to be an admm_prune.LayerReconstruction"
            )
        if type(problem).token_weights != self._hook("token_weights"):
            raise UserError(
                f"the problem '{self.name}' builds a {type(problem).__name__}, whose token_weights is not its own: "
                "give the class itself"
            )
        return problem

    def __post_init__(self) -> None:
        """Raises UserError if the function that builds the problem, or one of its hooks, cannot be called as needed."""
        if not callable(self.build):
            raise UserError(f"the problem {self.name} is {_kind_of(self.build)}, which builds no problem")
        if inspect.isclass(self._part) and not issubclass(self._part, LayerReconstruction):
            raise UserError(
                f"the problem '{self.name}' is {_kind_of(self._part)}, not a subclass of "
                "admm_prune.LayerReconstruction: call solver.solve(problem) from Python for any other objective"
            )
        _check_call(f"the problem '{self.name}'", self.build, 3, ridge=0.0, damping=0.0)
        if inspect.isabstract(self.build):
            raise UserError(f"the problem '{self.name}' lacks methods: {_abstract(self.build)}")
        self._check_hooks()

    def _check_hooks(self) -> None:
        for name in _HOOKS:
            hook, what = self._hook(name), f"{name} of the problem '{self.name}'"
            if hook is None:
                continue
            if not callable(hook):
                raise UserError(f"{what} must be a staticmethod, not {_kind_of(hook)}")
            if inspect.isclass(self._part) and inspect.isfunction(inspect.getattr_static(self._part, name)):
                raise UserError(f"{what} must be a staticmethod or a classmethod: it has no instance to be called on")
            _check_call(what, hook, 2 if name == "token_scores" or _takes_context(hook) else 1)
        needs_outputs = self._hook("needs_outputs")
        if not isinstance(needs_outputs, bool | None):
            raise UserError(f"needs_outputs of the problem '{self.name}' must be True or False, not {needs_outputs!r}")
        weigh = self._hook("token_weights")
        for name, declared in (("needs_outputs", needs_outputs), ("token_scores", self._hook("token_scores"))):
            if declared and (weigh is None or not _takes_context(weigh)):
                raise UserError(
                    f"the problem '{self.name}' has {name}, which only token_weights(inputs, context) can read: "
                    "give it a token_weights of two parameters"
                )

    @property
    def _part(self) -> Any:
        """The class or function that builds the problem, without `functools.partial` around it."""
        part: Any = self.build
        while isinstance(part, partial):
            part = part.func
        return part

    def _hook(self, name: str) -> Any:
        return getattr(self._part, name, None)

    def _check_values(self, name: str, values: object, of: Tensor) -> None:
        """Raises UserError unless a hook returned one real number for each row of `of`."""
        try:
            check_token_values(f"{name} of the problem '{self.name}'", values, len(of), of.device)
        except ValueError as error:
            raise UserError(str(error)) from error

    @classmethod
    def of(cls, part: str | Objective) -> LayerProblem:
        """From the name of a built-in part or a plug-in, or from an object.

        Raises:
            UserError: there is no part of this name, or the plug-in is not a subclass of `LayerReconstruction`.
        """
        if not isinstance(part, str):
            return cls(described(part), part)
        check_no_clash("problems", part, LAYER_PROBLEMS)
        if part in LAYER_PROBLEMS:
            return cls(part, LAYER_PROBLEMS[part])
        if part not in declared("problems"):
            raise unknown("problem", part, [*LAYER_PROBLEMS, *declared("problems")])
        kind = load_declared("problems", part)
        if not (inspect.isclass(kind) and issubclass(kind, LayerReconstruction)):
            raise UserError(
                f"the plug-in '{part}' is {_kind_of(kind)}: a problem with a name on the command line derives from "
                "admm_prune.LayerReconstruction; any other is solved from Python"
            )
        return cls(part, kind)


@dataclass(frozen=True)
class SetFamily:
    """A family of constraints that differ only in their sparsity.

    Attributes:
        member: a constraint whose other settings apply to the whole family; or a function from a sparsity to a member.
    """

    name: str
    member: SparseSet | Callable[[float], SparseSet]

    @classmethod
    def of(cls, part: str | SparseSet | Callable[[float], SparseSet]) -> SetFamily:
        """From the name of a built-in part or a plug-in, from a class, or from a member.

        Raises:
            UserError: there is no part of this name, or it makes no `SparseSet` from a sparsity.
        """
        if isinstance(part, SparseSet):
            return cls(described(part), part)
        if isinstance(part, str):
            check_no_clash("constraints", part, SETS)
        if not isinstance(part, str):
            family = cls(described(part), part)
        elif part in SETS:
            family = cls(part, SETS[part])
        elif part in declared("constraints"):
            family = cls(part, load_declared("constraints", part))
        else:
            raise unknown("constraint", part, [*SETS, *declared("constraints")])
        if not isinstance(family.member, SparseSet):
            family._with_sparsity(0.5)
        return family

    def at(self, target: Target) -> SparseSet:
        """The member with the sparsity of a target; `NofM` for a pattern.

        Raises:
            UserError: there is no such member.
        """
        if isinstance(self.member, SparseSet) and target == target_of(self.member):
            return self.member
        return NofM(*target.pattern) if target.pattern is not None else self._with_sparsity(target.fraction)

    def _with_sparsity(self, sparsity: float) -> SparseSet:
        member = cast("Any", self.member)
        if inspect.isabstract(member):
            raise UserError(f"the constraint '{self.name}' lacks methods of a SparseSet: {_abstract(member)}")
        if not callable(self.member) and not isinstance(self.member, SparseSet):
            raise UserError(f"the constraint '{self.name}' is {_kind_of(member)}, which makes no sparse set")
        try:
            made: Any = replace(member, sparsity=sparsity) if isinstance(self.member, SparseSet) else member(sparsity)
        except UserError:
            raise
        except Exception as error:  # code of another package may raise anything
            if not isinstance(error, TypeError | ValueError):
                raise UserError(f"the constraint '{self.name}' failed: {type(error).__name__}: {error}") from error
            kind = type(member).__name__ if isinstance(member, SparseSet) else getattr(member, "__name__", self.name)
            raise UserError(f"{kind} is not made from a sparsity alone ({error}): give the set itself") from error
        if not isinstance(made, SparseSet):
            raise UserError(
                f"the constraint '{self.name}' gives {_kind_of(made)}: a constraint derives from "
                "admm_prune.problems.constraints.SparseSet"
            )
        return made


def target_of(constraint: SparseSet) -> Target | None:
    """The target that a constraint states; None if it has neither a sparsity nor a pattern."""
    if isinstance(constraint, NofM):
        return Target(pattern=(constraint.n, constraint.m))
    sparsity = getattr(constraint, "sparsity", None)
    return None if sparsity is None else Target(sparsity=float(sparsity))


def check_one_set(constraint: object, pattern: str | None) -> None:
    """Raises UserError if both a constraint and a pattern are given, because a pattern is a constraint too."""
    if constraint is not None and pattern is not None:
        raise UserError(f"the pattern {pattern} is a sparse set of its own: give the constraint a sparsity instead")


def described(part: object) -> str:
    """The description of a part in a manifest: its name, or its class and settings."""
    if isinstance(part, str):
        return part
    if isinstance(part, partial):
        bound = [*map(repr, part.args), *(f"{name}={value!r}" for name, value in part.keywords.items())]
        return f"{described(part.func)}({', '.join(bound)})"
    if isinstance(part, type) or callable(part):
        return f"{part.__module__}.{getattr(part, '__qualname__', type(part).__name__)}"
    return repr(part) if is_dataclass(part) else f"{type(part).__module__}.{type(part).__qualname__}"


def _check_call(what: str, function: Any, positional: int, **named: object) -> None:
    """Raises UserError if a function does not accept this number of positional arguments and these keywords."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:  # functions implemented in C may have no signature
        if isinstance(function, partial):
            raise UserError(f"{what} does not take the arguments that are bound to it: {error}") from error
        return
    try:
        signature.bind(*range(positional), **named)
    except TypeError as error:
        raise UserError(f"{what} does not take the arguments it is given: {error}") from error


def _takes_context(weigh: Any) -> bool:
    """Whether `token_weights` has a second parameter without a default."""
    try:
        signature = inspect.signature(weigh)
    except (TypeError, ValueError):  # functions implemented in C may have no signature
        return False
    for arguments in (("inputs",), ("inputs", "context")):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return len(arguments) == 2
    return False


def _abstract(kind: Any) -> str:
    return ", ".join(sorted(kind.__abstractmethods__))


def _kind_of(thing: object) -> str:
    return f"the class {thing.__name__}" if inspect.isclass(thing) else f"a {type(thing).__name__}"


RECONSTRUCTION = LayerProblem(LAYER, LayerReconstruction)
