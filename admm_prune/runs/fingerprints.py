"""Fingerprints of what a run writes: of every file, and of a JSON object over its own content.

A fingerprint detects an alteration; it does not authenticate. Whoever alters a file on purpose can compute a new one.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from admm_prune.data.durable import file_sha256
from admm_prune.errors import UserError
from admm_prune.runs.journal.folder import finite, write_json

DIGEST = "sha256"  # the key of an object's fingerprint in the object itself


def digest_of(content: Mapping[str, Any]) -> str:
    """sha256 of an object's canonical JSON (sorted keys, no spaces), its own fingerprint left out."""
    plain = json.loads(json.dumps(finite(content)))  # as it will be read: no tuples, all keys text
    plain.pop(DIGEST, None)
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its fingerprint as the last key."""
    plain = {key: value for key, value in content.items() if key != DIGEST}
    return {**plain, DIGEST: digest_of(plain)}


def has_own_digest(content: Mapping[str, Any]) -> bool:
    """Whether an object is the one that its fingerprint was taken of."""
    try:
        return content.get(DIGEST) == digest_of(content)
    except RecursionError:  # nested deeper than anything that is written here
        return False


def read_json(path: Path) -> Any:
    """The content of a strict JSON file: no key twice in an object, no number that is not finite.

    Raises:
        UserError: it cannot be read, or is no such file.
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
    """Writes the fingerprints of pages, which show times, into the file of times.

    A file of times that was altered since it was written keeps the fingerprint that shows it.
    """
    content = read_json(timings) if timings.is_file() else {}
    if not isinstance(content, dict):
        raise UserError(f"{timings} is not a JSON object")
    sound = not content or has_own_digest(content)
    changed = {**content, "pages": {page.name: file_sha256(page) for page in pages}}
    write_json(timings, with_digest(changed) if sound else changed)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' stands twice in an object")
    return found


def _number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refused(text)


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a finite number")
