"""The figures of a model, recomputed: the same where the run was made, within the rounding of its dtype elsewhere.

On another processor or device, or with other versions, sums are taken in another order, and rounded differently.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from admm_prune.data.sequences import Sequences
from admm_prune.errors import UserError
from admm_prune.models.evaluate import METRICS, evaluate
from admm_prune.models.loading import LoadedModel
from admm_prune.models.losses import token_scores
from admm_prune.runs.claims import read_json
from admm_prune.runs.evaluate import beginning_continued
from admm_prune.runs.journal.folder import MANIFEST, TIMINGS
from admm_prune.runs.machine import free_bytes, processor
from admm_prune.runs.manifest import environment
from admm_prune.verify.integrity import is_number
from admm_prune.verify.report import Verification, in_full

Manifest = dict[str, Any]

_REPEATED = 1e-6  # relative: figures that are recomputed in the environment of the run
_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
# Standard deviations between an honest figure and that of exact arithmetic: one honest run in 15,000 is beyond it. For
# 1,000 tokens of SmolLM2-135M in bfloat16 that is 0.8 to 2 % of the perplexity, where two sets of instructions differ
# by 0.4 % (`benchmarks/rounding.py`), and falls with the square root of their number. In float32 it is 3e-5.
_DEVIATIONS = 4.0
# Relative to the machine precision of the dtype, where rounding cannot be measured: no figure so far off is refuted by
# less than that. Those two differ by 0.5 of it in bfloat16.
_UNMEASURED = 16.0
_COMPUTING = ("admm-prune", "torch", "transformers")  # packages in which figures are computed


def elsewhere(manifest: Manifest, folder: Path, device: torch.device) -> str:
    """How the environment differs from that of the run where it matters to rounding; empty where it does not."""
    then, now = manifest["environment"], environment(device)
    names = ["machine", "cpu_capability", "threads", "device", *(["cuda"] if device.type == "cuda" else [])]
    pairs = {name: (then.get(name), now[name]) for name in names}
    pairs |= {name: (then["versions"].get(name), now["versions"][name]) for name in _COMPUTING}
    differing = [f"{name} {in_full(a)} became {in_full(b)}" for name, (a, b) in pairs.items() if a != b]
    return ", ".join([*differing, *_another_processor(folder)])


def _another_processor(folder: Path) -> Iterator[str]:
    """The kind of processor, which times are recorded with: equal instructions do not make equal libraries."""
    try:
        described = read_json(folder / TIMINGS)["machine"]
    except (UserError, LookupError, TypeError):
        return  # reported with the files
    if f", {processor()}, " not in f", {described}":
        yield f"the processor became {processor()}"


def check_figures(
    report: Verification, loaded: LoadedModel, text: Sequences, manifest: Manifest, environment_differs: str
) -> None:
    """The figures of the pruned model, and how it continues the text.

    Args:
        environment_differs: as `elsewhere` says.
    """
    figures = asdict(evaluate(loaded.model, text))
    report.expect("figures", figures.keys() == manifest["pruned"].keys(), "the figures are not those that a run writes")
    claims = {name: manifest["pruned"][name] for name in figures if name in manifest["pruned"]}
    if manifest["continuation"]:  # a streamed run has no continuation
        _check_continuation(report, loaded, text, manifest["continuation"], environment_differs)
    repeated = {name: same(claim, figures[name], tolerance=_REPEATED) for name, claim in claims.items()}
    rounding: Rounding | str = ""
    unmeasured = _UNMEASURED * torch.finfo(_narrowest(loaded.model)).eps
    if environment_differs and not all(repeated[name] for name in claims if isinstance(figures[name], float)):
        rounding = measured(loaded.model, text)  # last, because it widens the model
    for name, claimed in claims.items():
        recomputed = figures[name]
        message = f"claimed {name} {in_full(claimed)}, recomputed {in_full(recomputed)}"
        if isinstance(recomputed, float | int):
            report.numbers[f"{report.where}{name}"] = recomputed
        number = isinstance(recomputed, float) and (claimed is None or is_number(claimed))
        if repeated[name] or not (environment_differs and number):
            report.expect(name, repeated[name], message)
        elif claimed is None or not math.isfinite(recomputed):
            report.open(f"{message}: the model overflows here or in another environment ({environment_differs})")
        elif isinstance(rounding, Rounding):
            near = rounding.explains(name, claimed, figures, text)
            what = "within the" if near else "more than the"
            message = f"{message}: {what} rounding of {rounding.dtype} in another environment ({environment_differs})"
            if report.expect(name, near, message):
                report.note(message)
        elif abs(claimed - recomputed) <= unmeasured * abs(recomputed):
            report.open(f"{message} in another environment ({environment_differs}); {rounding}")
        else:
            report.expect(name, False, f"{message}, even in another environment ({environment_differs})")


def _check_continuation(
    report: Verification, loaded: LoadedModel, text: Sequences, claimed: dict[str, Any], environment_differs: str
) -> None:
    """The greedy continuation; in another environment a different one, where two tokens are near, refutes nothing."""
    prompt, continuation = beginning_continued(loaded, text)
    report.agree("prompt", claimed.get("prompt"), prompt)
    if environment_differs and claimed.get("pruned") != continuation:
        report.by_fingerprint(f"{MANIFEST}: continuation.pruned")
        report.left_out.append(f"{report.where}the continuation, in another environment ({environment_differs})")
    else:
        report.agree("continuation", claimed.get("pruned"), continuation)


def same(claimed: Any, recomputed: Any, tolerance: float = 1e-12) -> bool:
    """Whether values are equal, numbers up to a relative tolerance; null for non-finite ones."""
    if not isinstance(recomputed, float):
        return bool(claimed == recomputed) and isinstance(claimed, bool) == isinstance(recomputed, bool)
    if claimed is None:
        return recomputed - recomputed != 0
    return is_number(claimed) and bool(abs(claimed - recomputed) <= tolerance * abs(recomputed))


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How far the loss L of a text may be from L*, that of a wider dtype, on any machine: |L - L*| <= |b| + 4 s.

    With e_t the deviation of the loss of token t on this machine, b = sum e_t is what they have in common, and s^2 the
    variance of their sum: on another machine they are rounded differently, with the same spread. It is estimated as
    sum e_t^2, and, as the tokens of a sequence are not independent, from the sums of the sequences; the larger counts.

    Attributes:
        dtype: of the model.
        loss: L*, in nats.
        bias, deviation: b and s.
    """

    dtype: str
    loss: float
    bias: float
    deviation: float

    @property
    def allowed(self) -> float:
        """|b| + 4 s in nats."""
        return abs(self.bias) + _DEVIATIONS * self.deviation

    def explains(self, name: str, claimed: float, figures: dict[str, Any], text: Sequences) -> bool:
        """Whether a figure can be that of the same model.

        The metrics are functions of L. The standard error of the perplexity changes with the losses of the sequences,
        and by no more than twice what the perplexity itself may.
        """
        if name not in METRICS:
            return bool(abs(claimed - figures[name]) <= 2 * self.allowed / text.scored_tokens * figures["perplexity"])
        losses = torch.tensor([self.loss - self.allowed, self.loss + self.allowed], dtype=torch.float64)
        ends = sorted(METRICS[name].compute(loss, text) for loss in losses)
        return bool(ends[0] <= claimed <= ends[1])


