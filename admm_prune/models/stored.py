"""Whether safetensors files hold what a model's config asks for, told from their headers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from admm_prune.errors import UserError
from admm_prune.models.structure import Block, decoder_blocks

_WHOLE = ("I", "U", "BOOL")  # how the names of dtypes begin that are no float's


def shapes(kind: Any, config: Any, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False) -> Any:
    """The model of a config on the meta device, in evaluation mode: all of its shapes, no weights.

    Args:
        kind: its class, or an auto class.
    """
    auto = hasattr(kind, "from_config")
    build = kind.from_config if auto else kind._from_config
    code = {"trust_remote_code": trust_remote_code} if auto else {}
    with torch.device("meta"):
        return build(config, dtype=dtype, **code).eval().requires_grad_(False)


def check_stored(source: str, model: Any, files: Mapping[str, Path]) -> None:
    """Refuses files that hold other weights than the model has: of another shape, in whole numbers, of more blocks.

    Weights that files name otherwise than the model does are left to who loads them.

    Args:
        source: as the user named the model.
        model: its shapes; no weights are needed.
        files: of every stored tensor, by its name.

    Raises:
        UserError: the message names the weight.
    """
    blocks: list[Block] = []
    with suppress(UserError):  # a model that cannot be pruned may be evaluated
        blocks = decoder_blocks(model)
    path = blocks[0].name.rpartition(".")[0] if blocks else None
    for name in files if path else ():
        number = name.removeprefix(f"{path}.").partition(".")[0]
        if name.startswith(f"{path}.") and number.isdecimal() and int(number) >= len(blocks):
            raise UserError(f"{source}: the weights hold {name}, but config.json asks for {len(blocks)} blocks only")
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for path_ in dict.fromkeys(files.values()):
        with safe_open(path_, framework="pt") as file:
            for name in (name for name, own in files.items() if own == path_ and name in wanted):
                stored = file.get_slice(name)
                shape, dtype = tuple(stored.get_shape()), str(stored.get_dtype())
                if dtype.startswith(_WHOLE):
                    raise UserError(f"{source}: the weight {name} is stored in whole numbers ({dtype}), not as floats")
                if shape != wanted[name]:
                    raise UserError(
                        f"{source}: the weight {name} is of shape {shape}, config.json asks for {wanted[name]}"
                    )
