"""Size and speed of a pruned model compared with the dense one, with a sentence on the gain."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from admm_prune.data.durable import writing
from admm_prune.data.hub import expanded
from admm_prune.errors import UserError
from admm_prune.inference.packed_linear import pack_model
from admm_prune.models.checkpoint import weight_bytes
from admm_prune.models.evaluate import sparsity
from admm_prune.models.loading import LoadedModel, load
from admm_prune.models.structure import assign, decoder_blocks
from admm_prune.ops import backend, bits, packed
from admm_prune.point import Point
from admm_prune.problems.constraints import NofM
from admm_prune.runs.journal.folder import check_output_file, check_writable, write_json
from admm_prune.runs.machine import check_dtype, pick_device
from admm_prune.runs.manifest import environment
from admm_prune.runs.report.plots import COLOURS, legend, panels, style, svg

_TWO_OF_FOUR = NofM(2, 4)
_PROMPT = 16  # tokens before those that are decoded

Clock = Callable[[], float]  # seconds
Run = Callable[[Any, int, Clock], float]  # (model, tokens, clock) -> seconds


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One form of a model, measured.

    Attributes:
        form: "dense", "as stored", "packed", "CSR kernels" or "2:4 kernels".
        disk_bytes: of the safetensors; None if this form is never saved.
        packed_bytes: of its parameters as 'admm-prune pack' would store them, in the dtype of this form.
        memory_bytes: of parameters and buffers.
        prefill: of all requested tokens.
        decoding: of each batch size.
    """

    form: str
    parameters: int
    zeros: float
    disk_bytes: int | None
    packed_bytes: int | None
    memory_bytes: int
    prefill: Speed
    decoding: list[Decoding]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The time of one form, compared with the first row.

    Attributes:
        seconds: the minimum of the repeats.
        range: the minimum and the maximum of the repeats.
        speedup: over the first row, by the minima.
        differs: from the first row, beyond the spread: the slowest repeat of one takes less time than the fastest of
            the other. Less is noise; one repeat has no spread, and shows nothing.
    """

    seconds: float
    range: tuple[float, float]
    speedup: float
    differs: bool

    @classmethod
    def of(cls, times: dict[str, list[float]], form: str) -> Speed:
        first, repeats = next(iter(times.values())), times[form]
        return cls(
            seconds=min(repeats),
            range=(min(repeats), max(repeats)),
            speedup=min(first) / min(repeats),
            differs=len(repeats) > 1 and (max(repeats) < min(first) or max(first) < min(repeats)),
        )


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Decoding of a batch of texts; tokens per second are those of all texts together."""

    batch: int
    tokens_per_second: float
    speed: Speed


@torch.no_grad()
def prefill(model: Any, tokens: int, now: Clock) -> float:
    """Seconds of a forward pass over `tokens` tokens with the logits of the last one."""
    ids = torch.arange(tokens, device=model.device)[None] % model.config.get_text_config().vocab_size
    began = now()
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return now() - began


@torch.no_grad()
def decode(model: Any, tokens: int, now: Clock, batch: int = 1) -> float:
    """Seconds of generating `tokens` tokens one by one, with a cache, of each text in a batch.

    The time of the prompt of 16 tokens, which also gives the first new token, is not included.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    class AfterEachToken(StoppingCriteria):
        """Stops nothing, and notes when the first token was generated."""

        began: float | None = None

        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
            self.began = now() if self.began is None else self.began
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    after = AfterEachToken()
    ids = torch.arange(_PROMPT, device=model.device).repeat(batch, 1) % model.config.get_text_config().vocab_size
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens + 1,
        min_new_tokens=tokens + 1,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([after]),
    )
    assert after.began is not None
    return now() - after.began


def timed(run: Run, models: dict[str, Any], tokens: int, repeats: int) -> dict[str, list[float]]:
    """The times of each model; the models alternate, with one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            times[name].append(run(model, tokens, _clock(model.device.type)))
    return {name: seconds[1:] for name, seconds in times.items()}


