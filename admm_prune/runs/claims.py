"""What a finished file claims about itself: the metadata of a solved layer, and the fingerprints of tensors."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from admm_prune.data.durable import file_sha256
from admm_prune.data.layer_file import MARK, LayerFile
from admm_prune.errors import UserError
from admm_prune.methods.target import Target, target_named

_KIND = "solved_layer"  # a key of the metadata, which tells a solved layer from a layer problem
CLAIMS_DIGEST = "claims_sha256"  # a key of the metadata: the fingerprint of all the others
_NUMBERS = {"relative_error", "relative_error_holdout", "objective", "bound", "sparsity", "ridge", "damping"}
_OPTIONAL = {"relative_error_holdout", "bound", "bound_kind", "constraint"}


@dataclass(frozen=True, kw_only=True)
class Claims:
    """All that a solved layer file says of its weight.

    Attributes:
        target: "0.7", the fraction pruned, or "2:4".
        budget: "matrix", "row" or "group": within what the kept weights are counted; "set": a set that has to be asked.
        constraint: the sparse set, by name, where it is not the method's own.
        problem: the objective, by name.
        bound_kind: the argument that gave the bound.
        ridge, damping: as used in the end.
        layer: where the layer problem lay.
        layer_sha256, weight_sha256: of the layer problem, tensors and metadata, and of the pruned weight.
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
        """As strings that give every number back to the bit, None left out, and a fingerprint of them all."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        content = {_KIND: "1", MARK: "1"} | {name: str(value) for name, value in values.items() if value is not None}
        return {**content, CLAIMS_DIGEST: claims_sha256(content)}

    @classmethod
    def read(cls, metadata: dict[str, str], where: Path) -> Self:
        """Reads the claims back.

        Raises:
            UserError: no solved layer, or a claim is missing or no number.
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
        """The keys of the metadata that are no claims, and the marks of the file that are not as written."""
        known = {field.name for field in fields(cls)} | {_KIND, MARK, CLAIMS_DIGEST}
        return sorted((metadata.keys() - known) | {mark for mark in (_KIND, MARK) if metadata.get(mark) != "1"})

    @property
    def aim(self) -> Target:
        """The target, parsed; raises UserError where it is none."""
        return target_named(self.target)


def claims_sha256(metadata: dict[str, str]) -> str:
    """sha256 over the metadata of a solved layer, its own fingerprint left out."""
    content = {name: value for name, value in metadata.items() if name != CLAIMS_DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def layer_sha256(layer: LayerFile) -> str:
    """sha256 over the metadata of a layer problem and its tensors, by name."""
    names = ("weight", "gram", "gram_validation", "gram_holdout", "cross_gram")
    digest = hashlib.sha256(f"{sorted(layer.metadata.items())!r} ".encode())
    for name in names:
        tensor = getattr(layer, name)
        if tensor is not None:
            digest.update(f"{name} {tensor_sha256(tensor)} ".encode())
    return digest.hexdigest()


def weights_sha256(folder: Path) -> dict[str, dict[str, Any]]:
    """For every safetensors file of a folder: {"sha256": of the file, "tensors": {name: sha256}}."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found[path.name] = {
                "sha256": file_sha256(path),
                "tensors": {name: tensor_sha256(file.get_tensor(name)) for name in sorted(file.keys())},
            }
    return found
