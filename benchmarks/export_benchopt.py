"""Layer problems as a benchmark of benchopt: a folder that `benchopt run` takes, with an objective, data and solvers.

    python -m benchmarks.export_benchopt LAYERS OUT
    benchopt run OUT

LAYERS is a layer problem file or a folder of them. Solvers are judged by NumPy code alone.
Add a file to OUT/solvers to compare another solver.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from admm_prune.data.layer_file import load_layer_file

TEMPLATE = Path(__file__).parent / "benchopt"


def export(layers: Path, out: Path) -> list[Path]:
    """Writes the benchmark to a new folder and returns the layer files in it.

    Raises:
        UserError: a file is not a layer problem, or re-targets to other inputs, which this objective does not know.
        FileExistsError: `out` is there.
    """
    files = sorted(layers.glob("*.safetensors")) if layers.is_dir() else [layers]
    if not files:
        raise FileNotFoundError(f"{layers} contains no layer problem files")
    for file in files:
        if load_layer_file(file).cross_gram is not None:
            raise ValueError(f"{file} re-targets to other inputs, which this benchmark does not know")
    shutil.copytree(TEMPLATE, out, ignore=shutil.ignore_patterns("__pycache__"))
    (out / "layers").mkdir()
    return [Path(shutil.copyfile(file, out / "layers" / file.name)) for file in files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    try:
        written = export(given.layers, given.out)
    except (OSError, ValueError) as error:
        sys.exit(f"export_benchopt: {error}")
    print(f"{len(written)} layers in {given.out}: benchopt run {given.out}")


if __name__ == "__main__":
    main()
