"""Packs a model folder into an archive without the zeros of its weights, and restores it exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from admm_prune.data.durable import file_sha256
from admm_prune.errors import UserError
from admm_prune.models.adapters import check_no_adapters
from admm_prune.models.archive import PACK_MANIFEST, PACKED, pack_file, unpack_file
from admm_prune.runs.card import CARD
from admm_prune.runs.journal.folder import check_apart, check_output, output_folder, write_json

OnFile = Callable[[int, int, str], None]  # (files done, files, name of the current one)


@dataclass(frozen=True)
class Packing:
    """The size of an archive: bytes of all files, dense and packed, and the number of packed tensors."""

    bytes: int
    packed_bytes: int
    tensors: int

    @property
    def ratio(self) -> float:
        return self.packed_bytes / self.bytes


def pack(folder: Path, out: Path, progress: OnFile = lambda *_: None, *, overwrite: bool = False) -> Packing:
    """Writes a copy of a model folder in which every safetensors file is packed; one tensor is in memory at a time.

    Every packed file is unpacked again and compared with its source.

    Args:
        overwrite: replace an earlier result in `out`, which is refused otherwise.

    Raises:
        UserError: no model folder, one with an adapter, packed already, or `out` cannot be written.
    """
    files = _files(folder)
    if (folder / PACK_MANIFEST).is_file():
        raise UserError(f"{folder} is packed already")
    check_no_adapters(str(folder), folder)
    if not any(path.suffix == ".safetensors" for path in files):
        raise UserError(f"{folder} contains no safetensors weights: there is nothing to pack")
    check_output(out, overwrite=overwrite)
    _keep_apart(folder, out)
    record: dict[str, dict[str, object]] = {}
    tensors = 0
    with output_folder(out, overwrite=overwrite) as new:
        for done, path in enumerate(files):
            name = path.relative_to(folder)
            progress(done, len(files), str(name))
            weights = path.suffix == ".safetensors"
            target = new / name if not weights else new / f"{name}{PACKED}"
            target.parent.mkdir(parents=True, exist_ok=True)
            packed: list[str] = []
            if weights:
                packed = pack_file(path, target)
                _check_packed(path, target)
            else:
                shutil.copyfile(path, target)
            tensors += len(packed)
            record[str(name)] = {
                "sha256": file_sha256(path),
                "bytes": path.stat().st_size,
                "packed_bytes": target.stat().st_size,
                "packed_tensors": packed,
            }
        write_json(new / PACK_MANIFEST, {"format": 1, "files": record})
        after = sum(path.stat().st_size for path in _files(new))
    progress(len(files), len(files), "")
    return Packing(sum(path.stat().st_size for path in files), after, tensors)


def unpack(folder: Path, out: Path, progress: OnFile = lambda *_: None, *, overwrite: bool = False) -> Packing:
    """Restores the packed folder and checks every file by its sha256, but for the model card, which may be edited.

    Args:
        overwrite: replace an earlier result in `out`, which is refused otherwise.

    Raises:
        UserError: no archive, damaged, or `out` cannot be written.
    """
    manifest = folder / PACK_MANIFEST
    if not manifest.is_file():
        raise UserError(f"{folder} is not an archive: it has no {PACK_MANIFEST}; 'admm-prune pack' makes one")
    try:
        record = json.loads(manifest.read_bytes())["files"]
        files = {str(name): (str(file["sha256"]), len(file["packed_tensors"])) for name, file in record.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest} cannot be read: {type(error).__name__}: {error}") from error
    check_output(out, overwrite=overwrite)
    _keep_apart(folder, out)
    with output_folder(out, overwrite=overwrite) as new:
        for done, (name, (sha256, _)) in enumerate(files.items()):
            progress(done, len(files), name)
            target = new / name
            if not target.resolve().is_relative_to(new.resolve()):
                raise UserError(f"{manifest} names a file outside the folder: {name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            packed = folder / f"{name}{PACKED}"
            if packed.is_file():
                unpack_file(packed, target)
            elif (folder / name).is_file():
                shutil.copyfile(folder / name, target)
            else:
                raise UserError(f"{folder} lacks {name}: it is damaged")
            if name != CARD and file_sha256(target) != sha256:  # people edit their model cards
                raise UserError(f"{name} is not the file that was packed: {folder} is damaged")
        dense = sum(path.stat().st_size for path in _files(new))
    progress(len(files), len(files), "")
    return Packing(dense, sum(path.stat().st_size for path in _files(folder)), sum(n for _, n in files.values()))


def _check_packed(path: Path, packed: Path) -> None:
    """Raises UserError unless unpacking restores the original bytes."""
    again = packed.with_name(f".{packed.name}.again")
    unpack_file(packed, again)
    same = file_sha256(again) == file_sha256(path)
    again.unlink()
    if not same:
        raise UserError(f"{path} was not packed: unpacked again, it is another file; report this")


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _keep_apart(folder: Path, out: Path) -> None:
    if out.resolve() == folder.resolve() or out.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{out} is the folder itself, or in it: choose another place")
    check_apart(out, folder)
