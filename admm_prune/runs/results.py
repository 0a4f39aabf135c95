"""The result of a run as an object: returned by `prune`, read again from its folder, shown in notebooks and pandas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from admm_prune.data.hub import expanded
from admm_prune.errors import UserError
from admm_prune.methods.base import LayerReport, TextUse
from admm_prune.models.evaluate import METRICS, RANKING, Evaluation
from admm_prune.runs.claims import DIGEST
from admm_prune.runs.hub import push_to_hub
from admm_prune.runs.manifest import Phase
from admm_prune.runs.report.content import label_of, mean_error, place_of
from admm_prune.runs.report.pages import REPORT, of_this_release, read_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONTENT = (
    *("method", "target", "budget", "text_use", "block_weights", "sparsity"),
    *("dense", "pruned", "tasks", "layers", "notes", "details", "continuation"),
)
_STRUCTURED = ("name", "shape", "ridge_trials", "notes", "diagnosis", "convergence")  # fields that are not numbers


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """The result of a run. All of it except `model` is written to the manifest.

    Notebooks display it as a table; `to_pandas` returns the layers as a data frame.

    Attributes:
        method: the name of the method.
        target: the requested target, "70%" or "2:4".
        budget: the scope of the target: every "matrix" of the blocks by itself, the "model" (all of them together), or
            another quantity (see `methods.base.Budget`).
        text_use: what the calibration text was used for: "calibration", "training", or "measurement" of errors only.
        block_weights: the number of entries in the matrices of the dense model's blocks.
        sparsity: the fraction of them that are zero, or were removed with their row or column.
        dense: perplexity and other metrics of the dense model on the evaluation text, with their protocol.
        pruned: the same for the pruned model.
        tasks: results of the pruned model on tasks of lm-evaluation-harness, as `eval --tasks` returns them; None
            without tasks.
        layers: one report for each matrix of the blocks.
        seconds: the duration of the allocation and of pruning in this process; NaN if the folder has no times.
        notes: notes on the run and by the method.
        details: further results of the method, by name.
        continuation: greedy continuations of the beginning of the evaluation text, "prompt", by the "dense" and the
            "pruned" model; empty if the weights were streamed, or sharded over processes.
        manifest: settings, texts, versions and fingerprints.
        model: the pruned model. It has no weights if they were streamed or sharded, because they are in `out`; None in
            a report from `load_report`.
        phases: time and memory of the parts of the run.
        out: the folder that was written; None if there is none.
    """

    method: str
    target: str
    budget: str
    text_use: TextUse
    block_weights: int
    sparsity: float
    dense: Evaluation
    pruned: Evaluation
    layers: list[LayerReport]
    seconds: float
    notes: tuple[str, ...]
    details: dict[str, Any]
    continuation: dict[str, str]
    manifest: dict[str, Any]
    model: PreTrainedModel | None = None
    phases: tuple[Phase, ...] = ()
    out: Path | None = None
    tasks: dict[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        """The content of the manifest. Equal runs have equal manifests, even if one of them was interrupted."""
        layers = [{key: x for key, x in layer.as_json().items() if key != "seconds"} for layer in self.layers]
        content = {name: getattr(self, name) for name in _CONTENT}
        content |= {"dense": asdict(self.dense), "pruned": asdict(self.pruned), "layers": layers}
        return content | self.manifest

    def timings(self) -> dict[str, Any]:
        """The seconds of pruning in this process, of each layer in the process that pruned it, and of the phases."""
        return {
            "seconds": round(self.seconds, 3),
            "layers": {layer.name: round(layer.seconds, 4) for layer in self.layers},
            "phases": [asdict(phase) for phase in self.phases],
        }

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the folder of the run to the Hugging Face Hub; returns the URL of the repository.

        Args:
            repo_id: "owner/name", or "name" in the account of the token.
            options: `private`, `revision`, `create_pr`, `commit_message`, `token`, as in `huggingface_hub.HfApi`.

        Raises:
            UserError: the run was not written to a folder, or the Hub rejects it or cannot be reached.
        """
        if self.out is None:
            raise UserError("this run was not written to a folder: call prune with out=")
        return push_to_hub(self.out, repo_id, **options)

    @property
    def mean_relative_error(self) -> float | None:
        """The mean of the layers' relative errors; None unless every layer has one."""
        return mean_error([layer.relative_error for layer in self.layers])

    def to_pandas(self) -> Any:
        """The layers as a `pandas.DataFrame`: one row per pruned matrix, indexed by its name.

        The columns are "block" and "matrix" (the two parts of the name), "rows" and "columns" (the shape of the dense
        weight), the figures of `LayerReport`, "diagnosis" (codes) and "notes".

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise UserError("to_pandas needs pandas: pip install pandas") from error
        rows = []
        for layer in self.layers:
            block, matrix = place_of(layer.name)
            figures = {name: value for name, value in vars(layer).items() if name not in _STRUCTURED}
            rows.append({
                "name": layer.name,
                "block": block,
                "matrix": matrix,
                "rows": layer.shape[0],
                "columns": layer.shape[1],
                **figures,
                "diagnosis": ", ".join(finding.code for finding in layer.diagnosis),
                "notes": "; ".join(layer.notes),
            })  # fmt: skip
        return pd.DataFrame(rows).set_index("name")

    def __repr__(self) -> str:
        figures = f"{RANKING}={getattr(self.pruned, RANKING):.4g} (dense {getattr(self.dense, RANKING):.4g})"
        where = "" if self.out is None else f", out={str(self.out)!r}"
        return (
            f"Report({self._title!r}, sparsity={self.sparsity:.4f}, {figures}, "
            f"layers={len(self.layers)}, seconds={self.seconds:.1f}{where})"
        )

    def _repr_html_(self) -> str:
        """The HTML that notebooks display: the metrics of both models, and a summary of the layers."""
        rows = []
        for name, metric in METRICS.items():
            dense, pruned = getattr(self.dense, name), getattr(self.pruned, name)
            cells = (metric.name, metric.format % dense, metric.format % pruned, f"{pruned / dense:.3f}")
            rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
        error, lines = self.mean_relative_error, []
        lines.append(f"{100 * self.sparsity:.2f} % of {self.block_weights:,} block weights zero or removed")
        if error is not None:
            lines.append(f"mean relative error of {len(self.layers)} matrices: {error:.4f}")
        if self.out is not None:
            lines.append(f"saved in {self.out} (see {REPORT})")
        return (
            f"<table><caption>{escape(self._title)}</caption>"
            "<thead><tr><th>metric</th><th>dense</th><th>pruned</th><th>pruned / dense</th></tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>"
            f"<p>{'<br>'.join(map(escape, lines))}</p>"
            f"<p><small>{escape(self.pruned.protocol)}</small></p>"
        )

    @property
    def label(self) -> str:
        """The target; if only some weights are selected, the fraction of all weights that is pruned, such as "4.7%"."""
        return label_of(self.target, self.sparsity, self.manifest["settings"]["selection"])

    @property
    def _title(self) -> str:
        return f"{self.method}, {self.label} of {self.manifest['settings']['model']}"


def load_report(folder: str | Path) -> Report:
    """Reads the report of a finished run from its folder; without the model, which `from_pretrained` loads.

    Args:
        folder: the output of `prune` or 'admm-prune run', or a model in the output of a comparison.

    Raises:
        UserError: the folder is not a finished run, or its manifest is damaged or from another release.
    """
    place = expanded(folder)
    content = read_run(place)
    if "rows" in content:
        raise UserError(f"{folder} is a comparison: load one of its models, such as {folder}/models/...")
    times = content.pop("timings")
    content.pop(DIGEST, None)
    with of_this_release(place):
        fields: dict[str, Any] = {name: content.pop(name) for name in _CONTENT}
        seconds = {layer["name"]: times["layers"].get(layer["name"], 0.0) for layer in fields["layers"]}
        layers = [LayerReport.from_json({**layer, "seconds": seconds[layer["name"]]}) for layer in fields["layers"]]
        fields |= {"dense": _evaluation(fields["dense"]), "pruned": _evaluation(fields["pruned"]), "layers": layers}
        fields["notes"] = tuple(fields["notes"])
        return Report(
            **fields,
            seconds=math.nan if times["seconds"] is None else times["seconds"],
            manifest=content,
            phases=tuple(Phase(**phase) for phase in times["phases"]),
            out=place,
        )


def _evaluation(content: Mapping[str, Any]) -> Evaluation:
    """An evaluation from JSON, in which null stands for a metric that is not finite."""
    figures: dict[str, Any] = {
        name: math.nan if value is None and name in METRICS else value for name, value in content.items()
    }
    return Evaluation(**figures)
