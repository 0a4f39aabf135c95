"""Products with packed matrices beside torch's: dense in the same dtype, dense in float32, and CSR; with bytes.

    python -m benchmarks.packed_matvec OUT.json [--shape 4096x4096] [--sparsity 0.5,0.7,0.9] [--tokens 1,4,16]

Every kind multiplies by its own `--layers` matrices in turn, so that none is in a cache, and the kinds take turns in
every repeat. With one thread, times are the CPU time of the process; with more, or on CUDA, wall-clock times. Beside
each time is the floor of its bytes at the rate at which this machine sums a large vector in the same minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from admm_prune.ops import packed
from benchmarks.machine import machine


def masked(shape: tuple[int, int], sparsity: float, dtype: torch.dtype, device: str) -> Tensor:
    weight = torch.randn(shape, device=device)
    weight[torch.rand(shape, device=device) < sparsity] = 0
    return weight.to(dtype)


def kinds_of(weights: Sequence[Tensor], which: Sequence[str]) -> dict[str, tuple[list[Callable[[Tensor], Any]], int]]:
    """Products of each kind, and the bytes of one matrix."""
    first = weights[0]
    kinds: dict[str, tuple[list[Callable[[Tensor], Any]], int]] = {}
    if "packed" in which:
        matrices = [packed.pack(w) for w in weights]
        kinds["packed"] = [lambda x, m=m: packed.linear(x, m) for m in matrices], matrices[0].nbytes
    if "packed-int8" in which:
        matrices = [packed.quantize(packed.pack(w)) for w in weights]
        kinds["packed-int8"] = [lambda x, m=m: packed.linear(x, m) for m in matrices], matrices[0].nbytes
    if "dense" in which:
        kinds["dense"] = [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights], first.nbytes
    if "dense-float32" in which:
        wide = [w.float() for w in weights]
        kinds["dense-float32"] = [lambda x, w=w: torch.nn.functional.linear(x.float(), w) for w in wide], wide[0].nbytes
    if "csr" in which:
        sparse = [w.float().to_sparse_csr() for w in weights]
        parts = sparse[0].values(), sparse[0].col_indices(), sparse[0].crow_indices()
        kinds["csr"] = [lambda x, w=w: (w @ x.float().T).T for w in sparse], sum(part.nbytes for part in parts)
    return kinds


def measured(
    kinds: Mapping[str, tuple[list[Callable[[Tensor], Any]], int]], x: Tensor, repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of a product of each kind, in every repeat; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    with torch.no_grad():
        for _ in range(repeats + 1):
            for name, (products, _) in kinds.items():
                began = clock()
                for product in products:
                    product(x)
                seconds[name].append((clock() - began) / len(products))
    return {name: values[1:] for name, values in seconds.items()}


def memory_rate(clock: Callable[[], float], device: str) -> float:
    """Bytes per second of a sum of 256 MiB, the best of five."""
    x = torch.ones(1 << 26, device=device)
    best = float("inf")
    for _ in range(5):
        began = clock()
        x.sum()
        best = min(best, clock() - began)
    return x.nbytes / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="4096x4096")
    parser.add_argument("--sparsity", default="0.5,0.7,0.9")
    parser.add_argument("--tokens", default="1,4,16")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kinds", default="packed,dense,dense-float32,csr")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    cpu = time.process_time if given.threads == 1 else time.perf_counter
    clock = synchronized if given.device == "cuda" else cpu
    rows, columns = map(int, given.shape.split("x"))
    dtype = getattr(torch, given.dtype)
    results: list[dict[str, Any]] = []
    for sparsity in map(float, given.sparsity.split(",")):
        weights = [masked((rows, columns), sparsity, dtype, given.device) for _ in range(given.layers)]
        kinds = kinds_of(weights, given.kinds.split(","))
        for tokens in map(int, given.tokens.split(",")):
            x = torch.randn(tokens, columns, device=given.device).to(dtype)
            rate = memory_rate(clock, given.device)
            seconds = measured(kinds, x, given.repeats, clock)
            for name, values in seconds.items():
                median = statistics.median(values)
                ratios = [a / b for a, b in zip(seconds.get("dense", values), values, strict=True)]
                row = {
                    "sparsity": sparsity,
                    "tokens": tokens,
                    "kind": name,
                    "bytes": kinds[name][1],
                    "seconds": median,
                    "range": [min(values), max(values)],
                    "floor_seconds": kinds[name][1] / rate,
                    "times_as_fast_as_dense": statistics.median(ratios),
                    "ratio_range": [min(ratios), max(ratios)],
                }
                results.append(row)
                print(
                    f"{sparsity:.0%} {tokens:3} tokens {name:14} {1000 * median:8.3f} ms (floor "
                    f"{1000 * kinds[name][1] / rate:.3f}), {statistics.median(ratios):.2f} times as fast as dense "
                    f"({min(ratios):.2f} to {max(ratios):.2f}), {kinds[name][1] / weights[0].nbytes:.3f} of its bytes",
                    flush=True,
                )
    content = {"command": vars(given) | {"out": str(given.out)}, "kernels": packed.described(), "rows": results}
    given.out.write_text(json.dumps(content | {"machine": machine()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
