"""Layer problem files of the folder `layers`: what `admm-prune capture` and `benchmarks.instances` write."""

from __future__ import annotations

from pathlib import Path

from benchopt import BaseDataset
from safetensors.numpy import load_file

LAYERS = Path(__file__).resolve().parents[1] / "layers"


class Dataset(BaseDataset):
    name = "Layer file"
    parameters = {"file": sorted(path.name for path in LAYERS.glob("*.safetensors"))}
    requirements = ["safetensors"]

    def get_data(self):
        tensors = load_file(LAYERS / self.file)
        return {name: tensors.get(name) for name in ("weight", "gram", "gram_holdout")}
