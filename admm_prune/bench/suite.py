"""`admm-prune bench gpu`: all sections in order of importance, within one time budget, and its table."""

from __future__ import annotations

import json
import operator
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from admm_prune.bench import batches, blocks, layers, scaling, selecting, training
from admm_prune.bench.baselines import Ceilings, measured
from admm_prune.bench.rows import Measurement, Runner, free_memory, measured_row
from admm_prune.errors import UserError
from admm_prune.methods.target import Target
from admm_prune.ops import backend
from admm_prune.runs.journal.folder import MANIFEST, check_output, finite, output_folder, write_json

_HIDDEN = {"kernels", "status", "sparsity"}
SECTIONS = ("layers", "selection", "training", "models", "batches")
_PACKAGES = ("torch", "triton", "transformers", "numpy", "scipy", "safetensors")
Tell = Callable[[int, int, str], None]


def rendered(content: dict[str, Any], rows: Sequence[Measurement], ceilings: Ceilings) -> str:
    """Header, ceilings, a block for each section, the targets, and the model of time and memory."""
    about = content["environment"]
    lines = [
        f"{content['date']}, {about['device']}, torch {about['versions'].get('torch')}, kernels: {about['kernels']}",
        content["command"],
        *([content["gap"]] if content["gap"] else []),
        "",
        "ceilings measured in this run: "
        + ", ".join(f"{name} {rate / 1e12:.2f} TFLOP/s" for name, rate in ceilings.operations.items())
        + f", read {ceilings.read / 1e9:.0f} GB/s, copy {ceilings.copied / 1e9:.0f} GB/s",
        "floor: the larger of operations and bytes at these ceilings, which overlap; reached: floor / time;",
        "* marks baselines, written for this benchmark or part of torch.",
    ]
    for section in dict.fromkeys(row.section for row in rows):
        section_rows = [row for row in rows if row.section == section]
        wide = max(len(row.name) for row in section_rows) + 4
        case = max(len(row.case) for row in section_rows) + 2
        lines += [
            "",
            f"{section}",
            f"{'':{wide}}{'':{case}}{'ms':>11}{'floor':>10}{'reached':>9}{'GB':>8}{'error':>11}",
        ]
        lines += [_line(row, wide, case) for row in section_rows]
    heading = "targets" + (", which do not apply to tiny shapes" if content["gap"] else "")
    lines += ["", heading, *(_claim_line(claim) for claim in content["claims"])]
    return "\n".join([*lines, *_model_lines(content["model"])]) + "\n"


def _line(row: Measurement, wide: int, case: int) -> str:
    name = f"{row.name}{' *' if row.baseline else ''}"
    start = f"{name:{wide}}{row.case:{case}}"
    if row.status != "measured" or row.seconds is None:
        return f"{start}{row.status}: {row.note}"
    floor = "" if row.floor_seconds is None else f"{1e3 * row.floor_seconds:.3f}"
    reached = "" if row.reached is None else f"{row.reached:.2f}"
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}"
    error = "" if row.error is None else f"{row.error:.4e}"
    more = ", ".join(f"{key} {_figure(value)}" for key, value in row.more.items() if key not in _HIDDEN)
    text = f"{start}{1e3 * row.seconds:>11.3f}{floor:>10}{reached:>9}{peak:>8}{error:>11}  {more}"
    return (text + (f"; {row.note}" if row.note else "")).rstrip(" ;")


def _claim_line(claim: dict[str, Any]) -> str:
    value = claim["value"]
    verdict = "" if claim["met"] is None else " (met)" if claim["met"] else " (NOT met)"
    said = "not measured" if value is None else f"{_figure(value)}{verdict}"
    return f"{claim['what']}: {said}; target: {claim['asked']}"


