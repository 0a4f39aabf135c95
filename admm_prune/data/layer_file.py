"""Layer problem files: one layer's weight and Grams as safetensors, to be shared and solved anywhere."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from admm_prune.data.durable import give_default_mode
from admm_prune.errors import UserError
from admm_prune.statistics import check_gram, check_square, check_weight

_REQUIRED = ("weight", "gram")
_OPTIONAL = ("gram_validation", "gram_holdout", "cross_gram")
MARK = "admm_prune"  # a key of the metadata of every file we write: such a file may be replaced


@dataclass(frozen=True)
class LayerFile:
    """weight (out, in), gram (in, in), and the other data of one layer.

    `gram_validation` is of a part of the same tokens; `gram_holdout` of other tokens, for reporting only;
    `cross_gram` = X0^T X, for a target computed by the weights from other inputs X0, needs
    `target_energy` among the metadata.
    """

    weight: Tensor
    gram: Tensor
    gram_validation: Tensor | None = None
    gram_holdout: Tensor | None = None
    cross_gram: Tensor | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def target_energy(self) -> float | None:
        value = self.metadata.get("target_energy")
        if value is None:
            return None
        try:
            return float(value)
        except ValueError:
            raise UserError(f"target_energy among the metadata must be a number, not '{value}'") from None

    def save(self, path: Path) -> None:
        """Writes the file atomically.

        Raises:
            UserError: it cannot be written.
        """
        tensors = {name: getattr(self, name) for name in (*_REQUIRED, *_OPTIONAL)}
        write_tensors(path, {name: t for name, t in tensors.items() if t is not None}, self.metadata)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file atomically, with our mark.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(content, temporary, {MARK: "1", **(metadata or {})})
        give_default_mode(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def is_problem(path: Path) -> bool:
    """True for a layer file that `write_tensors` wrote."""
    return "gram" in _tensors_of_ours(path)


def is_solution(path: Path) -> bool:
    """True for a safetensors file that `write_tensors` wrote and that is not a layer file."""
    names = _tensors_of_ours(path)
    return bool(names) and "gram" not in names


def _tensors_of_ours(path: Path) -> frozenset[str]:
    """The names of the tensors of a file that `write_tensors` wrote; none for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            return frozenset(file.keys() if MARK in (file.metadata() or {}) else ())
    except (OSError, SafetensorError):
        return frozenset()


@contextmanager
def opened(path: Path) -> Generator[Any]:
    """An open safetensors file.

    Raises:
        UserError: it is none, or cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def load_solution(path: Path) -> Tensor:
    """The tensor `weight` of a safetensors file, such as a solver of another package wrote.

    Raises:
        UserError: no such file, not safetensors, or it has no such tensor of floats.
    """
    if not path.is_file():
        raise UserError(f"no such solution: {path}")
    with opened(path) as file:
        if "weight" not in file.keys():  # noqa: SIM118  # no mapping
            raise UserError(f"{path} has no tensor 'weight', which holds a solution")
        weight: Tensor = file.get_tensor("weight")
    if weight.ndim != 2 or not weight.is_floating_point():
        raise UserError(f"{path}: weight is no matrix of floats")
    return weight


def load_layer_file(path: Path) -> LayerFile:
    """Reads and checks a layer problem file.

    Raises:
        UserError: no such file, not safetensors, a tensor is missing, of a wrong shape or dtype, not finite, or a Gram
            is not symmetric.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a layer file")
    if not path.is_file():
        raise UserError(f"no such layer file: {path}")
    with opened(path) as file:
        names = set(file.keys())
        missing = [name for name in _REQUIRED if name not in names]
        if missing:
            present = sorted(names)
            others = f" and {len(present) - 4} more" if len(present) > 5 else ""
            raise UserError(
                f"{path} has no '{missing[0]}': a layer file contains weight and gram, as 'admm-prune capture' writes "
                f"it; there are {', '.join(present[:4] if others else present)}{others}"
            )
        tensors = {name: file.get_tensor(name) for name in (*_REQUIRED, *_OPTIONAL) if name in names}
        metadata = dict(file.metadata() or {})
    try:
        check_weight(tensors["weight"])
        for name in tensors.keys() - {"weight"}:
            check = check_square if name == "cross_gram" else check_gram
            check(name, tensors[name], tensors["weight"].shape[1])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if "cross_gram" in tensors and "target_energy" not in metadata:
        raise UserError(f"{path}: cross_gram needs target_energy among the metadata")
    return LayerFile(**tensors, metadata=metadata)
