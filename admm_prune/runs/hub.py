"""Uploads the folder of a run to the Hugging Face Hub."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from admm_prune.data.durable import file_sha256
from admm_prune.data.hub import expanded, first_line, progress_bars
from admm_prune.errors import UserError, check_type
from admm_prune.models.archive import PACK_MANIFEST
from admm_prune.runs.card import CARD, PLACE
from admm_prune.runs.claims import read_json
from admm_prune.runs.journal.folder import MANIFEST


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Uploads all files of a run's folder or archive in one commit; creates the repository if needed.

    In the code of the model card, the id of the repository replaces the path of the folder, unless the card was edited.
    Other files in an existing repository are not changed.

    Args:
        folder: written by `prune(out=...)`, 'admm-prune run' or 'admm-prune pack'.
        repo_id: "owner/name", or "name" in the account of the token.
        private: whether a new repository is private; by default as the account is configured.
        revision: the branch; "main" by default.
        create_pr: open a pull request instead of committing to the branch.
        commit_message: by default one that names this package.
        token: by default that of 'hf auth login', or of the environment variable HF_TOKEN.

    Returns:
        The URL of the repository, or of the pull request.

    Raises:
        UserError: there is no such folder, an argument has a wrong type, or the Hub rejects the upload or cannot be
            reached; the message is one line.
    """
    for name, kind, value in (
        ("repo_id", "str", repo_id),
        ("private", "bool | None", private),
        ("revision", "str | None", revision),
        ("create_pr", "bool", create_pr),
        ("commit_message", "str | None", commit_message),
        ("token", "str | None", token),
    ):
        check_type(name, kind, value)
    place = expanded(folder)
    paths = list(_files(place))
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    try:
        with warnings.catch_warnings(), progress_bars(shown=sys.stderr.isatty()):
            warnings.simplefilter("ignore")  # about missing metadata, which are not errors
            repository = api.create_repo(repo_id, private=private, exist_ok=True)
            name = repository.repo_id
            operations = [
                CommitOperationAdd(path.relative_to(place).as_posix(), _content(place, path, name)) for path in paths
            ]
            commit = api.create_commit(
                name,
                operations,
                commit_message=commit_message or "Upload a model pruned with admm-prune",
                revision=revision,
                create_pr=create_pr,
            )
    except Exception as error:  # the errors differ between releases of the client
        raise UserError(f"cannot push to {repo_id}: {_reason(error)}") from error
    return str(commit.pr_url if create_pr else repository)


def _files(folder: Path) -> Iterator[Path]:
    """The files to upload.

    Raises:
        UserError: the folder was not written by a run, or contains a link.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    manifest = next((folder / name for name in (PACK_MANIFEST, MANIFEST) if (folder / name).is_file()), None)
    if manifest is None:
        raise UserError(f"{folder} was written neither by 'admm-prune run' nor by 'admm-prune pack'")
    content = read_json(manifest)
    if manifest.name == MANIFEST and not (isinstance(content, dict) and "settings" in content):
        raise UserError(f"{folder} was written neither by 'admm-prune run' nor by 'admm-prune pack'")
    if isinstance(content, dict) and "rows" in content:
        raise UserError(f"{folder} is a comparison: push one of its models, such as {folder}/models/...")
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise UserError(f"{path} is a link: only files are pushed")
        if path.is_file() and not path.relative_to(folder).as_posix().startswith(".cache/"):
            yield path


def _content(folder: Path, path: Path, repository: str) -> Path | bytes:
    """A file, or the model card with the repository in its snippets."""
    if path != folder / CARD or not _is_unedited(folder):
        return path
    return path.read_bytes().replace(PLACE.encode(), repository.encode())


def _is_unedited(folder: Path) -> bool:
    """Whether the model card is the one that the run wrote."""
    try:
        content: Any = read_json(folder / MANIFEST)
        return bool(content["files"].get(CARD) == file_sha256(folder / CARD))
    except (UserError, LookupError, TypeError, AttributeError):
        return False


def _reason(error: Exception) -> str:
    """One line with the reason for a failed upload, and the remedy."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    kind = type(error).__name__
    if status == 401 or kind in ("LocalTokenNotFoundError", "RepositoryNotFoundError"):
        return "no valid token for it: log in with 'hf auth login', or set HF_TOKEN"
    if status == 403:
        return "the token has no permission to write there"
    if kind == "OfflineModeIsEnabled":
        return "the client is offline: unset HF_HUB_OFFLINE"
    server = getattr(error, "server_message", None)
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
    lines = [line.strip(" -") for line in str(server or cause).splitlines() if line.strip(" -")]
    return " ".join(lines[:2]) if lines else first_line(error)
