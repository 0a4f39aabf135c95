"""The additional memory at the peak of one solve, measured in a separate process.

    python -m benchmarks.memory LAYER_FILE SOLVER TARGET

TARGET is a sparsity (0.7) or a pattern (2:4). Prints the MiB that building the problem, solving it and evaluating the
result take in addition to what is resident after the weight and the Gram matrix were loaded and the solver was run on a
tiny layer.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from admm_prune.data.layer_file import LayerFile, load_layer_file
from admm_prune.methods.target import Target, target_named
from admm_prune.runs.machine import PeakMemory
from benchmarks.configurations import CONFIGURATIONS, problem_for
from benchmarks.measuring import warm_up

_ROOT = Path(__file__).resolve().parents[1]


def peak_in_a_process(path: Path, solver: str, target: Target) -> float:
    """Runs this module in a fresh interpreter.

    Raises:
        RuntimeError: the solve failed; the message holds its last words.
    """
    command = [sys.executable, "-m", "benchmarks.memory", str(path.resolve()), solver, str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"no peak of {solver} on {path.name}: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return float(done.stdout)


def peak(path: Path, solver: str, target: Target) -> float:
    """MiB, in this process."""
    method = CONFIGURATIONS[solver]
    warm_up(method, target)
    loaded = load_layer_file(path)
    # Copies, so that no page of the file is first touched while the peak is measured; what is for reporting is let go.
    layer = LayerFile(
        weight=loaded.weight.clone(),
        gram=loaded.gram.clone(),
        gram_validation=None if loaded.gram_validation is None else loaded.gram_validation.clone(),
        cross_gram=None if loaded.cross_gram is None else loaded.cross_gram.clone(),
        metadata=loaded.metadata,
    )
    del loaded
    with PeakMemory() as memory:
        method.make().solve(problem_for(layer, method, target))
    return memory.extra_mib


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layer", type=Path)
    parser.add_argument("solver", choices=list(CONFIGURATIONS))
    parser.add_argument("target", type=target_named)
    chosen = parser.parse_args(arguments)
    print(peak(chosen.layer, chosen.solver, chosen.target))


if __name__ == "__main__":
    main()
