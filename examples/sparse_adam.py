"""Prune a network while it is trained, with nothing but `pip install admm-prune`: `SparseAdam` in place of Adam.

python examples/sparse_adam.py
"""

from __future__ import annotations

import torch
from torch import nn

from admm_prune import SparseAdam

STEPS = 200


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    teacher = torch.randn(8, 32, generator=generator) * (torch.rand(8, 32, generator=generator) < 0.1)
    optimizer = SparseAdam(model, sparsity=0.9, lr=1e-2, total_steps=STEPS)
    for step in range(STEPS):
        x = torch.randn(64, 32, generator=generator)
        loss = nn.functional.mse_loss(model(x), x @ teacher.T)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss:.4f}")
    masks = optimizer.finalize()
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    x = torch.randn(1024, 32, generator=generator)
    loss = nn.functional.mse_loss(model(x), x @ teacher.T)
    print(f"pruned: loss {loss:.4f}, {kept} of {total} weights kept")


if __name__ == "__main__":
    main()
