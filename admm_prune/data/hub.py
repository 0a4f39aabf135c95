"""Shared access to the Hugging Face Hub: repository names, muted logging, one-line errors."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from admm_prune.errors import UserError

_LIBRARIES = ("transformers", "huggingface_hub", "datasets")
_PATIENCE = 10.0  # seconds, the client's own for one request
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_repository(source: str) -> bool:
    """True where `source` can be a Hub id, "name" or "owner/name", by its form alone."""
    return _REPOSITORY.fullmatch(source) is not None


def expanded(path: str | Path) -> Path:
    """A path with a home folder in place of ~.

    Raises:
        UserError: it is the home of a user that does not exist, or no path.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such home folder") from error
    except TypeError as error:
        raise UserError(f"a path must be a string or a pathlib.Path, not {path!r}") from error


def check_hub(repository: str, kind: Literal["model", "dataset"]) -> None:
    """Contacts the Hub once for a repository: without a connection, downloads would retry for a long time.

    The client waits 23 seconds between its attempts to download a file, and has no setting for that.

    Raises:
        ConnectionError: there is no answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().repo_info(repository, repo_type=kind, timeout=_PATIENCE)
    except (HfHubHTTPError, ValueError):  # the Hub answered, or the name is invalid: the download reports it
        return
    except Exception as error:  # releases of the client differ in the network errors that they raise
        raise ConnectionError(first_line(error)) from error


def fetch(repository: str, names: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a model repository in the local cache, with those of its files that have these names.

    Args:
        names: shell patterns; only files at the repository's root are meant.
        revision: the commit; the latest by default, or without the Hub the latest that is in the cache.

    Raises:
        OSError, ValueError: the Hub has no such repository, or is out of reach and nothing of it is in the cache.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(names), ignore_patterns=["*/*"])
        )
    except (OSError, ValueError):
        raise
    except Exception as error:  # as in check_hub
        raise ConnectionError(first_line(error)) from error


@contextmanager
def progress_bars(*, shown: bool) -> Generator[None]:
    """Context in which huggingface_hub shows its progress bars, or hides them; the setting is restored after it."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    def switch(on: bool) -> None:
        if are_progress_bars_disabled() == on:  # else there is a warning where an environment variable sets them
            (enable_progress_bars if on else disable_progress_bars)()

    before = not are_progress_bars_disabled()
    switch(shown)
    try:
        yield
    finally:
        switch(before)


@contextmanager
def quiet() -> Generator[None]:
    """Mutes log lines and progress bars of transformers, huggingface_hub and datasets, and restores them after.

    What matters in those lines (missing weights, no connection) is reported as a `UserError` instead.
    """
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    levels = [logger.level for logger in loggers]
    model_bars = transformers_logging.is_progress_bar_enabled()
    datasets = sys.modules.get("datasets")  # avoids a second of import time where datasets are not used
    data_bars = datasets is not None and not datasets.are_progress_bars_disabled()
    with progress_bars(shown=False):  # transformers switches them with its own
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        transformers_logging.disable_progress_bar()
        if datasets is not None:
            datasets.disable_progress_bars()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if model_bars:
                transformers_logging.enable_progress_bar()
            if datasets is not None and data_bars:
                datasets.enable_progress_bars()


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says anything, else its class."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
