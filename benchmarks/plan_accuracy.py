"""The estimates of `admm-prune plan` compared with runs: peak resident memory and time, each in a fresh process.

    python -m benchmarks.plan_accuracy OUT --date DATE [--cases embedded,memory,stream,experts,part,whole] [--only M]

Models are random Llamas with the embedded model's tokenizer, or the embedded model; "part" is two blocks of TinyLlama's
shape with its whole vocabulary, "whole" all 22; "experts" is a Mixtral. Text is a megabyte of Python's own library.
Memory is the high-water mark of the whole process (VmHWM), with and without what was resident once its libraries were
loaded; time is wall-clock and CPU time. The plan is made right before the run, so that other work on the machine
affects both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from admm_prune.bench.memory import LlamaShape, write_random_model
from benchmarks.machine import headline, machine
from benchmarks.streaming import write_model

_ROOT = Path(__file__).resolve().parents[1]
_CHARACTERS = 1_000_000
_CONTEXT = 512
_MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A run: a Llama of this width and depth, the embedded model where both are 0."""

    width: int
    depth: int
    method: str
    stream: bool
    target: str = "0.5"
    samples: int = 8
    length: int = 512
    eval_samples: int = 2
    steps: int | None = None
    experts: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """Of the run and of its plan."""
        return {
            "method": self.method,
            "sparsity": float(self.target),
            "samples": self.samples,
            "length": self.length,
            "eval_samples": self.eval_samples,
            "steps": self.steps,
            "stream": self.stream,
        }


