"""The manifest of a run: settings, versions and fingerprints to repeat it, with time and memory of each phase."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from admm_prune import __version__
from admm_prune.data.sequences import Sequences
from admm_prune.data.sources import Corpus
from admm_prune.methods.callbacks import Callback, Callbacks
from admm_prune.methods.parts import Kind, declared
from admm_prune.runs.machine import PeakMemory

_LOG = logging.getLogger(__name__)
_PACKAGES = ("admm-prune", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy")


@dataclass(frozen=True)
class TextRecord:
    """A text and how it was cut; `notes` list assumptions and replacements made in reading it."""

    source: str
    fingerprint: str
    documents: int
    packing: str
    length: int
    sequences: int
    tokens: int
    truncated_tokens: int
    dropped_sequences: int
    token_hash: str
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, corpus: Corpus, sequences: Sequences) -> TextRecord:
        return cls(
            source=corpus.name,
            fingerprint=corpus.fingerprint,
            documents=len(corpus.documents),
            packing=sequences.packing,
            length=sequences.length,
            sequences=len(sequences.rows),
            tokens=sequences.tokens,
            truncated_tokens=sequences.truncated_tokens,
            dropped_sequences=sequences.dropped_sequences,
            token_hash=sequences.token_hash,
            notes=corpus.notes,
        )


def environment(device: torch.device | str) -> dict[str, Any]:
    """Versions and the kind of machine; no names, paths or times, so that equal runs write equal files.

    Args:
        device: on which the model runs.
    """
    return {
        "versions": {name: _version(name) for name in _PACKAGES if name != "datasets" or find_spec(name)},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.device(device).type,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def manifest(
    settings: dict[str, Any], texts: dict[str, TextRecord], revision: str | None, device: torch.device | str
) -> dict[str, Any]:
    """The settings, the model's revision, the texts and the environment, ready for JSON."""
    described = environment(device)
    return {
        "settings": settings,
        "model_revision": revision,
        "texts": {name: asdict(record) for name, record in texts.items()},
        "environment": {**described, "versions": {**described["versions"], **_plugin_versions(settings)}},
    }


def _plugin_versions(settings: dict[str, Any]) -> dict[str, str]:
    """The versions of the packages that declare the parts that are chosen by name."""
    kinds: dict[str, Kind] = {
        "method": "solvers",
        "solver": "solvers",
        "problem": "problems",
        "constraint": "constraints",
    }
    points = (declared(kind).get(str(settings.get(name))) for name, kind in kinds.items())
    return {point.dist.name: point.dist.version for point in points if point is not None and point.dist is not None}


@dataclass
class Phase:
    """One part of a run; its figures are there when it is over.

    Attributes:
        peak_mib: peak memory beyond that at its start; see `PeakMemory`.
    """

    name: str
    seconds: float = 0.0
    peak_mib: float = 0.0


class Phases(list[Phase]):
    """The phases of a run in their order; calling it measures another one over a `with` block.

    Args:
        device: whose memory is measured.
        before: earlier phases.
        callback: is called at the beginning and the end of each.
    """

    def __init__(
        self, device: torch.device | str, before: Iterable[Phase] = (), callback: Callback | None = None
    ) -> None:
        super().__init__(before)
        self._device = device
        self._callback = Callbacks() if callback is None else callback

    @contextmanager
    def __call__(self, name: str) -> Generator[Phase]:
        phase = Phase(name)
        _LOG.info("%s ...", name)
        self._callback.on_phase_begin(name)
        began = time.perf_counter()
        with PeakMemory(self._device) as memory:
            yield phase
        phase.seconds, phase.peak_mib = round(time.perf_counter() - began, 3), memory.extra_mib
        _LOG.info("%s: %.1f s, %.0f MiB", name, phase.seconds, phase.peak_mib)
        self.append(phase)
        self._callback.on_phase_end(name, phase.seconds, phase.peak_mib)


def _version(name: str) -> str:
    """Of a package; of this one also where it runs from a checkout that is not installed."""
    return __version__ if name == "admm-prune" else version(name)
