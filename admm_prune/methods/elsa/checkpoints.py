"""Checkpoints of training, by torch.distributed.checkpoint in safetensors; any number of processes can read them."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from admm_prune.data.durable import file_sha256, read_sealed, sync, write_sealed, writing
from admm_prune.errors import UserError
from admm_prune.models.parallel import World

_VALUES, _UNFINISHED = "values.json", ".unfinished"


class Checkpoints:
    """The latest checkpoint in a folder, written atomically.

    Every process writes its shards to its own files in a folder with a temporary name. The first process then writes
    the other values and the fingerprints of all files, and renames the folder.

    Args:
        folder: a folder for checkpoints only, the same in all processes; None saves nothing.
        world: the processes.
    """

    def __init__(self, folder: Path | None, world: World) -> None:
        self._folder, self._world = folder, world
        self._count = 0
        self._latest: Path | None = None

    @property
    def enabled(self) -> bool:
        return self._folder is not None

    def latest(self) -> dict[str, Any] | None:
        """The values of the latest checkpoint other than tensors; None if there is no checkpoint.

        Raises:
            UserError: the checkpoint is damaged.
        """
        folder = self._folder
        if folder is None:
            return None
        checkpoint = self._world.broadcast_from_rank0(lambda: _read_latest(folder))
        if checkpoint is None:
            return None
        name, values = checkpoint
        self._latest, self._count = folder / name, int(name) + 1
        return values

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Loads the tensors of the latest checkpoint into these, which may be sharded differently.

        Raises:
            UserError: the checkpoint has other tensors, shapes or dtypes.
        """
        assert self._latest is not None
        reader = HuggingFaceStorageReader(str(self._latest))
        stored = reader.read_metadata().state_dict_metadata.items()
        saved = {name: (x.size, x.properties.dtype) for name, x in stored if isinstance(x, TensorStorageMetadata)}
        if saved != {name: (x.shape, x.dtype) for name, x in tensors.items()}:
            raise UserError(f"{self._latest} is a checkpoint of another run: delete it to start over")
        with _unwrapped(), _quiet():
            state_dict_loader.load(tensors, storage_reader=reader, no_dist=self._world.size == 1)

    def save(self, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
        """Writes a checkpoint, then deletes the one before.

        Raises:
            WriteError: the checkpoint cannot be written. The one before is unaffected.
        """
        folder = self._folder
        assert folder is not None
        place = folder / f"{self._count:06d}"
        new = place.with_name(place.name + _UNFINISHED)
        self._world.broadcast_from_rank0(lambda: _emptied(new))
        try:
            with writing(folder), _unwrapped(), _quiet():
                writer = HuggingFaceStorageWriter(str(new), save_distributed=True)
                state_dict_saver.save(dict(tensors), storage_writer=writer, no_dist=self._world.size == 1)
            self._world.broadcast_from_rank0(lambda: _complete(new, place, values))
        except BaseException:
            if self._world.first:  # an incomplete checkpoint would take up disk space
                shutil.rmtree(new, ignore_errors=True)
            raise
        self._count += 1


@contextmanager
def _unwrapped() -> Generator[None]:
    """Context that raises the cause of a CheckpointException, which is not an Exception: a full disk, an interrupt."""
    try:
        yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise min(causes, key=lambda cause: isinstance(cause, Exception)) from error


@contextmanager
def _quiet() -> Generator[None]:
    """Context that suppresses torch's warning about a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _emptied(folder: Path) -> None:
    with writing(folder.parent):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def _complete(new: Path, place: Path, values: dict[str, Any]) -> None:
    """Synchronizes all files before the folder is renamed, and renames it before older checkpoints are deleted."""
    with writing(place.parent):
        content = {"values": values, "sha256": _fingerprints(new)}
        write_sealed(new / _VALUES, content)
        new.replace(place)
        sync(place.parent)
        for other in place.parent.iterdir():
            if other.name != place.name:
                shutil.rmtree(other)


def _read_latest(folder: Path) -> tuple[str, dict[str, Any]] | None:
    names = [path.name for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    if not names:
        return None
    place = folder / max(names)
    content = read_sealed(place / _VALUES)
    if content is None or content["sha256"] != _fingerprints(place):
        raise UserError(f"{place} is damaged: the journal cannot be trusted; delete it to start over")
    return place.name, content["values"]


def _fingerprints(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))}
