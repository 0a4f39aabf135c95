"""Runs `admm-prune solve` on layer problems and prints its errors over those published for the same problems.

    python -m benchmarks.instances LAYERS --seed 0
    python -m benchmarks.anchors LAYERS [--solvers sparsegpt,admm]

SparseGPT is compared with SparseGPT's own code, everything else with ALPS's; see benchmarks/references.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from admm_prune.data.layer_file import load_layer_file
from benchmarks.published import instance_name, published

TARGETS = {"50%": "--sparsity=0.5", "70%": "--sparsity=0.7", "90%": "--sparsity=0.9", "2:4": "--pattern=2:4"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", type=Path)
    parser.add_argument("--solvers", default="sparsegpt,admm")
    args = parser.parse_args()
    command = Path(sys.executable).with_name("admm-prune")
    for solver in args.solvers.split(","):
        ratios = []
        for layer in sorted(args.layers.glob("*.safetensors")):
            name = instance_name(load_layer_file(layer))
            for label, target in TARGETS.items():
                words = [command, "solve", layer, "--solver", solver, target, "--json"]
                outcome = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
                base = published(name, label)["sparsegpt" if solver == "sparsegpt" else "alps"]
                ratio = outcome["relative_error"] / base.calibration, outcome["relative_error_holdout"] / base.holdout
                ratios.append(ratio)
                print(
                    f"{solver:10s} {layer.stem:10s} {label:4s} error {outcome['relative_error']:.4e}"
                    f"  / published {ratio[0]:.4f}  held out {ratio[1]:.4f}  peak {outcome['peak_mib']:.0f} MiB",
                    flush=True,
                )
        print(f"{solver}: worst {max(r[0] for r in ratios):.4f}, held out {max(r[1] for r in ratios):.4f}")


if __name__ == "__main__":
    main()
