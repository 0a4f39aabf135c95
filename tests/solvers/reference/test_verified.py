"""What the exact references write down, `verify` accepts: their bound is no more than what another point shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from admm_prune.data.layer_file import LayerFile
from admm_prune.errors import UserError
from admm_prune.methods.local import method_named
from admm_prune.methods.target import Target
from admm_prune.runs.layer import solve_path
from admm_prune.verify.layer import verify_layer


def layer(path: Path, seed: int, dtype: torch.dtype, *, shift: float = 0.0, energy: float = 1.0) -> Path:
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(40, 6, generator=g) + 0.5 * torch.randn(40, 1, generator=g)).double()
    weight = torch.randn(2, 6, generator=g) * 10.0 ** torch.empty(2, 6).uniform_(-6, 6, generator=g)
    dense = x + shift * torch.randn(x.shape, generator=g)
    whole = float((dense @ weight.double().T).square().sum()) * energy
    LayerFile(
        weight=weight.to(dtype),
        gram=(x.T @ x).to(dtype),
        cross_gram=(dense.T @ x).to(dtype) if shift else None,
        metadata={"target_energy": repr(whole)} if shift else {},
    ).save(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["brute-force", "branch-and-bound"])
@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_a_solved_layer_is_verified(tmp_path: Path, dtype: torch.dtype, method: str, shift: float) -> None:
    """The bound was the value of the rounded point, which a refit in float64 went below."""
    for seed in range(8):
        path, out = layer(tmp_path / "layer.safetensors", seed, dtype, shift=shift), tmp_path / "v.safetensors"
        (solved,) = solve_path(path, method_named(method), [Target(0.5)], out=out, device="cpu", overwrite=seed > 0)
        assert solved.bound is not None
        found = verify_layer(out)
        assert found.verified, found.failures
        if not shift:  # verify adds the ridge in float64, the solver in the Gram's dtype
            assert solved.bound <= found.numbers["reachable"] * (1 + 8 * torch.finfo(dtype).eps)


def test_an_energy_that_is_too_small_is_refused_before_any_work(tmp_path: Path) -> None:
    path, out = layer(tmp_path / "layer.safetensors", 0, torch.float32, shift=1e-4, energy=0.9), tmp_path / "v"
    with pytest.raises(UserError, match=r"layer.safetensors: target_energy .* is not the squared norm of the target"):
        solve_path(path, method_named("magnitude"), [Target(0.5)], out=out, device="cpu")
    assert not out.exists()