_ONE_SHOT = ("wanda", "admm", "sparsegpt", "struprune", "magnitude", "sparsellm")
_TRAINED: dict[str, Any] = {"samples": 64, "length": 128, "steps": 16}
_LARGE = 2048  # from this width on: TinyLlama's shape, embedding and head apart
CASES: dict[str, tuple[Case, ...]] = {
    "embedded": (
        *(Case(0, 0, method, False) for method in _ONE_SHOT),
        *(Case(0, 0, method, False, **_TRAINED) for method in ("elsa", "elsa-l", "elsa-published", "gradual")),
    ),
    "memory": (
        *(Case(640, 5, method, False) for method in _ONE_SHOT),
        *(Case(640, 5, method, False, **_TRAINED) for method in ("elsa", "elsa-l")),
        *(Case(1024, 8, method, False) for method in ("wanda", "sparsegpt")),
    ),
    "stream": (
        *(Case(640, 5, method, True) for method in _ONE_SHOT),
        *(Case(1024, 8, method, True) for method in ("wanda", "struprune", "sparsegpt", "magnitude", "admm")),
    ),
    "experts": tuple(
        Case(512, 3, method, stream, experts=8) for method in ("wanda", "admm") for stream in (False, True)
    ),
    "part": tuple(Case(_LARGE, 2, method, True) for method in ("wanda", "struprune", "sparsegpt", "magnitude")),
    "whole": tuple(Case(_LARGE, 22, method, True) for method in ("wanda", "struprune", "sparsegpt", "magnitude")),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--date", required=True)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--only", default="")
    parser.add_argument("--child", choices=["plan", "run"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--options")
    chosen = parser.parse_args(arguments)
    if chosen.child:
        child = _planned if chosen.child == "plan" else _ran
        print(json.dumps(child(chosen.model, chosen.text, json.loads(chosen.options), chosen.out)))
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / "plan-accuracy.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    cases = [case for name in chosen.cases.split(",") for case in CASES[name]]
    only = set(filter(None, chosen.only.split(",")))
    for case in cases:
        if (only and case.method not in only) or any(row["case"] == asdict(case) for row in rows):
            continue
        rows.append(_compared(case))
        print(_line(rows[-1]), flush=True)
        content = {"date": chosen.date, "machine": machine(), "rows": rows}
        path.write_text(json.dumps(content, indent=2) + "\n")
        (chosen.out / "plan-accuracy.txt").write_text(_table(content))


def _compared(case: Case) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        model = _written(case, place)
        text = place / "text.txt"
        text.write_text(_text())
        results = {child: _process(child, model, text, case, place) for child in ("plan", "run")}
    return {"case": asdict(case), **results}


def _process(child: str, model: Path, text: Path, case: Case, place: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.plan_accuracy", str(place / "out"), "--date", "-", "--child", child]
    command += ["--model", str(model), "--text", str(text), "--options", json.dumps(case.options)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{child} of {case} failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _planned(model: Path, text: Path, options: dict[str, Any], out: Path) -> dict[str, Any]:
    from admm_prune.plan.plan import make_plan

    began = time.perf_counter()
    plan = make_plan(str(model), data=str(text), out=out, **options)
    peak = plan.peak("host")
    return {
        "bytes": peak.bytes,
        "stage": peak.name,
        "parts": dict(peak.parts),
        "seconds": plan.seconds,
        "parameters": plan.parameters,
        "stages": plan.as_json()["stages"],
        "took": round(time.perf_counter() - began, 1),
    }


def _ran(model: Path, text: Path, options: dict[str, Any], out: Path) -> dict[str, Any]:
    import transformers.models.llama.modeling_llama  # noqa: F401  # what a run loads before its first byte of work

    from admm_prune.runs.machine import peak_resident_bytes, resident_bytes, return_freed_memory
    from admm_prune.runs.prune import prune

    return_freed_memory()  # what is resident counts, not what the allocator keeps for later
    before = resident_bytes()
    began, processor = time.perf_counter(), time.process_time()
    prune(str(model), data=str(text), out=out, device="cpu", **options)
    return {
        "seconds": time.perf_counter() - began,
        "processor": time.process_time() - processor,
        "bytes": peak_resident_bytes(),
        "libraries": before,
    }


def _written(case: Case, place: Path) -> Path:
    embedded = Path(str(files("admm_prune") / "assets" / "embedded"))
    if not case.width:
        return embedded
    model = place / "model"
    model.mkdir()
    if case.width >= _LARGE:
        write_model("1.1B", "float32", case.depth, model)
        return model
    config = LlamaShape(case.width, case.depth).config()
    config.max_position_embeddings = _CONTEXT
    if case.experts:
        _write_mixture(config, case.experts, model)
    else:
        write_random_model(config, model)
    for path in embedded.glob("tokenizer*"):
        shutil.copyfile(path, model / path.name)
    return model


def _write_mixture(like: Any, experts: int, folder: Path) -> None:
    """A Mixtral of random weights with a Llama's shape, each expert half as wide as its network, two a token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    shape = {name: value for name, value in like.to_dict().items() if name in MixtralConfig().to_dict()}
    shape |= {"intermediate_size": like.intermediate_size // 2, "num_local_experts": experts}
    arguments = {name: value for name, value in shape.items() if name not in ("model_type", "architectures")}
    MixtralForCausalLM(MixtralConfig(**arguments)).save_pretrained(folder)


def _text() -> str:
    from admm_prune.data.sources import read_corpus

    return "\n".join(_documents(read_corpus("embedded").documents))


def _documents(documents: tuple[str, ...]) -> Iterator[str]:
    left = _CHARACTERS
    for document in documents:
        if left <= 0:
            return
        yield document[:left]
        left -= len(document)


def _line(row: dict[str, Any]) -> str:
    case, plan, run = Case(**row["case"]), row["plan"], row["run"]
    planned, used = (result["bytes"] - run["libraries"] for result in (plan, run))
    return (
        f"{plan['parameters'] / 1e6:>8.1f} {case.method:>15} {'disk' if case.stream else 'memory':>8}"
        f"{plan['bytes'] / _MIB:>9.0f}{run['bytes'] / _MIB:>9.0f}{plan['bytes'] / run['bytes']:>7.2f}"
        f"{planned / _MIB:>9.0f}{used / _MIB:>9.0f}{planned / used:>7.2f}"
        f"{plan['seconds']:>9.1f}{run['seconds']:>9.1f}{plan['seconds'] / run['seconds']:>7.2f}{run['processor']:>9.1f}"
    )


def _table(content: dict[str, Any]) -> str:
    head = (
        f"{'M params':>8} {'method':>15} {'from':>8}"
        f"{'plan':>9}{'peak':>9}{'ratio':>7}{'plan-l':>9}{'peak-l':>9}{'ratio':>7}"
        f"{'plan s':>9}{'clock s':>9}{'ratio':>7}{'cpu s':>9}"
    )
    lines = [
        headline(content["machine"]),
        "python -m benchmarks.plan_accuracy OUT --date DATE",
        "Peak resident memory in MiB of the whole process, and (-l) without interpreter and libraries; seconds;",
        "",
        head,
        *map(_line, content["rows"]),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