def _clock(device: str) -> Clock:
    """On the CPU the CPU time of the process, so that other load on the machine does not count, and the elapsed time
    with several threads, whose CPU times add up. On CUDA the elapsed time, read when the device is done."""
    if device == "cuda":

        def now() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return now
    return time.perf_counter if torch.get_num_threads() > 1 else time.process_time


def bench_inference(
    model: str,
    against: str | None = None,
    *,
    tokens: int = 256,
    new_tokens: int = 16,
    batches: Sequence[int] = (1, 4, 16),
    repeats: int = 7,
    out: Path | None = None,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measures a model as stored, packed, with torch's sparse kernels for its masks, and its dense model.

    Args:
        model, against: folders, Hub ids or "embedded".
        tokens: of the prefill, at most the context.
        new_tokens: that are decoded.
        batches: numbers of texts that are decoded together.
        repeats: the number of repeats, of which the minimum counts; two or more show a spread.
        out: folder for inference.json and inference.svg, a plot of it; made where it is missing.
        trust_remote_code: allow running code that comes with the models.
        overwrite: replace both files of an earlier result in `out`, which is refused otherwise.

    Returns:
        For JSON: "rows" of `Timing`, "sentences" on the gain, "environment".

    Raises:
        UserError: a model cannot be loaded, its context is shorter than `tokens`, or `out` cannot be written.
    """
    if not batches or min(batches) < 1:
        raise UserError("batches must be numbers of texts, from 1 on")
    if out is not None:
        _check_out(out, overwrite=overwrite)
    place = pick_device(device)
    check_dtype(dtype)
    opened = partial(load, device=place, dtype=dtype, trust_remote_code=trust_remote_code)
    given = opened(model)
    forms: dict[str, tuple[LoadedModel, str | None]] = {}
    if against is not None:
        forms["dense"] = (opened(against), against)
    forms["as stored"] = (given, model)
    for _, (loaded, name) in forms.items():
        context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and max(tokens, _PROMPT + 1 + new_tokens) > context:
            raise UserError(f"{name}: its context of {context} tokens is too short: use fewer --tokens or --new-tokens")
    zeros = sparsity(decoder_blocks(given.model))
    remarks = _of_dtypes({form: loaded.model.dtype for form, (loaded, _) in forms.items()})
    if zeros > 0:
        made, of_kernels = _with_kernels(partial(opened, model), given, place)
        forms |= {form: (loaded, None) for form, loaded in made.items()}
        remarks += of_kernels
    models = {form: loaded.model for form, (loaded, _) in forms.items()}
    of_prefill = timed(prefill, models, tokens, repeats)
    of_batch = {batch: timed(partial(decode, batch=batch), models, new_tokens, repeats) for batch in batches}
    rows = [
        Timing(
            form=form,
            parameters=_parameters(forms["as stored"][0] if name is None else loaded),
            zeros=zeros if form != "dense" else sparsity(decoder_blocks(loaded.model)),
            disk_bytes=None if name is None else _disk_bytes(name),
            packed_bytes=None if name is None else _packed_bytes(loaded.model),
            memory_bytes=_memory_bytes(loaded.model),
            prefill=Speed.of(of_prefill, form),
            decoding=[
                Decoding(
                    batch=batch, tokens_per_second=batch * new_tokens / min(times[form]), speed=Speed.of(times, form)
                )
                for batch, times in of_batch.items()
            ],
        )
        for form, (loaded, name) in forms.items()
    ]
    content = {
        "model": model,
        "against": against,
        "device": place,
        "tokens": tokens,
        "new_tokens": new_tokens,
        "kernels": packed.described() if place == "cpu" else backend.described(place),
        "rows": [asdict(row) for row in rows],
        "sentences": [
            *_sentences(rows, repeats, given.model, cuda=place == "cuda"),
            *remarks,
        ],
        "environment": environment(place),
    }
    if out is not None:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "inference.json", content)
            (out / "inference.svg").write_text(_plot(rows), encoding="utf-8")
    return content


def _check_out(out: Path, *, overwrite: bool) -> None:
    """Refuses a folder whose files could not be written, or are not to be replaced."""

    def is_result(path: Path) -> bool:
        with suppress(OSError, ValueError):
            content = json.loads(path.read_bytes())
            return isinstance(content, dict) and {"rows", "sentences", "kernels"} <= content.keys()
        return False

    def is_plot(path: Path) -> bool:
        with suppress(OSError):
            return b'id="inference-' in path.read_bytes()
        return False

    if not out.is_dir():
        check_writable(out / "inference.json")
        return
    check_output_file(out / "inference.json", overwrite=overwrite, ours=is_result)
    check_output_file(out / "inference.svg", overwrite=overwrite, ours=is_plot)


def _plot(rows: Sequence[Timing]) -> str:
    """Tokens per second over the batch size, and the memory of the weights, of every form; as SVG."""
    figure, (speed, memory) = panels(2)
    for i, row in enumerate(rows):
        sizes = [decoding.batch for decoding in row.decoding]
        speed.plot(sizes, [decoding.tokens_per_second for decoding in row.decoding], label=row.form, **style(i))
        memory.barh(row.form, row.memory_bytes / 2**20, color=COLOURS[i % len(COLOURS)])
    for axis in (speed.set_xscale, speed.set_yscale):
        axis("log", base=2)
    speed.set_xticks([decoding.batch for decoding in rows[0].decoding])
    speed.xaxis.set_major_formatter("{x:g}")
    speed.yaxis.set_major_formatter("{x:g}")
    speed.set_xlabel("texts decoded together")
    speed.set_ylabel("tokens per second")
    memory.set_xlabel("MiB of parameters and buffers")
    memory.invert_yaxis()
    legend(figure, speed)
    return svg(figure, "inference")


class _CSRLinear(nn.Module):
    """x W^T + b with W in compressed sparse rows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            self.register_buffer("weight", linear.weight.detach().to_sparse_csr(), persistent=False)
        self.bias: Any = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        out: Tensor = (weight @ x.reshape(-1, x.shape[-1]).T).T.reshape(*x.shape[:-1], weight.shape[0])
        return out if self.bias is None else out + self.bias


def _with_kernels(
    opened: Callable[[], LoadedModel], given: LoadedModel, place: str
) -> tuple[dict[str, LoadedModel], list[str]]:
    """A copy of the model for every sparse kernel that supports its masks on this device; and sentences on kernels that
    take a part of its matrices, or none."""
    made: dict[str, LoadedModel] = {}
    remarks: list[str] = []

    def add(form: str, make: Callable[[nn.Linear], nn.Module]) -> None:
        loaded = opened()
        matrices = [view for block in decoder_blocks(loaded.model) for view in block.weights]
        replaced = _replace(loaded.model, make)
        if replaced:
            made[form] = loaded
        others = sorted({type(view.module).__name__ for view in matrices if type(view.module) is not nn.Linear})
        if others:
            remarks.append(
                f"{form} take {replaced} of the {len(matrices)} matrices of the blocks: they are for linear layers, "
                f"not for {' or '.join(others)}."
            )

    if given.model.dtype in packed.FLOATS:
        with suppress(UserError):  # where no matrix would become smaller
            loaded = opened()
            made["packed"] = replace(loaded, model=pack_model(loaded.model))
    if given.model.dtype in (torch.float32, torch.float64):
        add("CSR kernels", _CSRLinear)
    halves = given.model.dtype in (torch.float16, torch.bfloat16)
    if place == "cuda" and halves and _fits_two_of_four(given.model):
        add("2:4 kernels", _semi_structured)
    return made, remarks


def _of_dtypes(dtypes: dict[str, torch.dtype]) -> list[str]:
    """A sentence where the models are compared in different dtypes."""
    if len(set(dtypes.values())) < 2:
        return []
    listed = ", ".join(f"{form} in {str(dtype).removeprefix('torch.')}" for form, dtype in dtypes.items())
    return [f"The models are not compared in one data type ({listed}): give --dtype."]


def _semi_structured(linear: nn.Linear) -> nn.Linear:
    weight: Any = torch.sparse.to_sparse_semi_structured(linear.weight.detach())
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _replace(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> int:
    """Replaces the linear layers of the blocks that hold their matrices; returns their number."""
    replaced = 0
    for block in decoder_blocks(model):
        matrices = {view.module for view in block.weights}
        for path, module in list(block.module.named_modules()):
            if type(module) is nn.Linear and module in matrices:
                assign(block.module, path, make(module))
                replaced += 1
    return replaced


def _fits_two_of_four(model: nn.Module) -> bool:
    views = [view for block in decoder_blocks(model) for view in block.weights]
    return all(view.shape[1] % 4 == 0 and _TWO_OF_FOUR.contains(Point(weight=view.read())) for view in views)


def _parameters(loaded: LoadedModel) -> int:
    return sum(x.numel() for x in loaded.model.parameters())


def _memory_bytes(model: nn.Module) -> int:
    """Bytes of all distinct parameters and buffers, a sparse tensor by its parts."""
    seen: dict[int, int] = {}
    for x in (*model.parameters(), *model.buffers()):
        for part in _parts(x):
            seen[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(seen.values())


def _parts(x: Tensor) -> list[Tensor]:
    if x.layout is torch.sparse_csr:
        return [x.values(), x.col_indices(), x.crow_indices()]
    halves = [getattr(x, name, None) for name in ("packed", "meta")]  # semi-structured: kept values, their positions
    return [part for part in halves if isinstance(part, Tensor)] or [x]


def _packed_bytes(model: nn.Module) -> int:
    """Bytes of all distinct parameters, each as 'admm-prune pack' stores it."""
    total = 0
    for x in model.parameters():
        dense = x.numel() * x.element_size()
        stored = int(((x != 0) | x.signbit()).count_nonzero())  # of zeros those below, whose sign is kept
        total += min(dense, stored * x.element_size() + bits.packed_width(x.numel()))
    return total


def _disk_bytes(name: str) -> int | None:
    return weight_bytes(expanded(name)) or None


def _sentences(rows: list[Timing], repeats: int, model: nn.Module, *, cuda: bool) -> list[str]:
    """Sentences on the gains, and on what brings none."""
    first, stored = rows[0], next(row for row in rows if row.form == "as stored")
    said = []
    for row in rows[1:]:
        compared = [
            _compared("prefill", row.prefill),
            *(_compared(f"decoding of {decoding.batch}", decoding.speed) for decoding in row.decoding),
        ]
        said.append(f"{row.form}, beside {first.form}: {'; '.join(compared)}.")
    if repeats == 1 and len(rows) > 1:
        said.append("A single repeat shows no spread, so that a difference in speed may be noise: use more --repeats.")
    if stored.zeros > 0 and stored.parameters == first.parameters:
        said.append(
            f"{100 * stored.zeros:.3g} % of the block weights are zeros that are stored and multiplied like any other "
            "number: as stored, the mask does not make the model smaller."
            + (" admm_prune.load_packed does." if any(row.form == "packed" for row in rows) else "")
        )
        dense = sum(x.nbytes for x in model.parameters())
        if stored.packed_bytes is not None and stored.packed_bytes < dense:
            kind = str(next(model.parameters()).dtype).removeprefix("torch.")
            said.append(
                f"'admm-prune pack' would store its parameters, in {kind}, in {stored.packed_bytes / dense:.2f} of "
                "their bytes."
            )
    if stored.parameters < first.parameters:
        said.append(f"{1 - stored.parameters / first.parameters:.1%} of the parameters were removed.")
    if stored.zeros > 0 and not any(row.form == "2:4 kernels" for row in rows) and _fits_two_of_four(model):
        why = "they take float16 and bfloat16" if cuda else "they need a CUDA device"
        said.append(f"The weights are 2:4; kernels for that were not measured here: {why}.")
    return said


def _compared(what: str, speed: Speed) -> str:
    if not speed.differs:
        return f"{what} shows no difference beyond the spread"
    ratio = speed.speedup
    return f"{what} {ratio:.2f} times as fast" if ratio > 1 else f"{what} takes {1 / ratio:.2f} times as long"
