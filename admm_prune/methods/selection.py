"""The selection of the weights to prune, by patterns for the names and classes of modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from admm_prune.errors import UserError, did_you_mean
from admm_prune.methods.target import DENSE, Target, target_named
from admm_prune.models.structure import Block, WeightView, decoder_blocks

_REGULAR = "re:"
LISTING = "'admm-prune list modules --model MODEL' lists the names"


@dataclass(frozen=True)
class Selection:
    """Patterns that select weights. A pattern is one of

        "q_proj", "mlp.up_proj"        the last component of a module's name, or the last few,
        "model.layers.0.mlp.up_proj"   the full name of a module or of its parameter,
        "Linear", "LlamaMLP"           the class of a module,
        "re:.*down_proj"               a regular expression that matches the start of a module's name (`re.match`).

    It selects the weights of the module and of all modules inside it, up to a whole decoder block: "mlp" and "layers.0"
    are patterns too.

    Attributes:
        targets: a weight is pruned if it matches one of them; without targets every weight is.
        ignore: a weight that matches one of them is not pruned.
        overrides: (pattern, "0.5" or "2:4" or "dense"): targets that replace that of the run. If several match a
            weight, the last one counts.
    """

    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    overrides: tuple[tuple[str, str], ...] = field(default=())

    @classmethod
    def of(
        cls, targets: str | Sequence[str] = (), ignore: str | Sequence[str] = (), overrides: Mapping[str, object] = {}
    ) -> Selection:
        """From user input: one pattern or several, and overrides such as {pattern: 0.5} or {pattern: "2:4"}.

        Raises:
            UserError: a pattern is not a valid regular expression, or an override is not a target.
        """
        if not isinstance(overrides, Mapping):
            raise UserError(f"overrides must be a mapping such as {{'up_proj': 0.5}}, not a {type(overrides).__name__}")
        given = tuple((pattern, str(target).strip()) for pattern, target in overrides.items())
        made = cls(_several(targets), _several(ignore), given)
        for pattern in (*made.targets, *made.ignore, *overrides):
            _check(pattern)
        for pattern, target in given:
            if target != DENSE:
                try:
                    target_named(target)
                except UserError as error:
                    raise UserError(f"the override of '{pattern}': {error}") from error
        return made

    def __bool__(self) -> bool:
        return bool(self.targets or self.ignore or self.overrides)

    def applied(self, model: nn.Module, target: Target) -> Target:
        """The target of the run, with entries in `Target.layers` for all weights whose target differs.

        Raises:
            UserError: a pattern matches no weight or is ambiguous, an override matches no weight that is pruned, or
                nothing is left to prune.
        """
        if not self:
            return target
        modules = Modules.of(decoder_blocks(model), model)
        patterns = (*self.targets, *self.ignore, *(pattern for pattern, _ in self.overrides))
        fits = {pattern: modules.matching(pattern) for pattern in patterns}
        everything = set(modules.classes)
        chosen = set().union(*(fits[pattern] for pattern in self.targets)) if self.targets else everything
        chosen = chosen - set().union(*(fits[pattern] for pattern in self.ignore))
        for pattern, _ in self.overrides:
            if not fits[pattern] & chosen:
                raise UserError(f"the override '{pattern}' has no effect: targets and ignore leave out all it matches")
        overrides = {name: text for pattern, text in self.overrides for name in fits[pattern]}
        chosen -= {name for name, text in overrides.items() if text == DENSE}
        if not chosen:
            raise UserError("nothing is left to prune: targets, ignore and overrides leave out every weight")
        layers = {name: overrides.get(name) if name in chosen else DENSE for name in modules.classes}
        return replace(target, layers=tuple((name, text) for name, text in layers.items() if text is not None))


@dataclass(frozen=True)
class Modules:
    """The weights in the blocks of a model, each with the modules that contain it.

    Attributes:
        model: the class name of the model.
        classes: {name of a weight: {name of a module: class name}}, from the module of the weight outwards.
    """

    model: str
    classes: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, blocks: Iterable[Block], model: nn.Module) -> Modules:
        classes = {view.name: _around(view, block, model) for block in blocks for view in block.weights}
        return cls(type(model).__name__, classes)

    def matching(self, pattern: str) -> set[str]:
        """The names of the weights that a pattern selects.

        Raises:
            UserError: the pattern matches nothing or is ambiguous; the message suggests a name.
        """
        if pattern.startswith(_REGULAR):
            expression = re.compile(pattern.removeprefix(_REGULAR))
            names = {weight for weight, places in self.classes.items() if expression.match(next(iter(places)))}
        else:
            names = self._named(pattern)
        if not names:
            near = "" if pattern.startswith(_REGULAR) else did_you_mean(pattern, self._names())
            raise UserError(f"no module in {self.model}'s blocks matches '{pattern}'{near}: {LISTING}")
        return names

    def _named(self, pattern: str) -> set[str]:
        """The weights in modules with a full name, the end of a name, or a class. A full name has precedence; a pattern
        that is both the end of a name and a class is ambiguous."""
        whole = {weight for weight, places in self.classes.items() if pattern == weight or pattern in places}
        if whole:
            return whole
        of_class = {weight for weight, places in self.classes.items() if pattern in places.values()}
        ends = {}
        for weight, places in self.classes.items():
            inner, *outer = [name for name in {**places, weight: ""} if name.endswith(f".{pattern}")] or [""]
            if outer:
                raise UserError(f"'{pattern}' is ambiguous: {outer[0]} and, in it, {inner}: give more of the name")
            if inner:
                ends[weight] = inner
        if ends and of_class:
            module = next(iter(ends.values()))
            raise UserError(f"'{pattern}' is ambiguous: the name of {module}, and a class: give more of the name")
        return set(ends) or of_class

    def _names(self) -> list[str]:
        """All patterns to suggest for a misspelt one: the last components of names, classes, full names."""
        names = dict.fromkeys(name for places in self.classes.values() for name in places)
        last = dict.fromkeys(name.rpartition(".")[2] for name in names)
        classes = dict.fromkeys(kind for places in self.classes.values() for kind in places.values())
        return [*last, *classes, *names]


def parse_overrides(items: Iterable[str]) -> dict[str, float | str]:
    """{pattern: target} from items "PATTERN=TARGET".

    Raises:
        UserError: an item has another form.
    """
    overrides: dict[str, float | str] = {}
    for item in items:
        pattern, equals, target = item.rpartition("=")
        if not (equals and pattern and target):
            raise UserError(f"an override is PATTERN=TARGET, such as 're:.*down_proj=0.5', not '{item}'")
        overrides[pattern] = target
    return overrides


def _around(view: WeightView, block: Block, model: nn.Module) -> dict[str, str]:
    classes = {view.module_name: type(view.module).__name__}
    place = view.parameter_name
    if view.expert is not None:  # its matrix is a part of a parameter, which has a name too
        classes[place] = type(view.module).__name__
    while len(place := place.rpartition(".")[0]) >= len(block.name):
        classes[place] = type(model.get_submodule(place)).__name__
    return classes


def _several(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _check(pattern: object) -> None:
    if not isinstance(pattern, str):
        raise UserError(f"a pattern for modules must be a string, not {pattern!r}")
    if not pattern.removeprefix(_REGULAR).strip():
        raise UserError("an empty pattern: give the name or the class of a module, or re: and a regular expression")
    try:
        re.compile(pattern.removeprefix(_REGULAR) if pattern.startswith(_REGULAR) else "")
    except re.error as error:
        raise UserError(f"'{pattern}' is no regular expression: {error}") from error