def _model_lines(model: dict[str, Any]) -> list[str]:
    if not model["layers"] and not model["models"]:
        return []
    lines = ["", "time of a layer = overhead + floor / reached, fitted over the shapes and targets above"]
    lines += [
        f"{name:12} overhead {1e3 * fit['overhead']:.2f} ms, reached {fit['reached']:.2f}, {fit['rows']} rows, "
        f"worst {fit['worst']:.0%} off"
        for name, fit in model["layers"].items()
    ]
    lines += ["", "whole models, local pruning (predicted; largest: the precision that takes most of the floor)"]
    lines += [
        f"{m['method']:12}{m['shape']:6}{m['parameters'] / 1e9:>6.1f} B {m['seconds']:>10.1f} s, floor "
        f"{m['floor_seconds']:.1f} s, bound by {m['bound']} ({m['largest_part']}), beyond the weights "
        f"({m['weights_bytes'] / 1e9:.0f} GB, or one block of them) {m['working_bytes'] / 1e9:.1f} GB; "
        f"time from {m['from']}, memory {'counted' if m['working_from'] == 'counted' else 'from blocks'}"
        for m in model["models"]
    ]
    grown = model["structured_peak"]
    if grown is not None:
        lines += [
            "",
            f"struprune's peak beyond the model grows as parameters^{grown['exponent']:.2f}, {grown['rows']} rows",
        ]
    return lines


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Size:
    """The sizes of all cases."""

    shapes: tuple[tuple[int, int], ...]
    targets: tuple[Target, ...]
    scores: int
    trained: tuple[str, ...]
    large: str
    local: str
    samples: int
    length: int
    structured: tuple[int, ...]
    batches: tuple[tuple[int, int, int], ...]
    dtype: torch.dtype
    ceiling_width: int
    ceiling_entries: int


FULL = Size(
    shapes=((4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192)),
    targets=layers.TARGETS,
    scores=6_500_000_000,
    trained=("1B", "7B"),
    large="27B",
    local="7B",
    samples=128,
    length=2048,
    structured=(640, 1024, 1536, 2304),
    batches=((1024, 2048, 16), (768, 768, 32), (256, 256, 64)),
    dtype=torch.bfloat16,
    ceiling_width=8192,
    ceiling_entries=1 << 29,
)
SMALL = Size(
    shapes=((48, 64), (64, 32)),
    targets=(Target(0.7), Target(pattern=(2, 4))),
    scores=200_000,
    trained=("small",),
    large="small",
    local="small",
    samples=4,
    length=32,
    structured=(128, 192),
    batches=((16, 32, 4),),
    dtype=torch.float32,
    ceiling_width=128,
    ceiling_entries=1 << 18,
)


def bench_gpu(
    out: Path,
    *,
    device: str,
    small: bool = False,
    budget: float = 450.0,
    sections: Sequence[str] = SECTIONS,
    overwrite: bool = False,
    progress: Tell = lambda *_: None,
) -> dict[str, Any]:
    """Runs the sections, and writes the rows as JSON and as a table to the folder `out`.

    Until then each row is a line of `out`.rows.jsonl beside it, which a run that is stopped leaves behind, and which
    only `overwrite` replaces.

    Args:
        device: "cuda", or "cpu" to try everything without a GPU.
        small: tiny shapes.
        budget: seconds for everything; rows for which no time is left are marked.
        overwrite: replace an earlier result in `out`, which is refused otherwise.

    Returns:
        The content of the JSON file.

    Raises:
        UserError: `out` cannot be used; no such section; full size on a CPU.
    """
    check_output(out, overwrite=overwrite)
    so_far = out.with_name(f"{out.name}.rows.jsonl")
    if so_far.exists() and not overwrite:
        raise UserError(f"{so_far} has the rows of a run that was stopped: replace it with --overwrite, or move it")
    unknown = [name for name in sections if name not in SECTIONS]
    if unknown:
        raise UserError(f"no section '{unknown[0]}': choose from {', '.join(SECTIONS)}")
    if device != "cuda" and not small:
        raise UserError("the full shapes need a GPU: add --small to try everything at tiny shapes on the CPU")
    size, where = (SMALL if small else FULL), torch.device(device)
    about = environment(where)
    began = time.perf_counter()
    progress(0, 0, "measuring the ceilings of the device")
    ceilings = measured(where, width=size.ceiling_width, entries=size.ceiling_entries)
    heard: list[Measurement] = []
    so_far.unlink(missing_ok=True)

    def tell(row: Measurement) -> None:
        heard.append(row)
        with so_far.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite({**asdict(row), "reached": row.reached})) + "\n")
        progress(len(heard), 0, f"{row.section}: {row.name}, {row.case}: {row.status}")

    runner = Runner(where, ceilings, budget - (time.perf_counter() - began), tell)
    for name in sections:
        runner.run(_cases(name, size, where))
    predicted = [training.SHAPES[name] for name in (("small",) if small else ("7B", "13B", "27B", "70B"))]
    content = {
        "command": _command(device, small, budget, sections),
        "date": time.strftime("%Y-%m-%d"),
        "environment": about,
        "gap": _gap(device, small),
        "ceilings": asdict(ceilings),
        "seconds": time.perf_counter() - began,
        "rows": [{**asdict(row), "reached": row.reached} for row in runner.rows],
        "claims": claims(runner.rows, applicable=not _gap(device, small)),
        "model": scaling.model_of(
            runner.rows,
            predicted,
            ceilings,
            tokens=size.samples * size.length,
            methods=("sparsegpt", "admm-fast", "admm"),
        ),
    }
    with output_folder(out, overwrite=overwrite) as folder:
        write_json(folder / MANIFEST, finite(content))
        (folder / "gpu.txt").write_text(rendered(content, runner.rows, ceilings), encoding="utf-8")
    so_far.unlink(missing_ok=True)
    return content


