"""Products with packed matrices compared with those of torch: dense in the same dtype, dense in float32, and CSR.

    python -m benchmarks.packed_matvec OUT.json [--shape 4096x4096] [--sparsity 0.5,0.7,0.9] [--tokens 1,4,16]
        [--threads 1,2]

Every kind multiplies by `--layers` matrices of its own in turn, so that none of them is in a cache; the kinds and the
numbers of threads are interleaved in every repeat. With `--threads 1` times are CPU times of the process, otherwise
wall-clock times. Each time is compared with a lower bound: the bytes of the matrix at the rate at which this machine
sums a large vector. With several threads, the scaling of as many independent processes is measured too, each with a
matrix in its cache, because two hardware threads of one core do not do twice the work of one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """For each kind, the products by its matrices and the bytes of one of them."""
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
    """Seconds of a product in every repeat, by (threads, kind); the first round is a warm-up."""
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
    """Products per second of one token by a packed matrix of 1 MB, measured once all processes have started."""
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
    """The products per second of `count` concurrent processes, relative to those of a single one."""
    rates = []
    for processes in (1, count):
        with get_context("spawn").Manager() as manager, ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            start = manager.Barrier(processes)
            rates.append(sum(pool.map(products_per_second, [start] * processes, [seconds] * processes)))
    return rates[1] / rates[0]


def memory_rate(clock: Callable[[], float], device: str) -> float:
    """Bytes per second of a sum over 256 MiB, the best of five."""
    x = torch.ones(1 << 26, device=device)
    best = float("inf")
    for _ in range(5):
        began = clock()
        x.sum()
        best = min(best, clock() - began)
    return x.nbytes / best


def clock_for(device: str, threads: Sequence[int]) -> Callable[[], float]:
    """CPU time for a single thread, wall-clock time for several threads and for a GPU, after its work is done."""

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    if device == "cuda":
        return synchronized
    return time.process_time if list(threads) == [1] else time.perf_counter


def rows_of(
    seconds: Mapping[tuple[int, str], list[float]], sizes: Mapping[str, int], rate: float, first: int
) -> Iterator[dict[str, Any]]:
    """A row of figures for each number of threads and kind.

    Args:
        sizes: the bytes of one matrix, by kind.
        rate: the bytes per second of the memory.
        first: the number of threads that others are compared with.
    """
    for (count, name), values in seconds.items():
        ratio, ratio_range = median_ratio(seconds.get((count, "dense"), values), values)
        scaling, scaling_range = median_ratio(seconds[first, name], values)
        yield {
            "kind": name,
            "threads": count,
            "bytes": sizes[name],
            "seconds": statistics.median(values),
            "range": [min(values), max(values)],
            "floor_seconds": sizes[name] / rate,
            "times_as_fast_as_dense": ratio,
            "ratio_range": ratio_range,
            "times_as_fast_as_first_threads": scaling,
            "scaling_range": scaling_range,
        }


def line_of(row: Mapping[str, Any], dense_bytes: int, threads: Sequence[int]) -> str:
    """A row as one line of text."""
    low, high = row["ratio_range"]
    scaling = f", {row['times_as_fast_as_first_threads']:.2f} times {threads[0]} thread" if len(threads) > 1 else ""
    return (
        f"{row['sparsity']:.0%} {row['tokens']:3} tokens {row['kind']:14} {row['threads']} threads "
        f"{1000 * row['seconds']:8.3f} ms (floor {1000 * row['floor_seconds']:.3f}), "
        f"{row['times_as_fast_as_dense']:.2f} times as fast as dense ({low:.2f} to {high:.2f}), "
        f"{row['bytes'] / dense_bytes:.3f} of its bytes{scaling}"
    )


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

    clock = clock_for(given.device, threads)
    rows, columns = map(int, given.shape.split("x"))
    dtype = getattr(torch, given.dtype)
    results: list[dict[str, Any]] = []
    for sparsity in map(float, given.sparsity.split(",")):
        weights = [masked((rows, columns), sparsity, dtype, given.device) for _ in range(given.layers)]
        kinds = kinds_of(weights, given.kinds.split(","))
        sizes = {name: size for name, (_, size) in kinds.items()}
        for tokens in map(int, given.tokens.split(",")):
            x = torch.randn(tokens, columns, device=given.device).to(dtype)
            rate = memory_rate(clock, given.device)
            seconds = measured(kinds, x, given.repeats, clock, threads)
            for row in rows_of(seconds, sizes, rate, threads[0]):
                results.append({"sparsity": sparsity, "tokens": tokens, **row})
                print(line_of(results[-1], weights[0].nbytes, threads), flush=True)
    content: dict[str, Any] = {"command": vars(given) | {"out": str(given.out)}, "kernels": packed.described()}
    if max(threads) > 1:
        content["scaling_of_processes"] = {count: scaling_of_processes(count) for count in threads if count > 1}
        for count, scaling in content["scaling_of_processes"].items():
            print(f"{count} independent processes: {scaling:.2f} times one")
    content["rows"] = results
    given.out.write_text(json.dumps(content | {"machine": machine()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
