"""Output folders: written next to their destination and moved there atomically; they never replace foreign files."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from admm_prune.data.hub import expanded
from admm_prune.errors import UserError
from admm_prune.models.archive import PACK_MANIFEST

MANIFEST = "admm_prune.json"
_EARLIER = "contains an earlier result: replace it with --overwrite, or choose another output"
TIMINGS = "timings.json"  # separate from the manifest, which is identical in equal runs


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Rejects, before any work is done, an output folder that could not be written.

    Args:
        overwrite: whether a folder written by admm-prune may be replaced; others never are.

    Raises:
        UserError: the path is a file, the working folder, a folder with other content, an earlier result that must not
            be replaced, or it cannot be written.
    """
    place = absolute(path)
    if place.is_symlink() or (place.exists() and not place.is_dir()):
        raise UserError(f"{path} is a file or a link, not a folder: choose another output")
    if place.is_dir():
        ours = any((place / name).is_file() for name in (MANIFEST, PACK_MANIFEST))
        if any(place.iterdir()) and not ours:
            raise UserError(f"{path} exists and was not written by admm-prune: choose another output")
        if Path.cwd().is_relative_to(place.resolve()):  # replacing it would leave the caller in a deleted folder
            raise UserError(f"{path} is the folder you are in, or holds it: choose another output")
        if ours and not overwrite:
            raise UserError(f"{path} {_EARLIER}")
    check_writable(path)


def check_apart(out: Path, *inputs: object) -> None:
    """Rejects, before any work is done, an output that would replace an input.

    Args:
        inputs: those that are strings or paths of existing files or folders are compared with the output.

    Raises:
        UserError: the output is one of the inputs, or contains one.
    """
    place = absolute(out).resolve()
    for given in inputs:
        if isinstance(given, str | Path):
            with suppress(OSError):  # a string that is not a path
                source = expanded(given)
                if source.exists() and source.resolve().is_relative_to(place):
                    raise UserError(f"{out} is, or holds, the input {given}: choose another output")


def check_output_file(path: Path, *, overwrite: bool = False, ours: Callable[[Path], bool]) -> None:
    """Rejects, before any work is done, an output file that could not be written.

    Args:
        overwrite: whether a file written by admm-prune may be replaced; others never are.
        ours: tells whether a file was written by admm-prune as an output of this kind.

    Raises:
        UserError: the path is a folder, a foreign file or one that must not be replaced, its folder is missing, or it
            cannot be written.
    """
    place = absolute(path)
    if place.is_dir():
        raise UserError(f"{path} is a folder, not a file: choose another output")
    if place.exists() or place.is_symlink():
        if not ours(place):
            raise UserError(f"{path} exists and was not written by admm-prune as such a file: choose another output")
        if not overwrite:
            raise UserError(f"{path} {_EARLIER}")
    if not place.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    check_writable(path)


@contextmanager
def output_folder(path: Path, *, overwrite: bool = False) -> Generator[Path]:
    """Yields an empty folder that replaces `path` if the block succeeds, and is deleted otherwise.

    An earlier result is moved aside, and deleted only after the new one has replaced it.

    Args:
        overwrite: as for `check_output`.

    Raises:
        UserError: the output cannot be written.
    """
    check_output(path, overwrite=overwrite)
    place = absolute(path)
    try:
        how: Any = {"prefix": f".{place.name}-", "dir": place.parent, "ignore_cleanup_errors": True}
        with removing_new_parents(place), tempfile.TemporaryDirectory(**how) as folder:
            new = Path(folder) / "new"
            new.mkdir()
            yield new
            check_output(path, overwrite=overwrite)  # again: it may have been created meanwhile
            swap(new, place, Path(folder) / "old")
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error


@contextmanager
def removing_new_parents(place: Path) -> Generator[None]:
    """Creates the parent folders of `place`; if the block fails, those of them that are empty are removed again."""
    made = [parent for parent in place.parents if not parent.exists()]  # the innermost first
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in made:
            with suppress(OSError):  # missing, or in use by another process
                parent.rmdir()
        raise


def write_json(path: Path, content: Any) -> None:
    """Writes standard JSON, with null for numbers that are not finite."""
    path.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """A copy of JSON values, with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flattened(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings: {"target": {"sparsity": 0.7}} becomes {"target.sparsity": 0.7}."""
    entries: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        entries |= flattened(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return entries


def swap(new: Path, place: Path, old: Path) -> None:
    """Moves `new` to `place`, and an existing folder to `old`; restores it if the move fails."""
    if place.exists():
        place.replace(old)
    try:
        new.replace(place)
    except BaseException:
        if old.exists():
            old.replace(place)
        raise


def existing_parent(path: Path) -> Path:
    """The innermost existing folder among the parents of a path."""
    return next(parent for parent in absolute(path).parents if parent.exists())


def check_writable(path: Path) -> None:
    """Rejects a file or folder that could not be created, by a trial: permission bits do not show that a file system is
    read-only or virtual.

    Raises:
        UserError: the innermost existing parent folder is not writable.
    """
    parent = existing_parent(path)
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".admm-prune-", dir=parent))  # noqa: PTH106  # mkdtemp gives a str
    except OSError as error:
        raise UserError(f"cannot write {path}: {parent} is not a writable folder ({error.strerror})") from error


def absolute(path: Path) -> Path:
    """The absolute path, without ".." and with links unresolved. It does not depend on later changes of the working
    folder."""
    return Path(os.path.abspath(expanded(path)))  # noqa: PTH100  # Path.absolute keeps ".."
