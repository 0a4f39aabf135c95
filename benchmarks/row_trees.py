"""How many rows cut from real layers are proved to 1 %, with how many nodes and in what time.

    admm-prune capture --weight NAME --out layer.safetensors
    python -m benchmarks.row_trees OUT layer.safetensors ... [--rows 24] [--widths 8,16,32,64] [--max-nodes 4000]

A row keeps some of its columns, drawn at random, with their part of the Hessian, ridge included. Times are of the
processor, the heuristic that finds the value included. OUT receives row_trees.txt and row_trees.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from admm_prune.data.layer_file import LayerFile, load_layer_file
from admm_prune.solvers.reference import prove_rows
from benchmarks.machine import headline, machine

SPARSITIES = (0.5, 0.7, 0.9)


def cut(layers: list[LayerFile], rows: int, width: int, ridge: float, seed: int) -> tuple[Tensor, Tensor]:
    """(Hessians (rows, width, width), targets (rows, width)), from the layers in turn."""
    generator = torch.Generator().manual_seed(seed)
    hessians, targets = [], []
    for i in range(rows):
        layer = layers[i % len(layers)]
        columns = torch.randperm(layer.weight.shape[1], generator=generator)[:width].sort().values
        row = int(torch.randint(len(layer.weight), (1,), generator=generator))
        gram = layer.gram[columns[:, None], columns].double()
        hessians.append(gram + ridge * torch.diag(gram.diagonal()))
        targets.append(layer.weight[row, columns].double())
    return torch.stack(hessians), torch.stack(targets)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("layers", type=Path, nargs="+", help="of 'admm-prune capture'")
    parser.add_argument("--rows", type=int, default=24, help="of each width and sparsity")
    parser.add_argument("--widths", default="8,16,32,64")
    parser.add_argument("--ridge", type=float, default=0.03)
    parser.add_argument("--max-nodes", type=int, default=4000, help="of a row, on average")
    parser.add_argument("--date", help="to put in the report; today by default")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    layers = [load_layer_file(path) for path in chosen.layers]
    lines: list[dict[str, Any]] = []
    text = [f"{'width':>5}{'pruned':>8}{'proved':>12}{'nodes':>7}{'most':>7}{'s a row':>9}{'worst gap':>11}"]
    for width in (int(part) for part in chosen.widths.split(",")):
        for sparsity in SPARSITIES:
            hessians, targets = cut(layers, chosen.rows, width, chosen.ridge, width)
            keep = [round((1 - sparsity) * width)] * chosen.rows
            began = time.process_time()
            tree = prove_rows(hessians, targets, keep, max_nodes=chosen.max_nodes)
            seconds = (time.process_time() - began) / chosen.rows
            line = {
                "width": width,
                "sparsity": sparsity,
                "rows": chosen.rows,
                "proved": int((tree.gaps <= 0.01).sum()),
                "nodes_median": float(np.median(tree.nodes)),
                "nodes_most": int(tree.nodes.max()),
                "seconds": seconds,
                "worst_gap": float(tree.gaps.max()),
            }
            lines.append(line)
            text.append(
                f"{width:>5}{sparsity:>8.0%}{line['proved']:>5} of {chosen.rows:>3}{line['nodes_median']:>7.0f}"
                f"{line['nodes_most']:>7}{seconds:>9.3f}{line['worst_gap']:>11.2%}"
            )
            print(text[-1], flush=True)
    facts: dict[str, Any] = machine(chosen.date)
    facts["command"] = f"python -m benchmarks.row_trees OUT LAYERS --rows {chosen.rows} --max-nodes {chosen.max_nodes}"
    chosen.out.mkdir(parents=True, exist_ok=True)
    content = {"machine": facts, "rows": lines}
    (chosen.out / "row_trees.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (chosen.out / "row_trees.txt").write_text("\n".join([headline(facts), "", *text]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
