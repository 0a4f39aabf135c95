"""The journal of a run in a folder next to its output: atomic records of finished work, one lock, and one rename that
publishes the output.

    OUT.partial/
      lock            held while a run is active
      header          what the run depends on: arguments, weights, texts, versions
      records/        one file per record: fingerprint, content, state of the random generators, names of its tensors
      tensors/        one safetensors file per record
      activations/    those of the latest record that has any
      checkpoints/    files managed by the method
      scratch/        temporary files
      model/          the finished folder while it is written; it becomes OUT
      old/            the earlier OUT, until it is replaced

The tensors of a record are synchronized to disk before the record is renamed to its final name, so that every record is
complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from safetensors.torch import load_file
from torch import Tensor

from admm_prune.data.durable import file_sha256, read_sealed, sync, write_sealed, writing
from admm_prune.errors import UserError, WriteError
from admm_prune.methods.base import Journal
from admm_prune.models.archive import write_tensors
from admm_prune.models.parallel import World
from admm_prune.runs.journal.folder import MANIFEST, absolute, check_output, flattened, removing_new_parents, swap
from admm_prune.runs.journal.process_state import FolderLock, random_state, restore_random_state

T = TypeVar("T")
P = ParamSpec("P")
SUFFIX = ".partial"
_FORMAT = 1
_FOLDERS = ("records", "tensors", "activations", "checkpoints")
_HEADER, _LOCK = "header", "lock"


class FolderJournal(Journal):
    """A journal in a folder. `journal_of` opens and closes it.

    Attributes:
        out: the output folder of the run.
        home: the folder of the journal.
        resumed: whether it belongs to an interrupted run that is being resumed.
    """

    keeps = True

    def __init__(self, out: Path, *, resumed: bool, overwrite: bool) -> None:
        self.out, self.resumed = out, resumed
        self._overwrite = overwrite
        self.home = home_of(out)
        self._header: str | None = None
        self._records: dict[str, list[dict[str, Any]]] = {}
        self._count = 0

    def begin(self, facts: dict[str, Any]) -> None:
        """Records what the run depends on; in a resumed run checks that it has not changed.

        Args:
            facts: JSON values: a manifest, and everything else that must not change.

        Raises:
            UserError: something has changed, or the journal is damaged; the message names it.
        """
        content = json.loads(json.dumps({"format": _FORMAT, **facts}))
        path = self.home / _HEADER
        if self.resumed:
            _check_same(self.home, _unseal(path), content)
        else:
            with self._writing():
                for name in _FOLDERS:  # left by a run killed before the header was written, or after it was deleted
                    shutil.rmtree(self.home / name, ignore_errors=True)
                    (self.home / name).mkdir()
                write_sealed(path, content)
        self._header = file_sha256(path)
        if self.resumed:
            self._read()

    def begun_with(self, setting: str) -> Any:
        """A setting of the interrupted run, from the header."""
        return _unseal(self.home / _HEADER)["settings"].get(setting)

    @property
    def holds_work(self) -> bool:
        """Whether it has finished blocks or checkpoints, which are worth keeping; measurements are not."""
        blocks = any(record["tensors"] is not None for records in self._records.values() for record in records)
        return blocks or _has_files(self.home / "checkpoints")

    @property
    def continues(self) -> bool:
        """Whether an earlier process has finished a part of the run."""
        return self.resumed and (bool(self._records) or _has_files(self.home / "checkpoints"))

    def finished(self, part: str) -> list[Any]:
        return [record["content"] for record in self._records.get(part, [])]

    def tensor_file(self, part: str, index: int) -> Path:
        file: dict[str, str] = self._records[part][index]["tensors"]
        return self.home / file["name"]

    def resume_point(self, part: str) -> dict[str, Tensor] | None:
        last = self._records[part][-1]
        restore_random_state(last["random"])
        return None if last["activations"] is None else load_file(self.home / last["activations"]["name"])

    def commit(
        self,
        part: str,
        index: int,
        content: Any,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        activations: Mapping[str, Tensor] | None = None,
    ) -> None:
        assert self._header is not None, "begin comes first"
        records = self._records.setdefault(part, [])
        if index != len(records):
            raise ValueError(f"the next record of {part} is {len(records)}, not {index}")
        name = f"{self._count:05d}-{part}-{index:05d}"
        with self._writing():
            record = {
                "header": self._header,
                "number": self._count,
                "part": part,
                "index": index,
                "content": content,
                "tensors": self._file(f"tensors/{name}.safetensors", tensors),
                "activations": self._file(f"activations/{name}.safetensors", activations),
                "random": random_state(),
            }
            records.append(write_sealed(self.home / "records" / name, record))
            self._count += 1
            if activations is not None:
                self._keep_only(self.home / "activations", {f"{name}.safetensors"})

    def checkpoints(self, name: str) -> Path | None:
        with self._writing():
            folder = self.home / "checkpoints" / name
            folder.mkdir(parents=True, exist_ok=True)
            return folder

    def scratch(self) -> Path | None:
        with self._writing():
            folder = self.home / "scratch"
            folder.mkdir(exist_ok=True)
            return folder

    @contextmanager
    def output(self) -> Generator[Path]:
        """Yields an empty folder that becomes the output if the block succeeds.

        Raises:
            UserError: the output cannot be written. Finished work stays in the journal.
        """
        new, old, place = self.home / "model", self.home / "old", absolute(self.out)
        with self._writing():
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            yield new
            for path in new.rglob("*"):
                if path.is_file():
                    sync(path)
            sync(new)
            check_output(self.out, overwrite=self._overwrite)  # it may have been created since the run began
            if place.exists() and old.exists():  # a run was killed after the last rename: `place` is the newer one
                shutil.rmtree(old)
            swap(new, place, old)
            sync(place.parent)

    def _file(self, name: str, tensors: Mapping[str, Tensor] | None) -> dict[str, Any] | None:
        if tensors is None:
            return None
        path = self.home / name
        unfinished = path.with_suffix(".unfinished")
        digest = write_tensors(unfinished, tensors)
        unfinished.replace(path)
        sync(path.parent)
        return {"name": name, "sha256": digest}

    def _read(self) -> None:
        """Reads the records of an interrupted run, and checks each against its fingerprint."""
        shutil.rmtree(self.home / "scratch", ignore_errors=True)
        paths = sorted(path for path in (self.home / "records").iterdir() if not path.name.endswith(".unfinished"))
        for number, path in enumerate(paths):
            record = _unseal(path)
            if record["header"] != self._header:
                raise UserError(f"{path} is a record of another run: {_advice(self.home)}")
            records = self._records.setdefault(record["part"], [])
            if record["number"] != number or record["index"] != len(records):
                raise UserError(f"{self.home}: a record before {path.name} is missing: {_advice(self.home)}")
            records.append(record)
        self._count = len(paths)
        everything = sorted((r for records in self._records.values() for r in records), key=lambda r: r["number"])
        latest = next((r for r in reversed(everything) if r["activations"] is not None), None)
        files = [record["tensors"] for record in everything if record["tensors"] is not None]
        files += [latest["activations"]] if latest is not None else []
        for file in files:
            path = self.home / file["name"]
            if not path.is_file() or file_sha256(path) != file["sha256"]:
                raise UserError(f"{path} is damaged or gone: {_advice(self.home)}")
        names = {Path(file["name"]).name for file in files}
        for folder in ("tensors", "activations"):
            self._keep_only(self.home / folder, names)

    @staticmethod
    def _keep_only(folder: Path, names: set[str]) -> None:
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()

    @contextmanager
    def _writing(self) -> Generator[None]:
        with writing(self.out):
            yield


@contextmanager
def journal_of(out: Path, *, resume: bool = False, overwrite: bool = False) -> Generator[FolderJournal]:
    """Opens and locks the journal of a run that writes to `out`.

    If the block succeeds, the journal is deleted; the output must have been written by then. Otherwise the journal is
    kept if it has finished work, or else deleted together with the parent folders that were created for it.

    Args:
        resume: continue with an existing journal.
        overwrite: whether an earlier result in `out` may be replaced.

    Raises:
        UserError: `out` cannot be used, another run is active, there is no journal to resume, or there is one and
            `resume` is False.
    """
    home = home_of(out)
    begun, finished = is_unfinished(out), (absolute(out) / MANIFEST).is_file()
    ours = begun or not home.is_dir() or _only_ours(home)
    if resume and not begun and ours and (finished or not home.is_dir()):
        why = f"{out} is finished" if finished else f"there is no {home}"
        raise UserError(f"nothing to resume: {why}; leave --resume out")
    # A run that was killed between its last rename and the deletion of its journal may replace its own output.
    overwrite = overwrite or (resume and _wrote(home, out))
    check_output(out, overwrite=overwrite)
    if home.is_symlink() or (home.exists() and not home.is_dir()):
        raise UserError(f"{home} is a file or a link, where a run keeps its journal: choose another output")
    if not ours:
        raise UserError(f"{home} was not written by admm-prune: choose another output")
    with ExitStack() as stack:
        try:
            stack.enter_context(removing_new_parents(home))
            home.mkdir(exist_ok=True)
            stack.enter_context(FolderLock(home / _LOCK))
        except OSError as error:
            raise UserError(f"cannot write to {out}: {error.strerror or error}") from error
        if begun and not resume:
            raise UserError(
                f"{home} contains an unfinished run: continue with --resume, or delete the folder to start over"
            )
        journal = FolderJournal(out, resumed=begun, overwrite=overwrite)
        keep = begun
        try:
            with _advising(out, lambda: journal.holds_work):
                yield journal
            keep = False
        except BaseException as error:
            interrupted = not isinstance(error, Exception)
            keep = keep or journal.holds_work or (interrupted and bool(journal.finished("dense")))
            raise
        finally:
            if not keep:
                _remove(home)


def _forwarded(method: Callable[Concatenate[FolderJournal, P], T]) -> Any:
    """A method of `SharedJournal` that calls this one in the first process only."""

    def call(self: SharedJournal, /, *arguments: P.args, **how: P.kwargs) -> T:
        def called(journal: FolderJournal) -> T:
            result: T = getattr(journal, method.__name__)(*arguments, **how)
            return result

        return self.in_first_process(called)

    return call


class SharedJournal(Journal):
    """One journal for all processes of a run. All processes make the same calls; the first one carries them out, and
    broadcasts results and errors.

    The folder must be visible to all processes, because they read each other's files in it.

    Args:
        journal: the journal in the first process; None in the others.
        world: the processes.
    """

    keeps = True

    def __init__(self, out: Path, journal: FolderJournal | None, world: World) -> None:
        self.out, self._journal, self._world = out, journal, world

    def in_first_process(self, call: Callable[[FolderJournal], T]) -> T:
        def in_this_process() -> T:
            assert self._journal is not None
            return call(self._journal)

        return self._world.broadcast_from_rank0(in_this_process)

    begun_with = _forwarded(FolderJournal.begun_with)
    finished = _forwarded(FolderJournal.finished)
    tensor_file = _forwarded(FolderJournal.tensor_file)
    commit = _forwarded(FolderJournal.commit)
    checkpoints = _forwarded(FolderJournal.checkpoints)
    scratch = _forwarded(FolderJournal.scratch)

    def begin(self, facts: Callable[[], dict[str, Any]]) -> None:
        """See `FolderJournal.begin`; the facts are computed in the first process only."""
        self.in_first_process(lambda journal: journal.begin(facts()))

    @property
    def resumed(self) -> bool:
        return self.in_first_process(lambda journal: journal.resumed)

    def resume_point(self, part: str) -> dict[str, Tensor] | None:
        if self._world.size == 1:
            return self.in_first_process(lambda journal: journal.resume_point(part))
        # Only single-process runs use saved activations, and nothing that several processes do is random.
        return None

    def output(self, write: Callable[[Path], T]) -> T:
        """Calls `write` in the first process, with an empty folder that then becomes the output; returns its result."""

        def written(journal: FolderJournal) -> T:
            with journal.output() as folder:
                return write(folder)

        return self.in_first_process(written)


@contextmanager
def shared_journal(
    out: Path, world: World, *, resume: bool = False, overwrite: bool = False
) -> Generator[SharedJournal]:
    """Opens the journal by `journal_of` in the first process, and yields it to all of them."""
    with ExitStack() as stack:
        if not world.first:
            stack.enter_context(_advising(out, lambda: _has_files(home_of(out) / "checkpoints")))
        opened: list[FolderJournal] = []
        world.broadcast_from_rank0(
            lambda: opened.append(stack.enter_context(journal_of(out, resume=resume, overwrite=overwrite)))
        )
        yield SharedJournal(out, opened[0] if opened else None, world)


@contextmanager
def _advising(out: Path, holds_work: Callable[[], bool]) -> Generator[None]:
    """Adds advice on resuming to the error of a file that cannot be written, if there is finished work."""
    try:
        yield
    except WriteError as error:
        if not holds_work():
            raise
        raise UserError(f"{error}: finished work is kept in {out}{SUFFIX}; continue with --resume") from error


def _has_files(folder: Path) -> bool:
    return any(path.is_file() for path in folder.rglob("*.*"))


def home_of(out: Path) -> Path:
    """The folder of the journal of a run that writes to `out`.

    Raises:
        UserError: `out` is the root of the file system, which has no folder next to it.
    """
    place = absolute(out)
    if not place.name:
        raise UserError(f"{out} is the root of the file system: choose another output")
    return place.with_name(place.name + SUFFIX)


def is_unfinished(out: Path) -> bool:
    """Whether there is a journal of a run that writes to `out`."""
    return (home_of(out) / _HEADER).is_file()


def _wrote(home: Path, out: Path) -> bool:
    """Whether `out` was written by the run of this journal: both have the same settings, texts and environment."""
    header, manifest = read_sealed(home / _HEADER) if (home / _HEADER).is_file() else None, absolute(out) / MANIFEST
    try:
        content = json.loads(manifest.read_bytes())
        return header is not None and all(content[key] == header[key] for key in ("settings", "texts", "environment"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remove(home: Path) -> None:
    """Deletes a journal: the header first, without which the rest is no unfinished run, and the lock last."""
    (home / _HEADER).unlink(missing_ok=True)
    for path in home.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
    (home / _LOCK).unlink(missing_ok=True)
    with suppress(OSError):
        home.rmdir()


def _only_ours(home: Path) -> bool:
    """Whether a folder without a header has only files of a journal, left by a run that was killed before it wrote
    the header, or after it deleted it."""
    known = {*_FOLDERS, _LOCK, f"{_HEADER}.unfinished", "scratch", "model", "old"}
    return all(path.name in known for path in home.iterdir())


def _check_same(home: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    if then.get("format") != now["format"]:
        raise UserError(f"{home} was written by another release of admm-prune: finish it with that release")
    for part, same in (("settings", "arguments"), ("environment", "machine and versions, or results would differ")):
        old, new = flattened(then.get(part, {})), flattened(now.get(part, {}))
        for key in old | new:
            if old.get(key) != new.get(key):
                raise UserError(
                    f"{home} was begun with {key.rpartition('.')[2]} {_said(old.get(key))}, not {_said(new.get(key))}: "
                    f"--resume needs the same {same}"
                )
    for role, text in then.get("texts", {}).items():
        if text != now.get("texts", {}).get(role):
            raise UserError(f"the {role} text is not the one that {home} was begun with: --resume needs the same")
    if then != now:
        raise UserError(f"the model is not the one that {home} was begun with: --resume needs the same weights")


def _said(value: Any) -> str:
    return "none" if value is None else str(value)


def _advice(home: Path) -> str:
    return f"the journal cannot be trusted; delete {home} to start over"


def _unseal(path: Path) -> dict[str, Any]:
    content = read_sealed(path)
    if content is None:
        raise UserError(f"{path} is damaged: {_advice(path.parent if path.name == _HEADER else path.parents[1])}")
    return content
