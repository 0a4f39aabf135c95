"""admm-prune pack and unpack: a masked model without its zeros, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from admm_prune.cli import common

if TYPE_CHECKING:
    from admm_prune.inference.packing import Packing

_OutFolder = Annotated[Path, typer.Argument(help="Folder to write, whole or not at all.")]


def pack(
    folder: Annotated[Path, typer.Argument(help="A model folder, such as 'admm-prune run' writes.")],
    out: _OutFolder,
    overwrite: common.Overwrite = False,
    json: common.Json = False,
) -> None:
    """Archive a masked model: of every tensor with enough zeros a bitmask and the other values. Lossless.

    Example: admm-prune pack pruned archive
    """
    from admm_prune.inference.packing import pack as pack_folder

    with common.progress_bar("packing") as progress:
        packing = pack_folder(folder, out, progress, overwrite=overwrite)
    _tell(packing, out, json)


def unpack(
    folder: Annotated[Path, typer.Argument(help="An archive, as 'admm-prune pack' writes it.")],
    out: _OutFolder,
    overwrite: common.Overwrite = False,
    json: common.Json = False,
) -> None:
    """Give an archived model back, every file to the byte, held to its sha256.

    Example: admm-prune unpack archive pruned
    """
    from admm_prune.inference.packing import unpack as unpack_folder

    with common.progress_bar("unpacking") as progress:
        packing = unpack_folder(folder, out, progress, overwrite=overwrite)
    _tell(packing, out, json)


def _tell(packing: Packing, out: Path, json: bool) -> None:
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
        print("Nothing is gained: no tensor has enough zeros to become smaller.")