def _cases(section: str, size: Size, device: torch.device) -> Any:
    if section == "layers":
        return layers.cases(list(size.shapes), device, targets=size.targets, baseline_rows=True)
    if section == "selection":
        return selecting.cases(size.scores, device)
    if section == "training":
        return _training(size, device)
    if section == "batches":
        return batches.cases(size.batches, device)
    return chain(
        blocks.local_cases(
            training.SHAPES[size.local],
            device,
            samples=size.samples,
            length=size.length,
            methods=("admm", "sparsegpt"),
            dtype=size.dtype,
        ),
        blocks.structured_cases(
            blocks.growing(size.structured), device, samples=min(8, size.samples), length=min(256, size.length)
        ),
    )


def _training(size: Size, device: torch.device) -> Any:
    """As many blocks of each shape as the largest configuration leaves memory for."""
    try:
        free = free_memory(device)
    except RuntimeError:  # of a device that has become unusable: the rows say so
        free = 0.0
    shapes = []
    for name in size.trained:
        shape = training.SHAPES[name]
        most = max(how.held for how in training.CONFIGURATIONS) + 1.0
        fit = shape.blocks if free is None else int(0.85 * free / (most * shape.block))
        shapes.append((shape, max(1, min(shape.blocks, fit))))
    large = training.SHAPES[size.large]
    fit = large.blocks if free is None else int((0.9 * free - 16.0 * large.block) / (4.4 * large.block))
    yield from training.cases(shapes, device)
    yield training.large_case(large, max(1, min(large.blocks, fit)), device)


