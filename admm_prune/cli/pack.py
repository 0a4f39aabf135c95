"""admm-prune pack and unpack: archives of masked models without the zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from admm_prune.cli import common
from admm_prune.cli.progress import shown_progress

if TYPE_CHECKING:
    from admm_prune.inference.packing import Packing

_OutFolder = Annotated[Path, typer.Argument(help="Output folder; written completely, or not at all.")]


@common.logs
def pack(
    folder: Annotated[Path, typer.Argument(help="A model folder, as written by 'admm-prune run'.")],
    out: _OutFolder,
    overwrite: common.Overwrite = False,
    json: common.Json = False,
) -> None:
    """Archive a masked model without loss: a bitmask and the non-zero values of every tensor with enough zeros.

    Example: admm-prune pack pruned archive
    """
    from admm_prune.inference.packing import pack as pack_folder

    _write(pack_folder, "packing", folder, out, overwrite, json)


@common.logs
def unpack(
    folder: Annotated[Path, typer.Argument(help="An archive, as written by 'admm-prune pack'.")],
    out: _OutFolder,
    overwrite: common.Overwrite = False,
    json: common.Json = False,
) -> None:
    """Restore an archived model; every file is restored exactly and checked by its sha256.

    Example: admm-prune unpack archive pruned
    """
    from admm_prune.inference.packing import unpack as unpack_folder

    _write(unpack_folder, "unpacking", folder, out, overwrite, json)


def _write(action: Callable[..., Packing], what: str, folder: Path, out: Path, overwrite: bool, json: bool) -> None:
    with shown_progress(what) as progress:
        packing = action(folder, out, progress.step, overwrite=overwrite)
    if json:
        common.emit(
            {
                "out": str(out),
                "bytes": packing.bytes,
                "packed_bytes": packing.packed_bytes,
                "ratio": packing.ratio,
                "packed_tensors": packing.tensors,
            }
        )
        return
    print(f"{packing.bytes:,} bytes dense, {packing.packed_bytes:,} packed: {packing.ratio:.3f}; in {out}")
    if packing.ratio >= 1:
        print("No gain: no tensor has enough zeros to become smaller.")
