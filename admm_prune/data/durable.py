"""Crash-safe files: synchronized to disk before they are renamed into place, with a fingerprint against damage."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from admm_prune.errors import UserError, WriteError


def sync(path: Path) -> None:
    """Synchronizes a file's bytes, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def give_default_mode(path: Path) -> None:
    """Gives a file the permissions that `open` gives: safetensors makes its files readable by the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


@contextmanager
def raising_os_errors() -> Generator[None]:
    """Raises OSError where safetensors or tokenizers cannot write a file: they raise SafetensorError and Exception."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        reason = re.search(r"\(os error (\d+)\)", str(error))  # as Rust's standard library puts it
        if reason is None:
            raise
        number = int(reason[1])
        raise OSError(number, os.strerror(number)) from error


@contextmanager
def writing(place: Path) -> Generator[None]:
    """Raises WriteError where a file or folder cannot be written."""
    try:
        with raising_os_errors():
            yield
    except OSError as error:
        raise WriteError.of(place, error) from error


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sealed(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Writes JSON preceded by its fingerprint, atomically; returns the content as it will be read.

    Raises:
        OSError: it cannot be written.
    """
    body = json.dumps(content)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync(path.parent)
    read: dict[str, Any] = json.loads(body)
    return read


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The content written by `write_sealed`; None if the file is missing or damaged."""
    try:
        digest, _, body = path.read_text(encoding="utf-8").removesuffix("\n").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        return None
    content: dict[str, Any] = json.loads(body)
    return content
