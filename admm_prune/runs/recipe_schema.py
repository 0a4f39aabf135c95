"""What a recipe file may hold, by pydantic. Loaded only where a file is read: nothing else of a run needs pydantic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from admm_prune.errors import UserError
from admm_prune.methods.selection import Selection
from admm_prune.methods.target import parse_target
from admm_prune.runs.texts import check_data
from admm_prune.settings import Settings, names_of, options


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Expected(_Strict):
    """Published perplexities of a protocol, and how far from their ratio a run of it may end.

    The ratio is compared, not the perplexities: it depends less on details of tokenization and evaluation.
    """

    dense: float = Field(gt=0, allow_inf_nan=False, description="Perplexity of the dense model.")
    pruned: float = Field(gt=0, allow_inf_nan=False, description="Perplexity of the pruned model.")
    table: str = Field(description="Where both are published.")
    tolerance: float = Field(gt=0, lt=1, description="Relative deviation of the ratio pruned / dense that passes.")
    reason: str = Field(description="Why that much.")

    @property
    def ratio(self) -> float:
        return self.pruned / self.dense

    def passed(self, ratio: float) -> bool:
        """True where a ratio is within the tolerance, on either side; False for NaN."""
        return abs(ratio / self.ratio - 1) <= self.tolerance


class Recipe(_Strict):
    """A run of admm-prune: what is pruned, how, to what, on which text.

    `name`, `summary`, `source` and `deviations` are for the reader: the paper that the protocol is from, and in what
    this differs from it. `expected` is what the paper reports for exactly this protocol. `RecipeFile` below adds the
    fields that `Settings` declares.
    """

    name: str | None = None
    summary: str | None = None
    source: str | None = None
    deviations: tuple[str, ...] = ()
    expected: Expected | None = None
    objects: dict[str, str] = Field(
        default={}, description="What was an object in Python; such a run cannot be repeated from the file."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            values = dict(self)
            parse_target(values["sparsity"], values["pattern"])
            Selection.of(values["targets"], values["ignore"], values["overrides"] or {})
        except UserError as error:
            raise ValueError(str(error)) from error
        return self

    def arguments(self) -> dict[str, Any]:
        """What `prune` is to be called with.

        Raises:
            UserError: an argument of the run was an object in Python, or the model is not the embedded one and no text
                is named.
        """
        if self.objects:
            parts = ", ".join(f"{name}={part}" for name, part in self.objects.items())
            named = {
                "data": "the text with --data",
                "eval_data": "the text with --data",
                "model": "the model with --model",
            }
            options = list(dict.fromkeys(named[name] for name in sorted(self.objects) if name in named))
            advice = f"; name {' and '.join(options)}" if self.objects.keys() <= named.keys() else ""
            raise UserError(
                f"this run was put together in Python, with {parts}: it cannot be repeated from a file{advice}"
            )
        values = self.model_dump(exclude={*Recipe.model_fields})
        values |= values.pop("text")
        return {**values, "data": check_data(values["data"], values["model"])}

    def with_options(self, given: Mapping[str, Any]) -> Recipe:
        """The recipe with arguments of `prune` in place of its own.

        A sparsity takes the place of a pattern, and the other way round; another calibration text that of the
        evaluation text too, unless that is given. Splits and numbers of documents go with a text that is replaced.
        What is expected of the recipe is not expected of another one.

        Raises:
            UserError: the result is not a valid recipe.
        """
        content = self.as_content()
        text, texts = dict(content.get("text", {})), names_of(text=True)
        for one, other in (("sparsity", "pattern"), ("pattern", "sparsity")):
            if one in given:
                content.pop(other, None)
        of_data, of_evaluation = ("eval_data", "split", "column", "documents"), ("eval_split", "eval_documents")
        dropped = of_data + of_evaluation if "data" in given else of_evaluation if "eval_data" in given else ()
        for name in dropped:
            text.pop(name, None)
        replaced = {*given, *(("eval_data",) if "data" in given else ())}
        content["objects"] = {name: part for name, part in content.get("objects", {}).items() if name not in replaced}
        for name, value in given.items():
            (text if name in texts else content)[name] = value
        changed = validated({**content, "text": text}, self.name or "the recipe")
        return changed.model_copy(update={"expected": None}) if changed.differences(self) else changed

    def differences(self, other: Recipe) -> set[str]:
        """The settings in which two recipes differ, apart from the device."""
        one, another = (recipe.model_dump(exclude={*Recipe.model_fields, "device"}) for recipe in (self, other))
        for values in (one, another):
            values |= values.pop("text")
        return {name for name, value in one.items() if value != another[name]}

    def as_content(self) -> dict[str, Any]:
        """For JSON and YAML, without what stands at its default, but for the model."""
        return self.model_dump(mode="json", exclude_defaults=True) | {"model": dict(self)["model"]}


def _fields(names: Sequence[str]) -> dict[str, Any]:
    """What pydantic makes fields of: type, range, default and description of each setting."""
    declared = {name: options(Settings)[name] for name in names}
    return {
        name: (one.in_file, Field(default=one.default, ge=one.least, le=one.most, description=one.help))
        for name, one in declared.items()
    }


_Text = create_model(
    "Text",
    __base__=_Strict,
    __doc__="Which text calibrates a run, and which evaluates it.",
    **_fields(names_of(text=True)),
)
RecipeFile = create_model(
    "RecipeFile",
    __base__=Recipe,
    __doc__=Recipe.__doc__,
    text=(_Text, _Text()),
    **_fields(names_of(saved_in=("recipe",), text=False)),
)


def validated(content: Mapping[str, Any], where: str) -> Recipe:
    """The recipe of a content.

    Raises:
        UserError: the first field that is wrong, in a line.
    """
    try:
        return RecipeFile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        said = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}: {f'{field}: ' if field else ''}{said[:1].lower()}{said[1:]}") from error


def schema() -> dict[str, Any]:
    """The JSON schema of recipe files."""
    return RecipeFile.model_json_schema()
