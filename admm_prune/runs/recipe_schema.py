"""What a recipe file may hold, by pydantic. Loaded only where a file is read: nothing else of a run needs pydantic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from admm_prune.data.sequences import Packing
from admm_prune.errors import UserError
from admm_prune.methods.struprune.selectors import Selection
from admm_prune.methods.target import parse_target
from admm_prune.runs.texts import check_data

_Count = Annotated[int, Field(ge=1)]
_Sparsity = Annotated[float, Field(ge=0.0, le=1.0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Text(_Strict):
    """Which text calibrates and which judges; see `TextSettings`."""

    data: str | None = Field(
        default=None,
        description="Calibration text: a file, a folder, a Hub id; 'embedded' is the embedded model's default alone.",
    )
    eval_data: str | None = Field(
        default=None, description="Text to evaluate on; a held-out part of `data` by default."
    )
    split: str = Field(default="train", description="Split of a Hub id to calibrate on.")
    eval_split: str | None = Field(
        default=None, description="Split of a Hub id to evaluate on; validation by default, else test."
    )
    column: str | None = Field(
        default=None, description="Column of rows; 'text' by default, or the only one that holds text."
    )
    documents: _Count | None = Field(default=None, description="Read so many documents of `data` and no more.")
    eval_documents: _Count | None = Field(default=None, description="Read so many documents to evaluate on.")
    samples: _Count | None = Field(
        default=None, description="Calibration sequences; the method's own number by default."
    )
    eval_samples: _Count | None = Field(default=None, description="Evaluation sequences; all of the text by default.")
    length: Annotated[int, Field(ge=2)] | None = Field(default=None, description="Tokens of a sequence.")
    packing: Packing = Field(default="auto", description="How documents become sequences.")
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Of every random choice.")


class RecipeFile(_Strict):
    """A run of admm-prune: what is pruned, how, to what, on which text.

    `name`, `summary`, `source` and `deviations` are for the reader: the paper that the protocol is from, and in what
    this differs from it.
    """

    name: str | None = None
    summary: str | None = None
    source: str | None = None
    deviations: tuple[str, ...] = ()
    model: str = Field(default="embedded", description="'embedded', a from_pretrained folder, or a Hub id.")
    method: str | None = Field(default=None, description="A name that 'admm-prune list' prints; admm by default.")
    solver: str | None = Field(
        default=None, description="What solves the layer problems, in place of the method's own."
    )
    problem: str | None = Field(default=None, description="Objective of a layer, by name; the method's own by default.")
    constraint: str | None = Field(
        default=None, description="Sparse set of a sparsity, by name; the method's own by default."
    )
    sparsity: _Sparsity | None = Field(default=None, description="Fraction of every matrix to go; or a pattern.")
    pattern: str | None = Field(default=None, description="N:M, N kept of every M inputs.")
    targets: tuple[str, ...] = Field(
        default=(), description="Prune only what fits: classes, names, or re: and an expression."
    )
    ignore: tuple[str, ...] = Field(default=(), description="Leave what fits as it is.")
    overrides: dict[str, float | str] = Field(default={}, description="{pattern: sparsity, 'N:M' or 'dense'}.")
    text: Text = Text()
    ridge: float | Literal["auto"] | None = None
    steps: _Count | None = Field(default=None, description="Optimizer steps of a method that trains.")
    unit: Literal["parameters", "bytes", "kv-cache", "flops", "latency"] | None = None
    multiple: _Count | None = None
    bounds: bool = False
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    device: str = "auto"
    objects: dict[str, str] = Field(
        default={}, description="Parts and texts that were objects in Python; such a run is not repeatable."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            parse_target(self.sparsity, self.pattern)
            Selection.of(self.targets, self.ignore, self.overrides)
        except UserError as error:
            raise ValueError(str(error)) from error
        return self

    def arguments(self) -> dict[str, Any]:
        """What `prune` is to be called with.

        Raises:
            UserError: a part of the run was an object in Python, or the model is another than the embedded one and no
                text is named.
        """
        if self.objects:
            parts = ", ".join(f"{name}={part}" for name, part in self.objects.items())
            advice = "; name the text with --data" if self.objects.keys() <= {"data", "eval_data"} else ""
            raise UserError(
                f"this run was put together in Python, with {parts}: it cannot be repeated from a file{advice}"
            )
        told = self.model_dump(exclude={"name", "summary", "source", "deviations", "objects", "text"})
        return {**told, **self.text.model_dump(), "data": check_data(self.text.data, self.model)}

    def with_options(self, given: Mapping[str, Any]) -> RecipeFile:
        """The recipe with arguments of `prune` in place of its own.

        A sparsity takes the place of a pattern, and the other way round; another calibration text that of the
        evaluation text too, unless that is given. Splits and numbers of documents go with a text that is replaced.

        Raises:
            UserError: what came of it is no recipe.
        """
        content = self.as_content()
        text = dict(content.get("text", {}))
        for one, other in (("sparsity", "pattern"), ("pattern", "sparsity")):
            if one in given:
                content.pop(other, None)
        of_data, of_evaluation = ("eval_data", "split", "column", "documents"), ("eval_split", "eval_documents")
        dropped = of_data + of_evaluation if "data" in given else of_evaluation if "eval_data" in given else ()
        for name in dropped:
            text.pop(name, None)
        replaced = {"data", "eval_data"} if "data" in given else {"eval_data"} & given.keys()
        content["objects"] = {name: part for name, part in content.get("objects", {}).items() if name not in replaced}
        for name, value in given.items():
            (text if name in Text.model_fields else content)[name] = value
        return validated({**content, "text": text}, self.name or "the recipe")

    def as_content(self) -> dict[str, Any]:
        """For JSON and YAML, without what stands at its default."""
        return self.model_dump(mode="json", exclude_defaults=True)


def validated(content: Mapping[str, Any], where: str) -> RecipeFile:
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
