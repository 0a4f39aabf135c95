"""What pruning a large model from disk takes: peak resident memory of the whole process, and time.

    python -m benchmarks.streaming OUT [--shape 1.1B] [--methods wanda,sparsegpt] [--blocks N] [--cold]
    python -m benchmarks.streaming OUT --shape 135M --methods "admm,admm --coordinate attention --refit block"

Writes a Llama of random weights, shard by shard, then runs `admm-prune run --stream` on it in a process of its own for
each method, with the options after its name, embedded text, and evaluation of one sequence before and after. The peak
is all that was resident: interpreter, libraries and mapped files included. Reading is the part of the run's time that
weights were brought in, which is the most that reading a block ahead could save; `--cold` has the system forget the
files before each block, so that they come from the disk. OUT.json and OUT.txt gain a row for each method as it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from admm_prune.bench.memory import write_random_model
from admm_prune.runs.machine import peak_resident_bytes
from benchmarks.machine import headline, machine, write_results

_ROOT = Path(__file__).resolve().parents[1]
_IN_THIS_PROCESS, _IN_THIS_PROCESS_COLD = "--here", "--here-cold"
# Width, neurons, blocks, query heads, key heads; vocabulary of 32000, embedding and head apart.
SHAPES: dict[str, tuple[int, int, int, int, int]] = {
    "tiny": (256, 512, 4, 4, 2),
    "135M": (576, 1536, 30, 9, 3),
    "1.1B": (2048, 5632, 22, 32, 4),
    "7B": (4096, 11008, 32, 32, 32),
}


def write_model(shape: str, dtype: str, blocks: int | None, folder: Path) -> int:
    """A random model of a shape, with the tokenizer of the embedded model; returns its number of parameters."""
    from transformers import LlamaConfig

    width, neurons, depth, heads, keys = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=blocks or depth,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    write_random_model(config, folder)
    for path in Path(str(files("admm_prune") / "assets" / "embedded")).glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    per_block = 2 * width**2 + 2 * width * (width // heads) * keys + 3 * width * neurons + 2 * width
    return (blocks or depth) * per_block + 2 * 32000 * width + width


def measure(model: Path, method: str, chosen: argparse.Namespace, place: Path) -> dict[str, Any]:
    """One run in a process of its own; `method` is a name, and options of `run`.

    Raises:
        RuntimeError: it failed; the message holds its last words.
    """
    arguments = [
        "run", "--model", str(model), "--method", *method.split(), "--sparsity", str(chosen.sparsity), "--stream",
        "--data", "embedded", "--samples", str(chosen.samples), "--eval-samples", "1", "--length", str(chosen.length),
        "--packing", "windows", "--device", "cpu", "--json", "--out", str(place / "run"),
    ]  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.streaming",
            _IN_THIS_PROCESS_COLD if chosen.cold else _IN_THIS_PROCESS,
            *arguments,
        ],
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{method} failed with status {done.returncode}")
    report, spent = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    shutil.rmtree(place / "run")
    return {
        "method": method,
        "peak_gb": round(spent["bytes"] / 1e9, 3),
        "reading_percent": round(100 * spent["reading"] / spent["seconds"], 2),
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "dense_perplexity": report["dense"]["perplexity"],
        "pruned_perplexity": report["pruned"]["perplexity"],
        "sparsity": report["sparsity"],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="without suffix")
    parser.add_argument("--shape", choices=list(SHAPES), default="1.1B")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--blocks", type=int, help="in place of the shape's own number: said in the results")
    parser.add_argument("--methods", default="wanda,sparsegpt,struprune", help="names, each with options of run")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--cold", action="store_true", help="weights come from the disk, not from the system's memory")
    parser.add_argument("--work", type=Path, help="where the model is written; a temporary folder by default")
    chosen = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=chosen.work) as work:
        model = Path(work) / "model"
        model.mkdir()
        parameters = write_model(chosen.shape, chosen.dtype, chosen.blocks, model)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        for method in chosen.methods.split(","):
            rows.append(measure(model, method, chosen, Path(work)))
            content = {
                "command": f"python -m benchmarks.streaming {shlex.join(arguments or sys.argv[1:])}",
                "machine": machine(),
                "shape": chosen.shape,
                "blocks": f"{chosen.blocks or SHAPES[chosen.shape][2]} of {SHAPES[chosen.shape][2]}",
                "parameters": parameters,
                "weights_gb": round(size / 1e9, 2),
                "tokens": chosen.samples * chosen.length,
                "rows": rows,
            }
            write_results(chosen.out, content, table(content))


def table(content: dict[str, Any]) -> str:
    wide = max(12, *(len(row["method"]) + 1 for row in content["rows"]))
    lines = [
        headline(content["machine"]),
        content["command"],
        f"{content['parameters'] / 1e9:.2f} G parameters: {content['shape']} shape, {content['blocks']} blocks",
        f"{content['weights_gb']} GB on disk, {content['tokens']} tokens of calibration",
        "Peak: everything resident in the process, libraries and mapped files included.",
        "",
        f"{'method':{wide}}{'peak GB':>9}{'minutes':>9}{'reading':>9}",
    ]
    lines += [
        f"{row['method']:{wide}}{row['peak_gb']:>9.2f}{row['minutes']:>9.1f}{row['reading_percent']:>7.2f} %"
        for row in content["rows"]
    ]
    return "\n".join(lines) + "\n"


def _run_in_this_process(arguments: list[str], *, cold: bool) -> None:
    """The command in this process, then what was resident at its peak, and the seconds of the run and of reading."""
    from admm_prune import cli
    from admm_prune.models.streaming import ModelOnDisk

    reading, fill = [0.0], ModelOnDisk._fill

    def timed(self: ModelOnDisk, prefix: str, names: list[str]) -> None:
        if cold:
            _forget(self._checkpoint.folder)
        began = time.perf_counter()
        fill(self, prefix, names)
        reading[0] += time.perf_counter() - began

    ModelOnDisk._fill = timed  # type: ignore[method-assign]
    sys.argv = ["admm-prune", *arguments]
    began = time.perf_counter()
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise
    spent = time.perf_counter() - began
    print(json.dumps({"bytes": peak_resident_bytes(), "reading": reading[0], "seconds": spent}))


def _forget(folder: Path) -> None:
    """Removes the files of a folder from the page cache of the system."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    if sys.argv[1:2] in ([_IN_THIS_PROCESS], [_IN_THIS_PROCESS_COLD]):
        _run_in_this_process(sys.argv[2:], cold=sys.argv[1] == _IN_THIS_PROCESS_COLD)
    else:
        main()
