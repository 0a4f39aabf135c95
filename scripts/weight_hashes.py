"""Hashes the weights that every method gives on the embedded model, to check a change that only moves code.

    python scripts/weight_hashes.py before.json
    python scripts/weight_hashes.py after.json --against before.json

One thread, one seed, little text. Hashes depend on machine and torch: take both files on the same one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROCESSES = ("wanda", "sparsellm", "elsa")  # one of each kind, in two processes


def hash_of(state: dict[str, Any]) -> str:
    """sha256 over names, dtypes, shapes and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def in_one_process(method: str) -> str:
    import admm_prune
    from admm_prune.methods.registry import recipe_named

    recipe = recipe_named(method)
    steps = {"steps": 8} if "steps" in recipe.options else {}
    text = {"data": "embedded", "samples": 8, "eval_samples": 2, "length": 64}
    sparsity = 0.5 if recipe.prunes else 0.0
    report = admm_prune.prune("embedded", method=method, sparsity=sparsity, device="cpu", **text, **steps)
    return hash_of(report.model.state_dict())


def in_two_processes(method: str) -> str:
    from safetensors.torch import load_file

    from admm_prune.methods.registry import recipe_named

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "admm_prune",
        ]
        command += ["run", "--model", "embedded", "--data", "embedded", "--method", method, "--sparsity", "0.5"]
        command += ["--samples", "8", "--eval-samples", "2", "--length", "64", "--device", "cpu", "--out", str(out)]
        command += ["--steps", "8"] if "steps" in recipe_named(method).options else []
        subprocess.run(command, check=True, capture_output=True)
        return hash_of(load_file(out / "model.safetensors"))


def method_names() -> list[str]:
    listing = subprocess.run([sys.executable, "-m", "admm_prune", "list", "--json"], check=True, capture_output=True)
    return [method["name"] for method in json.loads(listing.stdout)["methods"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path, help="a file of an earlier run: exit with 1 where a hash differs")
    arguments = parser.parse_args()
    hashes = {}
    for name, hashed, methods in (
        ("one process", in_one_process, method_names()),
        ("two processes", in_two_processes, PROCESSES),
    ):
        for method in methods:
            hashes[f"{method}, {name}"] = hashed(method)
            print(f"{method}, {name}: {hashes[f'{method}, {name}'][:16]}", flush=True)
            arguments.out.write_text(json.dumps(hashes, indent=1) + "\n")
    if arguments.against is None:
        return 0
    before = json.loads(arguments.against.read_text())
    different = sorted(key for key in before.keys() | hashes.keys() if before.get(key) != hashes.get(key))
    print(
        f"{len(different)} of {len(hashes)} differ: {', '.join(different)}" if different else f"all {len(hashes)} equal"
    )
    return 1 if different else 0


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch is imported
    sys.exit(main())