def claims(rows: Sequence[Measurement], *, applicable: bool = True) -> list[dict[str, Any]]:
    """The targets of the benchmark, with the measured values; None where a row is missing.

    Args:
        applicable: whether the shapes are large enough to assess the targets.
    """
    results: list[dict[str, Any]] = []

    def claim(what: str, target: str, value: float | None, met: Callable[[float], bool]) -> None:
        verdict = None if value is None or not applicable else met(value)
        results.append({"what": what, "asked": target, "value": value, "met": verdict})

    first = next((row.case for row in rows if row.section == "layers"), "")
    shape = first.partition(" ")[0]
    cases = list(
        dict.fromkeys(row.case for row in rows if row.section == "layers" and row.case.startswith(f"{shape} "))
    )
    for case in cases:
        ours, alps = measured_row(rows, "admm", case), measured_row(rows, "ALPS, straightforward float64", case)
        narrow = measured_row(rows, "ALPS, straightforward float32", case)
        claim(f"admm over float32 ALPS, {case}", "at least 4 x faster", _ratio(narrow, ours), lambda x: x >= 4)
        if shape == "4096x4096":
            spent = None if ours is None or ours.seconds is None else 1e3 * ours.seconds
            claim(f"milliseconds of admm, {case}", "at most 75", spent, lambda x: x <= 75)
        errors = None if not (ours and alps and ours.error and alps.error) else ours.error / alps.error
        claim(f"its error over that of ALPS, {case}", "at most 1.003", errors, lambda x: x <= 1.003)
        gpt, plain = measured_row(rows, "sparsegpt", case), measured_row(rows, "SparseGPT, straightforward", case)
        claim(
            f"sparsegpt over the straightforward one, {case}",
            "at least 2 x faster",
            _ratio(plain, gpt),
            lambda x: x >= 2,
        )
    selections = [row for row in rows if row.section == "selection"]  # of all scores first, then of fewer
    for name, most in (("threshold", 2), ("mask", 3)):
        chosen = measured_row(selections, name, selections[0].case if selections else None)
        reads = chosen.more.get("reads of memory") if chosen is not None else None
        claim(f"the {name} of all scores, in reads of memory", f"at most {most}", reads, partial(operator.ge, most))
    for case in dict.fromkeys(row.case for row in rows if row.name.startswith("torch.optim.Adam(fused")):
        adam, clipped = (measured_row(rows, name, case) for name in (training.ADAM, training.CLIPPED))
        sparse = measured_row(rows, "SparseAdam, float32, bfloat16 anchor", case)
        claim(
            f"SparseAdam's step over fused Adam's with clip_grad_norm_, {case}",
            "at most 1.0",
            _ratio(sparse, clipped),
            lambda x: x <= 1.0,
        )
        steps = [row for row in rows if row.section == training.SECTION and row.case == case]
        for row in (r for r in steps if training.EIGHT_BIT in r.name):
            claim(f"floor of {row.name} over its time, {case}", "at least 0.6", row.reached, lambda x: x >= 0.6)
        states = [None if row is None else row.more.get("state bytes per weight") for row in (sparse, adam)]
        beyond = None if states[0] is None or states[1] is None else states[0] - states[1]
        claim(f"state bytes per weight beyond Adam, {case}", "at most 2.2", beyond, lambda x: x <= 2.2)
    for case in dict.fromkeys(row.case for row in rows if row.name.startswith("training step")):
        whole = [
            measured_row(rows, f"training step, {name}", case)
            for name in ("SparseAdam", "torch.optim.Adam(fused=True)")
        ]
        claim(f"a whole training step over Adam's, {case}", "at most 1.05", _ratio(*whole), lambda x: x <= 1.05)
    elsa = measured_row(rows, "ELSA-L, step while gradients come")
    bytes_needed = None if elsa is None else elsa.more.get("GB for all blocks")
    claim(
        "GB that an ELSA-L step takes at the 27 B shape, blocks only", "at most 141", bytes_needed, lambda x: x <= 141
    )
    for case in dict.fromkeys(row.case for row in rows if row.section == batches.SECTION):
        one, many, played = (
            measured_row(rows, name, case)
            for name in ("admm, one after the other", "admm, one batch", "admm, one batch, graphs")
        )
        claim(f"one batch over one after the other, {case}", "faster", _ratio(one, many), lambda x: x > 1)
        claim(f"its steps replayed, {case}", "at least as fast", _ratio(many, played), lambda x: x >= 0.97)
    local = next((r for r in rows if r.name.startswith("admm 70 %") and r.seconds), None)
    whole_model = None if local is None else local.more["seconds for all blocks"]
    claim("seconds for all blocks of the 7 B shape, locally pruned", "below 600", whole_model, lambda x: x < 600)
    return results


def _ratio(over: Measurement | None, under: Measurement | None) -> float | None:
    if over is None or under is None or not over.seconds or not under.seconds:
        return None
    return over.seconds / under.seconds


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and the device; packages that are not installed are left out."""
    versions = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    cuda = device.type == "cuda"
    return {
        "versions": versions,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} thread(s)",
        "memory_bytes": torch.cuda.mem_get_info(device)[1] if cuda else None,
        "kernels": backend.described(device),
    }


def _gap(device: str, small: bool) -> str:
    if device == "cuda" and not small:
        return ""
    return "A trial run with tiny shapes: it shows that every part runs, and nothing about the speed of a GPU."


def _command(device: str, small: bool, budget: float, sections: Sequence[str]) -> str:
    parts = ["admm-prune bench gpu", f"--device {device}"]
    parts += ["--small"] if small else []
    parts += [f"--budget {budget:g}", f"--sections {','.join(sections)}"]
    return " ".join(parts)
