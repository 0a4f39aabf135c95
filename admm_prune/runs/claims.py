"""The claims of a solved layer, and fingerprints of tensors and files.

A fingerprint detects accidental alterations only: whoever alters a file on purpose can recompute the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from safetensors import safe_open
from torch import Tensor

from admm_prune.data.durable import file_sha256, writing
from admm_prune.data.layer_file import MARK, LayerFile
from admm_prune.errors import UserError
from admm_prune.methods.target import Target, target_named
from admm_prune.runs.journal.folder import finite, write_json

DIGEST = "sha256"  # the key of an object's fingerprint in the object itself
_KIND = "solved_layer"  # a key of the metadata, which tells a solved layer from a layer problem
CLAIMS_DIGEST = "claims_sha256"  # a key of the metadata: the fingerprint of all the others
_NUMBERS = {"relative_error", "relative_error_holdout", "objective", "bound", "sparsity", "ridge", "damping"}
_OPTIONAL = {"relative_error_holdout", "bound", "bound_kind", "constraint"}


def digest_of(content: Mapping[str, Any]) -> str:
    """The SHA-256 of the canonical JSON (sorted keys, no spaces) of an object, without the key for the fingerprint."""
    plain = json.loads(json.dumps(finite(content)))  # as it will be read: lists for tuples, strings for keys
    plain.pop(DIGEST, None)
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its fingerprint under an additional last key."""
    plain = {key: value for key, value in content.items() if key != DIGEST}
    return {**plain, DIGEST: digest_of(plain)}


def has_own_digest(content: Mapping[str, Any]) -> bool:
    """Whether an object has the fingerprint that it states."""
    try:
        return content.get(DIGEST) == digest_of(content)
    except RecursionError:  # nested more deeply than any file of this package
        return False


def read_json(path: Path) -> Any:
    """The content of a JSON file. Objects with duplicate keys and numbers that are not finite are errors.

    Raises:
        UserError: the file cannot be read, or is not such JSON.
    """
    try:
        return json.loads(
            path.read_bytes(), object_pairs_hook=_without_repeats, parse_constant=_refused, parse_float=_number
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def files_sha256(folder: Path, leave_out: Iterable[str] = ()) -> dict[str, str]:
    """{relative path: sha256} of all files of a folder and its subfolders.

    Args:
        leave_out: names of files in the folder itself.
    """
    omitted = set(leave_out)
    names = [name for name, mode in entries(folder) if stat.S_ISREG(mode) and name not in omitted]
    return {name: file_sha256(folder / name) for name in names}


def entries(folder: Path) -> Iterator[tuple[str, int]]:
    """(relative path, mode) of everything below a folder, sorted; links are not followed."""
    for path in sorted(folder.iterdir()):
        mode = path.lstat().st_mode
        yield path.name, mode
        if stat.S_ISDIR(mode):
            yield from ((f"{path.name}/{name}", below) for name, below in entries(path))


def record_pages(timings: Path, pages: Iterable[Path]) -> None:
    """Writes the fingerprints of pages that show times into the file of times.

    If the file of times was altered it keeps its old fingerprint, which reveals the alteration.
    """
    content = read_json(timings) if timings.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{timings} is not a JSON object")
    sound = not content or has_own_digest(content)
    changed = {**content, "pages": {page.name: file_sha256(page) for page in pages}}
    with writing(timings):
        write_json(timings, with_digest(changed) if sound else changed)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' stands twice in an object")
    return content


def _number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refused(text)


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a finite number")


@dataclass(frozen=True, kw_only=True)
class Claims:
    """All claims of a solved layer file.

    Attributes:
        target: "0.7", the fraction to prune, or "2:4".
        budget: the scope of the budget, "matrix", "row" or "group"; "set" if only the constraint defines it.
        constraint: the name of the constraint, if it is not that of the method.
        problem: the name of the objective.
        bound_kind: how the bound was proved.
        ridge, damping: the values used by the solver.
        layer: the path of the layer problem.
        layer_sha256, weight_sha256: fingerprints of the layer problem, tensors and metadata, and of the pruned weight.
    """

    method: str
    status: str
    target: str
    budget: str
    constraint: str | None
    problem: str
    sparsity: float
    relative_error: float
    relative_error_holdout: float | None
    objective: float
    bound: float | None
    bound_kind: str | None
    ridge: float
    damping: float
    layer: str
    layer_sha256: str
    weight_sha256: str

    def metadata(self) -> dict[str, str]:
        """The claims that are not None as strings, from which numbers are restored exactly, with a fingerprint."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        content = {_KIND: "1", MARK: "1"} | {name: str(value) for name, value in values.items() if value is not None}
        return {**content, CLAIMS_DIGEST: claims_sha256(content)}

    @classmethod
    def read(cls, metadata: dict[str, str], where: Path) -> Self:
        """Reads the claims back.

        Raises:
            UserError: the file is not a solved layer, or a claim is missing or not a number.
        """
        if _KIND not in metadata:
            raise UserError(
                f"{where} makes no claims: verify takes what 'admm-prune solve --out' or 'admm-prune run' wrote"
            )
        values: dict[str, Any] = {}
        for name in (field.name for field in fields(cls)):
            text = metadata.get(name)
            if text is None and name not in _OPTIONAL:
                raise UserError(f"{where}: '{name}' is missing among the claims")
            try:
                values[name] = float(text) if text is not None and name in _NUMBERS else text
            except ValueError:
                raise UserError(f"{where}: the claim {name} must be a number, not '{text}'") from None
        return cls(**values)

    @classmethod
    def unknown(cls, metadata: dict[str, str]) -> list[str]:
        """The keys of the metadata that are not claims, and the marks of the kind of file, if they were altered."""
        known = {field.name for field in fields(cls)} | {_KIND, MARK, CLAIMS_DIGEST}
        return sorted((metadata.keys() - known) | {mark for mark in (_KIND, MARK) if metadata.get(mark) != "1"})

    @property
    def aim(self) -> Target:
        """The parsed target; raises UserError if it is not a target."""
        return target_named(self.target)


def claims_sha256(metadata: dict[str, str]) -> str:
    """The SHA-256 of the metadata of a solved layer, without the key for this fingerprint."""
    content = {name: value for name, value in metadata.items() if name != CLAIMS_DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """The SHA-256 of dtype, shape and bytes of a tensor."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def layer_sha256(layer: LayerFile) -> str:
    """The SHA-256 of the metadata and the named tensors of a layer problem."""
    names = ("weight", "gram", "gram_validation", "gram_holdout", "cross_gram")
    digest = hashlib.sha256(f"{sorted(layer.metadata.items())!r} ".encode())
    for name in names:
        tensor = getattr(layer, name)
        if tensor is not None:
            digest.update(f"{name} {tensor_sha256(tensor)} ".encode())
    return digest.hexdigest()


def weights_sha256(folder: Path) -> dict[str, dict[str, Any]]:
    """{file name: {"sha256": of the file, "tensors": {name: SHA-256}}} for the safetensors files in a folder."""
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files[path.name] = {
                "sha256": file_sha256(path),
                "tensors": {name: tensor_sha256(file.get_tensor(name)) for name in sorted(file.keys())},
            }
    return files