def measured(model: nn.Module, text: Sequences) -> Rounding | str:
    """The rounding of a model's dtype on a text, from its losses in the next wider one, in which the model is left; why
    it cannot be measured."""
    dtype = _narrowest(model)
    wider = _WIDER.get(dtype)
    if wider is None:
        return f"there is no wider data type than {_named(dtype)}"
    if wider.itemsize * sum(parameter.numel() for parameter in model.parameters()) > free_bytes(device_of(model)):
        return f"the memory does not hold the model in {_named(wider)} to measure how much rounding changes"
    try:
        narrow = _token_losses(model, text)
        exact = _token_losses(model.to(wider), text)
    except RuntimeError as error:  # of a model that insists on its dtype
        return f"how much rounding changes is not known: it fails in {_named(wider)} ({in_full(error)})"
    deviations = [one - other for one, other in zip(narrow, exact, strict=True)]
    bias = sum(float(one.sum()) for one in deviations)
    if not math.isfinite(bias):
        return f"how much rounding changes is not known: some losses are not finite in {_named(wider)}"
    by_tokens = sum(float(one.square().sum()) for one in deviations)
    by_sequences = sum(float(one.sum(1).square().sum()) for one in deviations)
    loss = sum(float(one.sum()) for one in exact)
    return Rounding(dtype=_named(dtype), loss=loss, bias=bias, deviation=math.sqrt(max(by_tokens, by_sequences)))


def _token_losses(model: nn.Module, text: Sequences) -> list[Tensor]:
    """-log p of every scored token, float64 (b, L) of every batch; 0 for all others."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1).neg()

    return [token_scores(model, batch, loss).double() for batch in text.batches]


def _narrowest(model: nn.Module) -> torch.dtype:
    """The dtype of the parameters with the largest machine precision."""
    return max({one.dtype for one in model.parameters()}, key=lambda dtype: torch.finfo(dtype).eps)


def device_of(model: nn.Module) -> torch.device:
    """The device on which a model in memory runs."""
    return next(model.parameters()).device


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
