"""Which weights are pruned, and to what: by classes of modules, by names, by regular expressions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from admm_prune.errors import UserError
from admm_prune.models.structure import WeightView, decoder_blocks
from admm_prune.recipes.targets import DENSE, Target, target_named

_REGULAR = "re:"


@dataclass(frozen=True)
class Selection:
    """Patterns for weights. A pattern is one of

        "Linear", "LlamaMLP"           a class: of the weight's module, or of one around it, up to the decoder block,
        "model.layers.0.mlp.up_proj"   the name of a module or of its parameter,
        "re:.*down_proj"               a regular expression that the name of the module begins with, as `re.match` does.

    Attributes:
        targets: a weight is pruned if it fits one of them; all where there are none.
        ignore: what fits one of them is left as it is.
        overrides: (pattern, "0.5" or "2:4" or "dense"): targets in place of the run's; of several that fit, the last.
    """

    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    overrides: tuple[tuple[str, str], ...] = field(default=())

    @classmethod
    def of(
        cls, targets: str | Sequence[str] = (), ignore: str | Sequence[str] = (), overrides: Mapping[str, object] = {}
    ) -> Selection:
        """From what a user writes: a pattern or several; {pattern: 0.5} or {pattern: "2:4"}.

        Raises:
            UserError: a pattern is no regular expression, or an override no target.
        """
        given = tuple((pattern, str(wanted).strip()) for pattern, wanted in overrides.items())
        made = cls(_several(targets), _several(ignore), given)
        for pattern in (*made.targets, *made.ignore, *overrides):
            _check(pattern)
        for _, wanted in given:
            if wanted != DENSE:
                target_named(wanted)
        return made

    def __bool__(self) -> bool:
        return bool(self.targets or self.ignore or self.overrides)

    def applied(self, model: nn.Module, target: Target) -> Target:
        """The target with that of every weight of the model's blocks that has another one than the rest.

        Raises:
            UserError: a pattern fits no weight, or nothing is left to prune.
        """
        if not self:
            return target
        blocks = decoder_blocks(model)
        views = {view.name: (view, block.name) for block in blocks for view in block.weights}
        fits = {
            pattern: {name for name, (view, block) in views.items() if _fits(pattern, view, block, model)}
            for pattern in (*self.targets, *self.ignore, *(pattern for pattern, _ in self.overrides))
        }
        for pattern, found in fits.items():
            if not found:
                raise UserError(f"nothing in {type(model).__name__}'s blocks fits '{pattern}': see the names of layers")
        chosen = set().union(*(fits[pattern] for pattern in self.targets)) if self.targets else set(views)
        chosen -= set().union(*(fits[pattern] for pattern in self.ignore))
        own = {name: wanted for pattern, wanted in self.overrides for name in fits[pattern]}
        chosen -= {name for name, wanted in own.items() if wanted == DENSE}
        if not chosen:
            raise UserError("nothing is left to prune: targets, ignore and overrides leave out every weight")
        layers = {name: own[name] if name in chosen else DENSE for name in views if name in own or name not in chosen}
        return replace(target, layers=tuple(layers.items()))


def _several(patterns: str | Sequence[str]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _check(pattern: str) -> None:
    if not pattern.removeprefix(_REGULAR).strip():
        raise UserError("an empty pattern: give the class of a module, a name, or re: and a regular expression")
    try:
        re.compile(pattern.removeprefix(_REGULAR) if pattern.startswith(_REGULAR) else "")
    except re.error as error:
        raise UserError(f"'{pattern}' is no regular expression: {error}") from error


def _fits(pattern: str, view: WeightView, block: str, model: nn.Module) -> bool:
    module = view.name.removesuffix(f".{view.own}")
    if pattern.startswith(_REGULAR):
        return re.match(pattern.removeprefix(_REGULAR), module) is not None
    if pattern in (view.name, view.parameter_name, module):
        return True
    place = view.parameter_name
    while len(place := place.rpartition(".")[0]) >= len(block):
        if pattern == type(model.get_submodule(place)).__name__:
            return True
    return False
