"""The cost of SparseAdam compared with torch's Adam: time and peak memory of a step, dual updates, bytes of state.

    python -m benchmarks.training_step OUT.json [--model embedded] [--length 128] [--batch-size 8]

A step is a forward and a backward pass on random tokens in float32, and the step of the optimizer, in CPU time. The
steps of the optimizers alternate, and ratios are ratios of medians. Peaks are those of all allocations of torch in the
first three steps without the model, each in a fresh process. For dual updates the table has their fraction of the time
of a run with one every 32 steps.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from admm_prune import SparseAdam
from admm_prune.models.loading import load
from benchmarks.machine import headline, machine

Make = Callable[[nn.Module], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=1e-4),
    "SparseAdam, bfloat16 anchor": lambda model: SparseAdam(model, sparsity=0.9, lr=1e-4, interval=32),
    "SparseAdam, int8 anchor": lambda model: SparseAdam(model, sparsity=0.9, lr=1e-4, interval=32, anchor="int8"),
    "SparseAdam, support frozen": lambda model: SparseAdam(model, sparsity=0.9, lr=1e-4, freeze=1.0),
    "SparseAdam, gradual": lambda model: SparseAdam(
        model, sparsity=0.9, lr=1e-4, penalty=math.inf, total_steps=1000, ramp=1.0, interval=32
    ),
}

_INTERVAL = 32  # of the configurations above
_WARM_UP = 3


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    """Seconds of the optimizer's part, of one whole step."""
    model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    began = time.process_time()
    optimizer.step()
    spent = time.process_time() - began
    optimizer.zero_grad()
    return spent


def times(model_name: str, batches: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """Of every configuration: CPU seconds of a whole step and of the optimizer's part, medians, without dual updates;
    the extra of a dual update; its share of a run."""
    runs = {name: _started(model_name, make) for name, make in OPTIMIZERS.items()}
    spent: dict[str, list[tuple[float, float, bool]]] = {name: [] for name in runs}
    for i, batch in enumerate(batches):
        for name, (model, optimizer) in runs.items():
            began = time.process_time()
            part = step(model, optimizer, batch)
            dual = i > 0 and i % _INTERVAL == 0 and name != "Adam"
            if i >= _WARM_UP:
                spent[name].append((time.process_time() - began, part, dual))
    rows = {}
    for name, every in spent.items():
        plain = [(whole, part) for whole, part, dual in every if not dual]
        duals = [part for _, part, dual in every if dual]
        whole, part = median(whole for whole, _ in plain), median(part for _, part in plain)
        extra = max(0.0, median(duals) - part) if duals else 0.0
        rows[name] = {
            "step_seconds": whole,
            "optimizer_seconds": part,
            "dual_update_seconds": extra,
            "dual_update_share": extra / _INTERVAL / whole,
        }
    for row in rows.values():
        row["step_ratio"] = row["step_seconds"] / rows["Adam"]["step_seconds"]
    return rows


def peak(model_name: str, name: str, batches: Sequence[Tensor]) -> dict[str, float]:
    """In this process: MiB beyond the model at the peak of the first steps, and bytes of state a pruned weight."""
    model = load(model_name, dtype="float32").model.requires_grad_(True)
    optimizer = OPTIMIZERS[name](model)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for batch in batches[:3]:
            step(model, optimizer, batch)
    state = [x for held in optimizer.state.values() for x in held.values() if isinstance(x, Tensor)]
    return {
        "peak_mib": _peak_bytes(profiler) / 2**20,
        "state_mib": sum(x.numel() * x.element_size() for x in state) / 2**20,
        "bytes_a_weight_beyond_adam": _beyond_adam(optimizer),
    }


def _peak_bytes(profiler: profile) -> int:
    """The most that was allocated at once beyond what was there at the start; allocations are counted, not pages."""
    records = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(records, key=lambda e: e.start_ns())))


def _beyond_adam(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of state a pruned weight, the moments and the count of steps left out."""
    adam = {"exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "step"}
    held = [(p, state) for p, state in optimizer.state.items() if "mask" in state]
    extra = sum(
        x.numel() * x.element_size()
        for _, state in held
        for name, x in state.items()
        if isinstance(x, Tensor) and name not in adam
    )
    return extra / sum(p.numel() for p, _ in held) if held else 0.0


def _started(model_name: str, make: Make) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = load(model_name, dtype="float32").model.requires_grad_(True)
    return model, make(model)


def _batches(arguments: argparse.Namespace, count: int) -> list[Tensor]:
    vocabulary = load(arguments.model).model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch_size, arguments.length)
    return [torch.randint(vocabulary, shape, generator=generator) for _ in range(count)]


def _peak_elsewhere(arguments: argparse.Namespace, name: str) -> dict[str, float]:
    words = ["--model", arguments.model, "--length", str(arguments.length), "--batch-size", str(arguments.batch_size)]
    command = [sys.executable, "-m", "benchmarks.training_step", "-", *words, "--peak-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2 * _INTERVAL)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak-of", choices=list(OPTIMIZERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        print(json.dumps(peak(arguments.model, arguments.peak_of, _batches(arguments, 3))))
        return
    rows: dict[str, dict[str, Any]] = times(arguments.model, _batches(arguments, arguments.steps))
    for name, row in rows.items():
        row |= _peak_elsewhere(arguments, name)
    for row in rows.values():
        row["peak_beyond_adam_and_state"] = (
            row["peak_mib"] - row["state_mib"] - rows["Adam"]["peak_mib"] + rows["Adam"]["state_mib"]
        ) / rows["Adam"]["peak_mib"]
    facts = machine()
    settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "peak_of")}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": facts, "settings": settings, "rows": rows}, indent=1) + "\n")
    print(headline(facts))
    for name, row in rows.items():
        print(
            f"{name:28} step {row['step_ratio']:.3f} x Adam's, dual updates {row['dual_update_share']:.2%} of a run, "
            f"peak {row['peak_mib']:.1f} MiB ({row['peak_beyond_adam_and_state']:+.2%} beyond Adam's peak and state), "
            f"{row['bytes_a_weight_beyond_adam']:.3f} bytes a weight beyond Adam"
        )


if __name__ == "__main__":
    main()
