"""Products with packed matrices beside torch's: dense in the same dtype, dense in float32, and CSR; with bytes.

    python -m benchmarks.packed_matvec OUT.json [--shape 4096x4096] [--sparsity 0.5,0.7,0.9] [--tokens 1,4,16]
        [--threads 1,2]

Every kind multiplies by its own `--layers` matrices in turn, so that none is in a cache, and the kinds take turns in
every repeat, as do the numbers of threads. With one thread alone, times are the CPU time of the process; otherwise
wall-clock times. Beside each time is the floor of its bytes at the rate at which this machine sums a large vector in
the same minute; beside several threads, what as many processes reach that share nothing, each with a matrix in its
cache: two hardware threads of one core do not do twice the work of one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier
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
    kinds: Mapping[str, tuple[list[Callable[[Tensor], Any]], int]],
    x: Tensor,
    repeats: int,
    clock: Callable[[], float],
    threads: Sequence[int],
) -> dict[tuple[int, str], list[float]]:
    """Seconds of a product by (threads, kind), in every repeat; the first round is not counted."""
    seconds: dict[tuple[int, str], list[float]] = {(count, name): [] for count in threads for name in kinds}
    with torch.no_grad():
        for _ in range(repeats + 1):
            for (count, name), values in seconds.items():
                torch.set_num_threads(count)
                products = kinds[name][0]
                began = clock()
                for product in products:
                    product(x)
                values.append((clock() - began) / len(products))
    torch.set_num_threads(threads[0])
    return {key: values[1:] for key, values in seconds.items()}


def median_ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, list[float]]:
    """The median of a / b over the repeats, and the range."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return statistics.median(ratios), [min(ratios), max(ratios)]


def products_per_second(start: Barrier, seconds: float) -> float:
    """The rate of products of one token by a packed matrix of 1 MB, once all processes have come to the start."""
    torch.set_num_threads(1)
    matrix, x = packed.pack(masked((512, 4096), 0.5, torch.bfloat16, "cpu")), torch.randn(1, 4096).bfloat16()
    packed.linear(x, matrix)
    start.wait()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        packed.linear(x, matrix)
        count += 1
    return count / (time.perf_counter() - began)


def scaling_of_processes(count: int, seconds: float = 2.0) -> float:
    """The products per second of so many processes at once, over those of one alone."""
    rates = []
    for processes in (1, count):
        with get_context("spawn").Manager() as manager, ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            start = manager.Barrier(processes)
            rates.append(sum(pool.map(products_per_second, [start] * processes, [seconds] * processes)))
    return rates[1] / rates[0]


def memory_rate(clock: Callable[[], float], device: str) -> float:
    """Bytes per second of a sum of 256 MiB, the best of five."""
    x = torch.ones(1 << 26, device=device)
    best = float("inf")
    for _ in range(5):
        began = clock()
        x.sum()
        best = min(best, clock() - began)
    return x.nbytes / best


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="4096x4096")
    parser.add_argument("--sparsity", default="0.5,0.7,0.9")
    parser.add_argument("--tokens", default="1,4,16")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kinds", default="packed,dense,dense-float32,csr")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", default="1")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    threads = [int(count) for count in given.threads.split(",")]
    torch.set_num_threads(threads[0])
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    cpu = time.process_time if threads == [1] else time.perf_counter
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
            seconds = measured(kinds, x, given.repeats, clock, threads)
            for (count, name), values in seconds.items():
                floor, of_dense = kinds[name][1] / rate, kinds[name][1] / weights[0].nbytes
                ratio, ratio_range = median_ratio(seconds.get((count, "dense"), values), values)
                scaling, scaling_range = median_ratio(seconds[threads[0], name], values)
                row = {
                    "sparsity": sparsity,
                    "tokens": tokens,
                    "kind": name,
                    "threads": count,
                    "bytes": kinds[name][1],
                    "seconds": statistics.median(values),
                    "range": [min(values), max(values)],
                    "floor_seconds": floor,
                    "times_as_fast_as_dense": ratio,
                    "ratio_range": ratio_range,
                    "times_as_fast_as_first_threads": scaling,
                    "scaling_range": scaling_range,
                }
                results.append(row)
                scaled = f", {scaling:.2f} times {threads[0]} thread" if len(threads) > 1 else ""
                print(
                    f"{sparsity:.0%} {tokens:3} tokens {name:14} {count} threads {1000 * row['seconds']:8.3f} ms "
                    f"(floor {1000 * floor:.3f}), {ratio:.2f} times as fast as dense ({ratio_range[0]:.2f} to "
                    f"{ratio_range[1]:.2f}), {of_dense:.3f} of its bytes{scaled}",
                    flush=True,
                )
    content: dict[str, Any] = {"command": vars(given) | {"out": str(given.out)}, "kernels": packed.described()}
    if max(threads) > 1:
        content["scaling_of_processes"] = {count: scaling_of_processes(count) for count in threads if count > 1}
        for count, scaling in content["scaling_of_processes"].items():
            print(f"{count} processes that share nothing: {scaling:.2f} times one")
    content["rows"] = results
    given.out.write_text(json.dumps(content | {"machine": machine()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
