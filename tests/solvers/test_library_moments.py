"""Adam's moments in 8 bits: the library's optimizer bit for bit, as good as ours, and ours where it is missing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm_prune import SparseAdam
from admm_prune.errors import UserError
from admm_prune.ops import library_adam
from admm_prune.solvers.elsa.moments import MomentFormat

SHAPE = (48, 100)  # blocks of 256 run across the rows, and the last one is short
EIGHT_BITS: tuple[MomentFormat, ...] = ("int8", "bitsandbytes")


def bowl(shape: torch.Size) -> tuple[Tensor, Tensor]:
    """f(x) = sum h (x - b)^2 / 2, with curvatures that differ by a factor of 1000."""
    return torch.logspace(-3, 0, shape[1]), torch.randn(shape, generator=torch.Generator().manual_seed(7))


def gradient(x: Tensor, step: int) -> Tensor:
    """With noise that depends on the step alone."""
    h, b = bowl(x.shape)
    return h * (x.float() - b + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(step)))


def loss(x: Tensor) -> float:
    h, b = bowl(x.shape)
    return float((h * (x.float() - b).square()).sum()) / 2


def start() -> nn.Parameter:
    return nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)))


def trained(optimizer: torch.optim.Optimizer, x: nn.Parameter, first: int, last: int) -> None:
    for step in range(first, last):
        x.grad = gradient(x.detach(), step).to(x.dtype)
        optimizer.step()


@pytest.mark.bitwise
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_a_penalty_it_is_the_librarys_own_optimizer(weight_decay: float) -> None:
    from bitsandbytes.optim import AdamW8bit

    ours, theirs = start(), start()
    how: dict[str, Any] = {"lr": 0.02, "weight_decay": weight_decay}
    a = SparseAdam([ours], sparsity=0.5, penalty=0.0, clip=None, moments="bitsandbytes", **how)
    b = AdamW8bit([theirs], min_8bit_size=1, **how)
    trained(a, ours, 0, 60)
    trained(b, theirs, 0, 60)
    assert a.moments == f"bitsandbytes {library_adam.installed()}"
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bits_end_where_full_moments_end(dtype: torch.dtype) -> None:
    """Masked training, as `elsa-l` does it: the loss that is left differs little from that of full moments."""
    reached = {}
    for moments in ("full", *EIGHT_BITS):
        x = nn.Parameter(start().detach().to(dtype))
        optimizer = SparseAdam([x], sparsity=0.5, lr=0.02, freeze=1.0, clip=None, moments=moments)
        before = loss(x.detach())
        for step in range(400):
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * (1 - step / 400)
            trained(optimizer, x, step, step + 1)
        reached[moments] = loss(x.detach()) / before
        assert int(x.count_nonzero()) <= 2400
    assert reached["full"] < 0.9
    for moments in EIGHT_BITS:
        assert reached[moments] == pytest.approx(reached["full"], rel=0.01), reached


@pytest.mark.bitwise
@pytest.mark.parametrize("moments", EIGHT_BITS)
def test_a_saved_run_goes_on_as_if_it_had_not_stopped(moments: MomentFormat) -> None:
    how: dict[str, Any] = {"sparsity": 0.6, "lr": 0.01, "total_steps": 48, "interval": 8, "moments": moments}
    whole = start()
    trained(SparseAdam([whole], **how), whole, 0, 48)
    part = start()
    optimizer = SparseAdam([part], **how)
    trained(optimizer, part, 0, 21)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer = SparseAdam([part], **how)
    optimizer.load_state_dict(saved)
    trained(optimizer, part, 21, 48)
    assert torch.equal(whole, part)


def test_moments_of_another_format_are_refused() -> None:
    x = start()
    optimizer = SparseAdam([x], sparsity=0.5, lr=0.01, moments="bitsandbytes")
    trained(optimizer, x, 0, 2)
    for other in ("full", "int8"):
        with pytest.raises(UserError, match="in another format"):
            SparseAdam([x], sparsity=0.5, lr=0.01, moments=other).load_state_dict(optimizer.state_dict())


def test_where_the_library_is_missing_our_own_8_bits_take_its_place_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_adam, "find_spec", lambda name: None)
    x, same = start(), start()
    optimizer = SparseAdam([x], sparsity=0.5, lr=0.01, moments="bitsandbytes")
    trained(optimizer, x, 0, 10)
    trained(SparseAdam([same], sparsity=0.5, lr=0.01, moments="int8"), same, 0, 10)
    assert torch.equal(x, same)
    assert optimizer.moments == "int8"
    assert optimizer.notes == ("bitsandbytes is not installed: Adam's moments are kept in this package's 8-bit format",)


def test_there_are_three_formats() -> None:
    with pytest.raises(UserError, match=r"unknown format of moments 'int4'.*: choose one of full, int8, bitsandbytes"):
        SparseAdam([start()], sparsity=0.5, moments="int4")  # type: ignore[arg-type]
